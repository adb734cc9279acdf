"""Frozen weights in bfloat16: the steps of `bf16=True` bit for bit, a base that comes back, what is refused."""

import logging

import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from readers import GENTLE, adapted, distance, trained
from torch import nn
from transformers import Trainer, TrainerCallback

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import FastLora, LastBlock, fast_lora, prompt_store

BF16 = {"base_precision": "bf16"}


def trainer_for(folder, model=None, darel=BF16, eval_dataset=None, **settings):
    return DarelTrainer(
        model=tiny_lora() if model is None else model,
        args=arguments(folder, **{**GENTLE, **settings}),
        train_dataset=token_data(24),
        data_collator=PadCollator(),
        eval_dataset=eval_dataset,
        darel=DarelConfig(**darel),
    )


class Look(TrainerCallback):
    """What a model is like in the middle of training."""

    def __init__(self, look, step=3):
        self.look, self.step, self.seen = look, step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.seen = self.look(model)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_steps_are_those_of_bf16(tmp_path, family):
    """Trainer's own autocast rounds the same weights in every step; here that is done once, with or without it."""
    short = {"num_train_epochs": 1}
    half = trained(Trainer, tmp_path / "half", adapted(family), bf16=True, **short)
    full = trained(Trainer, tmp_path / "full", adapted(family), **short)
    ours = trained(DarelTrainer, tmp_path / "ours", adapted(family), BF16, **short)
    both = trained(DarelTrainer, tmp_path / "both", adapted(family), BF16, bf16=True, **short)
    assert_same_weights(ours, half)
    assert_same_weights(both, half)
    start = {name: p.detach() for name, p in adapted(family).named_parameters() if p.requires_grad}
    assert 1e-3 < distance(ours, full, start) < 0.2


def test_what_is_in_bfloat16_meanwhile(tmp_path):
    """Frozen matrices of linear layers, also the head's, and nothing else; the embedding keeps what they share."""
    trainer = trainer_for(tmp_path)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in trainer.model.named_parameters()}
    frozen = weights(trainer.model.get_base_model())
    look = Look(
        lambda model: (
            {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)},
            {name: value.dtype for name, value in model.state_dict().items()},
        )
    )
    trainer.add_callback(look)
    trainer.train()
    dtypes, saved = look.seen
    rounded = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert rounded == {
        name
        for name in dtypes
        if name.endswith("weight") and ("c_attn.base" in name or "c_proj" in name or "c_fc" in name or "head" in name)
    }
    assert len(rounded) == 2 * 4 + 1 and dtypes["base_model.model.transformer.wte.weight"] == torch.float32
    assert set(saved.values()) == {torch.float32}
    for name, parameter in trainer.model.named_parameters():
        pointer, value = before[name]
        assert parameter.data_ptr() == pointer and parameter.dtype == torch.float32
        assert parameter.requires_grad != torch.equal(parameter, value), name
    assert_same_weights(weights(trainer.model.get_base_model().transformer.wte), {"weight": frozen["lm_head.weight"]})
    assert trainer.model.get_base_model().lm_head.weight is trainer.model.get_base_model().transformer.wte.weight
    assert trainer.computing is None and not any(m._forward_pre_hooks for m in trainer.model.modules())


