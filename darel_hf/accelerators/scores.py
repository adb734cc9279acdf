"""Losses of samples on the rows that accelerators make of batches, where these are the same: of candidates, of all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters import find_reader
from ..data import ID_KEY, WEIGHT_KEY, by_beginning
from ..scoring import (
    IGNORE,
    BatchScorer,
    SampleLosses,
    SharedPrompts,
    base_model,
    is_causal_lm,
    share_prompts,
    shift_labels,
    token_losses,
)
from . import unpad
from .base import Accelerator, CannotAccelerate, first_line
from .share_prompts import share

logger = logging.getLogger(__name__)
#: Fraction of all positions that must be in common: otherwise the simple way is as fast.
WORTHWHILE = 0.2
#: Positions of the padded batch that a row stands for, relative to those of the row: for a GPU keys are copied to as
#: many, which takes memory.
PADDED = 4


class CheapScores:
    """
    Score batches as a scorer does, without what accelerators take out of a step: padding, and prompts that are known.

    The first batch is scored in both ways; where losses differ, or there is nothing to take out, all are scored the
    plain way.

    Args:
        scorer ([`BatchScorer`]): scores the plain way.
        accelerators (`Sequence[Accelerator]`): in the order in which they act on the batches of steps; of each its
            `transform` alone is called.
    """

    def __init__(self, scorer: BatchScorer, accelerators: Sequence[Accelerator | OneRow]):
        self.scorer, self.accelerators = scorer, accelerators
        self.alike: bool | None = None if accelerators else False  # whether losses are the same; None: not tried

    def __call__(self, inputs: Mapping[str, Any]) -> SampleLosses:
        """Score a batch, on the model's device; raises what the scorer raises."""
        if self.alike is None:
            return self.try_out(inputs)
        try:
            found = self._found(inputs) if self.alike else None
        except CannotAccelerate:  # such a batch cannot be made cheaper; a step on it says so, if it must be
            found = None
        return self.scorer(inputs) if found is None else found

    def try_out(self, inputs: Mapping[str, Any]) -> SampleLosses:
        """Score a batch in both ways, and remember whether they are alike."""
        wanted, found = self.scorer(inputs), None
        try:
            found = self._found(inputs)
            problem = None if found is not None else "steps compute all positions, or losses are not those of tokens"
        except Exception as error:  # whatever it is, the plain way has just done it
            problem = first_line(error)
        if problem is None:
            tolerance = self.scorer.tolerance
            same = torch.allclose(found.losses, wanted.losses, rtol=tolerance, atol=tolerance)
            problem = None if same else f"{found.losses.tolist()} in place of {wanted.losses.tolist()}"
        self.alike = problem is None
        if not self.alike:
            logger.info("samples are scored the plain way: %s", problem)
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
        apart = ("labels", "shift_labels", "logits_to_keep")
        with scorer.scoring():
            hidden = scorer.hidden(**{key: row[key] for key in row if key not in apart})[0, row["logits_to_keep"]]
            each = token_losses(
                hidden[:, None], wanted[0][:, None], project=scorer.head, want_correct=scorer.want_correct
            )
            own = each.n_tokens.bool()
            count, zeros = n_tokens.clamp(min=1), torch.zeros(len(n_tokens), device=n_tokens.device)
            losses = zeros.index_add(0, owner, each.losses[own]) / count
            return SampleLosses(losses, n_tokens, zeros.index_add(0, owner, each.correct[own]) / count)


