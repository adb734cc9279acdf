"""The last block for labels only: losses and gradients of the padded batch, what is computed, what is refused."""

import logging

import pytest
import torch
from helpers import PadCollator, arguments, tiny_gpt2, tiny_lora, token_data
from peft import LoraConfig
from readers import FAMILIES, GENTLE, adapted, make_base, rows
from torch import nn
from transformers import BertConfig, BertForMaskedLM, Trainer

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.accelerators import FastLora, LastBlock, fast_lora, flatten, last_block, share, unpad
from darel_hf.accelerators.last_block import Shortened


def blocks(model):
    return last_block._blocks(model)


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    largest = max(gradient.norm() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


LENGTHS = {
    "several": [(5, 3), (2, 9), (7, 4), (12, 1)],
    "one": [(6, 4)],
    "no-prompt": [(0, 5), (0, 7)],
    "one-label": [(9, 1)],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", ["all-weights", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_padded_batch(family, kind, lengths):
    model = (adapted(family) if kind == "lora" else make_base(family)).train()
    batch = rows(LENGTHS[lengths])
    wanted = gradients(model, batch)
    base = model.get_base_model() if kind == "lora" else model
    base.set_attn_implementation(unpad.ATTENTION)
    for row in (flatten(batch, True), share(batch, True)):
        shortened, widths = Shortened(blocks(model)[-1]), []
        mlp = blocks(model)[-1].mlp
        hook = mlp.register_forward_hook(lambda module, args, output, seen=widths: seen.append(output.shape[1]))
        shortened.wanted, shortened.positions = row["logits_to_keep"].unique(), row["input_ids"].shape[1]
        assert_same(gradients(model, row), wanted)
        assert widths == [len(shortened.wanted)]
        shortened.close()
        hook.remove()
        assert_same(gradients(model, row), wanted)
        assert not len(unpad.INSTEAD)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in blocks(model)[-1].modules())


def test_other_batches_pass_it_whole():
    model, batch = make_base("llama"), rows(LENGTHS["several"])
    wanted = gradients(model, batch)
    row = flatten(batch, True)
    model.set_attn_implementation(unpad.ATTENTION)
    shortened = Shortened(blocks(model)[-1])
    shortened.wanted, shortened.positions = row["logits_to_keep"], row["input_ids"].shape[1]
    assert_same(gradients(model, batch), wanted)  # padded, as in evaluation
    ids = torch.randint(3, 60, (1, shortened.positions))  # as long as the row, and none
    torch.testing.assert_close(model(ids).logits, make_base("llama")(ids).logits)
    shortened.close()


def test_after_an_error_it_goes_on():
    model, row = make_base("gpt2"), flatten(rows(LENGTHS["several"]), True)
    model.set_attn_implementation(unpad.ATTENTION)
    wanted = gradients(model, row)
    shortened = Shortened(blocks(model)[-1])
    shortened.wanted, shortened.positions = row["logits_to_keep"], row["input_ids"].shape[1]

    def fail(*called):
        raise MemoryError

    hook = blocks(model)[-1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(**row)
    hook.remove()
    assert_same(gradients(model, row), wanted)
    shortened.close()


def trained(cls, folder, model, darel=None, resume=None, **more):
    trainer = cls(
        model=model,
        args=arguments(folder, **{**GENTLE, **more}),
        train_dataset=token_data(24),
        data_collator=PadCollator(),
        **({} if darel is None else {"darel": DarelConfig(**darel)}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def always(monkeypatch):
    """So small a model has nothing to gain."""
    monkeypatch.setattr(fast_lora, "SMALL", 0)
    monkeypatch.setattr(FastLora, "most", float("inf"))
    monkeypatch.setattr(LastBlock, "most", float("inf"))
    monkeypatch.setattr(last_block, "LARGEST_SHARE", 1.0)


@pytest.mark.parametrize(
    ("beside", "more"),
    [
        ({"unpad": True}, {}),
        ({"share_prompts": 1}, {"gradient_accumulation_steps": 2}),
        ({"unpad": True, "fast_lora": True}, {}),
        ({"unpad": True, "online_keep": 0.5}, {}),
    ],
    ids=["unpad", "share", "fast", "online"],
)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_trains_as_without_it(family, beside, more, tmp_path, always):
    slow = (DarelTrainer, {"online_keep": 0.5}) if "online_keep" in beside else (Trainer, None)

    def start():
        return adapted(family, LoraConfig)

    _, wanted = trained(slow[0], tmp_path / "slow", start(), slow[1], **more)
    trainer, found = trained(DarelTrainer, tmp_path, start(), {**beside, "last_block": True}, **more)
    assert "last_block" in trainer.report.plan.costs.factors
    before = dict(start().named_parameters())
    gone = sum((wanted[n] - before[n]).norm() ** 2 for n in wanted) ** 0.5
    assert sum((found[n] - wanted[n]).norm() ** 2 for n in wanted) ** 0.5 < 1e-4 * gone
    assert not len(unpad.INSTEAD)


def test_resume_is_bit_exact(tmp_path, always):
    more = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    darel = {"unpad": True, "last_block": True}
    _, whole = trained(DarelTrainer, tmp_path, tiny_lora(dropout=0.1), darel, **more)
    resume = str(tmp_path / "checkpoint-5")
    _, again = trained(DarelTrainer, tmp_path, tiny_lora(dropout=0.1), darel, resume=resume, **more)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_it_cannot_be_had_for(tmp_path, caplog):
    def reason(darel, model=tiny_lora, rows=True, **more):
        trainer = DarelTrainer(
            model=model(),
            args=arguments(tmp_path, **more),
            train_dataset=token_data(8),
            data_collator=PadCollator(),
            darel=DarelConfig(last_block=True, **darel),
        )
        few = PadCollator()([token_data(4)[i] for i in range(4)])
        block = LastBlock(trainer)
        return block.unfit() or block.why_not((lambda: few) if rows else None)

    unpadded = {"unpad": True}
    assert "set unpad=True or share_prompts=1 beside it" in reason({})
    assert "a stream" in reason(unpadded, rows=False)
    assert "with checkpointing the block is called again" in reason(unpadded, gradient_checkpointing=True)
    assert "all positions have to pass the head" in reason(unpadded, label_smoothing_factor=0.1)
    assert "is compiled" in reason(unpadded, torch_compile=True, torch_compile_backend="eager")
    assert reason(unpadded) is None
    bert = BertForMaskedLM(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    assert "no causal language model" in reason(unpadded, model=lambda: bert)
    with pytest.raises(ValueError, match="prompt_cache='ram': what it computes has labels nearly everywhere"):
        DarelConfig(last_block=True, prompt_cache="ram")
    with caplog.at_level(logging.WARNING):
        trained(DarelTrainer, tmp_path / "alone", tiny_lora(), {"last_block": True}, num_train_epochs=1)
    assert "last_block=True: padded rows pass it whole" in caplog.text and "going on with False" in caplog.text


@pytest.mark.parametrize("what", ["another-block-is-last", "mixes-positions"])
def test_what_would_change_is_refused(what, tmp_path, monkeypatch):
    model = tiny_gpt2()
    if what == "another-block-is-last":
        monkeypatch.setattr(last_block, "_blocks", lambda model, found=last_block._blocks: found(model)[:1])
    else:

        class Mixed(nn.Module):
            def forward(self, hidden):
                return hidden.cumsum(1)

        model.transformer.h[-1].mlp = Mixed()
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=token_data(8),
        data_collator=PadCollator(),
        darel=DarelConfig(last_block=True, unpad=True),
    )
    few = PadCollator()([token_data(4)[i] for i in range(4)])
    said = LastBlock(trainer).why_not(lambda: few)
    assert said is not None and ("would change" in said or "cannot be trained without padding" in said)
    assert not len(unpad.INSTEAD)
