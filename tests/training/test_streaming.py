"""Streams: online selection by ids that come with the rows; everything that needs to know them before is refused."""

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_lora, token_data, weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer

from darel_hf import DarelConfig, DarelTrainer, LossLedger
from darel_hf.selection.ledger import OpenLedger


class Stream(torch.utils.data.IterableDataset):
    """A torch stream of dicts."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def numbered(n=48):
    data = token_data(n)
    return data.add_column("number", [1000 + 7 * i for i in range(n)])


def stream(form, n=48):
    data = numbered(n)
    return data.to_iterable_dataset() if form == "datasets" else Stream(list(data))


def trainer_for(folder, data, darel, **settings):
    settings = {"max_steps": 6, "num_train_epochs": 1, **settings}
    return DarelTrainer(
        model=tiny_lora(),
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(**{"id_column": "number", **darel}),
    )


@pytest.mark.parametrize("form", ["datasets", "torch"])
def test_the_hardest_of_each_batch(tmp_path, form):
    darel = {"online_keep": 0.5, "online_rule": "hardest", "length_correction": False}
    trainer = trainer_for(tmp_path, stream(form), darel, learning_rate=0.0)
    trainer.train()
    ledger, data = trainer.report.ledger, numbered()
    model = tiny_lora().eval()
    with torch.no_grad():
        losses = np.array([model(**PadCollator()([row])).loss.item() for row in data])
    expected = np.zeros(48, int)
    for start in range(0, 48, 8):
        expected[start + np.argsort(-losses[start : start + 8])[:4]] = 1
    rows = ledger.rows(np.array(data["number"]))
    assert len(ledger) == 48
    np.testing.assert_array_equal(ledger.times_trained[rows], expected)
    np.testing.assert_allclose(ledger.loss[rows], losses, rtol=1e-5)
    assert trainer.report.rows_backpropagated == 24


@pytest.mark.parametrize("form", ["datasets", "torch"])
def test_tracking_a_stream_changes_no_weight(tmp_path, form):
    ours = trainer_for(tmp_path / "ours", stream(form), {"track": True})
    ours.train()
    plain = Trainer(
        model=tiny_lora(),
        args=arguments(tmp_path / "plain", max_steps=6),
        train_dataset=stream(form),
        data_collator=PadCollator(),
    )
    plain.train()
    assert_same_weights(weights(ours.model), weights(plain.model))
    assert np.isfinite(ours.report.ledger.train_loss).sum() == 24


def test_resume(tmp_path):
    darel = {"online_keep": 0.5, "online_rule": "hardest"}
    whole = trainer_for(tmp_path / "run", stream("datasets"), darel, save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer_for(tmp_path / "again", stream("datasets"), darel)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(weights(whole.model), weights(again.model))
    left, right = whole.report.ledger.state_dict(), again.report.ledger.state_dict()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize(
    ("darel", "match"),
    [
        ({"offline_keep": 0.5, "offline_rule": "middle"}, "offline_keep=0.5: train_dataset is a stream"),
        ({"budget_time": 0.5, "online_rule": "hardest"}, "budget_time=0.5: train_dataset is a stream"),
        (
            {"online_keep": 0.5, "online_rule": "hardest", "rescore_every": 2},
            "rescore_every=2: a stream has no second epoch",
        ),
        (
            {"online_keep": 0.5, "online_rule": "hardest", "id_column": None},
            "id_column=None: the rows of a stream have no numbers",
        ),
        (
            {"online_keep": 0.5, "online_rule": "hardest", "group_column": "group"},
            "group_column='group': train_dataset is a stream",
        ),
    ],
)
def test_what_cannot_be_done_with_a_stream(tmp_path, darel, match):
    with pytest.raises(ValueError, match=match):
        trainer_for(tmp_path, stream("datasets"), darel)


@pytest.mark.parametrize(("column", "match"), [("absent", "no such key"), ("input_ids", "ids must be integers")])
def test_rows_without_ids(tmp_path, column, match):
    with pytest.raises((ValueError, TypeError), match=match):
        trainer_for(
            tmp_path, stream("torch"), {"online_keep": 0.5, "online_rule": "hardest", "id_column": column}
        ).train()


def test_max_steps_is_asked_for_by_trainer_itself(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_for(tmp_path, stream("datasets"), {"online_keep": 0.5, "online_rule": "hardest"}, max_steps=-1)


batches = st.lists(st.lists(st.integers(0, 2**62), min_size=1, max_size=8, unique=True), max_size=12)


@given(batches)
def test_an_open_ledger_knows_what_a_closed_one_knows(seen):
    open_ledger, closed = OpenLedger(), LossLedger([i for ids in seen for i in ids])
    for step, ids in enumerate(seen):
        losses = np.arange(len(ids)) + step
        for ledger in (open_ledger, closed):
            ledger.record_scores(np.array(ids), losses, np.ones(len(ids)), step)
            ledger.record_training(np.array(ids[:1]))
    again = OpenLedger()
    again.record_training(np.array([7, 9]))  # what a failed attempt has left
    again.load_state_dict(open_ledger.state_dict())
    emptied = OpenLedger()
    emptied.record_training(np.array([7, 9]))
    emptied.load_state_dict(OpenLedger().state_dict())
    assert len(emptied) == 0
    row = emptied.rows(np.array([9]))
    assert emptied.times_trained[row].tolist() == [0]
    for ledger in (open_ledger, again):
        assert len(ledger) == len(closed)
        rows = ledger.rows(closed.ids)
        for name in ("ids", "loss", "n_tokens", "scored_step", "times_scored", "times_trained"):
            np.testing.assert_array_equal(getattr(ledger, name)[rows], getattr(closed, name), err_msg=name)
