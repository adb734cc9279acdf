"""Columns of any data set, and how long its samples are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..files import require


def is_plain(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset` whose rows come straight from its table (no `with_transform`)."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"


def read_column(dataset: Any, name: str, purpose: str) -> list:
    """
    Read one column of a data set.

    Args:
        dataset: a `datasets.Dataset`, or a torch data set whose items are mappings.
        name (`str`): the column.
        purpose (`str`): the setting that asked for it, for the error message.

    Raises:
        ValueError: if there is no such column.
    """
    if isinstance(dataset, datasets.Dataset):
        columns = dataset.column_names
        require(name in columns, purpose, name, f"the training set has no such column, only {columns}")
        return dataset.with_format(None).select_columns([name])[:][name]
    return [cell(dataset[i], name, purpose) for i in range(len(dataset))]


def cell(item: Any, name: str, purpose: str) -> Any:
    """Return what an item has under a key; raise `ValueError` if it has none, see [`read_column`]."""
    known = isinstance(item, Mapping) and name in item
    require(known, purpose, name, "the items of the training set have no such key")
    return item[name]


def read_items(dataset: Any, positions: Sequence[int]) -> list:
    """Read some items, at once where the data set can."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(positions)
    return [dataset[i] for i in positions]


class Noting(torch.utils.data.Dataset):
    """
    A data set that notes facts of every item that is read, so that items that are slow to read are read once.

    Args:
        dataset: map-style.
        facts (`Mapping[str, Callable]`): by name, `item -> fact`.

    Attributes:
        noted (`dict[int, tuple]`): the facts of the items that were read, by position.
    """

    def __init__(self, dataset: Any, facts: Mapping[str, Callable[[Any], Any]]):
        self.dataset, self.facts = dataset, facts
        self.noted: dict[int, tuple] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list:
        items = read_items(self.dataset, indices)
        for index, item in zip(indices, items, strict=True):
            self.noted[index] = tuple(fact(item) for fact in self.facts.values())
        return items


def sample_lengths(dataset: Any, column: str | None = None) -> np.ndarray:
    """
    Return the length of every sample in tokens, source and target together where the target has its own.

    Args:
        dataset: a `datasets.Dataset`, or a torch data set whose items are mappings.
        column (`str`, *optional*): has the lengths, if the data set has such a column.

    Returns:
        int64 `[n]`.

    Raises:
        ValueError: if the samples have no `input_ids`.
    """
    if column is not None and column in (getattr(dataset, "column_names", None) or ()):
        return np.array(read_column(dataset, column, "length_column_name"), np.int64)
    remedy = "the samples of the training set have no input_ids, whose length it would go by; leave it out"
    stored = stores_lengths(dataset)
    require(stored or "input_ids" in dataset[0], "batch_by_length", True, remedy)
    if not stored:
        return np.array([feature_length(dataset[i]) for i in range(len(dataset))], np.int64)
    columns = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    table = dataset.with_format("arrow").select_columns(columns)[:]
    lengths, *targets = (
        pc.list_value_length(table[name]).to_numpy().astype(np.int64)
        for name in columns
        if pa.types.is_list(table[name].type) or pa.types.is_large_list(table[name].type) or name == "input_ids"
    )
    return lengths + sum(np.where(target != lengths, target, 0) for target in targets)


def stores_lengths(dataset: Any, column: str | None = None) -> bool:
    """Whether a table says how long samples are, without a transform that would have to be run."""
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else ()
    return column in columns or ("input_ids" in columns and np.ndim(dataset[0].get("input_ids")) == 1)


def feature_length(feature: Mapping[str, Any]) -> int:
    """Return a sample's length in tokens, source and target together for seq2seq, or 1 if it has none."""
    tokens = feature.get("input_ids") if isinstance(feature, Mapping) else None
    if tokens is None:
        return 1
    if len(tokens) and np.ndim(tokens[0]) > 0:  # choices: each is a row of the batch
        return len(tokens) * max(map(len, tokens))
    labels = feature.get("labels")
    target = len(labels) if np.ndim(labels) > 0 and len(labels) != len(tokens) else 0
    return len(tokens) + target


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning to its end."""
    return isinstance(dataset, torch.utils.data.IterableDataset)


def has_labels(feature: Mapping[str, Any]) -> bool:
    """Whether a sample has anything to learn: no labels of its own (a collator may make them), or one that counts."""
    labels = feature.get("labels") if isinstance(feature, Mapping) else None
    return np.ndim(labels) == 0 or any(label != -100 for label in np.ravel(labels))


def group_numbers(values: list[Any]) -> np.ndarray:
    """Number the distinct values of a column: int64 `[n]`."""
    numbers: dict[Any, int] = {}
    keys = (value if isinstance(value, bytes) else repr(value) for value in values)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
