"""Batches of samples of similar length, for scoring and training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def token_batches(lengths: np.ndarray, max_tokens: int, max_rows: int) -> Iterator[np.ndarray]:
    """
    Cut samples into batches of similar length, longest first (a batch that does not fit fails at once, not late).

    Args:
        lengths (`np.ndarray`): int `[n]`.
        max_tokens (`int`): at most so many positions a batch, padding included; a longer sample is a batch of its own.
        max_rows (`int`): at most so many samples a batch.

    Yields:
        int64 positions; each position once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = int(np.clip(max_tokens // max(lengths[order[start]], 1), 1, max_rows))
        if start + rows < len(order) and lengths[order[start + rows]] == 0:  # a batch of empty texts has no columns
            rows = len(order) - start
        yield order[start : start + rows]
        start += rows


class ShuffledByLength(torch.utils.data.Sampler[int]):
    """
    Visit samples so that batches have samples of similar length, and long and short batches come in random order.

    In every epoch the samples are shuffled, cut into windows of 16 batches, sorted by length within a window, cut into
    batches, and the batches are shuffled. Trainer's own `"group_by_length"` goes from the longest batch to the
    shortest of every 50: where that is much of an epoch, training ends on short texts only.

    Args:
        lengths (`np.ndarray`): int `[n]`.
        batch_size (`int`): rows of a batch; in training those of an optimizer step.
        seed (`int`): decides the order, together with the epoch.
    """

    BATCHES = 16  # of a window: more have a little less padding, fewer mix more

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw, size = np.random.default_rng([self.seed, self.epoch]), self.batch_size
        order = draw.permutation(len(self.lengths))
        whole = len(order) // size * size
        for start in range(0, whole, self.BATCHES * size):
            window = order[start : min(start + self.BATCHES * size, whole)]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        yield from draw.permutation(order[:whole].reshape(-1, size)).ravel().tolist()
        rest = order[whole:]  # the batch that is not whole comes last
        yield from rest[np.argsort(self.lengths[rest], kind="stable")].tolist()

    def positions(self, rows: int, plain_rows: int) -> float:
        """
        Return the positions of an epoch in micro-batches of `rows`, relative to those of plain ones, drawn at random.

        Args:
            rows (`int`): each `rows` samples in our order are padded to their longest.
            plain_rows (`int`): likewise, in random order.
        """
        ours, order = np.fromiter(self, int), np.random.default_rng(self.seed).permutation(len(self.lengths))
        return _padded(self.lengths[ours], rows) / max(_padded(self.lengths[order], plain_rows), 1)


def _padded(lengths: np.ndarray, rows: int) -> int:
    """Count the positions of batches of `rows` samples each, all padded to their longest."""
    starts = range(0, len(lengths), rows)
    return sum(int(lengths[start : start + rows].max()) * len(lengths[start : start + rows]) for start in starts)
