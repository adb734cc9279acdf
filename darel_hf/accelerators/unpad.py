"""Training without padding: the samples of a batch one after the other in one row, with the gradients of the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import find_reader
from ..config import ACCELERATOR_FACTS
from ..scoring import IGNORE, Trial, base_model
from .base import Accelerator, first_line, not_causal, register_accelerator
from .row_attention import NARROW, attend, autocast_dtype, holds_places, on_cpu, places_of

#: The name of our attention in transformers' registry.
ATTENTION = "darel_padding_free"
#: What a batch may hold: `[B, L]` each. What else there is might belong to columns, and we would not know.
TOKEN_KEYS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")
LAYERS = {"full_attention", "sliding_attention"}
#: By attention module, what is asked in place of attending, and is given a function that attends.
INSTEAD: WeakKeyDictionary[torch.nn.Module, Callable[[Callable[[], torch.Tensor]], torch.Tensor]] = WeakKeyDictionary()


def flatten(inputs: Mapping[str, Any], label_positions_only: bool = False) -> dict[str, Any]:
    """
    Put the samples of a padded batch one after the other in a single row, for a model with our attention.

    Args:
        inputs (`Mapping`): `input_ids`, `labels` and, where there are any, `attention_mask`, `position_ids` and
            `token_type_ids`, int64 `[B, L]`.
        label_positions_only (`bool`): let only the positions that predict a label pass the head.

    Returns:
        `dict`: `input_ids`, `position_ids`, `labels`, int64 `[1, N]` with the N positions that are in use;
        `attention_mask`, int64 `[1, 1, B, L]`, the places of each sample in the row, one after the other, then N.
        No label is at the first position of a sample, which nothing predicts. With `label_positions_only` also
        `logits_to_keep`, int64 `[K]`, and the labels of those positions as `labels` and `shift_labels`, `[1, K]`.

    Example:

    ```python
    >>> import torch
    >>> ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> flatten({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})["labels"]
    tensor([[-100,    6,    7, -100,    9]])
    ```
    """
    labels, used = inputs["labels"], used_positions(inputs)
    row = {key: inputs[key][used][None] for key in TOKEN_KEYS if key in inputs and key != "attention_mask"}
    row["labels"] = labels.masked_fill(first_used(used), IGNORE)[used][None]
    row.setdefault("position_ids", torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[used][None])
    row["attention_mask"] = places_of(used)
    if label_positions_only:
        row |= at_labels(F.pad(row["labels"], (0, 1), value=IGNORE)[:, 1:])
    return row


def missing(n: int) -> int:
    """
    Return how many positions a row of n lacks to be of one of few lengths: of 32, from a power of two to the next.

    For every new shape of a matrix product in 16 bits a CPU makes a kernel first, which takes longer than the products
    of small models; rows without padding have any length.
    """
    return -n % max(16, 1 << max(n.bit_length() - 6, 0))


def lengthened(row: Mapping[str, Any], stored: int) -> dict[str, Any]:
    """
    Return a row with one more sample in which nothing is predicted, so that rows are of few lengths, see [`missing`].

    Args:
        row (`Mapping`): N positions, as [`flatten`] returns them.
        stored (`int`): P, positions before the row whose keys and values attention is given besides.
    """
    n, keys, places = row["input_ids"].shape[1], stored + row["input_ids"].shape[1], row["attention_mask"][0, 0]
    more, made = missing(n), dict(row)
    for key in ("input_ids", "position_ids", "token_type_ids"):
        if key in row:
            made[key] = torch.cat([row[key], row[key][:, -1:].expand(-1, more)], dim=1)
    own = torch.arange(keys, keys + more, device=places.device)[None]
    tables, width = (places.masked_fill(places == keys, keys + more), own), max(places.shape[1], more)
    tables = [F.pad(table, (0, width - table.shape[1]), value=keys + more) for table in tables]
    made["attention_mask"] = torch.cat(tables)[None, None]
    if "alora_offsets" in row:  # counted from the end
        made["alora_offsets"] = [offset + more for offset in row["alora_offsets"]]
    if "logits_to_keep" not in row:
        return {**made, "labels": F.pad(row["labels"], (0, more), value=IGNORE)}
    keep = row["logits_to_keep"]
    free = torch.ones(n + more, dtype=torch.bool, device=keep.device).index_fill(0, keep, False)
    besides = free.nonzero()[: missing(len(keep)), 0]
    labels = F.pad(row["labels"], (0, len(besides)), value=IGNORE)
    return {**made, "logits_to_keep": torch.cat([keep, besides]), "labels": labels, "shift_labels": labels}


def at_labels(following: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Return what lets only the positions that predict a label pass the head.

    Args:
        following (`torch.Tensor`): int64 `[1, N]`, the label that each position predicts.

    Returns:
        `logits_to_keep`, int64 `[K]`; `labels` and `shift_labels` of those, `[1, K]`.
    """
    predicts = following[0].ne(IGNORE)
    predicts[0] |= ~predicts.any()  # a loss of nothing is still a loss
    keep = predicts.nonzero()[:, 0]
    return {"logits_to_keep": keep, "labels": following[:, keep], "shift_labels": following[:, keep]}


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend within samples that [`flatten`] has put into one row; anything else as transformers' `"sdpa"` does.

    Args:
        query, key, value (`torch.Tensor`): `[1, heads, N, d]`.
        attention_mask (`torch.Tensor`): that of [`flatten`].
        sliding_window (`int`, *optional*): positions that a position sees, itself included.
        **kwargs: as transformers gives them.

    Returns:
        `[1, N, heads, d]` and no weights.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not holds_places(attention_mask):
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    call = partial(within, module, kwargs)
    attends = partial(attend, call, query, (key, value), attention_mask, sliding_window, given=kwargs)
    instead = INSTEAD.get(module)
    return (attends() if instead is None else instead(attends)), None


