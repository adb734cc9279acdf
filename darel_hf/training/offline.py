"""`OfflineStage`: before training, score the samples (or take scores that are there), and decide which are kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn

from ..accelerators import Accelerator, share_rows
from ..data import code_fingerprint
from ..files import require
from ..scoring import (
    check_rows,
    load_scores,
    match_scores,
    model_fingerprint,
    rows_without_tokens,
    save_scores,
    score_dataset,
    scorer_for,
    skip_identity_adapters,
    to_device,
)
from ..selection import LossLedger, Scores, Selector
from . import checkpoints
from .clock import Clock
from .dataset import TrainingSet

logger = logging.getLogger(__name__)


class OfflineStage:
    """
    Score, select, and remember what was kept of the training set.

    Args:
        trainer (`DarelMixin`): the trainer.
        data ([`TrainingSet`]): the whole training set.
        clock ([`Clock`]): of the run.
        folder (`Path`): where scores are kept for the next run.

    Attributes:
        scorer (`nn.Module`, *optional*): what scores in place of the model that is trained.
        scorer_seconds (`float`): what making it has cost.
        positions (`np.ndarray`, *optional*): int64 `[k]`, rows that are kept; `None`: all.
        weights (`np.ndarray`, *optional*): float32 `[n]`, in the order of the ledger; `None`: all 1.
        losses (`np.ndarray`, *optional*): float32 `[n]`, likewise: what was gone by.
        reference (`np.ndarray`, *optional*): float `[n]`, losses of a reference model, in the order of the ids.
        scores_reused (`bool`): whether scores of an earlier run were taken.
    """

    def __init__(self, trainer: Any, data: TrainingSet, clock: Clock, folder: Path):
        self.trainer, self.args, self.config = trainer, trainer.args, trainer.darel
        self.data, self.clock, self.folder = data, clock, folder
        self.scorer = trainer.scorer
        self.scorer_seconds = 0.0
        self.positions: np.ndarray | None = None
        self.weights: np.ndarray | None = None
        self.losses: np.ndarray | None = None
        self.reference: np.ndarray | None = None
        self.scores_reused = False

    def load_reference(self) -> None:
        """Read the losses of the reference model, if the settings name any."""
        if self.config.reference_scores is not None:
            self.reference = self.trainer.on_main(self._saved, "reference_scores").losses

    def load_scores(self) -> Scores | None:
        """Read the scores that the settings name, if they do."""
        return None if self.config.scores is None else self.trainer.on_main(self._saved, "scores")

    def _saved(self, field: str) -> Scores:
        path, ids = getattr(self.config, field), self.data.ids
        scores = load_scores(path, field)
        remedy = f"{len(scores.ids)} scores for {len(ids)} samples that are known by row number; score these data"
        require(self.config.id_column is not None or len(scores.ids) == len(ids), field, path, remedy)
        scores = match_scores(scores, ids, self.data.fingerprint, path, field)
        check_rows(path, ids, self.data.column, field)
        return scores

    def make_scorer(self, needed: bool) -> None:
        """Call the user's function for a scoring model, if there may be an offline pass."""
        if isinstance(self.scorer, nn.Module) or self.scorer is None:
            return
        if not (needed and self.config.may_select("offline") and self.config.rule("offline").reads_losses):
            self.scorer = None
            return
        with self.clock.count("offline"):
            self.scorer = self.scorer()
            remedy = "the function must return a model (torch.nn.Module)"
            require(isinstance(self.scorer, nn.Module), "scorer", type(self.scorer).__name__, remedy, TypeError)
        self.scorer_seconds = self.clock.seconds["offline"]

    def score(self, accelerators: Sequence[Accelerator] = ()) -> Scores:
        """
        Score every sample, or find that it has been done: same model, data and loss definition.

        Args:
            accelerators (`Sequence[Accelerator]`): of the run; what one keeps of samples, scoring asks it for.
        """
        with self.clock.count("offline"):
            return self._score(accelerators)

    def _score(self, accelerators: Sequence[Accelerator]) -> Scores:
        trainer = self.trainer
        dataset, collator = self.data.batching
        model = self.scorer if self.scorer is not None else trainer.model
        if self.scorer is not None:
            to_device(model, self.args.device)
        scorer = scorer_for(trainer, model, "offline")
        items, size = [dataset[i] for i in range(min(8, len(dataset)))], trainer._train_batch_size
        probe = trainer._prepare_inputs(collator(items))
        accelerators = accelerators if model is trainer.model else ()
        with skip_identity_adapters(scorer, probe) as skipped:
            origin = self._origin(model, skipped)
            name = checkpoints.short_hash(origin, scorer.want_correct, scorer.want_embeddings)
            path, parts = self.folder / f"scores-{name}.parquet", self.folder / f"parts-{name}"
            cached = None
            if trainer.on_main(path.exists):
                self.data.learn()
                cached = trainer.on_main(self._cached, path)
            if cached is not None:
                self.scores_reused = True
                logger.info("using the scores in %s: same model, data and loss definition", path)
                return cached
            scores = score_dataset(
                scorer,
                dataset,
                collator,
                trainer._prepare_inputs,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                progress_bar=not self.args.disable_tqdm,
                max_rows=256 if "input_ids" in items[0] else rows_without_tokens(self.args.device, size),
                parts=parts,
                origin=origin,
                share=partial(share_rows, accelerators=accelerators),
                ids_of=self.data.ids_of,
            )
        for accelerator in accelerators:
            if accelerator.keeps:  # what it keeps of samples it has by now
                accelerator.first_epoch = 1.0
        self.data.learn()
        scores = replace(scores, origin={**origin, "data": self.data.fingerprint})  # that of ids which waited, too
        scores = match_scores(scores, self.data.ids, self.data.fingerprint, "offline pass")
        if self.args.should_save:
            save_scores(scores, path)
            shutil.rmtree(parts, ignore_errors=True)
        return scores

    def _origin(self, model: nn.Module, skipped: bool) -> dict[str, str]:
        """Return the fingerprints of all that decides the scores."""
        own, dataset = self.trainer.per_sample_loss, self.data.dataset
        # What makes items of a table's rows, of which the fingerprint of the data knows nothing; or the code of items.
        makes_items = [type(dataset)]
        if isinstance(dataset, datasets.Dataset):
            makes_items = [dataset.format["type"], *dataset.format["format_kwargs"].values()]
        return {
            "data": self.data.fingerprint,
            "model": model_fingerprint(model, without_adapters=skipped),
            "loss": code_fingerprint(
                ["mean over label positions", self.trainer.accelerator.mixed_precision, own],
                model_fingerprint(own) if isinstance(own, nn.Module) else "",
                self.trainer.data_collator,
                makes_items,
            ),
        }

    def _cached(self, path: Path) -> Scores | None:
        try:
            return match_scores(load_scores(path), self.data.ids, self.data.fingerprint, str(path))
        except ValueError as error:
            logger.warning("%s; scoring again", error)
            return None

    def select(self, selector: Selector, scores: Scores | None) -> None:
        """Decide which samples are kept; the selector's ledger learns their losses."""
        selection = selector.select_offline(scores, self.data.groups)
        self.positions = selection.positions
        if scores is not None:
            self.losses = selector.ledger.loss.copy()
        if selection.weights is not None:
            self.weights = np.ones(len(self.data), np.float32)
            self.weights[selector.ledger.rows(self.data.ids[self.positions])] = selection.weights

    def kept(self, ledger: LossLedger) -> np.ndarray:
        """Return which samples are kept, bool `[n]`, in the order of the ledger."""
        kept = np.full(len(ledger), self.positions is None)
        if self.positions is not None:
            kept[ledger.rows(self.data.ids[self.positions])] = True
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember."""
        arrays = {"positions": self.positions, "offline_weights": self.weights, "offline_losses": self.losses}
        found = {name: values for name, values in arrays.items() if values is not None}
        return {"scores_reused": self.scores_reused, **found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what [`OfflineStage.state_dict`] returned: nothing is scored again."""
        self.positions, self.losses = state.get("positions"), state.get("offline_losses")
        self.weights, self.scores_reused = state.get("offline_weights"), state["scores_reused"]
