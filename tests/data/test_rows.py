"""Rows cut out of batches."""

import numpy as np
import torch
from helpers import PadCollator, token_data
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf.data import (
    take_rows,
)

KEYS = ("input_ids", "attention_mask", "labels")


@given(
    n=st.integers(1, 8),
    widths=st.data(),
    multiple=st.sampled_from([None, 4, 8]),
)
@settings(max_examples=50, deadline=None)
def test_taken_rows_are_what_the_collator_makes_of_just_these(n, widths, multiple):
    rows = token_data(n, seed=widths.draw(st.integers(0, 9)))
    features = [{k: row[k] for k in KEYS} for row in rows]
    collator = PadCollator(multiple)
    chosen = np.array(sorted(widths.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    taken = take_rows(collator(features), chosen, n, multiple)
    alone = collator([features[i] for i in chosen])
    for key in KEYS:
        torch.testing.assert_close(taken[key], alone[key])


def test_left_padding_stays():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [7, 8, 9, 3]]),
    }
    assert take_rows(batch, np.array([0]), 2)["input_ids"].tolist() == [[0, 0, 5, 6]]


def test_seq2seq_labels_and_inputs_are_cut_on_their_own():
    batch = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 3]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[1, 2, 3, 4, 5], [6, -100, -100, -100, -100]]),
        "decoder_input_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 6, 0, 0, 0]]),
    }
    first, second = (take_rows(batch, np.array([i]), 2) for i in (0, 1))
    assert first["input_ids"].shape == (1, 2) and first["labels"].shape == (1, 5)
    assert second["input_ids"].shape == (1, 4) and second["decoder_input_ids"].tolist() == [[0]]


def test_whatever_has_rows_is_cut_and_the_rest_stays():
    batch = {
        "pixel_values": torch.arange(12).reshape(3, 2, 2),
        "names": ["a", "b", "c"],
        "array": np.arange(3),
        "scale": torch.tensor(2.0),
        "task": "x",
    }
    taken = take_rows(batch, np.array([0, 2]), 3)
    assert taken["pixel_values"].tolist() == [[[0, 1], [2, 3]], [[8, 9], [10, 11]]]
    assert taken["names"] == ["a", "c"] and taken["array"].tolist() == [0, 2]
    assert taken["scale"] == 2.0 and taken["task"] == "x"


def test_unknown_wide_tensors_forbid_cutting():
    batch = {
        "input_ids": torch.tensor([[5, 0], [7, 8]]),
        "attention_mask": torch.tensor([[1, 0], [1, 1]]),
        "bias": torch.zeros(2, 1, 2, 2),
    }
    assert take_rows(batch, np.array([0]), 2)["input_ids"].shape == (1, 2)
