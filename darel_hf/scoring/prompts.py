"""
Scoring by prompt where no row of [`darel_hf.accelerators.share_rows`] can be had: keys and values are copied.

That is a second way to compute a prompt once, and stays for models whose attention is none of transformers' registry
(BLOOM, Falcon, GPT-Neo, MPT, XGLM), for a reader without a prompt cache, which must be told where each row's prompt
ends, and for `score_dataset` on its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..data import token_batches
from .losses import IGNORE, SampleLosses, shift_labels, token_losses
from .scorer import BatchScorer

logger = logging.getLogger(__name__)
#: Cached positions of a batch, copied for each sample, relative to the positions that are computed: they take memory.
CACHED = 2
#: Fraction of all positions that must be saved: otherwise the simple way is as fast.
WORTHWHILE = 0.2


class SharedPrompts:
    """
    Score samples of a causal language model by prompt: several references of one meaning, answers to one question.

    A prompt is what precedes the first label, without its last token (which predicts that label). Its keys and values
    are computed once, copied for each of its samples, and the rest of the samples is scored after them.

    Args:
        scorer ([`BatchScorer`]): of a causal language model whose head can be called on its own.
        items (`Sequence[Mapping]`): n samples with `input_ids` and `labels`, lists of equal length.
    """

    def __init__(self, scorer: BatchScorer, items: Sequence[Mapping[str, Any]]):
        self.scorer, self.items = scorer, [_as_lists(item) for item in items]
        self.starts = np.array([max(_label_start(item["labels"]) - 1, 0) for item in self.items])
        prompts = [tuple(item["input_ids"][:start]) for item, start in zip(self.items, self.starts, strict=True)]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self.prompts, self.prompt_of = list(numbers), np.array([numbers[prompt] for prompt in prompts])

    @property
    def saving(self) -> float:
        """Fraction of all positions that need not be computed."""
        every = sum(len(item["input_ids"]) for item in self.items)
        return 1 - (every - self.starts.sum() + sum(map(len, self.prompts))) / every

    def some(self, rows: int, draw: np.random.Generator) -> tuple[SharedPrompts, int]:
        """Return the same of all samples of some prompts, of so many at most, and how many they are."""
        prompts = draw.permutation(len(self.prompts))[:rows]
        members = np.concatenate([np.flatnonzero(self.prompt_of == prompt) for prompt in prompts])[:rows]
        return SharedPrompts(self.scorer, [self.items[i] for i in members]), len(members)

    def batches(self, max_tokens: int, max_rows: int) -> Iterator[tuple[np.ndarray, SampleLosses]]:
        """
        Score all samples.

        Args:
            max_tokens (`int`): positions of a batch that are computed, padding included.
            max_rows (`int`): samples of a batch.

        Yields:
            positions in `items`, int64 `[b]`, and their losses; each sample once.
        """
        lengths = np.array([len(prompt) for prompt in self.prompts])
        rest = np.array([len(item["input_ids"]) for item in self.items]) - self.starts
        for chosen in token_batches(lengths, max_tokens, max_rows):
            with self.scorer.scoring():
                cache, mask = self._read([self.prompts[i] for i in chosen])
            members = np.concatenate([np.flatnonzero(self.prompt_of == prompt) for prompt in chosen])
            place = {prompt: row for row, prompt in enumerate(chosen.tolist())}
            cached = rest[members] + mask.shape[1]
            for part in token_batches(np.maximum(rest[members], cached // CACHED), max_tokens, max_rows):
                rows = members[part]
                which = torch.tensor([place[self.prompt_of[i]] for i in rows], device=mask.device)
                with self.scorer.scoring():
                    samples = self._score(rows, cache, mask, which)
                yield rows, samples

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Return keys and values `[P, heads, W, d]` of each layer, and the mask `[P, W]`; padded on the left."""
        device = next(self.scorer.model.parameters()).device
        tokens = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
        ids = pad_sequence(tokens, batch_first=True, padding_side="left").to(device)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side="left").to(device)
        if mask.shape[1] == 0:
            return [], mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        self.scorer.hidden(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, prompts=mask.sum(1)
        )
        return [(layer.keys, layer.values) for layer in cache.layers], mask

    def _score(self, rows: np.ndarray, cache: list, mask: torch.Tensor, which: torch.Tensor) -> SampleLosses:
        def batch(key: str, padding: int) -> torch.Tensor:
            rest = [torch.tensor(self.items[i][key][self.starts[i] :]) for i in rows]
            return pad_sequence(rest, batch_first=True, padding_value=padding).to(mask.device)

        ids, labels, own = batch("input_ids", 0), batch("labels", IGNORE), batch("used", 0)
        before = mask[which]
        positions = before.sum(1, keepdim=True) + (own.cumsum(1) - 1)  # padding stays within the model's positions
        past = DynamicCache()
        for layer, (keys, values) in enumerate(cache):
            past.update(keys[which], values[which], layer)
        both = torch.cat([before, own], dim=1)
        hidden = self.scorer.hidden(input_ids=ids, attention_mask=both, position_ids=positions, cache=past)
        want_correct = self.scorer.want_correct
        return token_losses(hidden, shift_labels(labels), project=self.scorer.head, want_correct=want_correct)


