"""Fingerprints of data, settings and code: what tells whether something saved may be used again."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import functools
import hashlib
import inspect
import logging
import os
import types
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

LOOKED_AT = 64  # items of a data set that is no table
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type)
PLAIN = (str, int, float, complex, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)


def data_fingerprint(dataset: Any, ids: np.ndarray, content: bytes | None = None) -> str:
    """
    Hash the ids and the content of a data set: 32 hexadecimal digits.

    The same rows give the same fingerprint, however they are stored. (`datasets`' own fingerprints are random once a
    function that cannot be hashed was mapped over the data.) A `datasets.Dataset` is hashed as a whole, below its
    transform; of other data sets, whose items may be slow to read, [`LOOKED_AT`] items, and of those what two readings
    give alike (no augmentation drawn anew) and what is plain data (no objects that only their address tells apart).

    Args:
        dataset: map-style.
        ids (`np.ndarray`): int64 `[n]`.
        content (`bytes`, *optional*): what [`data_content`] returned, where that was read already.
    """
    digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
    if isinstance(dataset, datasets.Dataset):
        table = dataset.with_format("arrow")
        for name in sorted(dataset.column_names):
            digest.update(name.encode())
            for start in range(0, len(dataset), 10_000):
                _hash_array(digest, table.select_columns([name])[start : start + 10_000][name].combine_chunks())
        return digest.hexdigest()
    digest.update(data_content(dataset) if content is None else content)
    return digest.hexdigest()


def data_content(dataset: Any) -> bytes:
    """Return what tells a data set that is no table from others, its ids apart: hashes of some items' cells."""
    positions = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)).tolist()
    readings = [[_cells(dataset[i]) for i in positions] for _ in range(2)]
    unlike = {key for one, two in zip(*readings, strict=True) for key in one if one[key] != two.get(key)}
    alike = (sorted((key, value) for key, value in item.items() if key not in unlike) for item in readings[0])
    return "".join(map(repr, alike)).encode()


def _cells(item: Any) -> dict[str, str]:
    """Return a hash of each cell of an item that is plain data."""
    cells = item if isinstance(item, Mapping) else dict(enumerate(item if isinstance(item, (tuple, list)) else [item]))
    found = {}
    for key, value in cells.items():
        digest = hashlib.blake2b(digest_size=16)
        with contextlib.suppress(TypeError):
            _hash_item(digest, value)
            found[str(key)] = digest.hexdigest()
    return found


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
    elif hasattr(value, "__dict__") and not isinstance(value, FUNCTIONS):
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


def _hash_array(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if array.null_count == 0 and numeric:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    elif array.null_count == 0 and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        _hash_array(digest, pc.list_value_length(array))
        _hash_array(digest, array.flatten())
    elif array.null_count == 0 and pa.types.is_fixed_size_list(kind):
        digest.update(f"x{kind.list_size}".encode())
        _hash_array(digest, array.flatten())
    elif array.null_count == 0 and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        _hash_array(digest, pc.binary_length(array))
        digest.update(b"".join(array.to_pylist()))
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
    elif value is None or isinstance(value, PLAIN):
        digest.update(repr(value).encode() + b"\0")
    else:  # its text may hold an address
        raise TypeError(f"{type(value).__name__} is no plain data")