class OneRow:
    """
    Put batches into a row, what their samples begin with in common once, for any model: nobody need train it.

    Args:
        model (`nn.Module`): a causal language model, PEFT's adapters included.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def fits(self) -> bool:
        """Whether a model may take such rows; that it does is for a trial to show."""
        inner, reader = base_model(self.model), find_reader(self.model)
        attends = getattr(inner, "_can_set_attn_implementation", bool)()  # else to ask for ours is a warning
        told = reader is None or reader.everywhere  # a reader takes one prompt a row
        return attends and told and is_causal_lm(inner) and not unpad.unknown_layers(inner)

    def transform(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row of a batch, see [`share`]; raises [`CannotAccelerate`] where it is no padded one."""
        wrong = unpad.unlike_a_padded_batch(inputs)
        if wrong is not None:
            raise CannotAccelerate(wrong)
        return share(inputs, label_positions_only=True)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model attend within samples of a row for a while."""
        inner = base_model(self.model)
        parts = {name: getattr(inner.config, name) for name in inner.config.sub_configs}  # of texts and images, say
        before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
        before |= {"": inner.config._attn_implementation}
        inner.set_attn_implementation(unpad.ATTENTION)
        try:
            yield
        finally:
            inner.set_attn_implementation(before)


class SharedRows:
    """
    Score samples in batches of those that begin alike, each of them put into one row.

    Args:
        score ([`CheapScores`]): scores a batch.
        tokens (`Sequence[np.ndarray]`): of each of n samples, int64 `[k]`.
        collate (`Callable`): makes a batch of samples, named by their position, on the model's device.
        attached (`Callable`): returns the context in which batches are scored.
    """

    def __init__(
        self,
        score: CheapScores,
        tokens: Sequence[np.ndarray],
        collate: Callable[[Sequence[int]], Mapping[str, Any]],
        attached: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.score, self.tokens, self.collate, self.attached = score, tokens, collate, attached
        self.order, self.common = by_beginning(tokens)
        self.lengths = np.array([len(row) for row in tokens])[self.order]

    @property
    def saving(self) -> float:
        """Fraction of all positions that samples have in common with others."""
        return self.common.sum() / max(self.lengths.sum(), 1)

    def alike(self) -> bool:
        """Whether a few samples are scored as the plain way does: of all lengths, and two that begin alike."""
        pair = int(self.common.argmax())
        few = [int(self.lengths.argmin()), int(self.lengths.argmax()), pair, max(pair - 1, 0), len(self.order) // 2]
        with self.attached():
            self.score.try_out(self.collate(self.order[[*dict.fromkeys(few)]]))
        return self.score.alike

    def some(self, rows: int, draw: np.random.Generator) -> tuple[SharedRows, int]:
        """Return the same of so many samples that follow one another, and how many they are."""
        start = int(draw.integers(max(len(self.order) - rows, 0) + 1))
        chosen = self.order[start : start + rows]
        tokens = [self.tokens[i] for i in chosen]
        return SharedRows(self.score, tokens, lambda part: self.collate(chosen[part]), self.attached), len(chosen)

    def batches(self, max_tokens: int, max_rows: int) -> Iterator[tuple[np.ndarray, SampleLosses]]:
        """
        Score all samples.

        Args:
            max_tokens (`int`): positions of a batch, what is in common counted once.
            max_rows (`int`): samples of a batch.

        Yields:
            positions of samples, int64 `[b]`, and their losses; each sample once.
        """
        start = size = longest = 0
        cuts = []
        for k, (length, common) in enumerate(zip(self.lengths.tolist(), self.common.tolist(), strict=True)):
            size, rows, padded = size + length - common, k + 1 - start, max(longest, length)
            full = size > max_tokens or rows > max_rows or rows * padded > PADDED * max_tokens
            if full and longest:  # a batch of empty texts has no columns
                cuts.append(k)
                start, size, longest = k, length, 0
            longest = max(longest, length)
        for chosen in np.split(self.order, cuts):
            with self.attached():
                samples = self.score(self.collate(chosen))
            yield chosen, samples


def share_rows(
    scorer: BatchScorer,
    items: Sequence[Any],
    collate: Callable[[Sequence[int]], Mapping[str, Any]],
    accelerators: Sequence[Accelerator] = (),
) -> SharedRows | SharedPrompts | None:
    """
    Find how samples are scored with what they begin with in common computed once; for `score_dataset(share=)`.

    Args:
        scorer ([`BatchScorer`]): scores the plain way.
        items (`Sequence`): the samples.
        collate (`Callable`): makes a batch of samples, named by their position, on the model's device.
        accelerators (`Sequence[Accelerator]`): of a run on the same model: the rows of one that keeps what it makes of
            samples are taken, see [`Accelerator.keeps`].

    Returns:
        what scores them by [`SharedRows.batches`], as a few samples have shown; `None`: nothing is saved.
    """
    keeping, row = [a for a in accelerators if a.keeps], OneRow(scorer.model)
    known = all(isinstance(item, Mapping) and np.ndim(item.get("input_ids")) == 1 for item in items)
    if known and (keeping or row.fits):
        score = CheapScores(scorer, keeping or [row])
        attached = contextlib.nullcontext if keeping else row.attached
        shared = SharedRows(score, [np.asarray(item["input_ids"]) for item in items], collate, attached)
        if not keeping and shared.saving < WORTHWHILE:
            return None
        if shared.alike():
            return shared
    return share_prompts(scorer, items, collate)
