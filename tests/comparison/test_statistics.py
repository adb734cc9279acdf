"""Student's distribution against scipy; intervals and the number of seeds against simulations with a known spread."""

import math

import numpy as np
import pytest
from scipy import stats

from darel_hf.comparison.statistics import LEVEL, POWER, critical, interval, power, seeds_needed, t_quantile, t_tail


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 400])
def test_tails_and_quantiles_are_scipys(freedom):
    for tail in (0.4, 0.1, 0.025, 0.00625, 0.0005):
        assert t_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail, freedom), rel=1e-9)
    for x in (-2.0, 0.0, 0.7, 3.0, 12.0):
        assert t_tail(x, freedom) == pytest.approx(stats.t.sf(x, freedom), abs=1e-10)
        for shift in (-1.5, 1.0, 5.0):
            assert t_tail(x, freedom, shift) == pytest.approx(1 - stats.nct.cdf(x, freedom, shift), abs=1e-9)


def test_an_interval_is_scipys_and_bonferronis():
    values = [0.3, -1.2, 0.4, 2.0]
    found = interval(values, comparisons=3)
    low, high = stats.t.interval(1 - 0.05 / 3, 3, np.mean(values), stats.sem(values))
    assert found[:3] == pytest.approx((np.mean(values), low, high))
    assert found.deviation == pytest.approx(np.std(values, ddof=1)) and found.seeds == 4


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.0]])
def test_what_shows_no_spread_has_no_limits(values):
    found = interval(values)
    assert found.mean == values[0] and math.isnan(found.low) and math.isnan(found.high)


def test_all_intervals_hold_as_often_as_they_say():
    generator = np.random.default_rng(0)
    draws, arms, seeds = 4000, 4, 3
    values = generator.normal(0, 1, (draws, arms, seeds)) - generator.normal(0, 1, (draws, 1, seeds))
    reach = critical(seeds, arms) * values.std(axis=2, ddof=1) / math.sqrt(seeds)
    holds = (np.abs(values.mean(axis=2)) < reach).all(axis=1).mean()
    assert LEVEL - 0.012 < holds < LEVEL + 0.04  # Bonferroni's is on the safe side


@pytest.mark.parametrize("comparisons", [1, 4])
@pytest.mark.parametrize(
    ("deviation", "mean", "margin"), [(1.4, 0.0, 1.0), (2.0, -0.4, 1.5), (0.8, 0.0, 1.0), (1, 0, 3)]
)
def test_as_many_seeds_as_asked_for_show_it_as_often_as_promised(deviation, mean, margin, comparisons):
    seeds = seeds_needed(deviation, margin + mean, comparisons)
    generator = np.random.default_rng(1)

    def shown(n, draws=20_000):  # the test of the table: the whole interval above -margin
        values = generator.normal(mean, deviation, (draws, n))
        reach = critical(n, comparisons) * values.std(axis=1, ddof=1) / math.sqrt(n)
        return (values.mean(axis=1) - reach > -margin).mean()

    promised = power(seeds, deviation, margin + mean, comparisons)
    assert promised >= POWER and shown(seeds) == pytest.approx(promised, abs=0.012)
    assert seeds == 2 or shown(seeds - 1) < POWER + 0.012  # and no seed too many


def extended(mean, deviation, margin, pilot, generator):
    """Look at a few seeds, run as many as asked for, look again: when `no worse` was shown."""
    values = generator.normal(mean, deviation, pilot)
    found = interval(values)
    if found.low > -margin:
        return "at once"
    needed = seeds_needed(found.deviation, margin + min(found.mean, 0.0))
    if needed is None:
        return "not asked"
    values = np.append(values, generator.normal(mean, deviation, max(needed - pilot, 1)))
    return "then" if interval(values).low > -margin else "not"


@pytest.mark.slow
def test_what_docs_say_of_a_spread_that_three_seeds_showed():
    generator = np.random.default_rng(2)

    def shares(mean, draws):
        ends = [extended(mean, 1.0, 1.0, 3, generator) for _ in range(draws)]
        return {end: ends.count(end) / draws for end in ("at once", "then", "not", "not asked")}

    for mean, promised in ((0.0, 0.90), (-0.5, 0.69)):
        found = shares(mean, 800)
        assert found["then"] / (found["then"] + found["not"]) == pytest.approx(promised, abs=0.05)
    at_the_margin = shares(-1.0, 2000)
    assert at_the_margin["at once"] + at_the_margin["then"] == pytest.approx(0.055, abs=0.02)


def test_where_no_number_of_seeds_is_enough():
    assert seeds_needed(1.0, 0.0) is None and seeds_needed(1.0, -0.5) is None
    assert seeds_needed(1.0, 0.001) is None
