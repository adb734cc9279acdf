"""Batches of several samples of the same prompt, for training that computes what they have in common once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..files import require


def prompt_length(taught: np.ndarray) -> int:
    """Return how many tokens precede the first that is taught (bool `[n]`), but for the last of them, or n."""
    return max(int(taught.argmax()) - 1, 0) if taught.any() else len(taught)


def prompt_of(item: Any) -> bytes:
    """Return what tells a sample's prompt from others: the tokens of it, see [`prompt_tokens`]."""
    return prompt_tokens(item).tobytes()


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
