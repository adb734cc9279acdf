"""Each stage by itself: made, asked and restored without the others."""

import time

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, tiny_lora, token_data

from darel_hf import DarelConfig, DarelTrainer, Selector
from darel_hf.data import ID_KEY, CarryIds
from darel_hf.training.clock import Clock
from darel_hf.training.dataset import TrainingSet
from darel_hf.training.offline import OfflineStage
from darel_hf.training.online import OnlineStage
from darel_hf.training.planner import Planner


def trainer_for(folder, data=None, **darel):
    return DarelTrainer(
        model=tiny_lora(),
        args=arguments(folder),
        train_dataset=token_data(20) if data is None else data,
        data_collator=PadCollator(),
        darel=DarelConfig(**darel),
    )


def clock():
    return Clock(torch.device("cpu"))


def test_the_clock_counts_the_outermost_block_once():
    watch = clock()
    with watch.count("evaluation", wait=False), watch.count("evaluation", wait=False):
        time.sleep(0.02)
    with pytest.raises(RuntimeError), watch.count("scoring"):
        raise RuntimeError
    assert 0.02 <= watch.seconds["evaluation"] <= watch.elapsed and watch.seconds["scoring"] > 0
    later = clock()
    later.load_state_dict({"seconds": {"offline": 3.0}, "elapsed": 100.0})
    assert later.seconds["offline"] == 3.0 and later.elapsed >= 100


def test_the_training_set_knows_ids_groups_and_lengths(tmp_path):
    data = TrainingSet(
        trainer_for(tmp_path, group_column="group", offline_keep=0.5, offline_rule="middle", batch_by_length=True)
    )
    data.take_fingerprint()
    data.learn()
    assert data.ids.tolist() == list(range(20)) and set(data.groups) == set(range(5))
    assert data.lengths.tolist() == [len(row["input_ids"]) for row in token_data(20)]
    dataset, collator = data.batching
    assert ID_KEY in dataset[0] and isinstance(collator, CarryIds)
    rows = data.few_rows()
    assert rows["input_ids"].shape[0] == 4 and ID_KEY not in rows
    used = rows["attention_mask"].sum(1)
    assert used[0] == used.min() and used[1] == used.max()
    other = TrainingSet(trainer_for(tmp_path))
    other.load_state_dict(data.state_dict())
    np.testing.assert_array_equal(other.lengths, data.lengths)


def test_a_planner_plans_without_stages(tmp_path):
    trainer = trainer_for(tmp_path, data=token_data(200), budget_time=0.5, fast=False, offline_rule="random")
    planner = Planner(trainer, TrainingSet(trainer), clock())
    planner.try_accelerators()
    assert planner.accelerators == []
    planner.draft(scores_free=True)
    planner.measure(None, 0.0)
    planner.solve()
    assert planner.plan.costs.measured and planner.plan.predicted_time == pytest.approx(0.5, abs=0.15)
    planner.keep_budget(lambda step: False)
    assert planner.pace is not None and planner.full_seconds > 0
    again = Planner(trainer, planner.data, clock())
    again.load_state_dict(planner.state_dict())
    assert again.plan == planner.plan


def test_an_offline_stage_scores_and_selects_without_a_plan(tmp_path):
    trainer = trainer_for(tmp_path, offline_keep=0.5, offline_rule="hardest", length_correction=False)
    data, watch = TrainingSet(trainer), clock()
    stage = OfflineStage(trainer, data, watch, tmp_path)
    scores = stage.score()
    selector = Selector(trainer.darel, data.ids)
    stage.select(selector, scores)
    assert sorted(stage.positions) == sorted(np.argsort(-scores.losses, kind="stable")[:10])
    assert watch.seconds["offline"] > 0 and not stage.scores_reused
    assert stage.kept(selector.ledger).sum() == 10
    again = OfflineStage(trainer, data, clock(), tmp_path)
    np.testing.assert_array_equal(again.score().losses, scores.losses)
    assert again.scores_reused
    restored = OfflineStage(trainer, data, clock(), tmp_path)
    restored.load_state_dict(stage.state_dict())
    np.testing.assert_array_equal(restored.positions, stage.positions)


def test_an_online_stage_chooses_without_planner_and_offline_stage(tmp_path):
    trainer = trainer_for(tmp_path, online_keep=0.5, online_rule="hardest", length_correction=False)
    selector = Selector(trainer.darel, range(20))
    stage = OnlineStage(trainer, selector, clock(), batch_size=4)
    collator = CarryIds(PadCollator())
    columns = ("input_ids", "attention_mask", "labels")
    items = [{**{k: row[k] for k in columns}, ID_KEY: i} for i, row in enumerate(token_data(20))]
    loader = torch.utils.data.DataLoader(items, batch_size=8, collate_fn=collator)
    stage.begin(loader)
    stage.start_step()
    chosen = stage.select(collator(items[:8]))
    assert chosen["input_ids"].shape[0] == 4 and ID_KEY not in chosen
    ledger = selector.ledger
    hardest = np.argsort(-ledger.loss[:8], kind="stable")[:4]
    assert set(np.flatnonzero(ledger.times_trained)) == set(hardest)
    assert stage.begin_row(chosen)["labels"].shape[0] == 4
    settle = stage.end_row()
    loss = torch.tensor(1.0)
    assert settle(loss) is loss
    values = stage.logs(1.0)
    assert values["darel/rows_backpropagated"] == 4 and values["darel/kept_fraction"] == 0.5
    again = OnlineStage(trainer, Selector(trainer.darel, range(20)), clock(), batch_size=4)
    again.load_state_dict(stage.state_dict())
    np.testing.assert_array_equal(again.selector.ledger.loss, ledger.loss)
    assert again.trained_rows == 4
