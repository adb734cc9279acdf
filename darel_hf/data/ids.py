"""Sample ids: read or made, carried through any data set, stream and collator."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..files import require
from .columns import cell, is_plain, is_stream, read_column, read_items
from .rows import ID_KEY, check_rows


def sample_ids(dataset: Any, id_column: str | None = None, values: Sequence | None = None) -> np.ndarray:
    """
    Return the id of every sample: int64 `[n]`, the row numbers unless `id_column` names a column.

    Args:
        dataset: map-style.
        id_column (`str`, *optional*): the column.
        values (`Sequence`, *optional*): what it holds, where it was read already.

    Raises:
        TypeError: if the data set has no length, or the ids are not integers.
        ValueError: if ids occur twice, or there is no such column.
    """
    try:
        if is_stream(dataset):
            raise TypeError
        n = len(dataset)
    except TypeError:
        raise TypeError(
            f"train_dataset={type(dataset).__name__}: it has no length, so there is nothing to take a fraction of; "
            "use a data set with a length (of a streaming one, take the part to train on and load it without "
            "streaming=True)"
        ) from None
    require(n > 0, "train_dataset", "empty", "give a training set with at least one sample")
    if id_column is None:
        return np.arange(n, dtype=np.int64)
    values = np.asarray(read_column(dataset, id_column, "id_column") if values is None else values)
    whole = values.ndim == 1 and np.issubdtype(values.dtype, np.integer)
    require(whole, "id_column", id_column, f"ids must be integers, not {values.dtype}; number the rows", TypeError)
    unique, counts = np.unique(values, return_counts=True)
    twice = unique[counts > 1][:10].tolist()
    require(not twice, "id_column", id_column, f"ids must be unique; these occur more than once: {twice}")
    return values.astype(np.int64)


class WithIds(torch.utils.data.Dataset):
    """
    A data set whose items carry their sample id, for data sets to which no column can be added.

    Args:
        dataset: any map-style data set whose items are mappings.
        ids (`np.ndarray`): int64 `[n]`.
    """

    def __init__(self, dataset: Any, ids: np.ndarray):
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.ids)

    def _add(self, item: Any, index: int) -> dict:
        known, kind = isinstance(item, Mapping), type(item).__name__
        require(known, "train_dataset", kind, "items must be mappings (dict)", TypeError)
        return {**item, ID_KEY: int(self.ids[index])}

    def __getitem__(self, index: int) -> dict:
        return self._add(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self._add(item, i) for item, i in zip(read_items(self.dataset, indices), indices, strict=True)]


class StreamWithIds(torch.utils.data.IterableDataset):
    """
    A stream whose items carry their sample id.

    Args:
        dataset (`torch.utils.data.IterableDataset`): its items are mappings.
        id_column (`str`): key of the id in them, an integer.

    Raises `ValueError` or `TypeError`, when it is read, for an item without an integer id.
    """

    def __init__(self, dataset: Any, id_column: str):
        self.dataset, self.id_column = dataset, id_column

    def __iter__(self) -> Iterator[dict]:
        for item in self.dataset:
            yield {**item, **stream_id(item, self.id_column)}

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, for streams that shuffle."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def stream_id(item: Mapping, id_column: str) -> dict[str, int]:
    """Return the id of an item of a stream under [`ID_KEY`]; raises `ValueError` or `TypeError` if it has none."""
    known = isinstance(item, Mapping) and id_column in item
    require(known, "id_column", id_column, "an item of the stream has no such key")
    return {ID_KEY: whole_id(item[id_column], id_column)}


def item_id(item: Any, id_column: str) -> int:
    """Return the id of an item of a map-style data set; raises `ValueError` or `TypeError` if it has none."""
    return whole_id(cell(item, id_column, "id_column"), id_column)


def whole_id(value: Any, id_column: str) -> int:
    """Return an id as a number of Python; raises `TypeError` for what is no integer of 64 bits."""
    remedy = f"ids must be integers, not {value!r}; number the rows (a hash of 63 bits does)"
    require(not isinstance(value, bool), "id_column", id_column, remedy, TypeError)
    try:
        number = operator.index(value)  # numbers of Python, numpy and torch
    except TypeError:
        raise TypeError(f"id_column={id_column!r}: {remedy}") from None
    require(-(2**63) <= number < 2**63, "id_column", id_column, remedy, TypeError)
    return number


def add_stream_ids(dataset: Any, id_column: str) -> Any:
    """Return a stream whose items carry their id, that of `id_column`; one of `datasets` stays one."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(functools.partial(stream_id, id_column=id_column))
    return StreamWithIds(dataset, id_column)


def add_ids(dataset: Any, ids: np.ndarray) -> Any:
    """Return the data set with its ids (int64 `[n]`) in every item, under [`ID_KEY`]; formats and transforms stay."""
    if not is_plain(dataset):
        return WithIds(dataset, ids)
    form = dataset.format
    with_ids = dataset.add_column(ID_KEY, pa.array(ids, type=pa.int64()))
    if form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return with_ids
    return with_ids.with_format(
        form["type"],
        columns=[*form["columns"], ID_KEY],
        output_all_columns=form["output_all_columns"],
        **form["format_kwargs"],
    )


def select_rows(dataset: Any, positions: np.ndarray) -> Any:
    """Return the part of a data set at `positions` (int64 `[k]`)."""
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(positions)
    return torch.utils.data.Subset(dataset, positions.tolist())


class CarryIds:
    """
    Wrap a collator so that sample ids travel around it, whatever it does with the rest.

    Args:
        collator (`Callable`): gets the features without ids.

    The batch gains `ID_KEY`, int64 `[B]`. Raises `ValueError` if the collator does not make one row a sample.
    """

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, features: list[Mapping]) -> Any:
        ids = torch.tensor([int(feature[ID_KEY]) for feature in features], dtype=torch.int64)
        batch = self.collator([{k: v for k, v in feature.items() if k != ID_KEY} for feature in features])
        check_rows(batch, len(features))
        batch[ID_KEY] = ids
        return batch
