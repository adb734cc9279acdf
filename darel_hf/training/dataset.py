"""`TrainingSet`: the training set of one `train()` as the stages see it: ids, groups, lengths, batches."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import datasets
import numpy as np

from ..data import (
    ID_KEY,
    CarryIds,
    ShuffledByLength,
    add_ids,
    add_stream_ids,
    data_fingerprint,
    feature_length,
    group_numbers,
    has_labels,
    is_stream,
    read_column,
    sample_ids,
    sample_lengths,
    shared_keys,
)
from ..files import require
from ..selection import kept_count


class TrainingSet:
    """
    The whole training set, before anything is selected.

    Args:
        trainer (`DarelMixin`): its data set, collator and settings.

    Attributes:
        streams (`bool`): whether it can only be read from its beginning to its end.
        ids (`np.ndarray`, *optional*): int64 `[n]`; `None` for a stream.
        groups (`np.ndarray`, *optional*): int64 `[n]`, number of each sample's group.
        lengths (`np.ndarray`, *optional*): int64 `[n]`, where batches are to be of similar length.
        fingerprint (`str`): of ids and content.
        seed (`int`): of whatever is drawn at random.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.config, self.dataset = trainer, trainer.darel, trainer.train_dataset
        self.seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        self.streams = is_stream(self.dataset)
        self.ids = None if self.streams else sample_ids(self.dataset, self.config.id_column)
        self.groups = self._read_groups()
        self.lengths: np.ndarray | None = None
        self.fingerprint = "a stream"

    def __len__(self) -> int:
        return 0 if self.streams else len(self.ids)

    def _read_groups(self) -> np.ndarray | None:
        """Number the groups; raise before any compute if there is no such column, or not a place for each group."""
        config = self.config
        if config.group_column is None:
            return None
        groups = group_numbers(read_column(self.dataset, config.group_column, "group_column"))
        present, places = int(groups.max()) + 1, kept_count(config.offline_keep, len(self.ids))
        remedy = f"has {present} values, but offline_keep={config.offline_keep} leaves {places} places; keep more"
        require(config.offline_keep == 1 or places >= present, "group_column", config.group_column, remedy)
        return groups

    def column(self, name: str) -> list | None:
        """Return the cells of a column, or None where the training set is no table that has it."""
        known = isinstance(self.dataset, datasets.Dataset) and name in self.dataset.column_names
        return read_column(self.dataset, name, name) if known else None

    def take_fingerprint(self) -> None:
        """Hash ids and content, on the main process; the caller has set the seeds of data that are augmented."""
        if not self.streams:
            self.fingerprint = self.trainer.on_main(data_fingerprint, self.dataset, self.ids)

    def measure_lengths(self) -> None:
        """Find out how long each sample is."""
        column = getattr(self.trainer.args, "length_column_name", None)
        self.lengths = self.trainer.on_main(sample_lengths, self.dataset, column)

    def by_length(self, lengths: np.ndarray, batch_size: int) -> ShuffledByLength:
        """Return what visits samples of these lengths, int64 `[k]`, by length, for micro-batches of so many rows."""
        args = self.trainer.args
        # All rows of an optimizer step alike: several processes do what one does that accumulates.
        rows = batch_size * args.gradient_accumulation_steps * args.world_size
        return ShuffledByLength(lengths, rows, self.seed)

    @cached_property
    def with_ids(self) -> Any:
        """The data set with an id in every item."""
        if self.streams:
            return add_stream_ids(self.dataset, self.config.id_column)
        return add_ids(self.dataset, self.ids)

    @cached_property
    def batching(self) -> tuple[Any, Any]:
        """
        The data set as Trainer trains on it, unused columns removed, and its collator.

        Where samples are scored, or chosen in the loop, with an id in every item: items must be mappings then.
        """
        trainer, config = self.trainer, self.config
        dataset, collator = trainer.train_dataset, trainer.data_collator
        scores = config.may_select("offline") and config.rule("offline").reads_losses
        if scores or config.may_select("online") or config.track:
            trainer.train_dataset, trainer.data_collator = self.with_ids, CarryIds(collator)
        try:
            loader = trainer.plain_train_dataloader()
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator
        return loader.dataset, loader.collate_fn

    @cached_property
    def shared_keys(self) -> frozenset[str]:
        """What of a batch belongs to no single row; raises for what belongs to rows in a way that we do not know."""
        if self.streams or len(self) < 3:
            return frozenset()
        dataset, collator = self.batching
        items = [dataset[i] for i in range(3)]
        return shared_keys(collator(items[:2]), collator(items))

    def few_rows(self) -> dict[str, Any]:
        """Return a batch of four samples, without ids: the shortest and the longest of some, and two others."""
        dataset, collator = self.batching
        some = [dataset[int(i)] for i in np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))]
        taught = [item for item in some if has_labels(item)] or some
        by_length = sorted(taught, key=feature_length)  # what differs may depend on lengths
        items = [by_length[0], by_length[-1], *(taught[i % len(taught)] for i in (len(taught) // 2, -1))]
        batch = self.trainer._prepare_inputs(collator(items))
        return {key: value for key, value in batch.items() if key != ID_KEY}

    def text_of(self, sample_id: int) -> str:
        """Return what a sample says: its columns of text, or else its tokens decoded."""
        if self.streams:
            return ""
        item = self.dataset[int(np.flatnonzero(self.ids == sample_id)[0])]
        texts = [f"{key}: {value}" for key, value in item.items() if isinstance(value, str)]
        decode = getattr(self.trainer.processing_class, "decode", None)
        if not texts and decode is not None and "input_ids" in item:
            texts = [decode(item["input_ids"])]
        if np.ndim(item.get("labels")) == 0 and "labels" in item:
            texts.append(f"label: {item['labels']}")
        return "\n".join(texts)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember."""
        return {"data": self.fingerprint, **({} if self.lengths is None else {"lengths": self.lengths})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what [`TrainingSet.state_dict`] returned; the fingerprint is compared, not restored."""
        self.lengths = state.get("lengths")
