"""`TrainingSet`: the training set of one `train()` as the stages see it: ids, groups, lengths, batches."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data import (
    ID_KEY,
    CarryIds,
    Noting,
    ShuffledByLength,
    ShuffledByPrompt,
    add_ids,
    add_stream_ids,
    cell,
    data_fingerprint,
    feature_length,
    group_numbers,
    has_labels,
    is_stream,
    keys_without_rows,
    prompt_of,
    read_column,
    require_rows,
    sample_ids,
    sample_lengths,
    stores_lengths,
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
        lengths (`np.ndarray`, *optional*): int64 `[n]`, where batches are to be of similar length.
        fingerprint (`str`): of ids and content.
        seed (`int`): of whatever is drawn at random.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.config, self.dataset = trainer, trainer.darel, trainer.train_dataset
        self.seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        self.streams = is_stream(self.dataset)
        self.noting = Noting(self.dataset, self._facts_of_items())
        self.ids = None if self.streams else self._read_ids()
        self.lengths: np.ndarray | None = None
        self.fingerprint = "a stream"
        if "group" not in self.noting.facts:  # else items are read for it, which scoring does by the way
            _ = self.groups  # raises before any compute

    def __len__(self) -> int:
        return 0 if self.streams else len(self.ids)

    def _facts_of_items(self) -> dict[str, Any]:
        """Return what can only be found out by reading items, by name: it is noted whenever one is read."""
        config, dataset, facts = self.config, self.dataset, {}
        if self.streams or isinstance(dataset, list):
            return facts
        if not isinstance(dataset, datasets.Dataset):
            if config.id_column is not None:
                facts["id"] = partial(cell, name=config.id_column, purpose="id_column")
            if config.group_column is not None:
                facts["group"] = partial(cell, name=config.group_column, purpose="group_column")
        if config.batch_by_length and not stores_lengths(dataset, self._length_column):
            remedy = "the samples of the training set have no input_ids, whose length it would go by; leave it out"
            require("input_ids" in dataset[0], "batch_by_length", True, remedy)
            facts["length"] = feature_length
        if config.of_a_prompt > 1:
            facts["prompt"] = prompt_of
        for fact in facts.values():
            fact(dataset[0])  # raises for a key that is not there, before any compute
        return facts

    @property
    def _length_column(self) -> str | None:
        return getattr(self.trainer.args, "length_column_name", None)

    @cached_property
    def _facts(self) -> dict[str, tuple]:
        """The facts of all items: those that nothing has read yet are read now, each by one process."""
        args, noting, error = self.trainer.args, self.noting, None
        mine = range(args.process_index, len(self.dataset), args.world_size)
        try:
            left = [i for i in mine if i not in noting.noted]
            hidden = args.disable_tqdm or args.process_index > 0
            for i in tqdm(left, desc="reading", unit=" samples", delay=2, leave=False, disable=hidden):
                noting[i]
        except Exception as found:  # of any kind: the other processes wait
            error = found
        found = {i: noting.noted.get(i) for i in mine}
        everyone = gather_object([(error, found)]) if args.world_size > 1 else [(error, found)]
        for error in (error for error, _ in everyone if error is not None):
            raise error
        noted = {i: facts for _, found in everyone for i, facts in found.items()}
        columns = zip(*(noted[i] for i in range(len(self.dataset))), strict=True)
        return dict(zip(noting.facts, columns, strict=True))

    def _read_ids(self) -> np.ndarray:
        values = self._facts["id"] if "id" in self.noting.facts else None
        return sample_ids(self.dataset, self.config.id_column, values)

    @cached_property
    def groups(self) -> np.ndarray | None:
        """Number of each sample's group, int64 `[n]`; raises where there is not a place for each group."""
        config, column = self.config, self.config.group_column
        if column is None:
            return None
        noted = "group" in self.noting.facts
        groups = group_numbers(self._facts["group"] if noted else read_column(self.dataset, column, "group_column"))
        present, places = int(groups.max()) + 1, kept_count(config.offline_keep, len(self.ids))
        remedy = f"has {present} values, but offline_keep={config.offline_keep} leaves {places} places; keep more"
        require(config.offline_keep == 1 or places >= present, "group_column", column, remedy)
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
        if "length" in self.noting.facts:
            self.lengths = np.array(self._facts["length"], np.int64)
        else:
            self.lengths = self.trainer.on_main(sample_lengths, self.dataset, self._length_column)

    @cached_property
    def prompts(self) -> np.ndarray | None:
        """Number of each sample's prompt, int64 `[n]`, where batches are to be of samples of the same ones."""
        if self.config.of_a_prompt == 1 or self.streams:
            return None
        noted = "prompt" in self.noting.facts
        values = self._facts["prompt"] if noted else [prompt_of(item) for item in self.dataset]
        return group_numbers(values)

    def by_prompt(self, prompts: np.ndarray, batch_size: int) -> ShuffledByPrompt:
        """Return what visits samples of these prompts, int64 `[k]`, by prompt, for micro-batches of so many rows."""
        return ShuffledByPrompt(prompts, self.config.of_a_prompt, batch_size, self.seed)

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
            noting = not self.streams and self.noting.facts
            noted = add_ids(self.noting, self.ids) if noting else self.with_ids
            trainer.train_dataset, trainer.data_collator = noted, CarryIds(collator)
        try:
            loader = trainer.plain_train_dataloader()
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator
        return loader.dataset, loader.collate_fn

    @cached_property
    def _without_rows(self) -> tuple[frozenset[str], dict[str, tuple]]:
        """See [`darel_hf.data.keys_without_rows`]; nothing is known of streams and of fewer than three samples."""
        if self.streams or len(self) < 3:
            return frozenset(), {}
        dataset, collator = self.batching
        items = [dataset[int(i)] for i in np.unique(np.linspace(0, len(self) - 1, 16).astype(int))]
        return keys_without_rows({n: collator(items[:n]) for n in (2, 3, len(items))})

    @cached_property
    def shared_keys(self) -> frozenset[str] | None:
        """What of a batch belongs to no single row; raises for what belongs to rows in a way that we do not know."""
        shared, apart = self._without_rows
        for key, sizes in apart.items():
            require_rows(False, key, sizes[0], 2)
        return shared if len(self) >= 3 else None

    def few_rows(self) -> dict[str, Any]:
        """Return a batch of four samples, without ids: the shortest and the longest of some, and two others."""
        return self._batch(self._few_items)

    @cached_property
    def _few_items(self) -> list:
        dataset, _ = self.batching
        some = [dataset[int(i)] for i in np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))]
        taught = [item for item in some if has_labels(item)] or some
        by_length = sorted(taught, key=feature_length)  # what differs may depend on lengths
        return [by_length[0], by_length[-1], *(taught[i % len(taught)] for i in (len(taught) // 2, -1))]

    def _batch(self, items: list) -> dict[str, Any]:
        batch = self.trainer._prepare_inputs(self.batching[1](items))
        return {key: value for key, value in batch.items() if key != ID_KEY}

    def examples(self) -> tuple[dict, list[dict]] | None:
        """Return a batch of a few samples, and two of them alone; `None` where they can be cut out of any batch."""
        if not any(self._without_rows):
            return None
        return self.few_rows(), [self._batch([item]) for item in self._few_items[:2]]

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
