"""Per-sample losses from logits and labels: causal LM, seq2seq, classification; shift and -100 handled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE = -100
#: How float labels of the shape of the logits, `[B, K]`, are read; the first that gives a model's own loss is taken.
FORMS = ("several labels", "several numbers", "probabilities")
#: Label positions whose logits exist at the same time in float32: 512 x 50,257 x 4 bytes is 103 MB.
CHUNK = 512


class SampleLosses(NamedTuple):
    """Losses of a batch of B samples.

    Attributes:
        losses (`torch.Tensor`): float32 `[B]`, mean over a sample's label positions, in nats; 0 where it has none.
        n_tokens (`torch.Tensor`): int64 `[B]`, number of label positions (1 for a class label).
        correct (`torch.Tensor`): float32 `[B]`, fraction of label positions whose most likely prediction is right.
        embeddings (`torch.Tensor`, *optional*): float32 `[B, D]`, what enters the classification head.
    """

    losses: torch.Tensor
    n_tokens: torch.Tensor
    correct: torch.Tensor
    embeddings: torch.Tensor | None = None


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Align the labels `[B, T]` of a causal LM with its logits: position t is to predict label t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_losses(
    source: torch.Tensor,
    labels: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    label_smoothing: float = 0.0,
    want_correct: bool = False,
) -> SampleLosses:
    """
    Compute each row's mean cross-entropy over its label positions, a few hundred positions at a time.

    Args:
        source (`torch.Tensor`): `[B, T', K]` logits, or hidden states if `project` is given. Aligned with `labels` on
            the right (prompt tuning prepends positions of its own).
        labels (`torch.Tensor`): int64 `[B, T]`, already shifted for a causal LM, -100 where there is nothing to learn.
        project (`Callable`, *optional*): maps hidden states `[N, D]` to logits `[N, K]`, so that logits of the whole
            batch never exist.
        label_smoothing (`float`): as in `TrainingArguments.label_smoothing_factor`.
        want_correct (`bool`): also find the most likely prediction of every position.

    Returns:
        [`SampleLosses`]; differentiable if `source` is.
    """
    labels = labels.to(source.device)
    source = source[:, source.shape[1] - labels.shape[1] :]
    rows, columns = labels.ne(IGNORE).nonzero(as_tuple=True)
    sums = torch.zeros(labels.shape[0], dtype=torch.float32, device=source.device)
    right = torch.zeros_like(sums)
    for start in range(0, rows.numel(), CHUNK):
        row, column = rows[start : start + CHUNK], columns[start : start + CHUNK]
        logits, target = source[row, column], labels[row, column]
        logits = (project(logits) if project is not None else logits).float()
        nll = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        sums = sums.index_add(0, row, nll)
        if want_correct:
            right = right.index_add(0, row, logits.detach().argmax(-1).eq(target).float())
    n_tokens = labels.ne(IGNORE).sum(1)
    count = n_tokens.clamp(min=1)
    return SampleLosses(sums / count, n_tokens, right / count)


def dense_token_losses(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, want_correct: bool = False
) -> SampleLosses:
    """
    Compute what [`token_losses`] does of logits, at all positions at once.

    No step's size depends on the labels, so that a compiler can trace it; the logits of the whole batch exist in
    float32.
    """
    logits = logits[:, logits.shape[1] - labels.shape[1] :].float()
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE, label_smoothing=label_smoothing
    )
    n_tokens = labels.ne(IGNORE).sum(1)
    count = n_tokens.clamp(min=1)
    losses = nll.view(labels.shape).sum(1) / count
    right = logits.detach().argmax(-1).eq(labels).sum(1) / count if want_correct else torch.zeros_like(losses)
    return SampleLosses(losses, n_tokens, right)


def per_sample_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shift: bool,
    label_smoothing: float = 0.0,
    want_correct: bool = False,
    dense: bool = False,
    form: str = FORMS[0],
) -> SampleLosses:
    """
    Compute the loss of each sample of a batch, whatever the task.

    Args:
        logits (`torch.Tensor`): `[B, T, K]` (one prediction a position) or `[B, K]` (one a sample).
        labels (`torch.Tensor`): int64 `[B, T]` or `[B]`; float `[B, K]` for several labels or regression.
        shift (`bool`): whether position t predicts label t + 1, as in a causal LM.
        label_smoothing (`float`): as in `TrainingArguments.label_smoothing_factor`; not for float labels.
        want_correct (`bool`): also fill [`SampleLosses.correct`].
        dense (`bool`): compute all positions at once, see [`dense_token_losses`].
        form (`str`): one of [`FORMS`], for float labels: binary cross-entropy, squared errors, or cross-entropy with
            the probabilities of the classes.

    Returns:
        [`SampleLosses`], differentiable.

    Raises:
        ValueError: if the shapes say nothing that we know; `per_sample_loss=` is the way out.

    Example:

    ```python
    >>> import torch
    >>> per_sample_losses(torch.zeros(2, 3), torch.tensor([0, 2]), shift=False).losses  # log(3) each
    tensor([1.0986, 1.0986])
    ```
    """
    labels = labels.to(logits.device)
    of_tokens = partial(
        dense_token_losses if dense else token_losses, label_smoothing=label_smoothing, want_correct=want_correct
    )
    if logits.dim() == 3 and labels.dim() == 2 and not labels.is_floating_point():
        return of_tokens(logits, shift_labels(labels) if shift else labels)
    if logits.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point() and logits.shape[1] > 1:
        return of_tokens(logits[:, None], labels[:, None])
    ones = torch.ones(labels.shape[0], dtype=torch.int64, device=logits.device)
    if labels.is_floating_point() and logits.dim() == 2 and labels.dim() == 2 and labels.shape == logits.shape:
        logits, labels = logits.float(), labels.float()
        if form == "several numbers":
            losses = F.mse_loss(logits, labels, reduction="none").mean(1)
            return SampleLosses(losses, ones, torch.zeros_like(losses))
        if form == "probabilities":
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
            return SampleLosses(losses, ones, logits.argmax(1).eq(labels.argmax(1)).float())
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        return SampleLosses(losses, ones, logits.gt(0).eq(labels.gt(0.5)).float().mean(1))
    if logits.dim() == 2 and logits.shape[1] == 1:
        losses = F.mse_loss(logits[:, 0].float(), labels.reshape(-1).float(), reduction="none")
        return SampleLosses(losses, ones, torch.zeros_like(losses))
    raise ValueError(
        f"logits of shape {tuple(logits.shape)} with {labels.dtype} labels of shape {tuple(labels.shape)}: "
        "the loss of one sample cannot be read off; pass per_sample_loss=, a callable "
        "(outputs, inputs) -> losses of shape [batch]"
    )


def weighted_loss(
    samples: SampleLosses, weights: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    Reduce per-sample losses with per-sample weights to the scalar that trains.

    With all weights 1 this is Trainer's own loss. Weighted losses are divided by the *unweighted* count, so that the
    sum over an epoch (not each step) is unbiased for rules that keep a row with probability 1 / weight (InfoBatch).

    Args:
        samples ([`SampleLosses`]): of the B rows of a micro-batch.
        weights (`torch.Tensor`): float `[B]`.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): label positions of the whole optimizer step; without
            it the mean over this micro-batch is taken.
    """
    count = samples.n_tokens.sum() if num_items_in_batch is None else num_items_in_batch
    total = (samples.losses * samples.n_tokens * weights.to(samples.losses)).sum()
    return total / (count.to(total.device).clamp(min=1) if torch.is_tensor(count) else max(count, 1))
