"""Losses of a whole data set, fast: sharded over ranks, resumable, in batches of similar length."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from ..data import ID_KEY, feature_length, read_items, token_batches
from ..files import atomic_path
from ..selection import Scores, check_finite
from .prompts import share_prompts
from .scorer import BatchScorer

logger = logging.getLogger(__name__)
#: Positions, padding included, in one batch of the offline pass, by device: caches are small, GPUs are wide.
MAX_TOKENS = {"cpu": 1024}
MAX_TOKENS_ELSEWHERE = 16384
WINDOW = 4096  # samples that are read, sorted by length and saved together,
WINDOW_BYTES = 2**28  # but no more of them than take so much memory: spectrograms, images


def default_max_tokens(device: torch.device) -> int:
    """Return how many positions a batch of the offline pass has on this device."""
    return MAX_TOKENS.get(device.type, MAX_TOKENS_ELSEWHERE)


def rows_without_tokens(device: torch.device, batch_size: int) -> int:
    """Return the rows of a batch of the offline pass for samples that are no token sequences, such as images."""
    return batch_size if device.type == "cpu" else 8 * batch_size  # caches of CPUs are small


def score_dataset(
    scorer: BatchScorer,
    dataset: Any,
    collator: Callable[[list], Mapping],
    prepare: Callable[[Mapping], Mapping],
    *,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    max_rows: int = 256,
    progress_bar: bool = True,
    parts: str | os.PathLike | None = None,
    origin: dict[str, str] | None = None,
    share: Callable[[BatchScorer, Sequence, Callable], Any] | None = share_prompts,
    ids_of: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Scores:
    """
    Score every sample of a data set.

    Args:
        scorer ([`BatchScorer`]): scores one batch.
        dataset: map-style data set whose items carry their id under `ID_KEY`.
        collator (`Callable`): makes a batch of items and keeps the ids, see [`darel_hf.data.CarryIds`].
        prepare (`Callable`): moves a batch to the model's device.
        rank, world_size (`int`): this process scores every `world_size`-th sample; all get all scores.
        max_tokens (`int`, *optional*): positions a batch, padding included; the default suits the device.
        max_rows (`int`): samples a batch; where memory is short, both are halved.
        progress_bar (`bool`): show one if the pass takes longer than two seconds.
        parts (path, *optional*): folder for finished parts; a pass that was killed goes on from them.
        origin (`dict`, *optional*): fingerprints to store with the scores.
        share (`Callable`, *optional*): how prompts that several samples share are computed once, where a trial shows
            the same losses: [`darel_hf.scoring.share_prompts`], or what is called and answers alike, such as
            [`darel_hf.accelerators.share_rows`], which is faster; `None`: each sample is computed whole.
        ids_of (`Callable`, *optional*): what items carry under `ID_KEY` are numbers that it turns into ids, int64
            `[n]` both, when all are scored; every rank calls it.

    Returns:
        [`Scores`], ids ascending; equal on every rank.

    Raises:
        ValueError: for NaN or infinite losses (names the ids); see also [`BatchScorer`].
    """
    if max_tokens is None:
        max_tokens = default_max_tokens(next(scorer.model.parameters()).device)
    mine = np.arange(rank, len(dataset), world_size)
    together = scorer.sharded and world_size > 1  # then every rank has to run as many forward passes

    def collated(items: list) -> Callable[[Sequence[int]], Mapping]:
        return lambda rows: prepare(collator([items[i] for i in rows]))

    def everywhere(flag: bool) -> list[bool]:
        return gather_object([flag]) if together else [flag]

    done: list[np.ndarray] = []
    start = 0
    hidden = rank != 0 or not progress_bar
    progress = tqdm(total=len(mine), desc="scoring", unit=" samples", delay=2, leave=False, disable=hidden)
    while any(everywhere(start < len(mine))):
        idle = start >= len(mine)  # the others need this rank in their forward passes: any sample will do
        part = None if parts is None else Path(parts) / f"rank{rank}of{world_size}-from{start}.npy"
        found = _read_part(part)
        if all(everywhere(idle or found is not None)):
            progress.update(0 if idle else len(found))
        else:
            items = read_window(dataset, [0] if idle else mine[start : start + WINDOW].tolist())
            found = None
            while found is None:
                try:
                    found = _score_window(
                        scorer, items, collated(items), max_tokens, max_rows, progress, together, share
                    )
                except Exception as error:
                    if together or max_rows == 1 or not should_reduce_batch_size(error):
                        raise
                    max_tokens, max_rows, progress.n = max(max_tokens // 2, 1), max_rows // 2, start
                if found is None:  # outside of the handler, which holds what is on the device
                    clear_device_cache(garbage_collection=True)
            del items  # not beside those of the next window
            if part is not None and not idle and len(found) < len(mine):
                with atomic_path(part) as temporary:
                    np.save(temporary, found)
        if not idle:
            done.append(found)
            start += len(found)
    progress.close()
    everyone = gather_object(done) if world_size > 1 else done
    rows = np.concatenate(everyone)
    rows = rows[np.unique(rows["id"], return_index=True)[1]]
    if ids_of is not None:
        rows["id"] = ids_of(rows["id"])
        rows = rows[np.argsort(rows["id"], kind="stable")]
    check_finite(rows["id"], rows["loss"])
    columns = {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names}
    embeddings = columns["embedding"] if columns["embedding"].shape[1] else None
    return Scores(columns["id"], columns["loss"], columns["n_tokens"], columns["correct"], origin or {}, embeddings)


def read_window(dataset: Any, positions: Sequence[int], seconds: float = math.inf) -> list:
    """
    Read the items at the first of some positions: at most `WINDOW`, and about `WINDOW_BYTES` or one.

    Args:
        dataset: map-style.
        positions (`Sequence[int]`): of what is to be read.
        seconds (`float`): start no further reading after so long.
    """
    items: list = []
    held, count, began = 0, 1, time.perf_counter()
    while count > 0 and time.perf_counter() - began < seconds:
        read = read_items(dataset, list(positions[len(items) : len(items) + count]))
        items += read
        held += sum(map(_bytes, read))
        room = (WINDOW_BYTES - held) * len(items) // max(held, 1)  # for items like those so far
        count = min(len(items), room, len(positions) - len(items), WINDOW - len(items))
    return items


def _bytes(value: Any) -> int:
    """Estimate what (a part of) an item takes in memory."""
    if hasattr(value, "nbytes"):  # arrays and tensors
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        flat = not value or isinstance(value[0], (int, float))
        return 32 * len(value) if flat else sum(map(_bytes, value))
    if hasattr(value, "getbands"):  # an image of PIL: once it is decoded, by the collator, it stays so
        return value.width * value.height * len(value.getbands())
    return sys.getsizeof(value)


def _read_part(part: Path | None) -> np.ndarray | None:
    """Return a finished part of an earlier pass, or `None` if there is none that can be read."""
    if part is None or not part.exists():
        return None
    try:
        return np.load(part, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        logger.warning("%s cannot be read (%s); its samples are scored again", part, error)
        return None


def _row_type(width: int) -> np.dtype:
    """Return the record of one sample, with an embedding of `width` numbers."""
    fields = [("id", np.int64), ("loss", np.float32), ("n_tokens", np.int32), ("correct", np.float32)]
    return np.dtype([*fields, ("embedding", np.float32, (width,))])


def _score_window(
    scorer: BatchScorer,
    items: list,
    collate: Callable[[Sequence[int]], Mapping[str, Any]],
    max_tokens: int,
    max_rows: int,
    progress: Any,
    together: bool,
    share: Callable | None,
) -> np.ndarray:
    """Return one record of `_row_type` a sample; if `together`, all ranks run as many forward passes."""
    shared = None if together or share is None else share(scorer, items, collate)
    if shared is not None:
        scored = shared.batches(max_tokens, max_rows)
    else:
        lengths = np.array([feature_length(item) for item in items])
        batches = list(token_batches(lengths, max_tokens, max_rows))
        if together:
            batches += [batches[-1][:1]] * (max(gather_object([len(batches)])) - len(batches))
        scored = ((batch_rows, scorer(collate(batch_rows))) for batch_rows in batches)
    collected = []
    for batch_rows, samples in scored:
        embeddings = samples.embeddings
        rows = np.empty(len(batch_rows), _row_type(0 if embeddings is None else embeddings.shape[1]))
        rows["id"] = [items[i][ID_KEY] for i in batch_rows]
        rows["loss"], rows["n_tokens"], rows["correct"] = (values.cpu().numpy() for values in samples[:3])
        if embeddings is not None:
            rows["embedding"] = embeddings.cpu().numpy()
        collected.append(rows)
        progress.update(len(batch_rows))
    return np.concatenate(collected)
