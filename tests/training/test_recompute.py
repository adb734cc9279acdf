"""A memory budget first has activations computed again in the backward pass, with the same gradients."""

import logging

import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.budget.plan import Costs, Plan, solve_budget
from darel_hf.training import planner

ROWS = {"per_device_train_batch_size": 8, "num_train_epochs": 1}


class Watch(TrainerCallback):
    """The gradients of every step, and what one forward pass holds on to, as torch's profiler counts it."""

    def __init__(self):
        self.gradients, self.held, self.on = [], None, None

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.held is None:
            batch = PadCollator()(list(token_data(8)))
            with torch.random.fork_rng(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                loss = model(**batch).loss
            self.held = sum(event.self_cpu_memory_usage for event in seen.key_averages())
            self.on = model.is_activation_checkpointing
            del loss

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


def trained(cls, folder, model, resume=None, settings=None, **darel):
    watch = Watch()
    trainer = cls(
        model=model,
        args=arguments(folder, **{**ROWS, **(settings or {})}),
        train_dataset=token_data(40),
        data_collator=PadCollator(),
        callbacks=[watch],
        **({"darel": DarelConfig(**darel)} if darel else {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lora])
def test_the_same_gradients_in_less_memory(make, tmp_path, capsys):
    """Of every step, with dropout, to the bit; the batch stays as large, and the model is left as it was."""
    plain, before = trained(Trainer, tmp_path / "plain", make(dropout=0.1))
    ours, after = trained(DarelTrainer, tmp_path / "ours", make(dropout=0.1), budget_memory=0.85)
    plan = ours.report.plan
    assert plan.recomputes and (plan.batch_size, plan.kept, plan.slowdown > 0) == (8, 1, True)
    assert "memory    activations are computed again in the backward pass (exact)" in capsys.readouterr().out
    assert (before.on, after.on) == (False, True) and after.held < 0.6 * before.held
    assert len(before.gradients) == len(after.gradients) == 5
    for one, two in zip(before.gradients, after.gradients, strict=True):
        assert len(one) == len(two) > 0 and all(map(torch.equal, one, two))
    assert_same_weights(weights(plain.model), weights(ours.model))
    assert not ours.model.is_activation_checkpointing and not ours.model.get_input_embeddings()._forward_hooks


def test_smaller_batches_besides_and_alone(tmp_path):
    both, _ = trained(DarelTrainer, tmp_path / "both", tiny_gpt2(), budget_memory=0.5)
    assert both.report.plan.recomputes and 1 <= both.report.plan.batch_size < 8
    given = {"gradient_checkpointing": True}
    alone, watch = trained(DarelTrainer, tmp_path / "alone", tiny_gpt2(), settings=given, budget_memory=0.8)
    assert not alone.report.plan.recomputes and 1 <= alone.report.plan.batch_size < 8 and watch.on
    whole, watch = trained(DarelTrainer, tmp_path / "whole", tiny_gpt2(), budget_memory=1.0)
    assert not whole.report.plan.recomputes and whole.report.plan.batch_size == 8 and not watch.on


def test_a_run_that_goes_on_and_what_does_not_go_with_it(tmp_path, caplog, monkeypatch):
    saves = {"save_strategy": "steps", "save_steps": 2}
    darel = {"budget_memory": 0.85, "unpad": True, "last_block": True}
    with caplog.at_level(logging.WARNING):
        whole, _ = trained(DarelTrainer, tmp_path, tiny_lora(0.1), settings=saves, **darel)
    assert "last_block=True: with checkpointing the block is called again" in caplog.text
    assert whole.report.plan.recomputes and list(whole.report.in_use) == ["unpad"]
    monkeypatch.setattr(planner, "measure_memory", lambda *args: pytest.fail("measured again"))
    again, watch = trained(
        DarelTrainer, tmp_path, tiny_lora(0.1), str(tmp_path / "checkpoint-2"), settings=saves, **darel
    )
    assert watch.on and again.report.plan == whole.report.plan and not again.model.is_activation_checkpointing
    assert_same_weights(weights(whole.model), weights(again.model))


def test_it_is_paid_for_in_time(tmp_path, monkeypatch):
    """A plan counts what it costs; a time budget beside it makes up for that, a memory budget alone drops nothing."""
    costs = Costs(step_seconds=1e4, forward_share=0.0, offline_share=0.0)
    made = Plan(1.0, 1.0, 1, 8, 3, 160, costs, slowdown=1.3, recomputes=True)
    assert solve_budget(made, None).kept == 1 and solve_budget(made, None).predicted_time == pytest.approx(1.3)
    monkeypatch.setattr(planner, "measure_costs", lambda *args, **kwargs: costs)
    monkeypatch.setattr(planner, "measure_slowdown", lambda *args: 1.3)
    darel = {"budget_memory": 0.85, "budget_time": 0.8, "fast": False, "offline_rule": "random"}
    plan = trained(DarelTrainer, tmp_path, tiny_gpt2(), **darel)[0].report.plan
    assert plan.recomputes and plan.predicted_time == pytest.approx(0.8, abs=0.03)
    assert plan.kept == pytest.approx(0.8 / 1.3, abs=0.03)
