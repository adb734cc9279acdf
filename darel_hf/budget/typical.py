"""Which batches stand for all of a run, where only a few can be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data import WithIds, feature_length, is_plain, prompt_tokens

ITEMS = 256  # that are read to choose among their batches, at most


def typical_batches(dataset: Any, rows: int, count: int, visited: Sequence[int] | None = None) -> list[np.ndarray]:
    """
    Choose batches whose mean length is that of many, so that what steps on them take is what steps of the run take.

    Batches of texts differ in what they cost, and the mean of a few drawn at random is off by a tenth. What a step
    costs goes with the positions of a padded batch, with its tokens, with those tokens where prompts that several rows
    have count once, or with what follows the prompts, as training computes it: in all four the batches that are chosen
    are, on average, as many are. They are drawn at random of data without tokens, and of data whose items are made
    when they are read, which may be slow: none is read here.

    Args:
        dataset: map-style, items as the collator gets them.
        rows (`int`): of a batch.
        count (`int`): how many are chosen.
        visited (`Sequence[int]`, *optional*): the samples of an epoch in the order of the run, where that is not drawn
            at random.

    Returns:
        positions of samples, int `[rows]` each: first one that is no better than any (to warm up with), then those.

    Example:

    ```python
    >>> rows = [{"input_ids": [1] * (2 + i % 9)} for i in range(64)]
    >>> [len(part) for part in typical_batches(rows, 16, 2)]
    [16, 16, 16]
    ```
    """
    generator = np.random.default_rng(0)
    parts = _drawn(generator, len(dataset), rows, count + 1, visited)
    stored = dataset.dataset if isinstance(dataset, WithIds) else dataset
    quick = isinstance(stored, list) or is_plain(stored)
    if not quick or not _has_tokens(dataset[0]):
        return parts[: count + 1]
    costs = [_costs([dataset[int(i)] for i in part]) for part in parts]
    found = np.array(costs) / np.maximum(np.mean(costs, axis=0), 1e-9)
    left, total, chosen = list(range(len(found))), np.zeros(found.shape[1]), []
    while len(chosen) < count:
        best = min(left, key=lambda k: np.square((total + found[k]) / (len(chosen) + 1) - 1).sum())
        left.remove(best)
        chosen.append(best)
        total += found[best]
    return [parts[left[0]], *(parts[k] for k in chosen)]


def _drawn(
    generator: np.random.Generator, samples: int, rows: int, least: int, visited: Sequence[int] | None
) -> list[np.ndarray]:
    """Return positions of batches as an epoch has them, in random order; at least so many."""
    most = max(ITEMS // rows, least)
    order = np.arange(samples) if visited is None else np.asarray(visited)
    if len(order) < rows:
        return [generator.choice(samples, size=rows, replace=samples < rows) for _ in range(most)]
    parts: list[np.ndarray] = []
    while len(parts) < least:
        epoch = generator.permutation(order) if visited is None else order
        cut = epoch[: len(epoch) // rows * rows].reshape(-1, rows)
        parts += list(cut[generator.permutation(len(cut))])
    return parts[:most]


def _has_tokens(item: Any) -> bool:
    return isinstance(item, Mapping) and "input_ids" in item


def _costs(items: list[Mapping[str, Any]]) -> list[float]:
    """Return what the cost of a step on a batch can go with, see [`typical_batches`]."""
    lengths = [feature_length(item) for item in items]
    try:
        prompts = [prompt_tokens(item).tobytes() for item in items]
    except ValueError:  # nothing says which tokens are prompt
        return [max(lengths), sum(lengths)]
    size = np.dtype(np.int64).itemsize
    completions = sum(lengths) - sum(map(len, prompts)) // size
    return [max(lengths), sum(lengths), completions + sum(map(len, set(prompts))) // size, completions]
