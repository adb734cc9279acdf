"""A time budget that is kept: fewer steps on a machine that got slower, and a learning rate that decays to its end."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, tiny_lora, token_data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.budget import Plan
from darel_hf.budget.pace import KeepBudget, Progress
from darel_hf.budget.plan import candidate_rows


@settings(deadline=None)
@given(st.integers(2, 500), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6))
def test_progress_never_goes_back_and_ends_at_the_end(planned, changes):
    progress = Progress(planned)
    for now, later in sorted(changes):
        step = int(now * (progress.end - 1))
        if step >= progress.decisions[-1][0]:
            before = progress.position(step)
            progress.end_at(step + 1 + int(later * (planned - step - 1)), step)
            assert progress.position(step) == pytest.approx(before)
    positions = [progress.position(step) for step in range(planned + 1)]
    assert positions[0] == 0
    assert np.all(np.diff(positions) >= -1e-9)
    assert positions[progress.end] == planned
    assert progress.end <= planned
    assert Progress(planned, json.loads(json.dumps(progress.decisions))).position(planned / 2) == pytest.approx(
        progress.position(planned / 2)
    )


def keep(seconds, step_cost, step_seconds, seconds_of):
    """Go through 100 planned steps by a clock of our own, on which a step takes `seconds_of(step)`; return the end."""
    now = 0.0
    keeper = KeepBudget(seconds, lambda: now, step_cost, step_seconds, lambda function: function())
    keeper.progress = Progress(100)

    class State:
        global_step, max_steps = 0, 100

    keeper.on_train_begin(None, State, None)
    while State.global_step < State.max_steps:
        now += seconds_of(State.global_step)
        State.global_step += 1
        keeper.on_step_end(None, State, None)
    return State.global_step, keeper.progress


@pytest.mark.parametrize(("seconds_a_step", "end"), [(1.0, 100), (2.0, 50), (4.0, 25), (20.0, 5)])
def test_ends_where_the_budget_ends(seconds_a_step, end):
    """100 steps planned, 100 seconds allowed, steps that take what they take."""
    step, progress = keep(100.0, lambda step: 1.0, seconds_a_step, lambda step: seconds_a_step)
    assert step == pytest.approx(end, abs=1)
    assert progress.position(step) == 100


@pytest.mark.parametrize(("loop", "end"), [(1.1, 100), (1.5, 83), (0.9, 100)])
def test_what_the_loop_adds_is_plain_trainings_too(loop, end):
    """Steps of 1 s were measured alone; in the loop they take more, of which up to a quarter is granted."""
    step, _ = keep(100.0, lambda step: 1.0, 1.0, lambda step: loop)
    assert step == pytest.approx(end, abs=1)


def test_a_machine_that_slows_down_later_is_not_granted_more():
    step, _ = keep(100.0, lambda step: 1.0, 1.0, lambda step: 1.0 if step < 40 else 2.0)
    assert step == pytest.approx(40 + 60 / 2, abs=2)


def test_steps_that_were_measured_too_slow_leave_less():
    """Plain training is as much faster as the steps are: 100 s were half of it, and half are 80 s, 80 steps."""
    step, _ = keep(100.0, lambda step: 1.0, 1.25, lambda step: 1.0)
    assert step == pytest.approx(80, abs=1)


@pytest.mark.parametrize(("granted", "end"), [(1.2, 100), (1.0, 83)])
def test_a_run_that_goes_on_keeps_what_was_granted(granted, end):
    """Steps take 1.2 of what was measured, which was found out in the first quarter; it was stopped at step 60."""
    now = 72.0
    keeper = KeepBudget(100.0, lambda: now, lambda step: 1.0, 1.0, lambda function: function(), granted=granted)
    keeper.progress = Progress(100)

    class State:
        global_step, max_steps = 60, 100

    keeper.on_train_begin(None, State, None)
    while State.global_step < State.max_steps:
        now += 1.2
        State.global_step += 1
        keeper.on_step_end(None, State, None)
    assert State.global_step == pytest.approx(end, abs=1)


def test_dear_epochs_are_not_taken_for_all():
    """The first epoch scores and costs three times as much: as planned, so nothing is to be shortened."""

    def cost(step):
        return 3.0 if step < 50 else 1.0

    step, progress = keep(200.0, cost, 1.0, cost)
    assert step == 100
    assert len(progress.decisions) == 1


@pytest.mark.parametrize("slow", [30.0, 300.0])
def test_a_step_that_is_slow_once_is_spent_once(slow):
    """Start-up, compiling: so much of a budget of 200 s is gone, the rest is used up; the first cut comes back."""
    step, _ = keep(200.0, lambda step: 1.0, 1.0, lambda step: slow if step == 0 else 1.0)
    assert step == pytest.approx(min(200 - slow, 100) if slow < 200 else 5, abs=2)


def test_what_a_cut_took_comes_back_at_once():
    step, progress = keep(100.0, lambda step: 1.0, 1.0, lambda step: 4.0 if step < 6 else 0.5)
    assert step == 100 and len(progress.decisions) > 1


def test_steps_that_are_slow_again_and_again_count():
    step, _ = keep(100.0, lambda step: 1.0, 1.0, lambda step: 11.0 if step % 10 == 5 else 1.0)
    assert step == pytest.approx(50, abs=4)  # 2 s on average


class Slower(TrainerCallback):
    """
    A machine on which training steps take five times as long as was measured before, by a clock of their own.

    Sleeping instead would leave it to the real machine's speed how many steps the budget is good for.
    """

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.now = trainer, None  # None: training has not begun
        clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() if self.now is None else self.now)
        monkeypatch.setattr("darel_hf.training.clock.time", clock)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.now is None:  # training begins anew after an out-of-memory error
            # In a run as short as this, measuring takes what it takes: here it took nothing.
            self.now = time.perf_counter() if state.global_step else self.trainer._run.clock.started

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 5 * self.trainer._run.plan.costs.step_seconds


def trainer_for(folder, epochs=60, **more):
    return DarelTrainer(
        model=tiny_lora(),
        args=arguments(folder, num_train_epochs=epochs, **more),
        train_dataset=token_data(40),
        eval_dataset=token_data(4),
        data_collator=PadCollator(),
        darel=DarelConfig(budget_time=0.9, fast=False, offline_rule="random", online_rule="random"),
    )


def test_training_ends_early_with_the_rate_decayed(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=8)
    trainer.add_callback(Slower(trainer, monkeypatch))
    trainer.train()
    report = trainer.report
    planned = 60 * int(np.ceil(report.plan.kept_samples / report.plan.candidate_rows))
    assert trainer.state.global_step < planned / 2
    assert trainer.state.global_step == report.decisions[-1][2]
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.all(np.diff(rates) <= 0)
    assert rates[-1] < 0.02 * rates[0]  # the last of more than a hundred steps
    assert "shortened" in str(report)
    # A run that goes on knows what was decided.
    checkpoint = tmp_path / "checkpoint-8"
    decisions = json.loads((checkpoint / "darel" / "state.json").read_text())["decisions"]
    assert len(decisions) > 1
    later = json.loads((tmp_path / "checkpoint-64" / "darel" / "state.json").read_text())
    assert later["granted"] == 1.25
    again = trainer_for(tmp_path)
    again.add_callback(Slower(again, monkeypatch))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.report.decisions[: len(decisions) - 1] == decisions[1:]
    assert again.state.global_step < planned / 2
    assert set(again.lr_scheduler.get_last_lr()) == {0.0}


@pytest.mark.slow
def test_a_run_that_trains_on_everything_does_all_steps(tmp_path, monkeypatch, caplog):
    """Where measuring has eaten the budget, it says so, and is not cut short on the way."""
    trainer = trainer_for(tmp_path, epochs=2)
    monkeypatch.setattr(Plan, "too_short", lambda plan, budget: True)
    trainer.add_callback(Slower(trainer, monkeypatch))
    trainer.train()
    assert "it trains on everything" in caplog.text
    assert trainer.state.global_step == 20 and trainer.report.decisions == []


@pytest.mark.slow
def test_smaller_batches_are_no_faster_machine(tmp_path, monkeypatch):
    """Trainer tries again with fewer rows after an out-of-memory error: a step takes less, all of them as much."""

    class AsMeasured(Slower):
        tries = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.now += self.trainer._run.plan.costs.step_seconds * state.train_batch_size / 8

        def on_step_end(self, args, state, control, **kwargs):
            if self.tries == 0 and state.global_step == 2:
                self.tries = 1
                raise RuntimeError("CUDA out of memory. Tried to allocate")

    trainer = trainer_for(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.add_callback(AsMeasured(trainer, monkeypatch))
    trainer.train()
    size, plan = trainer.state.train_batch_size, trainer.report.plan
    assert size < 8
    steps = np.ceil(plan.kept_samples / candidate_rows(size, plan.online_keep))
    assert trainer.state.global_step >= 0.95 * 60 * steps


def test_a_schedule_that_cannot_end_earlier(tmp_path, caplog):
    trainer = trainer_for(tmp_path, epochs=1, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    trainer.train()
    assert "cannot be made to end earlier" in caplog.text
    assert not trainer.report.decisions
    assert trainer.report.seconds["evaluation"] > 0


def test_several_evaluation_sets_are_counted_once(tmp_path):
    """`Trainer.evaluate` calls itself for each of them."""
    trainer = trainer_for(tmp_path, epochs=1, eval_strategy="epoch")
    trainer.eval_dataset = {"a": token_data(4), "b": token_data(4)}
    spent = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            self.started = time.perf_counter()

        def on_log(self, args, state, control, **kwargs):
            spent.append(time.perf_counter() - getattr(self, "started", time.perf_counter()))

    trainer.add_callback(Watch())
    trainer.train()
    assert 0 < trainer.report.seconds["evaluation"] < max(spent)


def test_decisions_for_other_steps_are_forgotten():
    """A retry with smaller batches, or a resume for more epochs, has another number of steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    saved = [[0, 0.0, 100], [50, 50.0, 75]]
    for steps, end in ((100, 75), (200, 200)):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        keeper = KeepBudget(1.0, lambda: 0.0, lambda step: 1.0, 1.0, lambda function: function(), saved)
        keeper.schedule(scheduler, steps)
        assert keeper.progress.end == end
        keeper.schedule(scheduler, steps)  # a second train() with a scheduler of the user's
        assert scheduler.lr_lambdas[0](60) == pytest.approx(1 - keeper.progress.position(60) / 100)
