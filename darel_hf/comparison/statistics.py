"""What a few seeds can tell: intervals of paired differences, and how many seeds it takes to show something."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of all intervals together
POWER = 0.8  # chance with which the seeds asked for show what they are asked for
MOST_SEEDS = 1000  # nobody runs more; from there on the answer is that it cannot be shown this way


class Interval(NamedTuple):
    """The mean of paired differences, its limits (NaN where seeds do not differ, or are one), their spread."""

    mean: float
    low: float
    high: float
    deviation: float
    seeds: int


def t_tail(x: float, freedom: int, shift: float = 0.0) -> float:
    """
    Return the chance that a t-distributed number is above `x`.

    Such a number is (Z + shift) / U, Z normal and U the spread of `freedom` + 1 samples over the true one; for a given
    U the chance is that of a normal number, and it is averaged over U, on a logarithmic scale.

    Args:
        x (`float`): where the tail begins.
        freedom (`int`): degrees of freedom, at least 1.
        shift (`float`): noncentrality; 0 for Student's distribution.
    """
    width = 12 / math.sqrt(2 * freedom)
    s, step = np.linspace(-45 / freedom - width, width, 2001, retstep=True)
    u = np.exp(s)
    log_density = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_density + freedom * s - freedom * u**2 / 2)  # of log U
    above = np.array([math.erfc(z / math.sqrt(2)) / 2 for z in x * u - shift])
    return float((density * above).sum() * step)


@functools.lru_cache(maxsize=1024)
def t_quantile(tail: float, freedom: int) -> float:
    """Return what a t-distributed number is above with the chance `tail`, in (0, 0.5]."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


def critical(seeds: int, comparisons: int = 1) -> float:
    """Return how many standard errors an interval reaches to either side: Student's, Bonferroni's for several arms."""
    return t_quantile((1 - LEVEL) / 2 / comparisons, seeds - 1)


def interval(differences: Sequence[float], comparisons: int = 1) -> Interval:
    """
    Return the mean of paired differences with its confidence interval.

    Args:
        differences (`Sequence[float]`): `[seeds]`, at least one.
        comparisons (`int`): how many such intervals are read together; with 0.95 all of them hold (Bonferroni).

    Returns:
        [`Interval`]: without limits (NaN) for one seed, and where all differences are the same: a spread that was not
        seen is no evidence that there is none.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    deviation = float(values.std(ddof=1)) if n > 1 else math.nan
    if n < 2 or deviation <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return Interval(mean, math.nan, math.nan, deviation, n)
    reach = critical(n, comparisons) * deviation / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, deviation, n)


def power(seeds: int, deviation: float, gap: float, comparisons: int = 1) -> float:
    """
    Return the chance that an interval ends before a limit (the noncentral t-distribution).

    Args:
        seeds (`int`): how many paired differences there are, at least 2.
        deviation (`float`): their true standard deviation.
        gap (`float`): how far their true mean is from the limit, on the right side of it.
        comparisons (`int`): of [`interval`].
    """
    return t_tail(critical(seeds, comparisons), seeds - 1, gap * math.sqrt(seeds) / deviation)


def seeds_needed(deviation: float, gap: float, comparisons: int = 1) -> int | None:
    """
    Return the smallest number of seeds that keeps an interval off a limit with a chance of `POWER`.

    Args: as of [`power`].

    Returns:
        `int`, at least 2; `None` if the mean is beyond the limit, or for more than `MOST_SEEDS`.
    """
    if not gap > 0 or power(MOST_SEEDS, deviation, gap, comparisons) < POWER:
        return None
    low, high = 1, 2  # too few, perhaps enough
    while power(high, deviation, gap, comparisons) < POWER:
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, deviation, gap, comparisons) >= POWER else (middle, high)
    return high
