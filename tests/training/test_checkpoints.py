"""Resuming: to the same end, from the newest complete checkpoint, and never from a wrong one."""

import json
import logging
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import BOTH, PadCollator, arguments, assert_same_weights, tiny_lora, token_data, weights
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.training.checkpoints import all_in, expected_files, problem, resolve, save


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_files_of_a_checkpoint_are_as_readable_as_others(tmp_path):
    """safetensors writes files that only their owner may read."""
    save(tmp_path, {"losses": np.ones(3), "steps": 3})
    (tmp_path / "another").touch()
    wanted = (tmp_path / "another").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "darel").iterdir()} == {wanted}


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
        {"offline_keep": 0.6, "offline_rule": "middle"},
        {"online_keep": 0.5, "online_rule": "percentile", "track": True},
        {"offline_keep": 0.7, "offline_rule": "infobatch"},
        {"budget_time": 0.9, "online_rule": "hardest", "fast": False},
        {"budget_time": 0.9, "online_rule": "hardest"},
        {**BOTH, "batch_by_length": True},
    ],
    ids=["both", "offline", "random-rule", "weights", "budget", "budget-fast", "by-length"],
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
    """The newest one stands for the one before it, and says so; another one is an error that names a good one."""
    make(tmp_path, stop=7).train()
    newest, before = all_in(tmp_path)[:2]
    whole = (before / name).read_bytes()
    cut(before / name)
    with pytest.raises(ValueError, match=f"cut off; the newest complete one is .*{newest.name}"):
        make(tmp_path).train(resume_from_checkpoint=str(before))
    (before / name).write_bytes(whole)
    cut(newest / name)
    assert name in problem(newest)
    for wanted in (get_last_checkpoint(str(tmp_path)), True):  # the first is how example scripts resume
        with caplog.at_level(logging.WARNING):
            assert resolve(wanted, str(tmp_path)) == str(before)
        assert caplog.text.count("going back to the checkpoint before it") == 1
        caplog.clear()
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.state.max_steps


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_half_deleted_checkpoint(tmp_path, name):
    """Rotation that was killed leaves folders without some files: they are not complete."""
    make(tmp_path, stop=7).train()
    newest, before = all_in(tmp_path)[:2]
    (newest / name).unlink()
    assert problem(newest) == f"{newest / name} is missing"
    assert resolve(True, str(tmp_path)) == str(before)


def test_what_is_left_of_a_deletion_goes_first(tmp_path):
    """Rotation goes by when folders were changed: what it was deleting when it was killed was changed last."""
    make(tmp_path, stop=10).train()
    for age, path in enumerate(all_in(tmp_path)):
        os.utime(path, (time.time() - 100 * age - 100,) * 2)
    (all_in(tmp_path)[-1] / "optimizer.pt").unlink()
    make(tmp_path, stop=13, save_total_limit=3).train(resume_from_checkpoint=True)
    left = all_in(tmp_path)
    assert len(left) == 3 and [problem(path) for path in left] == [None] * 3


def test_complete_is_what_was_to_be_written(tmp_path):
    make(tmp_path / "weights", stop=4, save_only_model=True).train()
    assert problem(all_in(tmp_path / "weights")[0]) is None
    two = SimpleNamespace(save_only_model=False, world_size=2)
    names = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"]
    assert expected_files(two, sharded=False) == names and expected_files(two, sharded=True) == names[2:]
    checkpoint = all_in(tmp_path / "weights")[0]
    (checkpoint / "notes.bin").write_text("the user's own file, no archive of torch")
    assert problem(checkpoint) is None


def test_what_a_killed_writer_left_is_no_fault(tmp_path):
    """A temporary file of ours does not make a good checkpoint bad, and is swept when it is written again."""
    make(tmp_path, stop=4).train()
    checkpoint = all_in(tmp_path)[0]
    leftover = checkpoint / "darel" / ".ledger.safetensors.abc.safetensors"
    leftover.write_bytes(b"xx")
    assert problem(checkpoint) is None
    save(checkpoint, {"plan": {}})
    assert not leftover.exists()


class Changing(torch.utils.data.Dataset):
    """Items with a cell that differs from reading to reading, and one whose text holds an address."""

    def __init__(self, seed=0):
        self.rows = [{k: v for k, v in row.items() if k != "group"} for row in token_data(24, seed)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {**self.rows[index], "noise": os.urandom(4), "meta": object()}


def test_items_that_differ_from_reading_to_reading(tmp_path):
    make(tmp_path, data=Changing(), stop=4).train()
    make(tmp_path, data=Changing()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="made from another data set"):
        make(tmp_path, data=Changing(seed=1)).train(resume_from_checkpoint=True)


def test_a_second_trainer_in_the_same_folder(tmp_path):
    """Trainer allows it; what the first one has written is kept."""
    for _ in range(2):
        make(tmp_path, {"offline_keep": 0.5, "offline_rule": "middle"}, save_strategy="no").train()
    held = {path.name for path in (tmp_path / "darel").glob("*.json")}
    assert {"run.json", "run-2.json", "report.json", "report-2.json"} <= held


class Slow(DarelTrainer):
    """A machine that is slower than it was when measured."""

    def training_step(self, *args, **kwargs):
        time.sleep(0.02)
        return super().training_step(*args, **kwargs)


def budget_run(folder, epochs=3):
    return Slow(
        model=tiny_lora(),
        args=arguments(
            folder, num_train_epochs=epochs, save_strategy="steps", save_steps=20, lr_scheduler_type="constant"
        ),
        train_dataset=token_data(300),
        data_collator=PadCollator(),
        darel=DarelConfig(budget_time=0.7, fast=False, offline_rule="random"),
    )


@pytest.mark.slow
def test_a_run_that_its_budget_ended_is_over(tmp_path, caplog):
    first = budget_run(tmp_path)
    first.train()
    end = first.state.global_step
    assert end < 3 * 75 * 0.7
    again = budget_run(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == end
    assert_same_weights(weights(first.model), weights(again.model))
    with caplog.at_level(logging.WARNING):
        longer = budget_run(tmp_path, epochs=9)
        longer.train(resume_from_checkpoint=True)
    assert "planned for 3 epochs, this run is for 9" in caplog.text
    assert longer.state.global_step > 1.5 * end


def test_no_epochs(tmp_path):
    trainer = make(tmp_path, num_train_epochs=0)
    trainer.train()
    assert trainer.state.global_step == 0


def test_a_scheduler_made_for_the_full_run(tmp_path, caplog):
    model = tiny_lora()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40)
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        optimizers=(optimizer, scheduler),
        darel=DarelConfig(offline_keep=0.5, offline_rule="random"),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "scheduler in optimizers= was made before" in caplog.text


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


def test_a_rule_that_nobody_asks_may_be_another(tmp_path):
    """So that a run goes on by a version with another default."""
    darel = {"online_keep": 0.5, "online_rule": "hardest"}
    make(tmp_path, {**darel, "offline_rule": "middle"}, stop=4).train()
    make(tmp_path, {**darel, "offline_rule": "random"}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"online_rule='random': the checkpoint .* was made with 'hardest'"):
        make(tmp_path, {**darel, "online_rule": "random"}).train(resume_from_checkpoint=True)


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
