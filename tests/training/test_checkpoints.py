"""Resuming: to the same end, from the newest complete checkpoint, and never from a wrong one."""

import json
import logging

import numpy as np
import pytest
from helpers import PadCollator, arguments, assert_same_weights, tiny_lora, token_data, weights
from transformers import TrainerCallback

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.training.checkpoints import all_in, problem

BOTH = {"offline_keep": 0.8, "online_keep": 0.5, "online_rule": "hardest", "rescore_every": 2}


class StopAt(TrainerCallback):
    """End a run early, as if it had been interrupted."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def make(folder, darel=None, data=None, stop=None, **settings):
    defaults = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 4}
    return DarelTrainer(
        model=tiny_lora(dropout=0.1),
        args=arguments(folder, **{**defaults, **settings}),
        train_dataset=token_data() if data is None else data,
        data_collator=PadCollator(),
        callbacks=[StopAt(stop)] if stop else None,
        darel=DarelConfig(**(darel or BOTH)),
    )


@pytest.mark.parametrize(
    "darel",
    [
        BOTH,
        {"offline_keep": 0.6},
        {"online_keep": 0.5, "online_rule": "percentile", "track": True},
        {"offline_keep": 0.7, "offline_rule": "infobatch"},
        {"budget_time": 0.9, "online_rule": "hardest"},
        {**BOTH, "batch_by_length": True},
    ],
    ids=["both", "offline", "random-rule", "weights", "budget", "by-length"],
)
def test_resumed_equals_straight(tmp_path, darel):
    # A budget depends on measured times, so that two runs would plan differently: its straight run goes on too.
    make(tmp_path / "killed", darel, stop=5).train()
    (tmp_path / "straight").mkdir()
    if "budget_time" in darel:
        import shutil

        shutil.rmtree(tmp_path / "straight")
        shutil.copytree(tmp_path / "killed", tmp_path / "straight")
        straight = make(tmp_path / "straight", darel)
        straight.train(resume_from_checkpoint=True)
    else:
        straight = make(tmp_path / "straight", darel)
        straight.train()
    resumed = make(tmp_path / "killed", darel)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.report.plan.offline_keep == straight.report.plan.offline_keep
    assert_same_weights(weights(straight.model), weights(resumed.model))
    np.testing.assert_array_equal(straight.report.kept, resumed.report.kept)
    for name, values in straight.report.ledger.state_dict().items():
        np.testing.assert_array_equal(values, resumed.report.ledger.state_dict()[name], err_msg=name)
    assert straight.report.rows_backpropagated == resumed.report.rows_backpropagated


def test_nothing_is_scored_or_measured_again_on_resume(tmp_path, monkeypatch):
    make(tmp_path, stop=5).train()
    monkeypatch.setattr("darel_hf.training.planner.measure_costs", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("darel_hf.training.offline.score_dataset", lambda *a, **k: pytest.fail("scored again"))
    make(tmp_path).train(resume_from_checkpoint=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "darel/state.json",
        "darel/ledger.safetensors",
        "adapter_model.safetensors",
        "optimizer.pt",
    ],
)
def test_a_cut_off_checkpoint(tmp_path, caplog, name):
    """`True` goes back to the one before and says so; the broken one by name is an error that names the good one."""
    make(tmp_path, stop=7).train()
    newest, before = all_in(tmp_path)[:2]
    cut(newest / name)
    assert name in problem(newest)
    with pytest.raises(ValueError, match=f"cut off; the newest complete one is .*{before.name}"):
        make(tmp_path).train(resume_from_checkpoint=str(newest))
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path)
        trainer.train(resume_from_checkpoint=True)
    assert "going back to the checkpoint before it" in caplog.text
    assert trainer.state.global_step == trainer.state.max_steps


def test_no_complete_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_data_set(tmp_path):
    make(tmp_path, stop=4).train()
    with pytest.raises(ValueError, match="made from another data set"):
        make(tmp_path, data=token_data(seed=8)).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_settings(tmp_path):
    make(tmp_path, stop=4).train()
    with pytest.raises(ValueError, match=r"online_keep=0.4: the checkpoint .* was made with 0.5"):
        make(tmp_path, {**BOTH, "online_keep": 0.4}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_plain_trainer(tmp_path):
    make(tmp_path, {"offline_keep": 1.0}, stop=4).train()
    with pytest.raises(ValueError, match="made without DAREL"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_the_state_is_written_before_trainer_completes_the_checkpoint(tmp_path):
    trainer = make(tmp_path, stop=4)
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(problem(all_in(tmp_path)[0]))

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [None]
    state, ours = (all_in(tmp_path)[0] / name for name in ("trainer_state.json", "darel/state.json"))
    assert ours.stat().st_mtime_ns <= state.stat().st_mtime_ns
    assert json.loads(ours.read_text())["plan"]["offline_keep"] == 0.8


def test_old_checkpoints_are_rotated_with_their_darel_part(tmp_path):
    make(tmp_path, save_total_limit=1).train()
    assert len(all_in(tmp_path)) == 1
