"""What a time budget is spent on: exact accelerators, then those that are allowed, then fewer samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from helpers import PadCollator, arguments, assert_same_weights, tiny_lora, token_data, weights, with_prompts
from peft import LoraConfig
from readers import adapted
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import ACCELERATORS, Accelerator, FastLora, LastBlock, PromptCache, register_accelerator
from darel_hf.budget import Costs
from darel_hf.config import ACCELERATOR_FACTS, AcceleratorFacts
from darel_hf.training import planner
from darel_hf.training.planner import Planner

#: What a step takes with an accelerator, by its setting: what is measured on a tiny model is chance.
FACTORS = {"share_prompts": 0.8, "fast_lora": 1.1, "fused_activation": 1.1, "last_block": 1.1, 16: 0.7, 8: 0.5, 4: 0.9}


@dataclass
class WithCut(DarelConfig):
    """The settings, and one that switches an accelerator of these tests on."""

    cut: int = field(default=0, metadata={"help": "train on so many tokens of a row at most"})


@pytest.fixture
def cut():
    """Register an accelerator that costs quality, the more the fewer tokens it leaves."""

    @register_accelerator
    class Cut(Accelerator):
        facts = AcceleratorFacts(
            "cut",
            setting="cut",
            exactness="approximate",
            phrase="cut",
            mildest_first=(16, 8, 4),
            not_with={"track": "no"},
        )
        made: list = []
        in_the_way: dict = {}

        def why_not(self, few_rows):
            self.made.append(self.value)
            return self.in_the_way.get(self.value)

        def transform(self, inputs):
            if inputs["input_ids"].shape[0] == 1:  # a row without padding
                return inputs
            return {key: value[:, : self.value] for key, value in inputs.items()}

    yield Cut
    del ACCELERATORS["cut"], ACCELERATOR_FACTS["cut"]


@pytest.fixture
def measured(monkeypatch):
    """Costs as if they had been measured: no chance in them, and measuring takes nothing beside such steps."""
    given = []

    def measure_costs(trainer, *args, accelerators, **kwargs):
        given.append([a.facts.name for a in accelerators])
        factors = {a.facts.name: FACTORS[a.value if a.facts.name == "cut" else a.facts.name] for a in accelerators}
        return Costs(step_seconds=1e4, forward_share=0.0, offline_share=0.3, factors=factors)

    monkeypatch.setattr(planner, "measure_costs", measure_costs)
    return given


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def trainer_for(folder, model=None, data=None, stop=False, settings=None, config=DarelConfig, collator=None, **darel):
    return DarelTrainer(
        model=model or tiny_lora(dropout=0.1),
        args=arguments(folder, save_strategy="steps", save_steps=5, num_train_epochs=3, **(settings or {})),
        train_dataset=token_data(40) if data is None else data,
        data_collator=collator or PadCollator(),
        callbacks=[Stop()] if stop else None,
        darel=config(**{"offline_rule": "random", **darel}),
    )


def test_a_budget_that_less_padding_meets_drops_nothing(tmp_path, monkeypatch, capsys):
    """All is measured here; but for what measuring takes, which is more than so short a run."""
    monkeypatch.setattr(Planner, "_count_overhead", lambda *args: None)
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 64, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0))
    collator = PadCollator(pad_to_multiple_of=128)  # of 128 positions of a row, 4 to 20 are no padding
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    trainer = trainer_for(tmp_path, model, collator=collator, budget_time=0.9)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = settings["per_device_train_batch_size"]
    trainer.train()
    plan = trainer.report.plan
    assert plan.used and plan.costs.accelerated < 0.8 and plan.kept == 1
    assert trainer.report.kept.all() and trainer.report.rows_backpropagated <= 3 * 40
    said = capsys.readouterr().out
    assert "budget    0.9 is met by exact accelerators alone: nothing is dropped" in said
    assert f"the same cost: {3 * plan.predicted_time:.2f} epochs of plain training, of 3" in said


@pytest.mark.parametrize(
    ("budget", "used", "tried", "kept"),
    [
        (0.85, {"share_prompts": 1}, [], 1.0),
        (0.57, {"share_prompts": 1, "cut": 16}, [16], 1.0),
        (0.45, {"share_prompts": 1, "cut": 8}, [16, 8], 1.0),
        (0.2, {"share_prompts": 1, "cut": 8}, [16, 8, 4], 0.5),  # what is to be harsher and is no cheaper is left out
    ],
)
def test_the_exact_first_then_the_mildest_that_is_enough(budget, used, tried, kept, tmp_path, cut, measured, capsys):
    cut.made.clear()
    trainer = trainer_for(tmp_path, config=WithCut, budget_time=budget, budget_allows=["cut"])
    trainer.train()
    plan = trainer.report.plan
    assert plan.used == used and cut.made == tried
    assert plan.kept == pytest.approx(kept, abs=0.02) and plan.predicted_time == pytest.approx(
        budget if kept < 1 else plan.costs.accelerated, abs=0.01
    )
    said = capsys.readouterr().out
    assert ("cut (approximate, cut=" in said) == ("cut" in used)
    assert ("nothing is dropped" in said) == (kept == 1)
    if kept < 1:
        assert "budget    0.2: everything takes 0.40 with exact accelerators and cut; some is dropped" in said
        assert "the same cost: 1.50 epochs of everything, of 3" in said
        assert "left out  cut=4: steps take 0.72 of plain ones, 0.40 without it" in said
    assert kept < 1 or [name for name in measured[-1] if name in used] == list(plan.costs.factors)  # in combination


def test_what_is_not_allowed_is_not_used(tmp_path, cut, measured, monkeypatch):
    cut.made.clear()
    report = trainer_for(tmp_path / "a", config=WithCut, budget_time=0.57)
    report.train()
    assert cut.made == [] and report.report.plan.kept < 0.75 and report.report.plan.used == {"share_prompts": 1}
    monkeypatch.setitem(cut.in_the_way, 16, "the moon is full")
    trainer = trainer_for(tmp_path / "b", config=WithCut, budget_time=0.57, budget_allows=["cut"])
    trainer.train()
    assert trainer.report.plan.used == {"share_prompts": 1, "cut": 8}
    assert trainer.report.plan.left_out["cut=16"] == "the moon is full"


@pytest.mark.parametrize("budget", [0.57, pytest.param(0.85, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_has_what_it_had(budget, tmp_path, cut, measured, monkeypatch):
    darel = {"config": WithCut, "budget_time": budget, "budget_allows": ["cut"]}
    whole = trainer_for(tmp_path, **darel)
    whole.train()
    monkeypatch.setattr(planner, "measure_costs", lambda *a, **k: pytest.fail("measured again"))
    again = trainer_for(tmp_path, **darel)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.report.plan == whole.report.plan
    assert_same_weights(weights(again.model), weights(whole.model))
    if "cut" in whole.report.plan.used:
        cut.in_the_way[whole.report.plan.used["cut"]] = "the moon is full"
        with pytest.raises(ValueError, match="the checkpoint was made with cut, which cannot be had here: the moon"):
            trainer_for(tmp_path, **darel).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        cut.in_the_way.clear()


def test_a_checkpoint_of_before_stays_without(tmp_path, measured):
    """A run with a budget that looked for no accelerators goes on without them."""
    trainer_for(tmp_path / "old", stop=True, budget_time=0.7, fast=False).train()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    path = tmp_path / "new" / "checkpoint-5" / "darel" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["budget_allows"], state["plan"]["used"], state["plan"]["budget_time"]
    path.write_text(json.dumps(state))
    ends = []
    for name, darel in (("old", {"fast": False}), ("new", {})):
        trainer = trainer_for(tmp_path / name, budget_time=0.7, **darel)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-5"))
        ends.append(weights(trainer.model))
    assert_same_weights(*ends)
    with pytest.raises(ValueError, match=r"fast=None: the checkpoint .* was made with False"):
        trainer_for(tmp_path / "old", budget_time=0.7).train(
            resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-5")
        )


@pytest.mark.parametrize(
    "darel",
    [
        {"budget_time": 0.7, "budget_method": "paper"},
        {"budget_time": 0.7, "fast": False},
        {"offline_keep": 0.7, "offline_rule": "middle"},
    ],
)
def test_where_nobody_asks_for_exact_ones(darel, tmp_path, measured):
    trainer = trainer_for(tmp_path, **darel)
    trainer.train()
    assert trainer.report.plan.costs.factors == {} and trainer.report.plan.kept < 1


@pytest.mark.parametrize("kind", [LoraConfig, ReaderLoraConfig])
def test_what_the_reader_would_do(kind, tmp_path, measured, monkeypatch, capsys):
    monkeypatch.setitem(FACTORS, "prompt_cache", 0.5)
    data = with_prompts(token_data(40))
    trainer_for(tmp_path, adapted("llama", kind), data, budget_time=0.9).train()
    prompt, tokens = sum(6 for _ in data), sum(len(row["input_ids"]) for row in data)
    line = f"reader    {prompt / tokens:.2f} of the positions are prompt"
    assert (line in capsys.readouterr().out) == (kind is LoraConfig)


def test_the_combination_is_measured(tmp_path, monkeypatch):
    """What changes the model itself is on while what comes after it is timed."""
    monkeypatch.setattr(planner, "PAYS", 1e9)
    shortened, measure = [], FastLora.measure

    def spy(self, seconds, inputs):
        (block,) = (a for a in self.trainer._run.planner.accelerators if isinstance(a, LastBlock))
        shortened.append(block.shortened is not None and block.shortened.wanted is not None)
        return measure(self, seconds, inputs)

    monkeypatch.setattr(FastLora, "measure", spy)
    trainer_for(tmp_path, adapted("llama"), unpad=True, fast=True).train()
    assert shortened and all(shortened)


@pytest.mark.parametrize(
    ("factors", "used"),
    [
        ({"share_prompts": 1.2, "unpad": 0.8, "last_block": 0.9}, {"unpad": True, "last_block": True}),
        ({"share_prompts": 1.2, "unpad": 1.1, "last_block": 0.9}, {}),
    ],
)
def test_where_one_way_does_not_pay_the_next_is_tried(factors, used, tmp_path, measured, monkeypatch):
    """Of ways that exclude each other; and what goes beside others does not stay alone."""
    for name, factor in factors.items():
        monkeypatch.setitem(FACTORS, name, factor)
    whole = trainer_for(tmp_path, adapted("llama"), budget_time=0.95)
    whole.train()
    plan = whole.report.plan
    assert plan.used == used and [set(names) - {"fast_lora"} for names in measured] == [
        {"share_prompts", "last_block"},
        {"unpad", "last_block"},
    ]
    assert plan.costs.factors == {name: FACTORS[name] for name in used}
    slow = {name for name, factor in factors.items() if factor > 1}
    assert all("of one without it" in plan.left_out[name] for name in slow)
    if not used:
        assert plan.left_out["last_block"] == "it goes beside unpad or share_prompts"
    again = trainer_for(tmp_path, adapted("llama"), budget_time=0.95)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(measured) == 2 and again.report.plan == plan and again.report.in_use == used
    assert_same_weights(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(("slow_way", "stays"), [(2e4, True), (1.2e4, False)])
def test_a_reader_keeps_what_beats_its_own_steps(slow_way, stays, tmp_path, monkeypatch):
    """Where reading stored prompts takes longer than LoRA everywhere, as on a GPU, it may still beat doing without."""
    asked = []

    def measure_costs(trainer, *args, accelerators, **kwargs):
        asked.append([a.facts.name for a in accelerators])
        reads = "prompt_cache" in asked[-1]
        factors = {name: 1.5 if name == "prompt_cache" else 0.9 for name in asked[-1]}
        return Costs(1e4 if reads else slow_way, forward_share=0.0, offline_share=0.3, factors=factors)

    monkeypatch.setattr(planner, "measure_costs", measure_costs)
    trainer = trainer_for(tmp_path, adapted("llama", config=ReaderLoraConfig), fast=True)
    trainer.train()
    plan = trainer.report.plan
    others = [name for name in asked[0] if name != "prompt_cache"]
    assert "prompt_cache" in asked[0] and asked[1] == others and len(asked) == 2
    if stays:
        assert plan.costs.factors == {name: 1.5 if name == "prompt_cache" else 0.9 for name in asked[0]}
        assert plan.costs.step_seconds == 1e4
    else:
        assert plan.left_out["prompt_cache"] == "a step takes 1.25 of one without it"
        assert plan.costs.factors == dict.fromkeys(others, 0.9) and plan.costs.step_seconds == slow_way


QUALITY = {"budget_spend": "quality", "budget_time": 1.0}


@pytest.mark.parametrize(
    ("budget", "epochs", "steps"), [(1.0, 3.75, 38), pytest.param(0.9, 3.375, 34, marks=pytest.mark.slow)]
)
def test_time_that_is_saved_is_spent_on_epochs(budget, epochs, steps, tmp_path, measured, capsys):
    """As a run that is asked for so many epochs, and uses the same accelerator, to the bit."""
    ours = trainer_for(tmp_path / "ours", budget_spend="quality", budget_time=budget)
    ours.train()
    plan = ours.report.plan
    assert plan.predicted_time == pytest.approx(budget, abs=1e-3) and plan.trained_epochs == pytest.approx(
        epochs, rel=1e-3
    )
    state = ours.state
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (steps, steps, 4)
    rates = [entry["learning_rate"] for entry in state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2 * (1 - step / steps) for step in range(steps)])
    assert ours.lr_scheduler.get_last_lr() == [0.0] * len(ours.lr_scheduler.get_last_lr())
    assert ours.args.num_train_epochs == 3 and ours.report.rows_backpropagated == 4 * steps
    said = capsys.readouterr().out
    assert f"epochs    {plan.trained_epochs:.2f} in place of 3, in the time that is left" in said
    assert f"the same cost: {3 * budget:.2f} epochs of plain training, of 3" in said
    asked = trainer_for(tmp_path / "asked", share_prompts=1)
    asked.args.num_train_epochs = epochs
    asked.train()
    assert_same_weights(weights(ours.model), weights(asked.model))


def test_training_ends_earlier_where_whole_rows_would_leave_much_of_a_budget(tmp_path, measured, capsys):
    """As a run that is asked for a part of its last epoch; 4 of 5 rows of each batch would take 0.64, not 0.76."""

    def config(offline_rule, **darel):  # by a rule whose pass would cost a tenth
        return DarelConfig(offline_rule="middle", **darel)

    ours = trainer_for(tmp_path / "ours", config=config, budget_time=0.76)
    ours.train()
    plan = ours.report.plan
    assert plan.predicted_time == pytest.approx(0.76, abs=1e-3) and plan.trained_epochs == pytest.approx(
        2.85, rel=1e-3
    )
    assert (ours.state.global_step, ours.state.max_steps) == (29, 29) and ours.args.num_train_epochs == 3
    assert not plan.selects and "training ends earlier, nothing is dropped" in capsys.readouterr().out
    asked = trainer_for(tmp_path / "asked", share_prompts=1)
    asked.args.num_train_epochs = plan.trained_epochs
    asked.train()
    assert_same_weights(weights(ours.model), weights(asked.model))
    again = trainer_for(tmp_path / "ours", config=config, budget_time=0.76)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-5"))
    assert again.state.global_step == again.state.max_steps == 29
    assert_same_weights(weights(again.model), weights(ours.model))


@pytest.mark.parametrize("step", [5, 35])
def test_epochs_that_were_planned_are_trained_by_a_run_that_goes_on(step, tmp_path, measured, monkeypatch):
    whole = trainer_for(tmp_path, **QUALITY)
    whole.train()
    for factor in FACTORS:
        monkeypatch.setitem(FACTORS, factor, 1.0)  # were it measured again, there would be no more epochs
    again = trainer_for(tmp_path, **QUALITY)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert again.state.global_step == again.state.max_steps == 38
    assert_same_weights(weights(again.model), weights(whole.model))
    assert json.loads((tmp_path / "checkpoint-38" / "trainer_state.json").read_text())["max_steps"] == 38


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_steps_took_in_the_run_is_reported(accumulation, tmp_path, measured, monkeypatch, cut):
    """By a clock of its own, on which a micro-batch takes 0.7 of a plain one, and its scoring as much again."""

    class Clock(TrainerCallback):
        now = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            self.now += 0.7 * 1e4 * accumulation
            with trainer._run.clock.count("scoring"):
                self.now += 0.7 * 1e4 * accumulation

    clock = Clock()
    timer = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("darel_hf.training.clock.time", timer)
    monkeypatch.setattr("darel_hf.training.clock.clock", lambda device: clock.now)
    settings = {"gradient_accumulation_steps": accumulation}
    monkeypatch.setitem(cut.in_the_way, 16, "the moon is full")
    darel = {"budget_time": 0.57, "budget_allows": ["cut"]}
    trainer = trainer_for(tmp_path, adapted("llama"), settings=settings, config=WithCut, **darel)
    trainer.add_callback(clock)
    trainer.train()
    report = trainer.report
    assert report.step_time == pytest.approx(0.7) and report.plan.step_time == pytest.approx(0.8 * 0.5)
    shared = {"name": "share_prompts", "setting": "share_prompts", "value": 1, "exactness": "exact", "factor": 0.8}
    inexact = {"name": "cut", "setting": "cut", "value": 8, "exactness": "approximate", "factor": 0.5}
    assert report.accelerators == [shared, inexact]
    stored = json.loads((tmp_path / "darel" / "report.json").read_text())
    assert stored["accelerators"] == [shared, inexact] and stored["left_out"] == report.left_out
    assert report.left_out["cut=16"] == "the moon is full" and "fast_lora" in report.left_out
    assert stored["measured_step"] == pytest.approx(0.7) and stored["predicted_step"] == pytest.approx(0.4)
    assert "steps     0.70 of a plain one in the run, scoring left out (predicted 0.40)" in str(report)
    assert "| share_prompts (exact, 0.80), cut (approximate, 0.50) |" in report.card()
    page = (tmp_path / "darel" / "report.html").read_text()
    for cell in ("share_prompts=1", "approximate", "0.50 of one without it", "the moon is full", "0.40 as planned"):
        assert cell in page


@pytest.mark.parametrize("known", [True, False])
def test_a_first_epoch_that_stores_prompts_ends_no_run_early(known, tmp_path, measured, monkeypatch):
    """By a clock of its own: steps take three times as long in the first of three epochs; where that is known."""

    class Clock(TrainerCallback):
        now = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            self.now += 0.5 * 1e4 * (3.0 if state.global_step < 10 else 1.0) / (5 / 3)

    clock = Clock()
    monkeypatch.setattr("darel_hf.training.clock.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("darel_hf.training.clock.clock", lambda device: clock.now)
    monkeypatch.setitem(FACTORS, "prompt_cache", 0.5)
    monkeypatch.setattr(PromptCache, "first_epoch", 3.0 if known else 1.0)
    trainer = trainer_for(
        tmp_path, adapted("llama", ReaderLoraConfig), with_prompts(token_data(40)), budget_time=0.505
    )
    trainer.add_callback(clock)
    trainer.train()
    assert trainer.report.plan.kept == 1 and list(trainer.report.in_use) == ["prompt_cache"]
    assert (trainer.state.global_step == 30 and not trainer.report.decisions) == known


@pytest.mark.parametrize("offline", [{}, {"offline_keep": 0.8, "offline_rule": "trimmed"}], ids=["all", "offline"])
def test_steps_are_timed_on_batches_as_the_run_has_them(offline, tmp_path, monkeypatch):
    """Samples of a prompt come together, whether or not a pass over all items is still to come."""
    given = []

    def measure_costs(*args, visited, **kwargs):
        given.append(visited)
        return Costs(step_seconds=1e4, forward_share=0.0, offline_share=0.3)

    monkeypatch.setattr(planner, "measure_costs", measure_costs)
    trainer_for(tmp_path, data=with_prompts(token_data(40), kinds=10), share_prompts=4, **offline).train()
    groups = [{position % 10 for position in given[0][i : i + 4]} for i in range(0, 40, 4)]
    assert sorted(given[0]) == list(range(40)) and all(len(group) == 1 for group in groups)


@pytest.mark.parametrize("darel", [{**QUALITY, "fast": False}, {**QUALITY, "budget_time": 0.6}])
def test_where_no_time_is_left_no_epoch_is_added(darel, tmp_path, measured):
    trainer = trainer_for(tmp_path, **darel)
    trainer.train()
    assert trainer.report.plan.more == 1 and trainer.state.global_step == (30 if "fast" in darel else 24)


def test_steps_that_are_given_leave_no_epochs_to_plan(tmp_path):
    with pytest.raises(ValueError, match="budget_spend='quality': max_steps=5 fixes the number of steps, and none"):
        trainer_for(tmp_path, settings={"max_steps": 5}, **QUALITY)


@pytest.mark.parametrize(
    ("darel", "message"),
    [
        ({"budget_allows": ["cut"]}, r"budget_allows=\['cut'\]: only a time budget that is measured has a use for it"),
        (
            {"budget_allows": ["cut"], "budget_time": 0.5, "budget_method": "paper"},
            "only a time budget that is measured",
        ),
        ({"budget_allows": ["cuts"], "budget_time": 0.5}, r"budget_allows=\['cuts'\]: choose of .*cut"),
        ({"budget_allows": ["unpad"], "budget_time": 0.5}, "unpad is exact, and a time budget uses it anyway"),
        ({"budget_allows": ["cut"], "budget_time": 0.5, "cut": 8}, "cut=8 is given already; leave out one of both"),
        ({"budget_allows": ["cut", "cut"], "budget_time": 0.5}, "give each name once"),
        ({"budget_spend": "quality"}, "budget_spend='quality': only a time budget that is measured leaves any"),
        ({"budget_spend": "quality", "budget_memory": 0.5}, "only a time budget that is measured leaves any"),
        ({**QUALITY, "budget_method": "paper"}, "only a time budget that is measured leaves any"),
        ({**QUALITY, "budget_spend": "money"}, r"budget_spend='money': choose one of \('time', 'quality'\)"),
        ({"budget_allows": "cut", "budget_time": 0.5}, "budget_allows='cut': give a list of names"),
    ],
)
def test_mistakes(darel, message, cut):
    with pytest.raises((ValueError, TypeError), match=message):
        WithCut(**darel)
