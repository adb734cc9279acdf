"""`shared_prefixes`: for any trainer and any loop, what rows of a batch begin with in common is computed once."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import find_reader
from ..files import require
from ..scoring import base_model, precision, preserve_rng_state
from . import unpad
from .base import first_line
from .share_prompts import put_once

logger = logging.getLogger(__name__)

#: Fraction of the positions of a batch that must be saved, padding included: else it stays as it is.
WORTHWHILE = 0.1
#: Relative differences of hidden states and gradients that are rounding, by precision.
TOLERANCES = {"exact": 1e-4, "float32": 2e-3, "reduced": 5e-2}
#: What of a decoder's arguments we know how to put into a row; all else must be left out, or be one of `HARMLESS`.
TAKEN = {*unpad.TOKEN_KEYS} - {"labels"}
HARMLESS = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "labels"}


@contextlib.contextmanager
def shared_prefixes(model: nn.Module) -> Iterator[None]:
    """
    Compute what rows of a batch begin with in common once, forward and backward, and no padding. Exact.

    Within this context the decoder of a causal language model puts the rows it is called with into a single one, in
    which each beginning is there once, and hands back hidden states `[B, L, D]` as ever (zeros at padding): whatever
    is on top of it, a language model's head, `logits_to_keep`, trl's fused head, a reward or a value head, sees no
    difference. So any trainer that calls the model with rows that begin alike gains: pairs of answers
    (`DPOTrainer`, `RewardTrainer`), groups of completions (`GRPOTrainer`), one instruction before all samples.

    Calls with a cache (generation), with embeddings in place of tokens, or that ask for attentions or all hidden
    states are left alone, and so are batches that this would make less than a tenth smaller. The first batch, and the
    first that is longer than a sliding window, is computed in both ways; where they differ, a warning says so, and all
    stays as it was. A call that does not say `use_cache=True` gets no cache.

    Args:
        model (`nn.Module`): a causal language model or one with another head on its decoder, PEFT's adapters included;
            with a trainer that wraps or replaces it, `trainer.model`. Its `attn_implementation` must be `"sdpa"`.

    Raises:
        ValueError: for a model that cannot be called like this.

    Example:

    ```python
    >>> from darel_hf import shared_prefixes
    >>> with shared_prefixes(trainer.model):  # doctest: +SKIP
    ...     trainer.train()
    ```
    """
    inner = base_model(model)
    decoder, name = inner.base_model, type(inner).__name__
    attention = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    known = set(getattr(getattr(inner, "config", None), "layer_types", None) or ()) <= unpad.LAYERS
    decodes = known and decoder is not inner and not getattr(inner.config, "is_encoder_decoder", False)
    require(decodes, "model", name, "give a causal language model, or one with another head on its decoder")
    require(attention == "sdpa", "attn_implementation", attention, "load the model with 'sdpa'")
    reader = find_reader(model) is not None
    require(not reader, "model", name, "a reader computes prompts and completions apart; use prompt_cache")
    door = _Door(decoder)
    hooks = (
        decoder.register_forward_pre_hook(door.before, with_kwargs=True),
        decoder.register_forward_hook(door.after, always_call=True),
    )
    inner.set_attn_implementation(unpad.ATTENTION)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        inner.set_attn_implementation("sdpa")


def _used(given: Mapping[str, Any]) -> torch.Tensor:
    """Return what of the rows of a call is no padding, bool `[B, L]`."""
    mask = given.get("attention_mask")
    return torch.ones_like(given["input_ids"], dtype=torch.bool) if mask is None else mask.ne(0)


class _Door:
    """What stands before and behind a decoder."""

    def __init__(self, decoder: nn.Module):
        self.decoder, self.signature = decoder, inspect.signature(decoder.forward)
        self.shown: bool | None = None  # whether the first batch has shown that nothing changes
        self.tried = 0  # positions of the rows in which that was shown
        self.trying = False
        self._calls: list[torch.Tensor | None] = []  # of those in progress: where each position is in the row

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = None if self.trying or self.shown is False else self._given(args, kwargs)
        made = None if given is None else self._row(given)
        length = 0 if made is None else given["input_ids"].shape[1]
        window = getattr(decoder.config, "sliding_window", None) or math.inf
        # A window that attention is not told of is not seen in rows that are shorter.
        if made is not None and (self.shown is None or self.tried <= window < length):
            if torch.is_inference_mode_enabled():
                made = None  # nothing can be shown of gradients
            else:
                self.shown, self.tried = self._show(given, *made), length
                made = made if self.shown else None
        self._calls.append(None if made is None else made[1])
        if made is None:
            return None
        rest = {key: value for key, value in given.items() if key not in TAKEN}
        return (), {**rest, **made[0], "use_cache": False}

    def after(self, decoder: nn.Module, args: tuple, outputs: Any) -> Any:
        if not self._calls:
            return None
        where = self._calls.pop()
        if where is None or outputs is None:  # `None` after an error
            return None
        return self._put_back(outputs, where)

    @staticmethod
    def _put_back(outputs: Any, where: torch.Tensor) -> Any:
        """Give each position of the padded batch its hidden state; padding gets zeros."""
        states = outputs[0]
        row = F.pad(states[0], (0, 0, 0, 1))
        padded = F.embedding(where, row)  # whose backward pass adds up what is in common, and is fast
        if isinstance(outputs, tuple):
            return padded, *outputs[1:]
        outputs["last_hidden_state"] = padded
        return outputs

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of a call by name, or `None` for one that is to be left alone."""
        given = {k: v for k, v in self.signature.bind_partial(*args, **kwargs).arguments.items() if v is not None}
        given |= given.pop("kwargs", {})
        wants = any(given.get(name) for name in ("use_cache", "output_attentions", "output_hidden_states"))
        config = self.decoder.config
        wants |= any(getattr(config, f"output_{n}", False) for n in ("attentions", "hidden_states", "router_logits"))
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        fits = (
            torch.is_tensor(ids) and ids.dim() == 2 and (mask is None or (mask.dim() == 2 and len(mask) == len(ids)))
        )
        others = {k for k, v in given.items() if torch.is_tensor(v) or hasattr(v, "update")} - TAKEN - HARMLESS
        return None if wants or not fits or others else given

    @staticmethod
    def _row(given: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """Return the row of a batch, and where its positions are in it, int64 `[B, L]`; `None`: little is saved."""
        ids, used = given["input_ids"], _used(given)
        if not used.any():
            return None
        row, places = put_once(given, used)
        size = row["input_ids"].shape[1]
        if size > (1 - WORTHWHILE) * ids.numel():
            return None
        where = torch.full_like(ids, size)
        where[used] = torch.cat([torch.from_numpy(part) for part in places]).to(ids.device)
        return row, where

    def _show(self, given: dict[str, Any], row: dict[str, torch.Tensor], where: torch.Tensor) -> bool:
        """Compute a batch in both ways, in eval mode; whether states and gradients are the same, and say if not."""
        training, self.trying = [module for module in self.decoder.modules() if module.training], True
        rest = {key: value for key, value in given.items() if key not in TAKEN} | {"use_cache": False}
        used = _used(given)
        weights = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]

        def way(row: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            outputs = self.decoder(**rest, **row)
            states = (self._put_back(outputs, where) if row["input_ids"].shape != where.shape else outputs)[0][used]
            if not weights:
                return [states]
            # Of something in which every state counts, and each in another way.
            probe = torch.linspace(-1, 1, states.numel(), device=states.device, dtype=states.dtype).view_as(states)
            gradients = torch.autograd.grad((states * probe).sum(), weights, allow_unused=True)
            return [states.detach(), torch.cat([g.flatten() for g in gradients if g is not None])]

        try:
            with preserve_rng_state(), torch.enable_grad():
                self.decoder.eval()
                both = zip(way(row), way({key: given[key] for key in TAKEN & set(given)}), strict=True)
                gap = max(((found - wanted).float().norm() / wanted.float().norm()).item() for found, wanted in both)
            least = TOLERANCES[precision(self.decoder, contextlib.nullcontext)]
            reason = None if gap <= least else f"hidden states or gradients would differ by {gap:.2g}"
        except Exception as error:  # whatever it is, such a model does not take a batch like this
            reason = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.trying = False
            for module in training:
                module.training = True
        if reason is not None:
            logger.warning("prefixes are not shared: %s", reason)
        return reason is None
