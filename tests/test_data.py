"""Ids through any data set and collator, rows cut out of batches, fingerprints."""

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, token_data
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf.data import (
    ID_KEY,
    CarryIds,
    add_ids,
    code_fingerprint,
    data_fingerprint,
    sample_ids,
    select_rows,
    take_rows,
)

KEYS = ("input_ids", "attention_mask", "labels")


def plain(n=6):
    return token_data(n).select_columns(list(KEYS))


@pytest.mark.parametrize(
    "dataset",
    [
        plain(),
        plain().with_format("torch"),
        plain().with_format("torch", columns=["input_ids"]),
        plain().with_transform(lambda rows: {"input_ids": rows["input_ids"]}),
        plain().select([5, 3, 1]),
        list(plain()),
        torch.utils.data.Subset(list(plain()), [4, 2]),
    ],
    ids=["plain", "torch", "columns", "transform", "indices", "list", "subset"],
)
def test_ids_in_every_item(dataset):
    ids = np.arange(len(dataset)) * 3 + 2**40
    with_ids = add_ids(dataset, ids)
    assert len(with_ids) == len(dataset)
    for i in range(len(dataset)):
        item = with_ids[i]
        assert int(item[ID_KEY]) == ids[i]
        assert {k for k in item if k != ID_KEY} == set(dataset[i])
        np.testing.assert_array_equal(np.asarray(item["input_ids"]), np.asarray(dataset[i]["input_ids"]))
    part = select_rows(with_ids, np.array([1, 0]))
    assert [int(part[i][ID_KEY]) for i in range(2)] == [ids[1], ids[0]]
    batch = with_ids.__getitems__([0, 1])
    assert [int(item[ID_KEY]) for item in batch] == ids[:2].tolist()


def test_ids_are_exact_beyond_float_precision():
    ids = np.array([2**53 + 1, 2**62 + 3], dtype=np.int64)
    batch = CarryIds(PadCollator())(add_ids(plain(2), ids).__getitems__([0, 1]))
    assert batch[ID_KEY].tolist() == ids.tolist() and batch[ID_KEY].dtype == torch.int64


def test_sample_ids_are_row_numbers_or_a_column():
    assert sample_ids(plain(3)).tolist() == [0, 1, 2]
    assert sample_ids(plain(3).add_column("key", [7, 5, 6]), "key").tolist() == [7, 5, 6]
    assert sample_ids([{"key": 7}, {"key": 8}], "key").tolist() == [7, 8]
    with pytest.raises(ValueError, match="at least one sample"):
        sample_ids([])


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


def test_fingerprints_follow_the_content(tmp_path):
    rows, ids = token_data(20), np.arange(20)
    base = data_fingerprint(rows, ids)
    shuffled = rows.select(list(range(19, -1, -1))).select(list(range(19, -1, -1)))
    rows.save_to_disk(str(tmp_path / "saved"))
    for same in (shuffled, datasets.load_from_disk(str(tmp_path / "saved")), rows.map(lambda row: row)):
        assert data_fingerprint(same, ids) == base
    other = rows.map(lambda row, i: {"group": 99 if i == 19 else row["group"]}, with_indices=True)
    assert data_fingerprint(other, ids) != base
    assert data_fingerprint(rows, ids + 1) != base
    assert data_fingerprint(rows.select(list(range(19, -1, -1))), ids) != base
    listed = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}]
    assert data_fingerprint(listed, ids[:2]) == data_fingerprint([dict(item) for item in listed], ids[:2])
    assert data_fingerprint(listed, ids[:2]) != data_fingerprint(listed[::-1], ids[:2])


def test_code_fingerprints_follow_state_and_code():
    assert code_fingerprint(PadCollator(8)) == code_fingerprint(PadCollator(8))
    assert code_fingerprint(PadCollator(8)) != code_fingerprint(PadCollator(4))
    assert code_fingerprint(lambda x: x + 1) != code_fingerprint(lambda x: x + 2)