def test_the_base_comes_back_after_an_error(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = trainer_for(tmp_path)
    before = weights(trainer.model.get_base_model())
    trainer.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_weights(
        {name: value for name, value in weights(trainer.model.get_base_model()).items() if "lora_" not in name},
        {name: value for name, value in before.items() if "lora_" not in name},
    )
    assert trainer.computing is None and not any(m._forward_pre_hooks for m in trainer.model.modules())


class Meanwhile(TrainerCallback):
    """Do something to a frozen weight in the middle of training."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                self.do(model.get_base_model().transformer.h[0].attn.c_attn.base_layer.weight)


def test_frozen_weights_that_somebody_trains_or_changes(tmp_path, caplog):
    """It would be lost when training ends: the first is an error, the second is said aloud."""
    trainer = trainer_for(tmp_path)
    trainer.add_callback(Meanwhile(lambda weight: weight.requires_grad_(True)))
    with pytest.raises(
        ValueError, match=r"base_precision='bf16': .*c_attn\.base_layer\.weight is trained from now on"
    ):
        trainer.train()
    assert "were changed" not in caplog.text
    trainer = trainer_for(tmp_path)
    trainer.add_callback(Meanwhile(lambda weight: weight.data.mul_(1.5)))
    trainer.train()
    said = "base_precision='bf16': 1 frozen weights (base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"
    assert said in caplog.text


def test_the_base_comes_back_where_memory_ends_halfway(tmp_path, monkeypatch):
    trainer, made = trainer_for(tmp_path), []
    before = {name: (p, p.detach().clone()) for name, p in trainer.model.named_parameters()}

    def short(layer, hook):
        made.append(layer)
        if len(made) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return register(layer, hook)

    register = nn.Module.register_state_dict_post_hook
    monkeypatch.setattr(nn.Module, "register_state_dict_post_hook", short)
    with pytest.raises(ValueError, match="trying it out takes more memory than there is"):
        trainer.train()
    for name, found in trainer.model.named_parameters():
        assert found is before[name][0] and torch.equal(found, before[name][1])


def test_whole_models_are_saved_as_they_were(tmp_path):
    """Without PEFT, with some weights frozen by hand: checkpoints have these in float32, unchanged."""

    def model():
        made = tiny_gpt2()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("h.1" in name)
        return made

    trainer = trainer_for(tmp_path, model(), save_strategy="steps", save_steps=3)
    trainer.train()
    found = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in model().state_dict().items():
        assert torch.equal(found[name], value) == ("h.1" not in name), name


@pytest.mark.slow
@pytest.mark.parametrize("others", [{"unpad": True, "fast_lora": True, "last_block": True}, {"share_prompts": 1}])
def test_with_others(tmp_path, others, monkeypatch):
    monkeypatch.setattr(fast_lora, "SMALL", 0)
    for cls in (FastLora, LastBlock):
        monkeypatch.setattr(cls, "most", float("inf"))
    alone = trained(DarelTrainer, tmp_path / "alone", adapted("llama"), BF16)
    start = {name: p.detach() for name, p in adapted("llama").named_parameters() if p.requires_grad}
    both = trained(DarelTrainer, tmp_path / "both", adapted("llama"), {**BF16, **others})
    assert distance(both, alone, start) < 0.2


def reader():
    return adapted("llama", ReaderLoraConfig)


def test_stored_prompts_follow_the_precision(tmp_path, monkeypatch):
    """What was kept in one precision is not read in another: in one run, which tries out before, and in two."""
    recorded = []
    record = prompt_store.FrozenBase.record
    monkeypatch.setattr(
        prompt_store.FrozenBase, "record", lambda base, some: recorded.append(base.precision) or record(base, some)
    )

    def run(darel):
        recorded.clear()
        darel = {"prompt_cache": "disk", **darel}
        return trained(DarelTrainer, tmp_path, reader(), darel, num_train_epochs=1)

    full = run({})
    assert set(recorded) == {None}
    ours = run(BF16)
    first = recorded.count(torch.bfloat16)
    assert first >= 5  # every prompt that the data have, though they were there in float32
    assert_same_weights(run(BF16), ours)
    assert recorded.count(torch.bfloat16) <= first - 5  # what was there, was read
    start = {name: p.detach() for name, p in reader().named_parameters() if p.requires_grad}
    assert 1e-3 < distance(ours, full, start) < 0.2


def test_what_is_kept_is_what_bf16_would_keep(tmp_path):
    """A reader on stored prompts, rounded once or in every step: the same."""
    darel = {"prompt_cache": "ram"}
    ours, theirs = (
        trained(DarelTrainer, tmp_path, reader(), {**darel, **more}, num_train_epochs=1, bf16=not more)
        for more in (BF16, {})
    )
    assert_same_weights(ours, theirs)


def test_a_run_that_goes_on_ends_the_same(tmp_path):
    darel = {**BF16, "unpad": True}
    whole = trainer_for(tmp_path, darel=darel, save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer_for(tmp_path, darel=darel)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(weights(again.model), weights(whole.model))


def test_scores_before_training_are_as_before(tmp_path):
    """The offline pass is over before weights are rounded; candidates are scored as they are trained on."""
    stages = {"offline_keep": 0.5, "offline_rule": "middle", "online_keep": 0.5, "online_rule": "hardest"}
    found = [trainer_for(tmp_path / str(i), darel={**stages, **darel}) for i, darel in enumerate(({}, BF16))]
    for trainer in found:
        trainer.train()
    plain, ours = (trainer.report.offline_losses for trainer in found)
    assert (plain == ours).all()


def test_evaluation_and_generation_meanwhile(tmp_path):
    trainer = trainer_for(tmp_path, eval_strategy="steps", eval_steps=12, eval_dataset=token_data(8, seed=1))
    ids = torch.tensor([[5, 6, 7]])
    look = Look(lambda model: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0))
    trainer.add_callback(look)
    trainer.train()
    assert look.seen.shape[1] > 3
    last = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    assert last == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-2)


@pytest.mark.slow
def test_one_forward_pass_scores_and_trains(tmp_path, caplog):
    darel = {"online_keep": 0.5, "online_backward": "sliced", "online_rule": "hardest", **BF16}
    trainer = trainer_for(tmp_path, darel=darel, num_train_epochs=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "going on" not in caplog.text and trainer.state.global_step == 3


def test_the_plan_says_what_it_is(tmp_path, capsys):
    trainer = trainer_for(tmp_path, darel={**BF16, "fast": True})
    trainer.train()
    assert "with frozen weights in bfloat16 (approximate): a step takes" in capsys.readouterr().out
    assert next(iter(trainer.report.plan.costs.factors)) == "base_precision"
    plain = trainer_for(tmp_path / "fast", darel={"fast": True})
    plain.train()
    assert "bfloat16" not in capsys.readouterr().out


class Frozen(nn.Module):
    """A model of which only a vector is trained."""

    def __init__(self, dtype):
        super().__init__()
        self.base, self.bias = nn.Linear(3, 3).to(dtype).requires_grad_(False), nn.Parameter(torch.zeros(3))

    def forward(self, input_ids, labels=None, attention_mask=None):
        return {"loss": (self.base(input_ids[:, :3].to(self.base.weight.dtype)).float() + self.bias).square().mean()}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny_gpt2, "nothing is frozen in GPT2LMHeadModel"),
        (lambda: Frozen(torch.bfloat16), "no frozen linear layer is in float32 (they are bfloat16)"),
        (lambda: Frozen(torch.float64), "no frozen linear layer is in float32 (they are float64)"),
    ],
)
def test_where_it_makes_no_sense(tmp_path, make, said):
    with pytest.raises(ValueError) as error:
        trainer_for(tmp_path, make()).train()
    assert str(error.value).startswith(f"base_precision='bf16': {said}")
    assert str(error.value).endswith("set it to None") and "\n" not in str(error.value)


def test_other_values():
    with pytest.raises(ValueError, match="base_precision='fp8': choose one of"):
        DarelConfig(base_precision="fp8")


def test_with_float16_or_quantised_weights(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer.args, "fp16", True)  # needs a GPU where arguments are made
    with pytest.raises(ValueError, match="fp16=True computes in float16, not in bfloat16; set it to None"):
        trainer.train()
    trainer = trainer_for(tmp_path)
    trainer.model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="the base is quantised, and smaller than that already; set it to None"):
        trainer.train()
