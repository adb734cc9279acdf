"""Prompts are counted as a loop over all rows counts them, or as far as time allows."""

import datasets
import pytest

from darel_hf.data import count_prompts

ROWS = [{"input_ids": [5, 6, *([9] * (i % 3)), 7, i], "labels": [*([-100] * (3 + i % 3)), i]} for i in range(600)]


@pytest.mark.parametrize("made", [list, datasets.Dataset.from_list])
def test_counts_all(made):
    distinct = {tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in ROWS}
    assert count_prompts(made(ROWS), seconds=60.0) == (600, 3, sum(map(len, distinct)))


def test_counts_as_far_as_time_allows():
    found = count_prompts(ROWS, seconds=0.0)
    assert found.read == 256 and found.distinct == 3


def test_rows_that_do_not_say():
    with pytest.raises(ValueError, match="labels or a completion_mask"):
        count_prompts([{"input_ids": [1, 2]}], seconds=1.0)
