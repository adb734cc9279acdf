"""Training without padding: the samples of a batch one after the other in one row, with the gradients of the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config import require
from .data import ID_KEY, WEIGHT_KEY
from .losses import IGNORE
from .scoring import BatchScorer, base_model, is_causal_lm, preserve_rng_state
from .sliced import first_line

#: The name of our attention in transformers' registry.
ATTENTION = "darel_padding_free"
#: What a batch may hold: `[B, L]` each. What else there is might belong to columns, and we would not know.
TOKEN_KEYS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")
LAYERS = {"full_attention", "sliding_attention"}


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
    labels, used = inputs["labels"], _used(inputs)
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    row = {key: inputs[key][used][None] for key in TOKEN_KEYS if key in inputs and key != "attention_mask"}
    row["labels"] = labels.masked_fill(_first_used(used), IGNORE)[used][None]
    row.setdefault("position_ids", columns[used][None])
    lengths = used.sum(1, keepdim=True)
    places = columns + lengths.cumsum(0) - lengths
    # A mask with four dimensions reaches attention as it is, in every model: so this does.
    row["attention_mask"] = places.masked_fill(columns >= lengths, row["input_ids"].shape[1])[None, None]
    if label_positions_only:
        following = F.pad(row["labels"], (0, 1), value=IGNORE)[:, 1:]
        predicts = following[0].ne(IGNORE)
        predicts[0] |= ~predicts.any()  # a loss of nothing is still a loss
        keep = predicts.nonzero()[:, 0]
        row["logits_to_keep"], row["labels"] = keep, following[:, keep]
        row["shift_labels"] = row["labels"]
    return row


def is_flat(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs come from [`flatten`]."""
    return _holds_places(inputs.get("attention_mask"))


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
    if not _holds_places(attention_mask):
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    # Causal attention never looks ahead, to where the padding is: so it needs no mask, only to begin with each sample.
    kwargs |= {"attention_mask": None, "is_causal": True}
    places = attention_mask[0, 0]
    if sliding_window is not None and places.shape[1] > sliding_window:
        distance = torch.arange(places.shape[1], device=query.device)
        distance = distance[:, None] - distance
        kwargs |= {"attention_mask": ((distance >= 0) & (distance < sliding_window))[None, None], "is_causal": False}
    way = _sample_by_sample if query.device.type == "cpu" else _in_rows
    return way(sdpa, module, (query, key, value), places, kwargs), None


