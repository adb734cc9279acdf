"""Sample ids: read or make them, carry them through any collator, cut rows out of batches, fingerprint the data."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import operator
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .config import require

ID_KEY = "darel_sample_id"  # name of the id in features and batches; never reaches the model
WEIGHT_KEY = "darel_sample_weight"  # likewise, the weight of the row in the loss

#: Trailing columns of these may be cut where they are masked in every row, each with the value that fills them.
DECODER_KEYS = ("labels", "decoder_input_ids", "decoder_attention_mask")
SEQUENCE_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "shift_labels")


def _is_plain(dataset: Any) -> bool:
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
    values = []
    for item in (dataset[i] for i in range(len(dataset))):
        known = isinstance(item, Mapping) and name in item
        require(known, purpose, name, "the items of the training set have no such key")
        values.append(item[name])
    return values


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
    stored = isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names
    remedy = "the samples of the training set have no input_ids, whose length it would go by; leave it out"
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


def feature_length(feature: Mapping[str, Any]) -> int:
    """Return a sample's length in tokens, source and target together for seq2seq, or 1 if it has none."""
    tokens = feature.get("input_ids")
    if tokens is None:
        return 1
    labels = feature.get("labels")
    target = len(labels) if np.ndim(labels) > 0 and len(labels) != len(tokens) else 0
    return len(tokens) + target


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning to its end."""
    return isinstance(dataset, torch.utils.data.IterableDataset)


def sample_ids(dataset: Any, id_column: str | None = None) -> np.ndarray:
    """
    Return the id of every sample: int64 `[n]`, the row numbers unless `id_column` names a column.

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
            "streaming=True), or leave out darel="
        ) from None
    require(n > 0, "train_dataset", "empty", "give a training set with at least one sample")
    if id_column is None:
        return np.arange(n, dtype=np.int64)
    values = np.asarray(read_column(dataset, id_column, "id_column"))
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
        require(
            isinstance(item, Mapping), "train_dataset", type(item).__name__, "items must be mappings (dict)", TypeError
        )
        return {**item, ID_KEY: int(self.ids[index])}

    def __getitem__(self, index: int) -> dict:
        return self._add(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(indices)
        else:
            items = [self.dataset[i] for i in indices]
        return [self._add(item, i) for item, i in zip(items, indices, strict=True)]


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
    value = item[id_column]
    remedy = f"ids must be integers, not {value!r}; number the rows (a hash of 63 bits does)"
    require(not isinstance(value, bool), "id_column", id_column, remedy, TypeError)
    try:
        return {ID_KEY: operator.index(value)}  # numbers of Python, numpy and torch
    except TypeError:
        raise TypeError(f"id_column={id_column!r}: {remedy}") from None


def add_stream_ids(dataset: Any, id_column: str) -> Any:
    """Return a stream whose items carry their id, that of `id_column`; one of `datasets` stays one."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(functools.partial(stream_id, id_column=id_column))
    return StreamWithIds(dataset, id_column)


def add_ids(dataset: Any, ids: np.ndarray) -> Any:
    """Return the data set with its ids (int64 `[n]`) in every item, under [`ID_KEY`]; formats and transforms stay."""
    if not _is_plain(dataset):
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


def check_rows(batch: Mapping, n: int) -> None:
    """Raise `ValueError` unless a collated batch of `n` samples has one row a sample."""
    for key in ("input_ids", "labels", "pixel_values"):
        value = batch.get(key)
        if torch.is_tensor(value) and value.dim() > 0 and value.shape[0] != n:
            raise ValueError(
                f"{key} has {value.shape[0]} rows for {n} samples: a row of a batch must be one sample. Switch off "
                "packing and padding-free batches (packing=False, padding_free=False, a collator without flattening); "
                "DarelConfig(unpad=True) takes the padding away after the samples are chosen"
            )


def take_rows(batch: Mapping, rows: np.ndarray, n: int, pad_to_multiple_of: int | None = None) -> dict[str, Any]:
    """
    Return the batch of just the chosen rows, without trailing columns that are masked in all of them.

    Args:
        batch (`Mapping`): tensors, arrays and lists; whatever has `n` rows is cut, all else is kept as it is.
        rows (`np.ndarray`): int64 `[k]`, row positions.
        n (`int`): rows of `batch`.
        pad_to_multiple_of (`int`, *optional*): as in the collator; the width stays a multiple of it.

    Returns:
        `dict`: as if the collator had got the chosen samples alone. Left padding stays: cutting it would move the
        positions of models that count them from the left.
    """
    taken: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            value = take_rows(value, rows, n, pad_to_multiple_of)
        elif torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == n:
            value = value.index_select(0, torch.as_tensor(rows, device=value.device))
        elif isinstance(value, np.ndarray) and value.ndim > 0 and value.shape[0] == n:
            value = value[rows]
        elif isinstance(value, (list, tuple)) and len(value) == n:
            value = type(value)(value[i] for i in rows)
        taken[key] = value
    labels = taken.get("labels")
    decodes = "decoder_input_ids" in taken  # then labels go with the decoder's inputs, whatever their width
    if "input_ids" in taken and torch.is_tensor(taken.get("attention_mask")) and taken["attention_mask"].dim() == 2:
        used = taken["attention_mask"].ne(0)
        token_labels = torch.is_tensor(labels) and labels.shape == used.shape and not labels.is_floating_point()
        token_labels = token_labels and not decodes
        if token_labels:
            used = used | labels.ne(-100)
        same = [k for k in SEQUENCE_KEYS if torch.is_tensor(taken.get(k)) and taken[k].shape == used.shape]
        same = [k for k in same if k != "labels" or token_labels]
        # A tensor that we do not know and that is as wide (a 4-D mask, say) would no longer fit: then nothing is cut.
        known = {*same, *DECODER_KEYS, ID_KEY, WEIGHT_KEY}
        others = [v for k, v in taken.items() if k not in known and torch.is_tensor(v) and v.dim() > 1]
        if not any(used.shape[1] in v.shape[1:] for v in others):
            _trim(taken, same, used, pad_to_multiple_of)
    if torch.is_tensor(labels) and labels.dim() == 2 and decodes:
        keys = [k for k in DECODER_KEYS if torch.is_tensor(taken.get(k)) and taken[k].shape == labels.shape]
        _trim(taken, keys, labels.ne(-100), pad_to_multiple_of)
    return taken


def _trim(batch: dict[str, Any], keys: list[str], used: torch.Tensor, pad_to_multiple_of: int | None) -> None:
    """Cut the columns after the last one that is `used` (bool `[k, T]`) in any row."""
    columns = used.any(0).nonzero()
    width = int(columns[-1]) + 1 if columns.numel() else 1
    multiple = pad_to_multiple_of or 1
    width = min(-(-width // multiple) * multiple, used.shape[1])
    for key in keys:
        batch[key] = batch[key][:, :width].contiguous()  # models flatten with `view`


def data_fingerprint(dataset: Any, ids: np.ndarray) -> str:
    """
    Hash the ids and the content of a data set: 32 hexadecimal digits.

    The same rows give the same fingerprint, however they are stored. (`datasets`' own fingerprints are random once a
    function that cannot be hashed was mapped over the data.) Items that are augmented at random are looked at with the
    global random states as they are: set them before, as the trainer does, for a fingerprint that stays.
    """
    digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
    if _is_plain(dataset):
        table = dataset.with_format("arrow")
        for name in sorted(dataset.column_names):
            digest.update(name.encode())
            for start in range(0, len(dataset), 10_000):
                _hash_array(digest, table.select_columns([name])[start : start + 10_000][name].combine_chunks())
    else:
        for i in range(len(dataset)):
            _hash_item(digest, dataset[i])
    return digest.hexdigest()


def code_fingerprint(*values: Any) -> str:
    """
    Hash settings, collators and functions: 32 hexadecimal digits, equal in another process for the same code and
        state.

    Models count by class alone (their weights are hashed elsewhere), tokenizers by what a collator uses of them. What
    cannot be hashed gets a value of its own, so that nothing saved for it is used again.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        _hash_code(digest, value, depth=0)
    return digest.hexdigest()


def _hash_code(digest: Any, value: Any, depth: int) -> None:
    if isinstance(value, PreTrainedTokenizerBase):
        value = [type(value).__name__, len(value), value.padding_side, value.pad_token_id, value.model_max_length]
    if isinstance(value, logging.Logger):
        return
    if isinstance(value, torch.nn.Module):
        digest.update(type(value).__qualname__.encode())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _hash_code(digest, item, depth + 1)
    elif hasattr(value, "__dict__") and not _is_function(value):
        digest.update(_source(type(value)))
        for name in sorted(vars(value)) if depth < 8 else []:
            digest.update(name.encode())
            _hash_code(digest, vars(value)[name], depth + 1)
    else:
        digest.update(_source(value))
        try:
            digest.update(Hasher.hash(value).encode())
        except Exception:  # dill raises whatever it likes on what it cannot pickle
            digest.update(os.urandom(16))


def _source(value: Any) -> bytes:
    """Return the source of a function or class: dill stores those of imported modules by name alone."""
    try:
        return inspect.getsource(value).encode()
    except (TypeError, OSError):
        return getattr(value, "__qualname__", "").encode()


def _is_function(value: Any) -> bool:
    return isinstance(
        value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)
    )


def _hash_array(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    kind = array.type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if array.null_count == 0 and numeric:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    elif array.null_count == 0 and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        _hash_array(digest, pc.list_value_length(array))
        _hash_array(digest, array.flatten())
    else:
        for value in array.to_pylist():
            _hash_item(digest, value)


def _hash_item(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _hash_item(digest, value[key])
    elif torch.is_tensor(value):
        _hash_item(
            digest, value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.dim() else value.item()
        )
    elif isinstance(value, (np.ndarray, np.generic)):
        digest.update(f"{np.shape(value)}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _hash_item(digest, item)
    elif isinstance(value, bytes):
        digest.update(value)
    elif hasattr(value, "tobytes"):  # a PIL image
        digest.update(value.tobytes())
    else:
        digest.update(repr(value).encode() + b"\0")
