"""The ledger: last write wins, ranks end equal, state comes back, errors name ids."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf import LossLedger
from darel_hf.selection.ledger import FIELDS


def test_records_and_lookup():
    ledger = LossLedger([30, 10, 20])
    ledger.record_scores([20, 10], [2.0, 1.0], [5, 4], step=7)
    ledger.record_scores([20], [2.5], [5], step=9)
    ledger.record_training([30, 30])
    assert ledger.ids.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(ledger.loss, np.float32([1.0, 2.5, np.nan]))
    assert ledger.scored_step.tolist() == [7, 9, -1]
    assert ledger.times_scored.tolist() == [1, 2, 0]
    assert ledger.times_trained.tolist() == [0, 0, 2]
    assert ledger.coverage == pytest.approx(1 / 3)


def test_modes_are_kept_apart():
    ledger = LossLedger(range(2))
    ledger.record_train_losses([0], [9.0])
    assert np.isnan(ledger.loss).all() and ledger.train_loss[0] == 9.0


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.floats(0, 10), st.booleans()), min_size=1, max_size=30)
)
@settings(max_examples=60, deadline=None)
def test_merging_makes_all_ranks_equal_and_loses_nothing(events):
    ledgers = [LossLedger(range(10)) for _ in range(3)]
    for step, (rank, sample, loss, trains) in enumerate(events):
        ledgers[rank].record_scores([sample], [loss], [1], step=step)
        if trains:
            ledgers[rank].record_training([sample])
    pending = [ledger.take_pending() for ledger in ledgers]
    for rank, ledger in enumerate(ledgers):
        ledger.merge(pending, rank)
    for name in FIELDS:
        for other in ledgers[1:]:
            np.testing.assert_array_equal(getattr(ledgers[0], name), getattr(other, name), err_msg=name)
    assert ledgers[0].times_scored.sum() == len(events)
    assert ledgers[0].times_trained.sum() == sum(trains for *_, trains in events)
    assert set(np.flatnonzero(~np.isnan(ledgers[0].loss))) == {sample for _, sample, _, _ in events}


def test_state_comes_back():
    ledger = LossLedger(range(5))
    ledger.record_scores([1, 2], [0.5, 0.25], [3, 4], step=2, correct=[1.0, 0.0])
    other = LossLedger(range(5))
    other.load_state_dict({name: values.copy() for name, values in ledger.state_dict().items()})
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(ledger, name), getattr(other, name))
    with pytest.raises(ValueError, match="other samples"):
        LossLedger(range(6)).load_state_dict(ledger.state_dict())


def test_unknown_ids_and_nan_losses_are_named():
    ledger = LossLedger([1, 5, 9])
    with pytest.raises(ValueError, match=r"\[7\]"):
        ledger.record_training([5, 7])
    with pytest.raises(ValueError, match=r"\[5\]"):
        ledger.record_scores([1, 5], [1.0, float("nan")], [1, 1], step=0)
    assert np.isnan(ledger.loss).all()


def test_parquet(tmp_path):
    ledger = LossLedger([4, 2])
    ledger.record_scores([4], [1.5], [6], step=1)
    ledger.to_parquet(tmp_path / "ledger.parquet")
    table = pq.read_table(tmp_path / "ledger.parquet")
    assert table["sample_id"].to_pylist() == [2, 4]
    assert table["loss"].to_pylist()[1] == 1.5
    with pytest.raises(FileExistsError, match="choose another name"):
        ledger.to_parquet(tmp_path / "ledger.parquet")