def _sample_by_sample(sdpa: Any, module: Any, qkv: tuple, places: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Attend to one sample after the other: nothing is copied, nothing padded; for CPUs, where calls are cheap."""
    lengths = places.lt(qkv[0].shape[2]).sum(1).tolist()
    mask, kwargs = kwargs["attention_mask"], {k: v for k, v in kwargs.items() if k != "attention_mask"}
    outputs = []
    for sample in zip(*(states.split(lengths, dim=2) for states in qkv), strict=True):
        length = sample[0].shape[2]
        own = None if mask is None else mask[:, :, :length, :length]
        outputs.append(sdpa(module, *sample, own, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def _in_rows(sdpa: Any, module: Any, qkv: tuple, places: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Attend to all samples at once, a row each as in the padded batch; for devices on which calls are dear."""
    n = qkv[0].shape[2]
    gathered = places.clamp(max=n - 1).flatten()

    def rows(states: torch.Tensor) -> torch.Tensor:
        taken = states[0].transpose(0, 1).index_select(0, gathered)
        return taken.unflatten(0, places.shape).transpose(1, 2)

    output = sdpa(module, *map(rows, qkv), **kwargs)[0].flatten(0, 1)
    return output.new_zeros(n + 1, *output.shape[1:]).index_copy(0, places.flatten(), output)[None, :n]


class PaddingFree:
    """
    Take the padding out of the batches of a trainer's steps, once it is shown that this changes nothing.

    Args:
        trainer (`DarelMixin`): its model is a causal language model.

    Raises:
        ValueError: if the model cannot be trained like this; names what is in the way.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.tried = trainer, 0  # positions of the longest row that was tried out
        model = base_model(trainer.model)
        self._require(is_causal_lm(model), f"{type(model).__name__} is no causal language model")
        used = model.config._attn_implementation
        self._require(used in ("sdpa", ATTENTION), f"attention is {used!r}; load it with attn_implementation='sdpa'")
        noise = trainer.args.neftune_noise_alpha
        self._require(noise is None, f"neftune_noise_alpha={noise} is scaled by the length of rows")
        layers = set(getattr(model.config, "layer_types", None) or ()) - LAYERS
        self._require(not layers, f"it has layers of kind {sorted(layers)}")
        # A loss that is not the model's own (of a class besides Trainer and DarelMixin, say) wants all logits.
        plain = sum("compute_loss" in vars(cls) for cls in type(trainer).__mro__) == 2
        plain = plain and trainer.label_smoother is None and trainer.compute_loss_func is None
        takes = inspect.signature(model.forward).parameters
        self.label_positions_only = plain and "logits_to_keep" in takes

    def _require(self, ok: bool, what: str) -> None:
        model = type(base_model(self.trainer.model)).__name__
        require(ok, "unpad", True, f"{model} cannot be trained without padding: {what}; set it to False")

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch for the model to train on, without ids and weights; see [`flatten`]."""
        inputs = {key: value for key, value in inputs.items() if key not in (ID_KEY, WEIGHT_KEY)}
        self._check(inputs)
        model = base_model(self.trainer.model)
        length, window = inputs["labels"].shape[1], getattr(model.config, "sliding_window", None) or math.inf
        if not self.tried or self.tried <= window < length:  # a window is not seen in rows that are shorter
            self.try_out(inputs)
        if model.config._attn_implementation != ATTENTION:  # Trainer may have made the model anew
            model.set_attn_implementation(ATTENTION)
        return flatten(inputs, self.label_positions_only)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        unknown = sorted(set(inputs) - set(TOKEN_KEYS))
        self._require(not unknown, f"its batches have {unknown}, of which we do not know what belongs to a position")
        self._require(torch.is_tensor(inputs.get("labels")), "its batches have no labels")
        shapes = {key: tuple(value.shape) for key, value in inputs.items()}
        same = len(set(shapes.values())) == 1 and inputs["labels"].dim() == 2
        self._require(same, f"its batches must be of one shape [B, L], they are of {shapes}")
        # At the first position of a row nothing is predicted in the padded batch either.
        first = _first_used(_used(inputs))[:, 1:] & inputs["labels"][:, 1:].ne(IGNORE)
        self._require(not first.any(), "its batches have labels that padding on the left predicts")

    def try_out(self, inputs: Mapping[str, Any]) -> None:
        """
        Compute a batch without ids and weights in both ways, in eval mode.

        Raises `ValueError` unless logits and losses are the same.
        """
        model = self.trainer.model
        scorer = BatchScorer(model, autocast=self.trainer.accelerator.autocast)
        inputs = self.trainer._prepare_inputs(inputs)
        self._check(inputs)
        row, tolerance = flatten(inputs), scorer.tolerance
        try:
            with scorer.scoring(), preserve_rng_state():
                padded = model(**inputs)
                self._require(isinstance(padded, Mapping) and "loss" in padded, "it returns no loss by that name")
                base_model(model).set_attn_implementation(ATTENTION)
                try:
                    found = model(**row)
                    losses, logits = found["loss"], found.get("logits")
                    fewer = model(**flatten(inputs, True))["loss"] if self.label_positions_only else None
                except Exception as error:  # whatever it is, such a model does not take a batch like this
                    self._require(False, f"{type(error).__name__}: {first_line(error)}")
            self._compare("losses", losses, padded["loss"], tolerance)
            if torch.is_tensor(logits):
                self._compare("logits", logits, padded["logits"][_used(inputs)][None], tolerance)
            self.label_positions_only = fewer is not None and _distance(fewer, padded["loss"]) <= tolerance
        finally:
            self.close()
        self.tried = max(self.tried, inputs["labels"].shape[1])

    def _compare(self, what: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
        distance = _distance(found, wanted)
        self._require(bool(distance <= tolerance), f"its {what} would change by {distance:.2g}")

    def close(self) -> None:
        """Give the model its attention back."""
        model = base_model(self.trainer.model)
        if model.config._attn_implementation == ATTENTION:
            model.set_attn_implementation("sdpa")


def _holds_places(mask: Any) -> bool:
    return torch.is_tensor(mask) and mask.dtype == torch.int64 and mask.dim() == 4


def _used(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return which positions of a padded batch are no padding, bool `[B, L]`; what has a label is in use."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    return torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.ne(0) | labels.ne(IGNORE)


def _first_used(used: torch.Tensor) -> torch.Tensor:
    """Return where each sample begins, bool `[B, L]`; true at unused positions right after its first one, too."""
    return used.cumsum(1).eq(1)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
