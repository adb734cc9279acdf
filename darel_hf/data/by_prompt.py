"""Samples by prompt: how many have the same one, and batches of them, for whoever computes it once."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files import require
from .columns import read_items


def prompt_length(taught: np.ndarray) -> int:
    """Return how many tokens precede the first that is taught (bool `[n]`), but for the last of them, or n."""
    return max(int(taught.argmax()) - 1, 0) if taught.any() else len(taught)


def prompt_of(item: Any) -> bytes:
    """Return what tells a sample's prompt from others, in 16 bytes: there may be millions; see [`prompt_tokens`]."""
    return digest_of(prompt_tokens(item))


def digest_of(tokens: np.ndarray) -> bytes:
    """Return 16 bytes that tell some tokens from others."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def prompt_tokens(item: Any) -> np.ndarray:
    """
    Return the tokens of a sample's prompt, int64 `[n]`, see [`prompt_length`].

    Args:
        item (`Mapping`): `input_ids`, and `labels` or trl's `completion_mask`, of equal length.

    Raises:
        ValueError: where nothing says which tokens are prompt.
    """
    known = isinstance(item, Mapping) and np.ndim(item.get("input_ids")) == 1
    taught = known and (item.get("labels") if "labels" in item else item.get("completion_mask"))
    told = known and taught is not None and np.ndim(taught) == 1
    remedy = "samples need input_ids, and labels or a completion_mask, to know their prompts by; give 1"
    require(told, "share_prompts", sorted(item) if isinstance(item, Mapping) else type(item).__name__, remedy)
    tokens, taught = np.asarray(item["input_ids"], np.int64), np.asarray(taught)
    return tokens[: prompt_length(taught != (-100 if "labels" in item else 0))]


def by_beginning(tokens: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    Sort samples so that those which begin alike follow one another.

    Args:
        tokens (`Sequence[np.ndarray]`): of each of n samples, int64 `[k]`, or `[k, m]` where m numbers say what is at
            a position.

    Returns:
        their order, int64 `[n]`; and how many tokens each one in it begins with as the one before does, int64 `[n]`,
        which has more in common with it than any other before.

    Example:

    ```python
    >>> by_beginning([np.array([5, 6, 7]), np.array([5, 2]), np.array([5, 6, 8, 9])])
    (array([1, 0, 2]), array([0, 1, 2]))
    ```
    """
    order = sorted(range(len(tokens)), key=lambda i: tokens[i].tolist())
    common = np.zeros(len(order), np.int64)
    for place in range(1, len(order)):
        before, own = tokens[order[place - 1]], tokens[order[place]]
        length = min(len(before), len(own))
        unlike = (own[:length] != before[:length]).any(axis=tuple(range(1, own.ndim)))
        common[place] = int(unlike.argmax()) if unlike.any() else length
    return np.array(order, np.int64), common


def common_beginnings(
    prompts: Sequence[Sequence[int]], least: int, few: int
) -> dict[tuple[int, ...], tuple[int, int]]:
    """
    Find what several prompts begin with: what all do, and what some of them go on with.

    Args:
        prompts (`Sequence[Sequence[int]]`): tokens of each; which is given how often and in which order is no matter.
        least (`int`): tokens of a beginning, besides those of a shorter one that is found, at least.
        few (`int`): prompts that begin so, at least.

    Returns:
        the beginnings, shorter ones first; of each by how many tokens it goes on from a shorter one, and how many
        different prompts begin so.

    Example:

    ```python
    >>> common_beginnings([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (1, 2, 7)], least=1, few=2)
    {(1, 2): (2, 4), (1, 2, 3): (1, 2)}
    ```
    """
    distinct = sorted({tuple(prompt) for prompt in prompts})
    _, common = by_beginning([np.array(prompt, np.int64) for prompt in distinct])
    # Where prompts go apart, and where one ends with which others begin.
    ends = {prompt[:length] for prompt, length in zip(distinct, common.tolist(), strict=True) if length >= least}
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for beginning in sorted(ends, key=lambda tokens: (len(tokens), tokens)):
        before = max((len(other) for other in found if beginning[: len(other)] == other), default=0)
        begin_so = sum(prompt[: len(beginning)] == beginning for prompt in distinct)
        if len(beginning) - before >= least and begin_so >= few:
            found[beginning] = len(beginning) - before, begin_so
    return found


class PromptCount(NamedTuple):
    """How many prompts there are: `read` samples of all have `distinct` ones, of so many `tokens` together."""

    read: int
    distinct: int
    tokens: int


def count_prompts(dataset: Any, seconds: float) -> PromptCount:
    """
    Count the distinct prompts of samples: of all, or of some at random, where reading takes too long.

    Args:
        dataset: map-style, see [`prompt_of`].
        seconds (`float`): begin to read no more after so long.

    Raises:
        ValueError: where nothing says which tokens are prompt.

    Example:

    ```python
    >>> rows = [{"input_ids": [5, 6, end], "labels": [-100, -100, end]} for end in (7, 8)]
    >>> count_prompts(rows, seconds=1.0)
    PromptCount(read=2, distinct=1, tokens=1)
    ```
    """
    order, began = np.random.default_rng(0).permutation(len(dataset)).tolist(), time.perf_counter()
    found: dict[bytes, int] = {}
    read = 0
    while read < len(order) and (not read or time.perf_counter() - began < seconds):
        part = order[read : read + 256]
        found |= {digest_of(tokens): len(tokens) for tokens in map(prompt_tokens, read_items(dataset, part))}
        read += len(part)
    return PromptCount(read, len(found), sum(found.values()))


class ShuffledByPrompt(torch.utils.data.Sampler[int]):
    """
    Visit samples so that batches have up to so many of the same prompt, and prompts come in random order.

    In every epoch the samples of each prompt are shuffled and dealt into groups, the groups are shuffled, and batches
    are filled with whole groups: one that does not fit waits for the next batch. Every sample is visited once.

    Args:
        prompts (`np.ndarray`): int `[n]`, the number of each sample's prompt.
        most (`int`): samples of a prompt in a group, k.
        batch_size (`int`): rows of a micro-batch.
        seed (`int`): decides the order, together with the epoch.
    """

    def __init__(self, prompts: np.ndarray, most: int, batch_size: int, seed: int = 0):
        self.prompts, self.most, self.batch_size = np.asarray(prompts), min(most, batch_size), batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        order = draw.permutation(len(self.prompts))
        order = order[np.argsort(self.prompts[order], kind="stable")]
        starts = np.flatnonzero(np.diff(self.prompts[order], prepend=-1))
        within = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        groups = np.split(order, np.flatnonzero(within % self.most == 0)[1:])
        waiting: dict[int, deque] = {size: deque() for size in range(self.most, 0, -1)}
        room = self.batch_size
        for number in draw.permutation(len(groups)):
            waiting[len(groups[number])].append(groups[number])
            # The largest that fits, the longest waiting first: until nothing does.
            while (size := next((size for size, some in waiting.items() if some and size <= room), 0)) > 0:
                yield from waiting[size].popleft().tolist()
                room = room - size or self.batch_size
        for some in waiting.values():  # the last batches, into which nothing fits whole
            for group in some:
                yield from group.tolist()
