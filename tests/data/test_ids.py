"""Ids through any data set and collator."""

import numpy as np
import pytest
import torch
from helpers import PadCollator, token_data

from darel_hf.data import (
    ID_KEY,
    CarryIds,
    add_ids,
    sample_ids,
    select_rows,
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