def _label_start(labels: Sequence[int]) -> int:
    """Return the position of the first label, or the length if there is none."""
    return next((position for position, label in enumerate(labels) if label != IGNORE), len(labels))


def share_prompts(
    scorer: BatchScorer, items: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[int]], Mapping[str, Any]]
) -> SharedPrompts | None:
    """
    Return a [`SharedPrompts`] where that saves much and gives the same losses, shown on a few samples; else `None`.

    Args:
        scorer ([`BatchScorer`]): as above.
        items (`Sequence[Mapping]`): the samples.
        collate (`Callable`): makes a batch of samples, named by their position, on the model's device.
    """
    fits = scorer.per_sample_loss is None and scorer.reading.shift and not scorer.want_embeddings
    if not fits or scorer.head is None or not all(_has_lists(item) for item in items):
        return None
    shared = SharedPrompts(scorer, items)
    if shared.saving < WORTHWHILE:
        return None
    most = np.flatnonzero(shared.prompt_of == np.bincount(shared.prompt_of).argmax())
    longest = int(np.argmax([len(item["input_ids"]) for item in shared.items]))  # what a collator may cut off
    probe = [*dict.fromkeys([int(shared.starts.argmin()), int(shared.starts.argmax()), longest, *most[:2].tolist()])]
    wanted = scorer(collate(probe)).losses
    found = torch.zeros_like(wanted)
    try:
        for rows, samples in SharedPrompts(scorer, [items[i] for i in probe]).batches(10**6, len(probe)):
            found[torch.as_tensor(rows)] = samples.losses
    except Exception as error:  # whatever it is, such a model has no cache that works like this
        logger.info("prompts are not shared: %s", error)
        return None
    # The same layers on the same tokens: closer than two ways through the head.
    tolerance = min(scorer.tolerance, 2e-3)
    if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        logger.info("prompts are not shared: losses would be %s in place of %s", found.tolist(), wanted.tolist())
        return None
    return shared


def _as_lists(item: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return tokens and labels as lists, whatever a data set is formatted as, and that all of them are in use."""
    lists = {key: np.asarray(item[key]).tolist() for key in ("input_ids", "labels")}
    return {**lists, "used": [1] * len(lists["labels"])}


def _has_lists(item: Mapping[str, Any]) -> bool:
    """Whether a sample is nothing but tokens and labels, none of them masked: what we can batch without a collator."""
    tokens, labels = item.get("input_ids"), item.get("labels")
    if np.ndim(labels) != 1 or np.ndim(tokens) != 1 or len(tokens) != len(labels) or len(tokens) < 2:
        return False
    others = {"input_ids", "labels", "attention_mask"}
    whole = all(np.asarray(item.get("attention_mask", [1])))
    return whole and all(key in others or np.ndim(item[key]) == 0 for key in item)
