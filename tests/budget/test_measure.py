"""Measuring takes no more than training does: where memory is short, costs are not known, and training goes on."""

import logging

import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, token_data, weights

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.budget.plan import Costs

SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Greedy(torch.optim.SGD):
    """An optimizer for whose states there is room only once."""

    fails = "nowhere"

    def __init__(self, params, own, **kwargs):
        super().__init__(params, **kwargs)
        self.copied = not any(p is own for group in self.param_groups for p in group["params"])
        if self.copied and self.fails == "making":
            raise torch.OutOfMemoryError(SHORT)

    def step(self, closure=None):
        if self.copied and self.fails == "states":
            raise torch.OutOfMemoryError(SHORT)
        return super().step(closure)


def train(folder, monkeypatch, fails=None, **darel):
    model = tiny_gpt2()
    frozen, trained = model.transformer.wpe.weight.requires_grad_(False), model.transformer.h[0].attn.c_attn.weight
    trainer = DarelTrainer(
        model=model,
        args=arguments(folder, num_train_epochs=1),
        train_dataset=token_data(24),
        data_collator=PadCollator(),
        optimizer_cls_and_kwargs=(Greedy, {"own": trained, "lr": 0.1}),
        darel=DarelConfig(**darel),
    )
    with monkeypatch.context() as patched:
        if fails in ("making", "states"):
            patched.setattr(Greedy, "fails", fails)
        elif fails == "gradients":
            zeros = torch.zeros_like

            def zeros_like(tensor, *args, **kwargs):
                if isinstance(tensor, torch.nn.Parameter):
                    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")
                return zeros(tensor, *args, **kwargs)

            patched.setattr(torch, "zeros_like", zeros_like)
        elif fails in ("frozen", "weights"):
            pointer, clone = (frozen if fails == "frozen" else trained).data_ptr(), torch.Tensor.clone

            def short(self, *args, **kwargs):
                if self.data_ptr() == pointer:
                    raise torch.OutOfMemoryError(SHORT)
                return clone(self, *args, **kwargs)

            patched.setattr(torch.Tensor, "clone", short)
        elif fails in ("scoring", "trial"):
            calls = []

            def forward(module, args, kwargs):
                calls.append(len(kwargs["input_ids"]))
                if len(calls) == (1 if fails == "trial" else 2):
                    raise torch.OutOfMemoryError(SHORT)

            model.register_forward_pre_hook(forward, with_kwargs=True)
        trainer.train()
    return trainer


@pytest.mark.parametrize("fails", ["frozen", "weights", "gradients", "making", "states", "scoring"])
@pytest.mark.parametrize(
    "darel", [{"online_keep": 0.5, "online_rule": "hardest"}, {"budget_time": 0.7, "fast": False}], ids=str
)
def test_no_memory_for_the_copies(tmp_path, monkeypatch, caplog, fails, darel):
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path / "short", monkeypatch, fails, **darel)
    assert caplog.text.count("what a training step costs could not be measured") == 1
    assert "memory" in caplog.text
    assert not trainer.report.plan.costs.measured
    assert trainer.state.global_step == trainer.state.max_steps > 0
    if "budget_time" not in darel:  # what is chosen does not depend on costs
        assert_same_weights(weights(trainer.model), weights(train(tmp_path / "wide", monkeypatch, **darel).model))


def test_no_memory_to_try_an_accelerator(tmp_path, monkeypatch, caplog):
    """One that falls back does; the other is refused by its name, with the way out."""
    with caplog.at_level(logging.WARNING):
        train(
            tmp_path / "sliced",
            monkeypatch,
            "scoring",
            online_keep=0.5,
            online_rule="hardest",
            online_backward="sliced",
        )
    assert "online_backward='sliced': trying it out takes more memory than there is" in caplog.text
    with pytest.raises(ValueError, match=r"unpad=True: .* more memory than there is .*; set it to False"):
        train(tmp_path / "unpad", monkeypatch, "trial", unpad=True)


def test_what_is_said_of_savings(tmp_path, monkeypatch, caplog, capsys):
    """Once, with the true cause; not where time is no matter, and no count that is not known."""
    # Steps of a millionth of a second: trying things out takes longer than there is to save.
    costs = Costs(step_seconds=1e-6, forward_share=0.2, offline_share=0.1)
    monkeypatch.setattr("darel_hf.training.planner.measure_costs", lambda *args, **kwargs: costs)
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "steps", monkeypatch, online_keep=0.5, online_rule="hardest")
        train(tmp_path / "memory", monkeypatch, budget_memory=0.9)
    assert caplog.text.count("no saving is predicted") == 1 and "train plainly" in caplog.text
    report = train(tmp_path / "random", monkeypatch, online_keep=0.5).report
    assert "label tokens" not in str(report) and "12 rows in 3 steps" in str(report)


def test_steps_that_an_accelerator_makes_no_cheaper(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("darel_hf.budget.measure._factors", lambda *args: {"unpad": 1.3})
    monkeypatch.setattr("darel_hf.training.planner.Planner._count_overhead", lambda *args: None)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, monkeypatch, unpad=True)
    assert "because steps are no cheaper with unpad; leave it out" in caplog.text


def test_max_steps_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        DarelTrainer(
            model=tiny_gpt2(), args=arguments(tmp_path, max_steps=2), train_dataset=token_data(24),
            data_collator=PadCollator(), darel=DarelConfig(online_keep=0.5),
        ).train()  # fmt: skip
    assert caplog.text.count("fixes the number of steps") == 1 and "no saving" not in caplog.text
