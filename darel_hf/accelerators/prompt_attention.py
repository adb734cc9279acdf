"""Attention of completions to their prompts and to themselves, for rows without prompts and without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from . import unpad
from .frozen_base import FrozenBase
from .row_attention import attend, holds_places

#: The name of our attention in transformers' registry.
ATTENTION = "darel_prompt_cache"


@dataclass
class Step:
    """
    What the attention of a micro-batch reads of its prompts.

    Attributes:
        kept (`dict`): by attention module, what was kept of all distinct prompts, `[P, width]`.
        positions (`torch.Tensor`): int64 `[P]`, for [`FrozenBase.keys_and_values`].
    """

    kept: dict[nn.Module, torch.Tensor]
    positions: torch.Tensor


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
    Attend to a row's prompt and to itself, for the rows of a [`Step`]; else as [`darel_hf.accelerators.unpad`] does.

    Args:
        query, key, value (`torch.Tensor`): `[1, heads, N, d]`, of the completions.
        attention_mask (`torch.Tensor`): see [`darel_hf.accelerators.row_attention.attend`].
        sliding_window (`int`, *optional*): positions that a position sees, itself included.
        **kwargs: as transformers gives them.

    Returns:
        `[1, N, heads, d]` and no weights.
    """
    layer = FrozenBase.called(module, key, value)
    step = None if layer is None else layer.base.step
    if step is None or not holds_places(attention_mask) or not len(step.positions):
        return unpad.attention(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    stored = layer.base.keys_and_values(layer, step.kept[module], step.positions)
    call = partial(unpad.within, module, kwargs)
    return attend(call, query, (key, value), attention_mask, sliding_window, stored, kwargs), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
