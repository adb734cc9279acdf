"""`Selector`: ledger, rules and plan in one object without a model; the same for the trainer and for any own loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..config import DarelConfig
from ..files import require
from .ledger import LossLedger, OpenLedger, check_finite
from .rules import RULES, Samples, candidate_rows, kept_count, length_corrected


@dataclass(frozen=True)
class Scores:
    """
    Saved or fresh scores of a data set.

    Attributes:
        ids (`np.ndarray`): int64 `[n]`.
        losses (`np.ndarray`): float32 `[n]`, eval mode, nats per label position.
        n_tokens (`np.ndarray`): int32 `[n]`, label positions.
        correct (`np.ndarray`): float32 `[n]`, fraction of positions predicted right; NaN where not asked for.
        origin (`dict`): fingerprints of what they come from: `data`, `model`, `loss`.
        embeddings (`np.ndarray`, *optional*): float32 `[n, D]`, what enters the classification head.
    """

    ids: np.ndarray
    losses: np.ndarray
    n_tokens: np.ndarray
    correct: np.ndarray
    origin: dict[str, str]
    embeddings: np.ndarray | None = None


@dataclass(frozen=True)
class OfflineSelection:
    """
    What the offline stage decided.

    Attributes:
        positions (`np.ndarray`): int64 `[k]`, rows of the training set that are kept, ascending.
        weights (`np.ndarray`, *optional*): float `[k]`, their weights in the loss; `None` where all are 1.
    """

    positions: np.ndarray
    weights: np.ndarray | None


class Selector:
    """
    Decide which samples training visits, and which rows of a candidate batch are trained on.

    It knows no model and no Trainer: losses go in, positions come out. Random choices depend on the seed and on the
    number of the batch alone, so that a resumed run chooses the same.

    Args:
        config ([`DarelConfig`]): the rules and their settings.
        ids (`Iterable[int]`, *optional*): ids of all training samples, unique; `None` for a stream, whose ids are not
            known before they are seen (no offline stage then).
        seed (`int`): of the rules that draw at random.
        reference (`np.ndarray`, *optional*): float `[n]`, losses of a reference model in the order of `ids`, for rules
            that need them.

    Attributes:
        ledger ([`LossLedger`]): what is known of every sample.

    Example: an own loop, see docs/settings.md.

    ```python
    >>> import numpy as np
    >>> selector = Selector(DarelConfig(online_keep=0.5, length_correction=False), ids=range(6))
    >>> selector.candidate_rows(2)
    4
    >>> rows, weights = selector.select(ids=[3, 1, 5, 0], losses=[0.1, 2.0, 0.3, 1.0], batch_size=2, batch=0)
    >>> rows.tolist(), weights
    ([1, 3], None)
    ```
    """

    def __init__(
        self, config: DarelConfig, ids: Iterable[int] | None, seed: int = 0, reference: np.ndarray | None = None
    ):
        self.config = config
        self.seed = seed
        self.ids = None if ids is None else np.asarray(ids, dtype=np.int64)
        self.reference = None  # in the order of the ledger's rows: ids ascending
        if reference is not None:
            self.reference = np.asarray(reference, np.float64)[np.argsort(self.ids, kind="stable")]
        self.ledger = OpenLedger() if ids is None else LossLedger(self.ids)

    def candidate_rows(self, batch_size: int) -> int:
        """Return how many candidates a batch of `batch_size` trained rows is chosen from: round(b / A)."""
        return candidate_rows(batch_size, self.config.online_keep)

    def is_fresh(self, epoch: int) -> bool:
        """Whether candidates are scored by a forward pass in this epoch (0, eta, 2 eta, ...)."""
        return epoch % self.config.rescore_every == 0

    def select_offline(self, scores: Scores | None, groups: np.ndarray | None = None) -> OfflineSelection:
        """
        Decide which samples are kept for training, and remember their losses.

        Args:
            scores ([`Scores`], *optional*): in the order of `ids`; `None` for a rule that reads no losses.
            groups (`np.ndarray`, *optional*): int `[n]`, group number of each sample, each to stay represented.

        Raises:
            ValueError: see [`darel_hf.selection.Rule`].
        """
        if scores is None:
            samples = Samples(self.ids, np.zeros(len(self.ids)), groups=groups)
        else:
            correct = None if np.isnan(scores.correct).any() else scores.correct
            self.ledger.record_scores(scores.ids, scores.losses, scores.n_tokens, 0, correct=correct, share=False)
            ids, reference = scores.ids, self._reference("offline", scores.ids)
            samples = Samples(ids, scores.losses, scores.n_tokens, groups, correct, scores.embeddings, reference)
            if self.config.length_correction:
                samples = length_corrected(samples)
        generator = np.random.default_rng([self.seed, 0])
        return OfflineSelection(*RULES[self.config.offline_rule](samples, self.config.offline_keep, generator))

    def select(
        self,
        ids: np.ndarray,
        losses: np.ndarray | None,
        batch_size: int,
        batch: int,
        lengths: np.ndarray | None = None,
        correct: np.ndarray | None = None,
        least: int = 1,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Choose the rows of a candidate batch that are trained on.

        Args:
            ids (`np.ndarray`): int64 `[n]`.
            losses (`np.ndarray`, *optional*): float `[n]`, all of one mode, eval or train; `None` for a rule that
                reads no losses.
            batch_size (`int`): rows to keep of a full candidate batch; of a smaller one (the last) in proportion.
            batch (`int`): number of this candidate batch, counted over the run and over all processes.
            lengths (`np.ndarray`, *optional*): int `[n]`, label positions, for `length_correction`.
            correct (`np.ndarray`, *optional*): float `[n]`, for rules that need it.
            least (`int`): rows to keep at least, of a batch that has as many.

        Returns:
            `positions` (int64 `[k]`, ascending) and `weights` (float `[k]`, or `None` where all are 1).

        Raises:
            ValueError: for NaN or infinite losses, and for unknown ids; the message names the ids.
        """
        ids = np.asarray(ids, np.int64)
        rule = RULES[self.config.online_rule]
        losses = np.zeros(len(ids)) if losses is None else np.asarray(losses, np.float64)
        remedy = f"there are {len(ids)} ids: one loss a sample is wanted (reduction='none')"
        require(losses.shape == ids.shape, "losses", f"shape {losses.shape}", remedy)
        self.ledger.rows(ids)  # raises for ids of other data
        reference = self._reference("online", ids)
        check_finite(ids, losses)
        candidates = self.candidate_rows(batch_size)
        count = batch_size if len(ids) >= candidates else kept_count(batch_size / candidates, len(ids))
        count = max(count, min(least, len(ids), batch_size))
        # Data loaders repeat samples to even out batches, so rows, not ids, are what must differ; ties still go by id.
        order = np.argsort(ids, kind="stable")
        row_ids = np.empty(len(ids), np.int64)
        row_ids[order] = np.arange(len(ids))
        samples = Samples(row_ids, losses, lengths, None, correct, reference=reference)
        if self.config.length_correction and rule.reads_losses:
            samples = length_corrected(samples)
        generator = np.random.default_rng([self.seed, 1, batch])
        positions, weights = rule(samples, count / len(ids), generator)
        self.ledger.record_training(ids[positions])
        return positions, weights

    def _reference(self, stage: str, ids: np.ndarray) -> np.ndarray | None:
        if self.reference is None or "reference" not in self.config.rule(stage).needs:
            return None
        return self.reference[self.ledger.rows(ids)]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint must remember, as arrays."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what [`Selector.state_dict`] returned."""
        self.ledger.load_state_dict(state)
