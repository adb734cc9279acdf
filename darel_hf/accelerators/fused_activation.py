"""`FusedActivation`: activation functions that a model's code writes out in many passes take torch's one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

from ..config import ACCELERATOR_FACTS
from ..scoring import base_model
from .base import Accelerator, register_accelerator


class _TanhGELU(nn.Module):
    """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` in one pass, with x alone saved for the backward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate="tanh")


class FusedNewGELU(_TanhGELU, NewGELUActivation):
    """GPT-2's and its like's (`"gelu_new"`)."""


class FusedFastGELU(_TanhGELU, FastGELUActivation):
    """`"gelu_fast"`."""


class FusedAccurateGELU(_TanhGELU, AccurateGELUActivation):
    """`"gelu_accurate"`."""


#: By class of an activation, the subclass that computes the same in one pass; others torch computes so already.
FUSED = {cls.__bases__[1]: cls for cls in (FusedNewGELU, FusedFastGELU, FusedAccurateGELU)}


@register_accelerator
class FusedActivation(Accelerator):
    """
    Let the activation functions of a model be computed by torch's fused ones. Exact.

    GPT-2's takes eight passes over memory forward, more backward, and saves four tensors; torch's takes one and saves
    its input. A module changes its class, to a subclass of its own, and nothing else.
    """

    facts = ACCELERATOR_FACTS["fused_activation"]
    on_model = True
    most = 1.02

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the arguments, the model, or what a few samples show."""
        model = self.trainer.model
        if self.trainer.args.torch_compile or hasattr(model, "_orig_mod"):
            return "torch_compile=True puts passes together itself"
        if not any(type(module) in FUSED for module in model.modules()):
            return f"{type(base_model(model)).__name__} has no activation function that is written out in many passes"
        return None if few_rows is None else self.try_attached(few_rows())

    def attach(self) -> None:
        """Make activations fused."""
        self._change(FUSED)

    def detach(self) -> None:
        """Make activations the model's own again."""
        self._change({fused: cls for cls, fused in FUSED.items()})

    def _change(self, classes: Mapping[type, type]) -> None:
        for module in self.trainer.model.modules():
            if type(module) in classes:
                module.__class__ = classes[type(module)]
