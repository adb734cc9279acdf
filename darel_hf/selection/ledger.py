"""`LossLedger`: what is known of every sample's loss, by sample id; merged across ranks, saved and restored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path, require

#: Sample ids, the fields that were learned of them, and the counter that goes up.
Record = tuple[np.ndarray, dict[str, Any], str | None]

#: Columns, each with what stands there before anything is known, in its type.
FIELDS = {
    "loss": np.float32("nan"),
    "n_tokens": np.int32(0),
    "correct": np.float32("nan"),
    "scored_step": np.int64(-1),
    "times_scored": np.int32(0),
    "train_loss": np.float32("nan"),
    "times_trained": np.int32(0),
}


class LossLedger:
    """
    Remember the latest loss of every sample.

    Losses of eval mode (no dropout: `loss`, what ranks) and of train mode (`train_loss`, what training happened to
    see) are kept apart and never compared. With `online_backward="sliced"` what ranks is of train mode too: then every
    epoch that scores does so for all samples it visits.

    Args:
        ids (`Iterable[int]`): all sample ids, unique; int64.

    Attributes:
        ids (`np.ndarray`): int64 `[n]`, ascending; every other array is aligned with it.
        loss (`np.ndarray`): float32 `[n]`, latest loss that ranks, in nats, NaN where none was seen.
        n_tokens (`np.ndarray`): int32 `[n]`, label positions of the sample, 0 where unknown.
        correct (`np.ndarray`): float32 `[n]`, fraction of label positions predicted right, NaN where unknown.
        scored_step (`np.ndarray`): int64 `[n]`, optimizer step of that loss; -1 before any.
        times_scored (`np.ndarray`): int32 `[n]`, how often such a loss was recorded.
        train_loss (`np.ndarray`): float32 `[n]`, latest train-mode loss, NaN where none was seen.
        times_trained (`np.ndarray`): int32 `[n]`, how often the sample got a backward pass.

    Memory: 32 bytes a sample and 8 for its id.
    """

    def __init__(self, ids: Iterable[int]):
        self.ids = np.unique(np.asarray(ids, dtype=np.int64))
        n = len(self.ids)
        self._dense = n > 0 and self.ids[0] == 0 and self.ids[-1] == n - 1
        for name, blank in FIELDS.items():
            setattr(self, name, np.full(n, blank))
        self._pending: list[Record] = []

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id. Raises `ValueError` that names the first unknown ids."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = ids if self._dense else np.searchsorted(self.ids, ids).clip(max=max(len(self.ids) - 1, 0))
        known = (ids >= 0) & (ids < len(self.ids)) if self._dense else self.ids[rows] == ids
        require(bool(np.all(known)), "sample ids", ids[~known][:10].tolist(), "not among the ids of this data set")
        return rows

    def record_scores(
        self,
        ids: np.ndarray,
        losses: np.ndarray,
        n_tokens: np.ndarray,
        step: int,
        correct: np.ndarray | None = None,
        share: bool = True,
    ) -> None:
        """
        Record eval-mode losses; of an id that occurs twice, the last one stays.

        Args:
            ids (`np.ndarray`): int64 `[B]`.
            losses (`np.ndarray`): float `[B]`, in nats.
            n_tokens (`np.ndarray`): int `[B]`.
            step (`int`): optimizer steps done so far.
            correct (`np.ndarray`, *optional*): float `[B]`.
            share (`bool`): whether other ranks still have to be told at the next [`LossLedger.take_pending`].

        Raises:
            ValueError: if a loss is NaN or infinite; the message names the ids.
        """
        check_finite(ids, losses)
        fields = {"loss": np.asarray(losses, np.float32), "n_tokens": np.asarray(n_tokens, np.int32)}
        if correct is not None:
            fields["correct"] = np.asarray(correct, np.float32)
        self._record(ids, {**fields, "scored_step": step}, "times_scored", share)

    def record_training(self, ids: np.ndarray) -> None:
        """Record that samples (int64 `[B]`) are trained on."""
        self._record(ids, {}, "times_trained", True)

    def record_train_losses(self, ids: np.ndarray, losses: np.ndarray) -> None:
        """Record train-mode losses (float `[B]`, in nats) of the samples `ids` (int64 `[B]`)."""
        self._record(ids, {"train_loss": np.asarray(losses, np.float32)}, None, True)

    def _record(self, ids: np.ndarray, fields: dict[str, Any], counter: str | None, share: bool) -> None:
        record = (np.array(ids, dtype=np.int64), fields, counter)
        self._apply(record, count=True)
        if share:
            self._pending.append(record)

    def _apply(self, record: Record, count: bool) -> None:
        ids, fields, counter = record
        rows = self.rows(ids)
        for name, values in fields.items():
            getattr(self, name)[rows] = values
        if counter is not None and count:
            np.add.at(getattr(self, counter), rows, 1)

    def take_pending(self) -> list[Record]:
        """Return what was recorded here since the last call, for [`LossLedger.merge`] on every rank, and forget it."""
        pending, self._pending = self._pending, []
        return pending

    def merge(self, by_rank: list[list[Record]], rank: int) -> None:
        """
        Bring all ranks to the same state.

        Args:
            by_rank (`list`): what [`LossLedger.take_pending`] returned on each rank, in rank order.
            rank (`int`): this rank. Its own records are counted already; they are written again in rank order, so that
                of an id that two ranks saw (loaders repeat ids to even out batches) the same value wins everywhere.
        """
        for other, records in enumerate(by_rank):
            for record in records:
                self._apply(record, count=other != rank)

    @property
    def coverage(self) -> float:
        """Fraction of samples that got at least one backward pass."""
        return float(np.count_nonzero(self.times_trained)) / max(len(self.ids), 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all arrays, for a checkpoint. Merge first: pending records are not part of it."""
        return {"ids": self.ids, **{name: getattr(self, name) for name in FIELDS}}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what [`LossLedger.state_dict`] returned. Raises `ValueError` if it is of other samples."""
        same = np.array_equal(self.ids, state["ids"])
        require(same, "ledger", f"{len(state['ids'])} ids", f"saved for other samples than these {len(self.ids)}")
        for name, blank in FIELDS.items():
            setattr(self, name, np.array(state[name], dtype=blank.dtype))
        self._pending = []

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Write one row a sample with all columns, `sample_id` first. Raises `FileExistsError` if `path` exists."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if Path(path).exists():
            raise FileExistsError(f"{path} exists; choose another name, or move it away")
        table = pa.table({"sample_id": self.ids, **{name: getattr(self, name) for name in FIELDS}})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)


class OpenLedger(LossLedger):
    """
    A ledger for streams, whose ids are not known before they are seen: `ids` is in the order of appearance.

    It grows by what it sees, so merge it before ranks compare it. Ids that were seen are never forgotten: 32 bytes a
    sample, and about 100 for its place in a dictionary.
    """

    def __init__(self) -> None:
        super().__init__([])
        self._row: dict[int, int] = {}
        self._room: dict[str, np.ndarray] = {"ids": self.ids}  # the arrays, longer than what is used of them

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id; unknown ids get one."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = np.array([self._row.setdefault(i, len(self._row)) for i in ids.tolist()], dtype=np.int64)
        self._grow(len(self._row))
        self.ids[rows] = ids
        return rows

    def _grow(self, n: int) -> None:
        if len(self._room["ids"]) < n:
            for name, blank in {"ids": np.int64(0), **FIELDS}.items():
                self._room[name] = np.full(max(2 * n, 1024), blank)
                self._room[name][: len(self.ids)] = getattr(self, name)
        if n:
            for name, values in self._room.items():
                setattr(self, name, values[:n])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all arrays, ids ascending, so that all ranks have the same."""
        order = np.argsort(self.ids, kind="stable")
        return {name: values[order] for name, values in super().state_dict().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what [`OpenLedger.state_dict`] returned."""
        self.__init__()
        rows = self.rows(state["ids"])
        for name in FIELDS:
            getattr(self, name)[rows] = state[name]


def check_finite(ids: np.ndarray, losses: np.ndarray) -> None:
    """Raise a `ValueError` that names the ids whose loss is NaN or infinite."""
    bad = ~np.isfinite(losses)
    if np.any(bad):
        names = np.asarray(ids)[bad]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(
            f"loss is NaN or infinite for sample ids {names[:10].tolist()}{more}: look at these samples (empty, or "
            "too long?), or at the precision (fp16 overflows; bf16 or float32 does not)"
        )