def within(
    module: torch.nn.Module,
    kwargs: dict[str, Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attend as transformers' `"sdpa"` does, with other arguments of a call as transformers gave them."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, mask, **{**kwargs, "is_causal": is_causal})[0]


def _sees_inputs_later(cls: type) -> str | None:
    """
    Return the method of somebody's own trainer class that gets what a step trains on after us, or `None`.

    Trials, which compute losses, do not show what it does. A `training_step` of a class on top of ours gets it before.
    """
    below = False
    for one in cls.__mro__:
        home = one.__module__.partition(".")[0]
        below |= home == __package__.partition(".")[0]
        names = ("_prepare_inputs", "training_step") if below else ("_prepare_inputs",)
        found = next((name for name in names if name in vars(one)), None)
        if found is not None and home not in (__package__.partition(".")[0], "transformers", "trl"):
            return f"{one.__name__}.{found}"
    return None


@register_accelerator
class PaddingFree(Accelerator):
    """
    Take the padding out of the batches of a trainer's steps, once it is shown that this changes nothing. Exact.

    For causal language models. Where the model cannot be trained like this that is an error, which names what is in
    the way: whoever asks for it would not want the slow steps.
    """

    facts = ACCELERATOR_FACTS["unpad"]
    falls_back = False
    attention = ATTENTION

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.tried = 0  # positions of the longest row that was tried out
        self.label_positions_only: bool | None = None  # whether only those that predict a label pass the head

    def unfit(self) -> str | None:
        """Return what models are not for it."""
        return not_causal(self.trainer.model)

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the model, the arguments, or what a few samples show."""
        model, args = base_model(self.trainer.model), self.trainer.args
        used, noise = getattr(getattr(model, "config", None), "_attn_implementation", None), args.neftune_noise_alpha
        layers = unknown_layers(model)
        if used not in ("sdpa", self.attention):
            return self._named(f"attention is {used!r}; load it with attn_implementation='sdpa'")
        reader = find_reader(self.trainer.model)
        if self.attention == ATTENTION and reader is not None and not reader.everywhere:
            return self._named("a reader looks for the prompt of each sample; prompt_cache has no padding either")
        own = _sees_inputs_later(type(self.trainer))
        if own is not None:
            return self._named(
                f"{own} would be given the rows of a step without padding, and may do other things to them"
            )
        if noise is not None:
            return self._named(f"neftune_noise_alpha={noise} is scaled by the length of rows")
        if layers:
            return self._named(f"it has layers of kind {layers}")
        return None if few_rows is None else self.try_out(few_rows())  # of a stream the first batch is tried out

    def _named(self, what: str) -> str:
        return f"{type(base_model(self.trainer.model)).__name__} cannot be trained without padding: {what}"

    def transform(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch for the model to train on, see [`flatten`]; raises `ValueError` for one that cannot be."""
        model = base_model(self.trainer.model)
        wrong = self._unlike_a_padded_batch(inputs)
        if wrong is None:
            length, window = inputs["labels"].shape[1], getattr(model.config, "sliding_window", None) or math.inf
            if not self.tried or self.tried <= window < length:  # a window is not seen in rows that are shorter
                wrong = self.try_out(inputs)
        if wrong is not None:
            self.refuse(wrong)
        if model.config._attn_implementation != self.attention:  # Trainer may have made the model anew
            model.set_attn_implementation(self.attention)
        try:
            return self.row(inputs, self.label_positions_only)
        except ValueError as error:
            if self.asked:
                raise
            self.refuse(first_line(error))

    def row(self, inputs: Mapping[str, Any], label_positions_only: bool) -> dict[str, Any]:
        """Return a batch without padding; of few lengths, where products of every new one take long at first."""
        row, device = self.flat(inputs, label_positions_only), inputs["input_ids"].device
        return lengthened(row, self.stored) if self.is_narrow(device) else row

    def is_narrow(self, device: torch.device) -> bool:
        """Whether matrix products are in 16 bits on a CPU."""
        with self.trainer.autocast():
            dtype = autocast_dtype(device) or base_model(self.trainer.model).dtype
        return on_cpu(device) and dtype in NARROW

    @property
    def stored(self) -> int:
        """Positions whose keys and values the attention of the row in progress is given besides its own."""
        return 0

    def flat(self, inputs: Mapping[str, Any], label_positions_only: bool) -> dict[str, Any]:
        """Return a batch that is as it must be without padding, see [`flatten`]."""
        return flatten(inputs, label_positions_only)

    def _unlike_a_padded_batch(self, inputs: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a batch, or `None`."""
        wrong = unlike_a_padded_batch(inputs)
        return None if wrong is None else self._named(wrong)

    def try_out(self, inputs: Mapping[str, Any]) -> str | None:
        """Do the step of a batch in both ways, in eval mode; return what would change, or `None`."""
        trainer = self.trainer
        wrong = self._unlike_a_padded_batch(inputs)
        if wrong is not None:
            return wrong
        if not inputs["labels"][:, 1:].ne(IGNORE).any():
            return self._named("the samples that were tried have no label left (prompts cut at the maximal length?)")
        model, inputs = trainer.model, self.samples_to_try(trainer._prepare_inputs(inputs))
        items = trainer.count_items(inputs)
        # A loss that is not the model's own (of a class besides Trainer and DarelMixin, say) wants all logits.
        fewer = self.label_positions_only is not False
        fewer &= sum("compute_loss" in vars(cls) for cls in type(trainer).__mro__) == 2
        fewer &= trainer.label_smoother is None and trainer.compute_loss_func is None
        fewer &= "logits_to_keep" in inspect.signature(base_model(model).forward).parameters

        def flat(label_positions_only: bool) -> torch.Tensor:
            base_model(model).set_attn_implementation(self.attention)
            return trainer.own_loss(self.row(inputs, label_positions_only), items, smoothed=True)

        trial = Trial(trainer, lambda: trainer.own_loss(inputs, items, smoothed=True))
        try:
            problem = trial.difference(lambda: flat(True)) if fewer else "it has to pass all positions"
            if problem is not None:
                fewer, problem = False, trial.difference(lambda: flat(False))
        except Exception as error:  # whatever it is, such a model does not take a batch like this
            problem = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.detach()
        if problem is not None:
            return self._named(problem)
        self.label_positions_only = fewer
        self.tried = max(self.tried, inputs["labels"].shape[1])
        return None

    def samples_to_try(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a batch is tried out with: whatever would show that the model cannot take it."""
        return inputs

    def detach(self) -> None:
        """Give the model its attention back."""
        model = base_model(self.trainer.model)
        if model.config._attn_implementation == self.attention:
            model.set_attn_implementation("sdpa")


def unknown_layers(model: torch.nn.Module) -> list[str]:
    """Return the kinds of layers of a model that may do with a row what they do not do with samples."""
    return sorted(set(getattr(getattr(model, "config", None), "layer_types", None) or ()) - LAYERS)


def unlike_a_padded_batch(inputs: Mapping[str, Any]) -> str | None:
    """Return what keeps a batch from being put into a row, or `None`."""
    unknown = sorted(set(inputs) - set(TOKEN_KEYS))
    if unknown:
        return f"its batches have {unknown}, of which we do not know what belongs to a position"
    if not torch.is_tensor(inputs.get("labels")):
        return "its batches have no labels"
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    if len(set(shapes.values())) != 1 or inputs["labels"].dim() != 2:
        return f"its batches must be of one shape [B, L], they are of {shapes}"
    # At the first position of a row nothing is predicted in the padded batch either.
    first = first_used(used_positions(inputs))[:, 1:] & inputs["labels"][:, 1:].ne(IGNORE)
    return "its batches have labels that padding on the left predicts" if first.any() else None


def used_positions(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return which positions of a padded batch are no padding, bool `[B, L]`; what has a label is in use."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    return torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.ne(0) | labels.ne(IGNORE)


def first_used(used: torch.Tensor) -> torch.Tensor:
    """Return where each sample begins, bool `[B, L]`; true at unused positions right after its first one, too."""
    return used.cumsum(1).eq(1)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
