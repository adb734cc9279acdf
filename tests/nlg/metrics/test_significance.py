"""Tests of tests: blocks change nothing, p-values are uniform where there is nothing to find, many are corrected."""

import math
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, TER
from sacrebleu.significance import PairedTest
from texts import columns

from darel_hf.nlg.metrics import NLGMetrics, holm, randomization_p_value, significance
from darel_hf.nlg.metrics.significance import bootstrap, ranks, swapped


def test_blocks_draw_the_same(monkeypatch):
    statistics = np.random.default_rng(0).normal(size=(37, 3))
    whole = np.concatenate([sums for _, sums in bootstrap(statistics, 50, 7)])
    coins = np.concatenate([a for _, a, _ in swapped(statistics, statistics[::-1], 50, 7)])
    expected = np.random.default_rng(7).choice(37, size=(50, 37), replace=True)
    assert whole == pytest.approx(statistics[expected].sum(axis=1))
    for block in (1, 100, 37 * 7):
        monkeypatch.setattr(significance, "BLOCK", block)
        parts = list(bootstrap(statistics, 50, 7))
        assert len(parts) > 1 and np.concatenate([sums for _, sums in parts]) == pytest.approx(whole)
        assert np.concatenate([a for _, a, _ in swapped(statistics, statistics[::-1], 50, 7)]) == pytest.approx(coins)


def test_swapping_keeps_the_sum():
    one, other = np.random.default_rng(0).normal(size=(2, 20, 4))
    for _, a, b in swapped(one, other, 30, 1):
        assert a + b == pytest.approx(np.broadcast_to((one + other).sum(axis=0), a.shape))


def texts(draw, n, quality):
    words = ["the", "inn", "pub", "is", "cheap", "quiet", "near", "a", "river", "and", "good", "food"]
    references = [draw.choices(words, k=draw.randint(5, 12)) for _ in range(n)]
    spoil = lambda text, share: " ".join(draw.choice(words) if draw.random() < share else w for w in text)  # noqa: E731
    systems = [[spoil(text, share) for text in references] for share in quality]
    return systems, [[" ".join(text)] for text in references]


def test_p_values_of_randomization_are_uniform_under_the_null():
    """Two systems of the same quality, 2,000 times: p is below a level as often as the level says."""
    draw, found = np.random.default_rng(0), []
    for seed in range(2000):
        one, other = draw.normal(size=(2, 40, 1))
        differences = np.concatenate([(a - b)[:, 0] for _, a, b in swapped(one, other, 199, seed)])
        found.append(randomization_p_value(differences, float((one - other).sum())))
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        slack = 4 * math.sqrt(level * (1 - level) / len(found))
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=slack)


def test_randomization_is_near_sacrebleus():
    draw = random.Random(1)
    (one, other), references = texts(draw, 120, (0.28, 0.33))
    ours = NLGMetrics(only=["bleu", "ter"], bootstrap=2000, processes=1)(one, references, other)
    metrics = {"BLEU": BLEU(lowercase=True), "TER": TER()}
    systems = [("other", other), ("one", one)]
    _, theirs = PairedTest(systems, metrics, columns(references), test_type="ar", n_samples=2000)()
    for name in ("bleu", "ter"):
        assert ours["p_randomization"][name] == pytest.approx(theirs[name.upper()][1].p_value, abs=0.03)


def test_holm():
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_one_swap_as_far_as_observed_counts_though_rounding_moves_it():
    assert randomization_p_value(np.array([0.3 - 0.1, 0.0]), 0.2) == pytest.approx(2 / 3)


def test_ranks_have_ties_where_the_data_cannot_tell():
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 1, (4, 2000))
    scores = [10.0, 10.1, 20.0, 5.0]
    assert ranks(scores, noise + np.array(scores)[:, None]) == [2, 2, 1, 4]
    assert ranks(scores, noise + np.array(scores)[:, None], lower_is_better=True) == [2, 2, 4, 1]
    assert ranks([1.0, 1.0], np.ones((2, 50))) == [1, 1]


def test_too_few_resamples_are_named():
    (one, other), references = texts(random.Random(0), 20, (0.1, 0.8))
    many = {f"s{i}": [one, other][i % 2] for i in range(6)}
    result = NLGMetrics(only=["ter"], bootstrap=100, processes=1).evaluate(many, references).result
    assert "100 resamples are too few to tell 6 systems apart; take 1000" in result["notes"]
