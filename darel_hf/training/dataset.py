"""`TrainingSet`: the training set of one `train()` as the stages see it: ids, groups, lengths, batches."""

from __future__ import annotations

from collections.abc import Callable
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
    data_content,
    data_fingerprint,
    feature_length,
    group_numbers,
    has_labels,
    is_plain,
    is_stream,
    item_id,
    keys_without_rows,
    prompt_of,
    prompt_tokens,
    read_column,
    require_rows,
    sample_ids,
    sample_lengths,
    stores_lengths,
)
from ..files import require
from ..scoring import base_model
from ..selection import kept_count


class TrainingSet:
    """
    The whole training set, before anything is selected.

    Args:
        trainer (`DarelMixin`): its data set, collator and settings.
        resumes (`bool`): whether a run goes on: then nothing is scored before training.

    Attributes:
        streams (`bool`): whether it can only be read from its beginning to its end.
        waits (`bool`): whether there are facts that only reading every item tells, and an offline pass may come, which
            reads them anyhow: until [`TrainingSet.learn`] they are known of the items that were looked at only.
        ids (`np.ndarray`, *optional*): int64 `[n]`; `None` for a stream, and where they wait.
        lengths (`np.ndarray`, *optional*): int64 `[n]`, where batches are to be of similar length.
        fingerprint (`str`): of ids and content; where ids wait, as if they were row numbers.
        seed (`int`): of whatever is drawn at random.
    """

    def __init__(self, trainer: Any, resumes: bool = False):
        self.trainer, self.config, self.dataset = trainer, trainer.darel, trainer.train_dataset
        self.seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        self.streams = is_stream(self.dataset)
        self._row_numbers = None if self.streams else sample_ids(self.dataset)
        self.noting = Noting(self.dataset, self._facts_of_items())
        config = self.config
        scores = config.may_select("offline") and config.rule("offline").reads_losses
        named = config.scores is not None or config.reference_scores is not None  # what is there goes by ids
        self.waits = bool(self.noting.facts) and scores and not named and not resumes
        self.ids = None if self.streams or self._ids_wait else self._read_ids()
        self.lengths: np.ndarray | None = None
        self.fingerprint = "a stream"
        self._content: bytes | None = None
        if "group" not in self.noting.facts:  # else items are read for it, which scoring does by the way
            _ = self.groups  # raises before any compute

    def __len__(self) -> int:
        return 0 if self.streams else len(self._row_numbers)

    def _facts_of_items(self) -> dict[str, Any]:
        """Return what can only be found out by reading items, by name: it is noted whenever one is read."""
        config, dataset, facts = self.config, self.dataset, {}
        if self.streams or isinstance(dataset, list):
            return facts
        if not isinstance(dataset, datasets.Dataset):
            if config.id_column is not None:
                facts["id"] = partial(item_id, id_column=config.id_column)
            if config.group_column is not None:
                facts["group"] = partial(cell, name=config.group_column, purpose="group_column")
        if config.batch_by_length and not stores_lengths(dataset, self._length_column):
            remedy = "the samples of the training set have no input_ids, whose length it would go by; leave it out"
            require("input_ids" in dataset[0], "batch_by_length", True, remedy)
            facts["length"] = feature_length
        if config.of_a_prompt > 1 and is_plain(dataset):
            prompt_of(dataset[0])  # raises for what has no prompt; tables are read for it before anything is planned
        elif config.of_a_prompt > 1:
            facts["prompt"] = prompt_of
        first = dataset[0] if facts else None
        for fact in facts.values():
            fact(first)  # raises for a key that is not there, before any compute
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

    @property
    def _ids_wait(self) -> bool:
        return self.waits and "id" in self.noting.facts

    def learn(self) -> None:
        """
        Know ids and lengths of all samples: what no pass has read by now is read, each item by one process.

        Raises `ValueError` or `TypeError` for ids that are none, or occur twice.
        """
        if self._ids_wait:
            self.ids = self._read_ids()
            self.fingerprint = data_fingerprint(self.dataset, self.ids, self._content)
        self.waits = False
        if self.config.batch_by_length and self.lengths is None and not self.streams:
            self._measure_lengths()

    @property
    def ids_of(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What turns the numbers in items of [`TrainingSet.batching`] into ids, see `learn`; `None`: they are ids."""
        return self._ids_at if "id" in self.noting.facts else None

    def _ids_at(self, rows: np.ndarray) -> np.ndarray:
        self.learn()
        return self.ids[rows]

    def _noted(self, fact: str) -> dict[int, Any]:
        """Return one fact of the items that this process has looked at so far, by position, ascending."""
        place = list(self.noting.facts).index(fact)
        return {i: facts[place] for i, facts in sorted(self.noting.noted.items())}

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
        present, places = int(groups.max()) + 1, kept_count(config.offline_keep, len(self))
        remedy = f"has {present} values, but offline_keep={config.offline_keep} leaves {places} places; keep more"
        require(config.offline_keep == 1 or places >= present, "group_column", column, remedy)
        return groups

    def count_groups(self) -> int:
        """Count the groups; while they wait, those of the items that the main process has looked at (there)."""
        if self.config.group_column is None:
            return 0
        waits = self.waits and "group" in self.noting.facts
        groups = group_numbers(list(self._noted("group").values())) if waits else self.groups
        return len(np.unique(groups))

    def column(self, name: str) -> list | None:
        """Return the cells of a column, or None where the training set is no table that has it."""
        known = isinstance(self.dataset, datasets.Dataset) and name in self.dataset.column_names
        return read_column(self.dataset, name, name) if known else None

    def take_fingerprint(self) -> None:
        """Hash ids and content, on the main process; the caller has set the seeds of data that are augmented."""
        if self.streams:
            return
        if not isinstance(self.dataset, datasets.Dataset):
            self._content = self.trainer.on_main(data_content, self.noting)  # what is looked at is noted
        ids = self._row_numbers if self.ids is None else self.ids
        self.fingerprint = self.trainer.on_main(data_fingerprint, self.dataset, ids, self._content)

    def known_lengths(self) -> tuple[np.ndarray, np.ndarray] | None:
        """
        Return where samples of known length are, and their lengths, int64 `[k]` both, the same on all processes.

        All samples, or, while they wait, those that the main process has looked at; `None` where no length matters.
        """
        if self.lengths is not None:
            return self._row_numbers, self.lengths
        if not (self.waits and "length" in self.noting.facts):
            return None
        noted = self.trainer.on_main(self._noted, "length")
        return np.array(list(noted), np.int64), np.array(list(noted.values()), np.int64)

    def _measure_lengths(self) -> None:
        if "length" in self.noting.facts:
            self.lengths = np.array(self._facts["length"], np.int64)
        else:
            self.lengths = self.trainer.on_main(sample_lengths, self.dataset, self._length_column)

    @cached_property
    def prompts(self) -> np.ndarray | None:
        """Number of each sample's prompt, int64 `[n]`, where batches are to be of samples of the same ones."""
        if self.config.of_a_prompt == 1 or self.streams:
            return None
        if "prompt" in self.noting.facts:
            return group_numbers(self._facts["prompt"])
        return self.trainer.on_main(lambda: group_numbers(list(map(prompt_of, self.dataset))))

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

        Where samples are scored, or chosen in the loop, with an id in every item, see [`TrainingSet.ids_of`]; items
        must be mappings then.
        """
        trainer, config = self.trainer, self.config
        dataset, collator = trainer.train_dataset, trainer.data_collator
        scores = config.may_select("offline") and config.rule("offline").reads_losses
        if scores or config.may_select("online") or config.track:
            noting = not self.streams and self.noting.facts
            ids = self.ids if self.ids_of is None else self._row_numbers
            noted = add_ids(self.noting, ids) if noting else self.with_ids
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
    def _some_items(self) -> list:
        dataset, _ = self.batching
        chosen = {*np.linspace(0, len(dataset) - 1, 64).astype(int).tolist(), *self._beyond_window()}
        return [dataset[i] for i in sorted(chosen)]

    def _beyond_window(self) -> list[int]:
        """Return the shortest sample beyond the window of the model, if there is one and lengths are at hand."""
        window = getattr(getattr(base_model(self.trainer.model), "config", None), "sliding_window", None)
        if not window or not stores_lengths(self.dataset):
            return []
        lengths = sample_lengths(self.dataset)
        longer = np.where(lengths > window, lengths, np.iinfo(np.int64).max)
        return [int(longer.argmin())] if (lengths > window).any() else []

    @cached_property
    def _few_items(self) -> list:
        some = self._some_items
        taught = [item for item in some if has_labels(item)] or some
        by_length = sorted(taught, key=feature_length)  # what differs may depend on lengths
        return [by_length[0], by_length[-1], *(taught[i % len(taught)] for i in (len(taught) // 2, -1))]

    def prompt_share(self) -> float | None:
        """Return which part of the positions of some samples is prompt; `None` where nothing tells, or none is."""
        try:
            prompts = sum(len(prompt_tokens(item)) for item in self._some_items)
        except ValueError:  # nothing says which tokens are prompt
            return None
        return prompts / sum(map(feature_length, self._some_items)) if prompts else None

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
