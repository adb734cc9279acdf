"""Batches that are timed stand for all: what they are like on average is what the batches of an epoch are like."""

import numpy as np
import pytest
from helpers import token_data, with_prompts

from darel_hf.budget.typical import typical_batches
from darel_hf.data import ShuffledByPrompt


def rows_of(n=256, kinds=32):
    """Texts of very different lengths, several of which have the same prompt."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(2, 60, kinds)
    rows = []
    for _ in range(n):
        prompt = int(generator.integers(kinds))
        own = 1 + int(generator.geometric(0.08))
        ids = [100 + prompt] * int(lengths[prompt]) + [int(generator.integers(50)) for _ in range(own)]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - own) + ids[len(ids) - own :], "prompt": prompt})
    return rows


def likeness(rows, part):
    """What a batch is like: as the collator pads it, without padding, with prompts once, and without prompts."""
    some = [rows[i] for i in part]
    lengths = [len(row["input_ids"]) for row in some]
    prompts = [row["labels"].count(-100) for row in some]
    once = {row["prompt"]: length for row, length in zip(some, prompts, strict=True)}
    own = sum(lengths) - sum(prompts)
    return np.array([len(some) * max(lengths), sum(lengths), own + sum(once.values()), own])


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("count", [2, 5])
def test_a_few_are_as_all_are(by_prompt, count):
    rows = rows_of()
    visited = list(ShuffledByPrompt(np.array([row["prompt"] for row in rows]), 4, 8)) if by_prompt else None
    epoch = np.random.default_rng(3).permutation(256) if visited is None else np.array(visited)
    every = np.array([likeness(rows, part) for part in epoch.reshape(-1, 8)])
    warm, *chosen = typical_batches(rows, 8, count, visited)
    assert len(chosen) == count and all(len(part) == 8 for part in (warm, *chosen))
    assert len({tuple(part) for part in (warm, *chosen)}) == count + 1
    away = np.abs(np.mean([likeness(rows, part) for part in chosen], axis=0) / every.mean(0) - 1)
    drawn = np.random.default_rng(4)
    by_chance = [every[drawn.choice(len(every), count, replace=False)].mean(0) / every.mean(0) - 1 for _ in range(200)]
    assert (away < 0.1).all() and (np.abs(by_chance).mean(0) > away).all()
    if by_prompt:
        assert {tuple(part) for part in (warm, *chosen)} <= {tuple(part) for part in epoch.reshape(-1, 8)}


def test_small_data_and_data_that_are_not_read():
    assert [len(part) for part in typical_batches([{"input_ids": [1, 2]}] * 3, 8, 2)] == [8, 8, 8]
    assert [len(part) for part in typical_batches(with_prompts(token_data(9)), 4, 4)] == [4] * 5
    pictures = [{"pixel_values": np.zeros(3), "labels": 0}] * 100
    assert [len(part) for part in typical_batches(pictures, 8, 3)] == [8] * 4

    class Slow:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            raise AssertionError("read")

    assert [len(part) for part in typical_batches(Slow(), 8, 3)] == [8] * 4
