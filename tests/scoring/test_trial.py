"""Trials can fail: they see what outputs alone hide, and leave the model bit for bit as it was."""

import logging

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.scoring import BatchScorer, Trial, counts_items, moved, skip_identity_adapters, untouched
from darel_hf.selection import Samples

COLUMNS = ("input_ids", "attention_mask", "labels")


def trainer_for(folder, model, data=None, cls=DarelTrainer, collator=None, more=None, **darel):
    return cls(
        model=model,
        args=arguments(folder, num_train_epochs=1, **(more or {})),
        train_dataset=token_data(24) if data is None else data,
        data_collator=collator or PadCollator(),
        darel=DarelConfig(**darel),
    )


def batch(n=4):
    return PadCollator()([{key: row[key] for key in COLUMNS} for row in token_data(n)])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lora])
def test_what_is_moved_is_put_back_bit_for_bit(make):
    model = make()
    before = weights(model)
    with moved(model):
        different = [name for name, value in weights(model).items() if not torch.equal(value, before[name])]
    assert_same_weights(before, weights(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if make is tiny_lora:
        assert {name.replace(".default", "") for name in different} == {n.replace(".default", "") for n in trained}
    else:  # the biases, which are zero
        assert different and all("bias" in name or "ln" in name for name in different)


def test_a_gradient_that_differs_while_outputs_do_not(tmp_path):
    """At its start an adapter changes no output: half of its gradient is zero, and a wrong one looks right."""
    model = tiny_lora()
    trainer, inputs = trainer_for(tmp_path, model, track=True), batch()
    trial = Trial(trainer, lambda: model(**inputs).loss)
    assert trial.difference(lambda: model(**inputs).loss) is None

    def half() -> torch.Tensor:
        with torch.no_grad():
            whole = model(**inputs).loss
        loss = model(**{key: value[:2] for key, value in inputs.items()}).loss
        return loss - loss.detach() + whole

    assert "the gradient of" in trial.difference(half) and "lora_" in trial.difference(half)
    assert "its loss would change by 0.0005" in trial.difference(lambda: model(**inputs).loss * 1.0005)
    assert all(p.grad is None for p in model.parameters())


def test_heads_that_ignore_the_count():
    assert counts_items(lambda n: torch.tensor(12.0) / n, 4)
    assert not counts_items(lambda n: torch.tensor(12.0), 4)


def test_alora_is_not_trained_without_padding(tmp_path):
    """It looks for its invocation tokens once a row, and a batch without padding is one row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8])
    rows = [[i + 20, *range(30, 34), 7, 8, *range(40 + i, 45 + i)] for i in range(8)]
    data = [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in rows]
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with pytest.raises(ValueError, match=r"unpad=True: LlamaForCausalLM cannot be .* would change by"):
        trainer_for(tmp_path, model, data, unpad=True).train()


def test_rows_without_labels_are_named(tmp_path):
    data = [{"input_ids": [i + 3, 5, 6], "attention_mask": [1] * 3, "labels": [-100] * 3} for i in range(8)]
    with pytest.raises(ValueError, match="have no label left"):
        trainer_for(tmp_path, tiny_gpt2(), data, unpad=True).train()


class Weighing(DarelTrainer):
    """A loss of the user's that weighs samples by a column."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("sample_weight")
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        nll = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        loss = (weight * nll.sum(1) / labels[:, 1:].ne(-100).sum(1).clamp(min=1)).mean()
        return (loss, outputs) if return_outputs else loss


class WithWeights(PadCollator):
    def __call__(self, features):
        return {**super().__call__(features), "sample_weight": torch.tensor([f["sample_weight"] for f in features])}


def test_a_column_that_only_the_users_loss_knows(tmp_path, caplog):
    """Scoring hands the model what the trainer's own step hands it; that it ranks by another loss is said once."""
    data = token_data(24).add_column("sample_weight", np.linspace(1, 9, 24).tolist())
    trainer = trainer_for(
        tmp_path, tiny_gpt2(), data, Weighing, WithWeights(), {"remove_unused_columns": False},
        offline_keep=0.75, offline_rule="middle", online_keep=0.5, online_rule="hardest",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.report.kept.sum() == 18
    assert caplog.text.count("samples are ranked by cross-entropy") == 1


def test_labels_read_in_no_way_are_refused():
    class Huber(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            return {"loss": torch.nn.functional.smooth_l1_loss(logits, labels), "logits": logits}

    inputs = {"x": torch.randn(4, 4), "labels": 3 * torch.randn(4, 3)}
    with pytest.raises(ValueError, match=r"read in no way that gives the loss that trains.*per_sample_loss"):
        BatchScorer(Huber())(inputs)
    assert BatchScorer(Huber(), per_sample_loss=lambda o, i: (o["logits"] - i["labels"]).abs().mean(1))(inputs)


def test_several_targets_are_squared_errors():
    class Outputs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = torch.nn.Linear(1, 1)

        def forward(self, logits, labels=None):
            return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}

    logits = torch.tensor([[0.0, 0, 0], [2, 2, 2]])
    found = BatchScorer(Outputs())({"logits": logits, "labels": torch.tensor([[0.0, 0, 0], [5, 5, 5]])})
    assert found.losses.tolist() == [0.0, 9.0]


def test_a_teacher_that_the_forward_pass_updates_is_restored():
    class Momentum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                self.teacher.weight.mul_(0.9)
            return self.layer(x)

    model = Momentum()
    before = weights(model)
    with untouched(model):
        model(torch.ones(1, 2))
    assert_same_weights(before, weights(model))


def test_adapters_of_single_tokens_are_never_skipped():
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": [61, 62]})
    model = get_peft_model(tiny_gpt2(), config)
    with skip_identity_adapters(BatchScorer(model), batch()) as off:
        assert not off


def test_adapters_behind_tokens_are_never_skipped():
    """Activated LoRA that was trained does nothing in rows without its tokens, of which a probe may be made."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], alora_invocation_tokens=[70, 71])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    with skip_identity_adapters(BatchScorer(model), batch()) as off:  # tokens below 64 only
        assert not off


@pytest.mark.parametrize("rule", ["hardest", "easiest", "middle", "infobatch", "stratified", "percentile", "random"])
def test_what_cannot_teach_is_dropped_first(rule):
    from darel_hf import RULES

    lengths = np.where(np.arange(200) % 5 == 0, 0, 7)  # 40 of 200 have no label
    losses = np.where(lengths == 0, 0.0, np.linspace(1, 2, 200))
    samples = Samples(np.arange(200), losses, lengths)
    draw = np.random.default_rng(0)
    positions, _ = RULES[rule](samples, 0.5, draw)
    assert len(positions) == 100 and (lengths[positions] > 0).all()
    positions, _ = RULES[rule](samples, 0.9, draw)
    assert len(positions) == 180 and (lengths[positions] == 0).sum() == 20


def test_samples_without_labels_are_counted_in_the_report(tmp_path):
    data = token_data(40).to_list()
    for row in data[::5]:
        row["labels"] = [-100] * len(row["labels"])
    data = datasets.Dataset.from_list(data)
    trainer = trainer_for(tmp_path, tiny_gpt2(), data, offline_keep=0.5, offline_rule="middle")
    trainer.train()
    report = trainer.report
    assert report.to_dict()["without_labels"] == 8 and not report.kept[::5].any()
    assert "8 have no label" in str(report)
    assert {s["why"] for s in report.dropped() if s["sample_id"] % 5 == 0} == {"no label: nothing to learn from it"}


def test_trying_weights_draws_no_random_numbers(tmp_path):
    """Dropout is on: what is tried before the first weighted step must not move what training draws."""
    ends = []
    for tried in (True, False):
        trainer = trainer_for(
            tmp_path / str(tried), tiny_lora(dropout=0.2), online_keep=2 / 3, online_rule="infobatch"
        )
        if not tried:
            start = trainer.get_train_dataloader

            def begin(start=start, trainer=trainer):
                loader = start()
                trainer._run.online._counts = True
                return loader

            trainer.get_train_dataloader = begin
        trainer.train()
        ends.append(weights(trainer.model))
    assert_same_weights(*ends)
