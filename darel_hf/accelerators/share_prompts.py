"""Training with what samples of a batch begin with in common computed once, with the gradients of the padded batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..config import ACCELERATOR_FACTS
from ..data import by_beginning, prompt_length
from ..scoring import IGNORE
from .base import register_accelerator
from .row_attention import rows_of_places
from .unpad import TOKEN_KEYS, PaddingFree, first_used, used_positions

#: Positions in common that are worth it: fewer save less than attending to them apart costs.
LEAST = 4


def beginnings(rows: list[np.ndarray], most: list[int]) -> tuple[list[int], list[np.ndarray]]:
    """
    Find a row for B samples in which whatever several of them begin with is there once.

    Args:
        rows (`list[np.ndarray]`): int64 `[n, k]` each: what must be equal at a position for what a causal model makes
            of it to be equal, such as its token and where it stands.
        most (`list[int]`): so many positions of each may be in common with others, at most.

    Returns:
        the samples in an order in which those that begin alike follow one another, and the places in the row of each
        of them, int64 `[n]`, in the order of `rows`. A sample has places of its own from the first one that exceeds
        those of all samples before it.
    """
    order, alike = by_beginning(rows)
    places, before, size = [np.empty(0, np.int64)] * len(rows), 0, 0
    for i, common in zip(order.tolist(), alike.tolist(), strict=True):
        common = min(common, most[i], most[before])
        common = common if common >= LEAST else 0
        own = len(rows[i]) - common
        places[i] = np.concatenate([places[before][:common], np.arange(size, size + own)])
        before, size = i, size + own
    return order.tolist(), places


def share(inputs: Mapping[str, Any], label_positions_only: bool = False) -> dict[str, Any]:
    """
    Put the samples of a padded batch into a single row, what several of them begin with once, for our attention.

    Args:
        inputs (`Mapping`): as [`darel_hf.accelerators.unpad.flatten`] takes them.
        label_positions_only (`bool`): let only positions that predict a label pass the head, those in common once for
            each sample. Else only what precedes the first label, less its last token, can be in common.

    Returns:
        `dict`: as [`darel_hf.accelerators.unpad.flatten`] gives it, with fewer positions; `attention_mask` is that of
        [`darel_hf.accelerators.row_attention.attend`].

    Example:

    ```python
    >>> import torch
    >>> ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]])
    >>> share({"input_ids": ids, "labels": ids.masked_fill(ids < 5, -100)})["input_ids"]
    tensor([[1, 2, 3, 4, 5, 6, 5, 7]])
    >>> row = share({"input_ids": ids, "labels": ids.masked_fill(ids < 5, -100)}, label_positions_only=True)
    >>> row["input_ids"], row["logits_to_keep"], row["labels"]
    (tensor([[1, 2, 3, 4, 5, 6, 7]]), tensor([3, 4, 3, 4]), tensor([[5, 6, 5, 7]]))
    ```
    """
    used, device = used_positions(inputs), inputs["labels"].device
    labels = by_row(inputs["labels"].masked_fill(first_used(used), IGNORE), used)
    most = None if label_positions_only else [prompt_length(row != IGNORE) for row in labels]
    row, places = put_once({key: value for key, value in inputs.items() if key in TOKEN_KEYS}, used, most)
    if label_positions_only:
        following = [np.append(row[1:], IGNORE) for row in labels]
        keep = np.concatenate([where[after != IGNORE] for where, after in zip(places, following, strict=True)])
        wanted = np.concatenate([after[after != IGNORE] for after in following])
        if not len(keep):  # a loss of nothing is still a loss
            keep, wanted = np.zeros(1, np.int64), np.full(1, IGNORE)
        row |= {"logits_to_keep": torch.from_numpy(keep).to(device)}
        labels = torch.from_numpy(wanted).to(device)[None]
        return {**row, "labels": labels, "shift_labels": labels}
    wanted = np.empty(row["input_ids"].shape[1], np.int64)
    wanted[np.concatenate(places)] = np.concatenate(labels)  # what is in common has no label
    return {**row, "labels": torch.from_numpy(wanted).to(device)[None]}


def put_once(
    inputs: Mapping[str, torch.Tensor], used: torch.Tensor, most: list[int] | None = None
) -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
    """
    Put the samples of a padded batch into a single row, what several of them begin with once.

    Args:
        inputs (`Mapping`): `input_ids` and, where there are any, `position_ids` and `token_type_ids`, int64 `[B, L]`;
            others are left out.
        used (`torch.Tensor`): bool `[B, L]`, what is no padding.
        most (`list[int]`, *optional*): see [`beginnings`].

    Returns:
        the row, `[1, N]` each, with the `attention_mask` of [`darel_hf.accelerators.row_attention.attend`]; and the
        places in it of the used positions of each sample, int64 `[n]`.
    """
    device = used.device
    columns = torch.arange(used.shape[1], device=device).expand_as(used)
    taken = {"input_ids": inputs["input_ids"], "position_ids": inputs.get("position_ids", columns)}
    taken |= {key: inputs[key] for key in ("token_type_ids",) if key in inputs}
    rows = by_row(torch.stack([values.expand_as(used) for values in taken.values()], dim=-1), used)
    order, places = beginnings(rows, [len(row) for row in rows] if most is None else most)
    size = 1 + max((int(row.max()) for row in places if len(row)), default=-1)
    every, source = np.concatenate(rows), np.empty(size, np.int64)
    source[np.concatenate(places)] = np.arange(len(every))  # any sample that has it
    row = {key: torch.from_numpy(every[source, i]).to(device)[None] for i, key in enumerate(taken)}
    row["attention_mask"] = rows_of_places([places[i] for i in order], size).to(device)
    return row, places


def by_row(values: torch.Tensor, used: torch.Tensor) -> list[np.ndarray]:
    """Return what each sample has at its used positions, `[n, ...]`."""
    return [part.numpy() for part in values[used].cpu().split(used.sum(1).tolist())]


def with_branches(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch and, for each of its samples, another that says something else after the same prompt."""
    ids, labels = inputs["input_ids"].clone(), inputs["labels"].clone()
    for row, own in enumerate(labels.ne(IGNORE)):
        ids[row, own], labels[row, own] = ids[row, own].roll(1), labels[row, own].roll(1)
    others = {**inputs, "input_ids": ids, "labels": labels}
    return {key: torch.cat([values, others[key]]) for key, values in inputs.items()}


@register_accelerator
class SharePrompts(PaddingFree):
    """
    Compute once, forward and backward, whatever samples of a batch begin with in common, and no padding. Exact.

    For whatever is trained: adapters that act everywhere, or all weights. With dropout in the model, what is in common
    is dropped alike for all. Samples that begin alike come into one batch by chance, unless `share_prompts` is more
    than 1: then the sampler sees to it, and batches are no longer drawn at random.
    """

    facts = ACCELERATOR_FACTS["share_prompts"]

    def flat(self, inputs: Mapping[str, Any], label_positions_only: bool) -> dict[str, Any]:
        """Return a batch that is as it must be, see [`share`]."""
        return share(inputs, label_positions_only)

    def samples_to_try(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch with samples that begin alike, of two kinds: all of it, and their prompts."""
        return with_branches(inputs)
