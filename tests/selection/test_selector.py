"""The selector without a trainer: an own loop, counters instead of random state, partial batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf import DarelConfig, Selector
from darel_hf.selection import Scores


@given(n=st.integers(1, 40), batch_size=st.integers(1, 8), keep=st.floats(0.1, 1.0), number=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_counts_of_full_and_partial_batches(n, batch_size, keep, number):
    selector = Selector(DarelConfig(online_keep=keep, online_rule="hardest"), range(100))
    candidates = selector.candidate_rows(batch_size)
    n = min(n, candidates)
    rows, _ = selector.select(np.arange(n), np.linspace(0, 1, n), batch_size, number)
    expected = batch_size if n == candidates else max(1, round(batch_size / candidates * n))
    assert len(rows) == expected
    assert selector.ledger.times_trained.sum() == expected


def test_random_choices_depend_on_seed_and_batch_alone():
    def choose(seed, batch):
        selector = Selector(DarelConfig(online_keep=0.5, online_rule="random"), range(50), seed=seed)
        return selector.select(np.arange(20), None, 10, batch)[0].tolist()

    assert choose(1, 7) == choose(1, 7)
    assert choose(1, 7) != choose(1, 8)
    assert choose(1, 7) != choose(2, 7)


def test_a_sample_may_occur_twice_in_a_batch():
    """Loaders repeat samples to even out batches."""
    selector = Selector(DarelConfig(online_keep=0.5, online_rule="hardest", length_correction=False), range(5))
    rows, _ = selector.select([3, 3, 1, 0], [2.0, 2.0, 1.0, 0.0], 2, 0)
    assert rows.tolist() == [0, 1]
    assert selector.ledger.times_trained[3] == 2


def test_fresh_epochs():
    selector = Selector(DarelConfig(online_keep=0.5, online_rule="hardest", rescore_every=3), range(5))
    assert [epoch for epoch in range(8) if selector.is_fresh(epoch)] == [0, 3, 6]


def test_offline_weights_and_ledger():
    losses = np.linspace(0, 1, 10, dtype=np.float32)
    scores = Scores(np.arange(10), losses, np.full(10, 3, np.int32), np.full(10, np.nan, np.float32), {})
    selector = Selector(DarelConfig(offline_keep=0.7, offline_rule="infobatch"), range(10))
    selection = selector.select_offline(scores)
    assert len(selection.positions) == 7 and selection.weights.sum() == pytest.approx(10)
    np.testing.assert_array_equal(selector.ledger.loss, losses)


def test_an_own_loop_learns_from_half_of_the_rows():
    """The loop of docs/settings.md, on a separable problem: it must work, not merely run."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    selector = Selector(DarelConfig(online_keep=0.5, online_rule="hardest"), ids=range(256))
    number = 0
    for _ in range(5):
        for ids in torch.randperm(256).split(selector.candidate_rows(16)):
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")
            rows, _ = selector.select(ids, losses, batch_size=16, batch=number)
            kept = ids[rows]
            loss = torch.nn.functional.cross_entropy(model(x[kept]), y[kept])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            number += 1
    assert selector.ledger.times_trained.sum() == 5 * 128
    assert model(x).argmax(1).eq(y).float().mean() > 0.9


def test_reference_losses_follow_their_ids():
    config = DarelConfig(
        online_keep=0.5, online_rule="rho_loss", reference_scores="any.parquet", length_correction=False
    )
    selector = Selector(config, ids=[30, 10, 20, 40], reference=np.array([3.0, 1.0, 2.0, 0.0]))
    rows, _ = selector.select(np.array([10, 20, 30, 40]), np.array([3.0, 3.0, 3.0, 0.5]), 2, 0)
    assert rows.tolist() == [0, 1]  # differences 2, 1, 0, 0.5
