"""Rows of batches: checked, cut out, and what travels in a batch beside what the model gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..files import require

ID_KEY = "darel_sample_id"  # name of the id in features and batches; never reaches the model
WEIGHT_KEY = "darel_sample_weight"  # likewise, the weight of the row in the loss
#: Trailing columns of these may be cut where they are masked in every row, each with the value that fills them.
DECODER_KEYS = ("labels", "decoder_input_ids", "decoder_attention_mask")
SEQUENCE_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "shift_labels")


def check_rows(batch: Mapping, n: int) -> None:
    """Raise `ValueError` unless a collated batch of `n` samples has one row a sample."""
    for key in ("input_ids", "labels"):
        value = batch.get(key)
        if torch.is_tensor(value) and value.dim() > 0 and value.shape[0] != n:
            raise ValueError(
                f"{key} has {value.shape[0]} rows for {n} samples: a row of a batch must be one sample. Switch off "
                "packing and padding-free batches (packing=False, padding_free=False, a collator without flattening); "
                "DarelConfig(unpad=True) takes the padding away after the samples are chosen"
            )


def keys_without_rows(batches: Mapping[int, Mapping]) -> tuple[frozenset[str], dict[str, tuple[int | None, ...]]]:
    """
    Find out which tensors of a batch have no row a sample, on batches of several sizes.

    Args:
        batches (`Mapping[int, Mapping]`): by number of samples, at least two.

    Returns:
        The keys that belong to all rows of a batch alike (always of one size), and those that belong to rows in a way
        that we do not know (the patches of all images of a batch, say), with their first sizes.
    """
    shared, apart = set(), {}
    for key in {key for batch in batches.values() for key, value in batch.items() if torch.is_tensor(value)}:
        values = [batch.get(key) for batch in batches.values()]
        sizes = tuple(len(v) if torch.is_tensor(v) and v.dim() else None for v in values)
        if sizes == tuple(batches) or set(sizes) == {None}:
            continue
        if len(set(sizes)) == 1:
            shared.add(key)
        else:
            apart[key] = sizes
    return frozenset(shared), apart


def require_rows(ok: bool, key: str, found: Any, of: Any) -> None:
    """Raise `ValueError` for a tensor of which nobody knows what belongs to which row."""
    remedy = f"its first size in a batch of {of} samples, so rows cannot be cut out of it; select offline"
    require(ok, key, found, remedy)


def take_rows(
    batch: Mapping,
    rows: np.ndarray,
    n: int,
    pad_to_multiple_of: int | None = None,
    shared: frozenset[str] | None = None,
) -> dict[str, Any]:
    """
    Return the batch of just the chosen rows, without trailing columns that are masked in all of them.

    Args:
        batch (`Mapping`): tensors, arrays and lists; whatever has `n` rows is cut.
        rows (`np.ndarray`): int64 `[k]`, row positions.
        n (`int`): rows of `batch`.
        pad_to_multiple_of (`int`, *optional*): as in the collator; the width stays a multiple of it.
        shared (`frozenset[str]`, *optional*): the only tensors that may have other than `n` rows, and stay whole, see
            [`keys_without_rows`]; `None`: not known, whatever has others stays as it is.

    Raises:
        ValueError: for a tensor that has neither `n` rows nor is one of `shared`.

    Returns:
        `dict`: as if the collator had got the chosen samples alone. Left padding stays: cutting it would move the
        positions of models that count them from the left.
    """
    taken: dict[str, Any] = {}
    for key, value in batch.items():
        if shared is not None and key in shared:
            pass
        elif isinstance(value, Mapping):
            value = take_rows(value, rows, n, pad_to_multiple_of)
        elif torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == n:
            value = value.index_select(0, torch.as_tensor(rows, device=value.device))
        elif torch.is_tensor(value) and value.dim() > 0:
            require_rows(shared is None, key, value.shape[0], n)
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
