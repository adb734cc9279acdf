"""Attention of completions to their prompts and to themselves, for rows without prompts and without padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import unpad
from .frozen_base import FrozenBase

#: The name of our attention in transformers' registry.
ATTENTION = "darel_prompt_cache"
#: Keys and values, `[1, heads, N, d]` each.
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Step:
    """
    What the attention of a micro-batch reads of its prompts.

    Attributes:
        kept (`dict`): by attention module, what was kept of all distinct prompts, `[N, width]`.
        positions (`torch.Tensor`): int64 `[N]`, for [`FrozenBase.keys_and_values`].
        prompts (`list[tuple[int, int]]`): where the prompt of each row begins and ends in that.
        lengths (`list[int]`): positions of each row that are computed.
    """

    kept: dict[nn.Module, torch.Tensor]
    positions: torch.Tensor
    prompts: list[tuple[int, int]]
    lengths: list[int]
    _made: dict[Any, Any] = field(default_factory=dict)  # masks, the same in all layers

    def one_by_one(self, call: Any, query: torch.Tensor, own: Pair, prompt: Pair, window: int | None) -> torch.Tensor:
        """
        Attend to one row after the other: nothing is padded; for CPUs, where calls are cheap.

        Args:
            call (`Callable`): `(query, key, value, mask) -> [1, T, heads, d]`.
            query, own: of the completions.
            prompt: keys and values of the distinct prompts.
            window (`int`, *optional*): positions that a position sees, itself included.
        """
        key = (window, query.dtype)
        if key not in self._made:
            pasts = [end - start for start, end in self.prompts]
            self._made[key] = [_mask(*sizes, window, query) for sizes in zip(self.lengths, pasts, strict=True)]
        outputs, rows = [], zip(*(states.split(self.lengths, dim=2) for states in (query, *own)), strict=True)
        for (q, *states), (start, end), mask in zip(rows, self.prompts, self._made[key], strict=True):
            k, v = (torch.cat([p[:, :, start:end], o], dim=2) for p, o in zip(prompt, states, strict=True))
            outputs.append(call(q, k, v, mask))
        return torch.cat(outputs, dim=1)

    def at_once(self, call: Any, query: torch.Tensor, own: Pair, prompt: Pair, window: int | None) -> torch.Tensor:
        """Attend to all rows at once, padded; for devices on which calls are dear; as [`Step.one_by_one`]."""
        if window not in self._made:
            self._made[window] = self._places(query, window)
        queries, keys, seen = self._made[window]

        def rows(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            taken = states[0].transpose(0, 1).index_select(0, places.flatten())
            return taken.unflatten(0, places.shape).transpose(1, 2)

        n = query.shape[2]
        padded = [torch.cat([p, o, torch.zeros_like(o[:, :, :1])], dim=2) for p, o in zip(prompt, own, strict=True)]
        output = call(rows(query, queries.clamp(max=n - 1)), *(rows(states, keys) for states in padded), seen)
        output = output.flatten(0, 1)
        return output.new_zeros(n + 1, *output.shape[1:]).index_copy(0, queries.flatten(), output)[None, :n]

    def _places(self, query: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return where a padded batch of all rows finds its queries and keys, and what sees what.

        Returns:
            int64 `[B, T]`, N for padding; int64 `[B, P + T]`, first a row's prompt, then the row, among all prompts,
            all completions and a row of zeros for padding; bool `[B, 1, T, P + T]`.
        """
        device, n, before = query.device, query.shape[2], len(self.positions)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        starts, ends = torch.tensor(self.prompts, device=device).T[..., None]
        own, past = (torch.arange(int(sizes.max()), device=device) for sizes in (lengths, ends - starts))
        queries = (own + lengths.cumsum(0) - lengths).masked_fill(own >= lengths, n)
        prompts = (starts + past).masked_fill(past >= ends - starts, before + n)
        keys = torch.cat([prompts, queries + before], dim=1)
        positions = own + ends - starts
        distance = positions[..., None] - torch.cat([past.expand_as(prompts), positions], dim=1)[:, None]
        seen = (distance >= 0) & (keys < before + n)[:, None]
        if window is not None:
            seen &= distance < window
        seen[..., 0] |= ~seen.any(-1)  # what pads must see something
        return queries, keys, seen[:, None]


def _mask(length: int, past: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return what to add to scores, `[1, 1, length, past + length]`: -inf for what is not seen; `None`: nothing."""
    if length == 1 and (window is None or past < window):
        return None
    distance = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(length, past + length, dtype=like.dtype).masked_fill(hidden, -torch.inf)[None, None]


def on_cpu(states: torch.Tensor) -> bool:
    """Whether calls are cheap where they are computed."""
    return states.device.type == "cpu"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend to a row's prompt and to itself, for the rows of a [`Step`]; else as transformers' `"sdpa"` does.

    Args:
        query, key, value (`torch.Tensor`): `[1, heads, N, d]`, of the completions.
        attention_mask (`torch.Tensor`): that of [`darel_hf.accelerators.unpad.flatten`].
        sliding_window (`int`, *optional*): positions that a position sees, itself included.
        **kwargs: as transformers gives them.

    Returns:
        `[1, N, heads, d]` and no weights.
    """
    layer = FrozenBase.called(module, key, value)
    step = None if layer is None else layer.base.step
    if step is None or not unpad.holds_places(attention_mask):
        return unpad.attention(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    prompt = key[:, :, :0], value[:, :, :0]
    if len(step.positions):
        prompt = layer.base.keys_and_values(layer, step.kept[module], step.positions)
    sdpa, kwargs = ALL_ATTENTION_FUNCTIONS["sdpa"], kwargs | {"is_causal": False}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return sdpa(module, q, k, v, mask, **kwargs)[0]

    way = step.one_by_one if on_cpu(query) else step.at_once
    return way(call, query, (key, value), prompt, sliding_window), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
