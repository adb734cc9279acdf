"""The contract of accelerators: a new one needs no change of trainer, planner or report; refusals and fallbacks."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field

import pytest
import torch
from helpers import PadCollator, arguments, tiny_lora, token_data, weights
from transformers import Trainer

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.accelerators import ACCELERATORS, Accelerator, register_accelerator
from darel_hf.config import ACCELERATOR_FACTS, AcceleratorFacts


@dataclass
class WithOneMore(DarelConfig):
    """The settings, and one that switches an accelerator of a test on."""

    shorter: bool = field(default=False, metadata={"help": "leave out trailing columns that are masked in all rows"})


@pytest.fixture
def shorter():
    """Register an accelerator that cuts trailing columns of padding: exact, and a few lines."""

    @register_accelerator
    class Shorter(Accelerator):
        facts = AcceleratorFacts(
            "shorter",
            setting="shorter",
            exactness="exact",
            phrase="cut to their longest row",
            not_with={"track": "no"},
        )
        in_the_way: str | None = None
        made: list = []

        def __init__(self, trainer):
            super().__init__(trainer)
            self.calls, self.times_attached = [], 0
            self.made.append(self)

        def why_not(self, few_rows):
            if self.in_the_way is None:
                wide = few_rows()
                with torch.no_grad():
                    losses = [self.trainer.model(**batch)["loss"] for batch in (wide, self.transform(wide))]
                assert torch.allclose(*losses, rtol=1e-5)
            return self.in_the_way

        def attach(self):
            self.times_attached += 1

        def detach(self):
            self.times_attached = 0

        def transform(self, inputs):
            self.calls.append(tuple(inputs["input_ids"].shape))
            if inputs["attention_mask"].dim() > 2:  # a row without padding
                return inputs
            width = int(inputs["attention_mask"].any(0).nonzero()[-1]) + 1
            return {key: value[:, :width] for key, value in inputs.items()}

    yield Shorter
    del ACCELERATORS["shorter"], ACCELERATOR_FACTS["shorter"]


def trainer_for(folder, cls=DarelTrainer, **darel):
    given = {"darel": WithOneMore(**darel)} if cls is DarelTrainer else {}
    return cls(
        model=tiny_lora(),
        args=arguments(folder, optim="sgd", learning_rate=0.1),  # makes no more of rounding than the gradients have
        train_dataset=token_data(24),
        data_collator=PadCollator(pad_to_multiple_of=32),
        **given,
    )


def test_a_new_one_trains_is_planned_and_reported(tmp_path, shorter, capsys):
    plain = trainer_for(tmp_path / "plain", Trainer)
    plain.train()
    ours = trainer_for(tmp_path / "ours", shorter=True)
    widths = []
    ours.model.register_forward_pre_hook(
        lambda model, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ours.train()
    for name, wanted in weights(plain.model).items():
        torch.testing.assert_close(weights(ours.model)[name], wanted, rtol=1e-4, atol=1e-6)
    assert len(widths) > ours.state.global_step and max(widths[-ours.state.global_step :]) < 32
    (accelerator,) = shorter.made
    assert accelerator.calls[-1][1] == 32 and accelerator.times_attached == 0
    assert "cut to their longest row (exact): a step takes" in capsys.readouterr().out
    factors = ours.report.plan.costs.factors
    assert list(factors) == ["shorter"] and factors["shorter"] > 0
    stored = json.loads((tmp_path / "ours" / "darel" / "report.json").read_text())
    assert stored["plan"]["costs"]["factors"] == factors


def test_two_of_them_act_one_after_the_other(tmp_path, shorter):
    plain, ours = trainer_for(tmp_path / "plain", Trainer), trainer_for(tmp_path / "ours", shorter=True, unpad=True)
    plain.train()
    ours.train()
    assert list(ours.report.plan.costs.factors) == ["unpad", "shorter"]
    assert shorter.made[-1].calls[-1][0] == 1  # it got the row that `unpad` had made
    for name, wanted in weights(plain.model).items():
        torch.testing.assert_close(weights(ours.model)[name], wanted, rtol=1e-4, atol=1e-6)


def test_where_it_cannot_be_had(tmp_path, shorter, caplog, monkeypatch):
    monkeypatch.setattr(shorter, "in_the_way", "the moon is full")
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path / "falls-back", shorter=True).train()
    assert "shorter=True: the moon is full; going on with False" in caplog.text
    assert len(shorter.made[-1].calls) == 0
    monkeypatch.setattr(shorter, "falls_back", False)
    with pytest.raises(ValueError, match="shorter=True: the moon is full; set it to False"):
        trainer_for(tmp_path / "refuses", shorter=True).train()


def test_where_it_does_not_pay(tmp_path, shorter, caplog, monkeypatch):
    """It is left out, and a run that goes on stays with that: it does not measure again."""
    monkeypatch.setattr(shorter, "most", 0.0)
    ours = trainer_for(tmp_path, shorter=True)
    ours.args.save_strategy, ours.args.save_steps = "steps", 3
    with caplog.at_level(logging.WARNING):
        ours.train()
    assert "shorter=True: a step takes" in caplog.text and "one without it; going on with False" in caplog.text
    assert ours.report.plan.costs.factors == {}
    monkeypatch.setattr(shorter, "most", 9.0)
    again = trainer_for(tmp_path, shorter=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(width == 32 for _, width in shorter.made[-1].calls) and len(shorter.made[-1].calls) == 1  # the trial
    for name, wanted in weights(ours.model).items():
        torch.testing.assert_close(weights(again.model)[name], wanted, rtol=0, atol=0)


def test_with_what_it_does_not_go(shorter):
    with pytest.raises(ValueError, match="track=True: no"):
        WithOneMore(shorter=True, track=True)
    assert WithOneMore(shorter=True).active and not WithOneMore().active
    with pytest.raises(ValueError, match="there is an accelerator of this name"):
        register_accelerator(shorter)


def test_off_it_is_not_even_made(tmp_path, shorter):
    before = len(shorter.made)
    trainer_for(tmp_path, offline_keep=0.5, offline_rule="random").train()
    assert len(shorter.made) == before


@pytest.mark.parametrize("name", ["unpad", "sliced", "fast_lora"])
def test_every_one_of_ours_says_what_it_is(name):
    facts = ACCELERATORS[name].facts
    assert facts is ACCELERATOR_FACTS[name] and facts.exactness in ("exact", "unbiased", "approximate")
    assert facts.setting in {f.name for f in dataclasses.fields(DarelConfig)}
