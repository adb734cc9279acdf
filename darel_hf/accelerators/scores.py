"""`CheapScores`: losses of candidates on the rows that accelerators make of them, where these are the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data import ID_KEY, WEIGHT_KEY
from ..scoring import IGNORE, BatchScorer, SampleLosses, shift_labels, token_losses
from .base import Accelerator, CannotAccelerate, first_line

logger = logging.getLogger(__name__)


class CheapScores:
    """
    Score batches as a scorer does, without what accelerators take out of a step: padding, and prompts that are known.

    The first batch is scored in both ways; where losses differ, or there is nothing to take out, all are scored the
    plain way.

    Args:
        scorer ([`BatchScorer`]): scores the plain way.
        accelerators (`Sequence[Accelerator]`): in the order in which they act on the batches of steps.
    """

    def __init__(self, scorer: BatchScorer, accelerators: Sequence[Accelerator]):
        self.scorer, self.accelerators = scorer, accelerators
        self.alike: bool | None = None if accelerators else False  # whether losses are the same; None: not tried

    def __call__(self, inputs: Mapping[str, Any]) -> SampleLosses:
        """Score a batch, on the model's device; raises what the scorer raises."""
        if self.alike is False:
            return self.scorer(inputs)
        wanted = self.scorer(inputs) if self.alike is None else None
        try:
            found = self._found(inputs)
            problem = None if found is not None else "steps compute all positions, or losses are not those of tokens"
        except Exception as error:  # such a batch cannot be made cheaper; a step on it says so, if it must be
            if self.alike:
                if isinstance(error, CannotAccelerate):
                    return self.scorer(inputs)
                raise
            found, problem = None, first_line(error)
        if wanted is None:
            return self.scorer(inputs) if found is None else found
        if problem is None:
            tolerance = self.scorer.tolerance
            same = torch.allclose(found.losses, wanted.losses, rtol=tolerance, atol=tolerance)
            problem = None if same else f"{found.losses.tolist()} in place of {wanted.losses.tolist()}"
        self.alike = problem is None
        if not self.alike:
            logger.info("candidates are scored the plain way: %s", problem)
        return found if self.alike else wanted  # a run that is resumed scores its first batch as any other

    def _found(self, inputs: Mapping[str, Any]) -> SampleLosses | None:
        scorer = self.scorer
        if scorer.per_sample_loss is not None or scorer.want_embeddings or scorer.head is None:
            return None
        if not scorer.reading.shift or not torch.is_tensor(inputs.get("labels")):
            return None
        row: Mapping[str, Any] = {key: value for key, value in inputs.items() if key not in (ID_KEY, WEIGHT_KEY)}
        for accelerator in self.accelerators:
            row = accelerator.transform(row)
        wanted, labels = row.get("shift_labels"), shift_labels(inputs["labels"])
        if not torch.is_tensor(wanted):  # of a row in which samples may have things in common, we would not know whose
            return None
        owner, n_tokens = labels.ne(IGNORE).nonzero()[:, 0], labels.ne(IGNORE).sum(1)
        if len(owner) != int(wanted.ne(IGNORE).sum()):
            return None
        with scorer.scoring():
            hidden = scorer.hidden(**{key: row[key] for key in row if key not in ("labels", "shift_labels")})
            each = token_losses(
                hidden[0][:, None], wanted[0][:, None], project=scorer.head, want_correct=scorer.want_correct
            )
            own = each.n_tokens.bool()
            count, zeros = n_tokens.clamp(min=1), torch.zeros(len(n_tokens), device=n_tokens.device)
            losses = zeros.index_add(0, owner, each.losses[own]) / count
            return SampleLosses(losses, n_tokens, zeros.index_add(0, owner, each.correct[own]) / count)
