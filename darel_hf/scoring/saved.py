"""Scores in files: written, read, matched to a data set; and the fingerprint of what made them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..files import atomic_path, require
from ..selection import Scores, check_finite
from .scorer import base_model

logger = logging.getLogger(__name__)
HASHES = ("text_hash", "label_hash")  # columns that say what was scored


def save_scores(scores: Scores, path: str | os.PathLike, hashes: Mapping[str, np.ndarray] | None = None) -> None:
    """
    Write scores as parquet (`sample_id`, `loss`, `n_tokens`, `correct`, perhaps `embedding`), atomically.

    Args:
        scores ([`Scores`]): what is written.
        path: the file.
        hashes (`dict`, *optional*): int64 `[n]` by column (`text_hash`, `label_hash`): what was scored, see
            [`check_rows`].
    """
    columns = {
        "sample_id": scores.ids,
        "loss": scores.losses,
        "n_tokens": scores.n_tokens,
        "correct": scores.correct,
    }
    if scores.embeddings is not None:
        width = scores.embeddings.shape[1]
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(scores.embeddings.reshape(-1), width)
    columns |= hashes or {}
    table = pa.table(columns).replace_schema_metadata({"darel": json.dumps(scores.origin)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def load_scores(path: str | os.PathLike, field: str = "scores") -> Scores:
    """
    Read scores from parquet. Columns `sample_id` and `loss` are needed, `n_tokens` and `correct` optional.

    Args:
        path (`str` or path): the file.
        field (`str`): the setting that names it, for errors.

    Raises:
        ValueError: if the file is missing, is no parquet file, or lacks a column; for NaN or infinite losses.
    """
    require(Path(path).is_file(), field, str(path), "no such file; make it with `darel score`")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field}={str(path)!r}: not a readable parquet file ({reason}); make it again") from None
    for name in ("sample_id", "loss"):
        remedy = f"column {name!r} is missing, there are only {table.column_names}"
        require(name in table.column_names, field, str(path), remedy)

    def column(name: str, dtype: type, default: float) -> np.ndarray:
        values = table[name].to_numpy() if name in table.column_names else np.full(table.num_rows, default)
        return values.astype(dtype)

    ids, losses = column("sample_id", np.int64, 0), column("loss", np.float32, 0)
    check_finite(ids, losses)
    try:
        origin = json.loads((table.schema.metadata or {}).get(b"darel", b"{}"))
    except ValueError:
        origin = {}
    embeddings = None
    if "embedding" in table.column_names:
        embeddings = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    n_tokens, correct = column("n_tokens", np.int32, 0), column("correct", np.float32, np.nan)
    return Scores(ids, losses, n_tokens, correct, origin, embeddings)


def match_scores(scores: Scores, ids: np.ndarray, data: str, path: str, field: str = "scores") -> Scores:
    """
    Put saved scores into the order of `ids`.

    Raises:
        ValueError: if an id has no score, or the scores say that they come from other data than the one with
            fingerprint `data`.
    """
    known = scores.origin.get("data", data)
    remedy = f"made from other data (fingerprint {known}, this training set has {data}); score this data set"
    require(known == data, field, path, remedy)
    require(len(np.unique(scores.ids)) == len(scores.ids), field, path, "sample ids occur more than once")
    missing = np.setdiff1d(ids, scores.ids)
    remedy = f"no score for {len(missing)} of {len(ids)} samples, ids {missing[:10].tolist()}; score this data set"
    require(len(missing) == 0, field, path, remedy)
    order = np.argsort(scores.ids)
    rows = order[np.searchsorted(scores.ids[order], ids)]
    embeddings = None if scores.embeddings is None else scores.embeddings[rows]
    return Scores(ids, scores.losses[rows], scores.n_tokens[rows], scores.correct[rows], scores.origin, embeddings)


def row_hashes(*columns: Sequence[Any]) -> np.ndarray:
    """Hash the cells of each row: int64 `[n]`."""
    hashes = (
        hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=8)
        for row in zip(*columns, strict=True)
    )
    return np.array([int.from_bytes(one.digest(), "little", signed=True) for one in hashes], np.int64)


def check_rows(
    path: str | os.PathLike, ids: np.ndarray, column: Callable[[str], Sequence[Any] | None], field: str = "scores"
) -> None:
    """
    See that scores made by `darel score` are those of these rows: by their texts, else by their labels.

    Args:
        path: the file of scores.
        ids (`np.ndarray`): int64 `[n]`, of the rows.
        column (`Callable`): returns the cells of a column by its name, or None where there is none.
        field (`str`): the setting that names the file, for errors.

    Raises:
        ValueError: if rows carry other texts than those that were scored, naming the first.
    """
    schema = pq.read_schema(path)
    if "text_hash" not in schema.names:
        return
    table = pq.read_table(path, columns=[name for name in HASHES if name in schema.names] + ["sample_id"])
    origin = json.loads((schema.metadata or {}).get(b"darel", b"{}"))
    scored = [name for name in (origin.get("prompt_column"), origin.get("target_column")) if name]
    order = {int(sample): row for row, sample in enumerate(table["sample_id"].to_pylist())}
    rows = np.array([order[int(sample)] for sample in ids], np.int64)
    cells = [column(name) for name in scored]
    if all(cell is not None for cell in cells):
        differ = np.flatnonzero(row_hashes(*cells) != table["text_hash"].to_numpy()[rows])
        where = f"{len(differ)} of {len(ids)} rows have other texts in {scored}"
    else:
        labels = column("labels")
        hashes = None if labels is None or "label_hash" not in table.column_names else label_hashes(labels)
        known = np.array([]) if hashes is None else table["label_hash"].to_numpy()[rows]
        if hashes is None or np.isin(hashes, known).mean() < 0.5:  # another tokenizer or another form of the samples
            logger.warning(
                "%s: the training set has no columns %s, so it cannot be checked that its rows are those scored",
                path,
                scored,
            )
            return
        differ = np.flatnonzero(hashes != known)
        where = f"{len(differ)} of {len(ids)} rows have other labels"
    first = int(ids[differ[0]]) if len(differ) else None
    remedy = f"made from other data: {where} than was scored, the first is sample {first}; score these data"
    require(len(differ) == 0, field, str(path), remedy)


def label_hashes(labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Hash the tokens of each row that count as labels: int64 `[n]`."""
    return row_hashes([[int(token) for token in row if token != -100] for row in labels])


def model_fingerprint(model: nn.Module, without_adapters: bool = False) -> str:
    """
    Hash a model's class and weights: 32 hexadecimal digits.

    Args:
        model (`nn.Module`): PEFT models welcome.
        without_adapters (`bool`): leave out the adapters' weights (those that are switched off change no score).
    """
    digest = hashlib.blake2b(type(base_model(model)).__name__.encode(), digest_size=16)
    configs = [getattr(base_model(model), "config", None)]
    if not without_adapters:
        configs += getattr(model, "peft_config", {}).values()  # scales, for one, are in no weight
    for config in configs:
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        places = ("_name_or_path", "base_model_name_or_path", "transformers_version", "revision")
        digest.update(repr(sorted((k, str(v)) for k, v in settings.items() if k not in places)).encode())
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if without_adapters else None
    for name, tensor in model.state_dict().items():
        if prefix is not None and prefix in name:
            continue
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if torch.is_tensor(tensor) and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
