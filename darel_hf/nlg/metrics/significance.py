"""What chance does to scores: bootstrap, approximate randomization, correction for many tests, ranks; in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from sacrebleu.metrics.base import Metric

BLOCK = 4_000_000  # cells of draws at a time, 32 MB
LEVEL = 0.05


def scores_of(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """Return the corpus score of each row of summed statistics: float64 `[rows, d]` -> `[rows]`."""
    return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])


def bootstrap(statistics: np.ndarray, resamples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """
    Draw segments with replacement and yield sums of their statistics, block by block.

    Args:
        statistics (`np.ndarray`): float64 `[n, d]`.
        resamples (`int`): how many draws; all see the same ones for the same seed, however the blocks are cut.
        seed (`int`): of the draws.

    Yields:
        `tuple`: which resamples, and float64 `[resamples in the block, d]`.
    """
    n = len(statistics)
    generator = np.random.default_rng(seed)
    for part in _blocks(resamples, n):
        drawn = generator.choice(n, size=(part.stop - part.start, n), replace=True)
        counts = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
        yield part, counts @ statistics


def swapped(
    one: np.ndarray, other: np.ndarray, trials: int, seed: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """
    Swap the segments of two systems at random and yield the sums of both, block by block.

    Args:
        one, other (`np.ndarray`): float64 `[n, d]`, statistics of the same segments.
        trials, seed (`int`): how many, and of which coins.
    """
    generator = np.random.default_rng([seed, 1])
    sums, other_sums, difference = one.sum(axis=0), other.sum(axis=0), other - one
    for part in _blocks(trials, len(one)):
        coins = generator.random((part.stop - part.start, len(one))) < 0.5
        moved = coins.astype(np.float64) @ difference
        yield part, sums + moved, other_sums - moved


def _blocks(rows: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def paired_p_value(differences: np.ndarray, observed: float) -> float:
    """
    Return the two-sided p-value of a paired bootstrap: how often chance alone moves the difference as far as observed.

    Chance is the resampled differences, centred on their mean (Koehn 2004); corrected by one, so that it is never 0.
    sacrebleu takes absolute values before it centres, which makes its values about half as large.

    Args:
        differences (`np.ndarray`): float `[resamples]`, of the two systems on the same draws.
        observed (`float`): their difference on all segments.
    """
    beyond = int((np.abs(differences - differences.mean()) >= abs(observed)).sum())
    return (beyond + 1) / (len(differences) + 1)


def randomization_p_value(differences: np.ndarray, observed: float) -> float:
    """
    Return the two-sided p-value of approximate randomization (Riezler and Maxwell 2005), corrected by one.

    Args:
        differences (`np.ndarray`): float `[trials]`, of the two systems with segments swapped at random.
        observed (`float`): their difference as they are.
    """
    beyond = int((np.abs(differences) >= abs(observed) * (1 - 1e-9)).sum())  # as far but for rounding is as far
    return (beyond + 1) / (len(differences) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Correct p-values for how many there are (Holm 1979): the chance of one false finding among all keeps the level.

    Example:

    ```python
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    ```
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def ranks(scores: Sequence[float], resampled: np.ndarray, lower_is_better: bool = False) -> list[int]:
    """
    Rank systems: 1 + how many are shown to be better, each pair tested by the bootstrap, corrected for all pairs.

    Systems of one rank are those that the data cannot tell from each other, or that as many others beat.

    Args:
        scores (`Sequence[float]`): of each system.
        resampled (`np.ndarray`): float `[systems, resamples]`, on the same draws.
        lower_is_better (`bool`): as with TER.
    """
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    corrected = holm([paired_p_value(resampled[i] - resampled[j], scores[i] - scores[j]) for i, j in pairs])
    beaten = [0] * len(scores)
    for (i, j), p in zip(pairs, corrected, strict=True):
        if p < LEVEL and scores[i] != scores[j]:
            beaten[i if (scores[i] < scores[j]) != lower_is_better else j] += 1
    return [1 + count for count in beaten]
