"""Prompts are counted as a loop over all rows counts them, or as far as time allows."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darel_hf.data import common_beginnings, count_prompts

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


@given(st.lists(st.lists(st.integers(1, 2), max_size=8), max_size=20), st.integers(1, 3), st.integers(2, 4))
def test_beginnings_are_what_several_begin_with(prompts, least, few):
    found = common_beginnings(prompts, least, few)
    distinct = {tuple(prompt) for prompt in prompts}

    def begin_so(beginning):
        return sum(prompt[: len(beginning)] == beginning for prompt in distinct)

    assert found == common_beginnings(prompts[::-1] + prompts, least, few)
    assert [len(b) for b in found] == sorted(len(b) for b in found)
    for beginning, told in found.items():
        before = max((len(b) for b in found if b != beginning and beginning[: len(b)] == b), default=0)
        assert begin_so(beginning) >= few and len(beginning) - before >= least
        assert all(begin_so((*beginning, token)) < begin_so(beginning) for token in (1, 2))  # it goes no further
        assert told == (len(beginning) - before, begin_so(beginning))
    if not found:  # then there is none
        every = {prompt[:n] for prompt in distinct for n in range(least, len(prompt) + 1)}
        assert all(begin_so(beginning) < few for beginning in every)
