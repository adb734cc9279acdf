"""`LastBlock`: the last block of a model computes its output for positions that predict a label, and for no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters import recomputes
from ..config import ACCELERATOR_FACTS
from ..scoring import Trial, base_model, is_sharded
from . import share_prompts, unpad
from .base import Accelerator, first_line, not_causal, register_accelerator
from .frozen_base import linears_of, take_positions
from .row_attention import holds_places

#: Where more of the positions than this predict a label, there is nothing to save.
LARGEST_SHARE = 0.9

#: What makes rows in which it finds where labels are predicted; what `fast` tries first comes first.
ROWS = {"share_prompts": share_prompts.SharePrompts, "unpad": unpad.PaddingFree}


class _Attended(Exception):
    """The attention of the block is computed."""


class Shortened:
    """
    A block whose output is wanted at some positions only.

    What follows attention, `y = h + W_o attention(norm(h))` and `y + MLP(norm(y))`, is computed position by position.
    So a call of the block becomes two: the first is on all positions and ends when attention is computed; the second
    is on those that are wanted, given that attention at these. Linear layers that the first has called, for queries,
    keys and values, compute nothing in the second.

    Args:
        block (`nn.Module`): the last of a model whose attention is that of [`darel_hf.accelerators.unpad`].

    Attributes:
        wanted (`torch.Tensor`, *optional*): int64 `[K]`, ascending, of the row of the step in progress.
        positions (`int`): N, of that row.
    """

    def __init__(self, block: nn.Module):
        self.block, self.wanted, self.positions = block, None, 0
        self._phase: str | None = None  # "first" or "second" call; None: the block runs as ever
        self._output: torch.Tensor | None = None  # of attention, [1, N, heads, d]
        self._called: set[nn.Module] = set()  # linear layers, by the first call
        self._hooks = [
            block.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._end, always_call=True),
        ]
        for module in block.modules():
            unpad.INSTEAD[module] = self._attend
        for linear in linears_of(block):
            self._hooks += [linear.register_forward_pre_hook(self._skip), linear.register_forward_hook(self._give)]

    def close(self) -> None:
        """Leave the block as it was."""
        for hook in self._hooks:
            hook.remove()
        for module in self.block.modules():
            unpad.INSTEAD.pop(module, None)

    def _begin(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        rows = any(map(holds_places, (*args, *kwargs.values())))  # evaluation, say, has none
        if self._phase is not None or self.wanted is None or not rows or hidden.shape[1] != self.positions:
            return None
        self._called, self._phase = set(), "first"
        try:
            block.forward(*args, **kwargs)
        except _Attended as attended:
            (self._output,) = attended.args
        finally:
            self._phase = None
        if self._output is None:
            raise RuntimeError(f"{type(block).__name__} has called no attention function")
        self._phase = "second"
        return take_positions((args, kwargs), self.wanted, self.positions)

    def _attend(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._phase == "first":
            raise _Attended(compute())
        return compute() if self._phase is None else self._output.index_select(1, self.wanted)

    def _skip(self, linear: nn.Module, args: tuple) -> tuple | None:
        if self._phase == "first":
            self._called.add(linear)
        return (args[0][:, :0], *args[1:]) if self._phase == "second" and linear in self._called else None

    def _give(self, linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self._phase == "second" and linear in self._called:  # nobody reads it
            return output.new_zeros(1, len(self.wanted), output.shape[-1])
        return None

    def _end(self, block: nn.Module, args: tuple, output: torch.Tensor | None) -> torch.Tensor | None:
        if self._phase != "second":
            return None
        self._phase, self._output = None, None
        if output is None:  # something has gone wrong
            return None
        return output.new_zeros(1, self.positions, output.shape[-1]).index_copy(1, self.wanted, output)


@register_accelerator
class LastBlock(Accelerator):
    """
    Compute what follows attention in the last block only where a label is predicted, beside `unpad`. Exact.

    The rows of a step must be those of `unpad` or `share_prompts`, where only such positions pass the head. That it
    changes nothing is shown on a few rows before training; else it is left out.
    """

    facts = ACCELERATOR_FACTS["last_block"]
    on_model = True
    most = 1.02

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.shortened: Shortened | None = None

    def unfit(self) -> str | None:
        """Return what models are not for it."""
        return not_causal(self.trainer.model)

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: other settings, the model, or what a few samples show."""
        trainer, model = self.trainer, self.trainer.model
        given = trainer.darel.accelerators
        if not trainer.darel.finds_exact and not set(given) & set(ROWS):
            return "padded rows pass it whole; set unpad=True or share_prompts=1 beside it"
        if few_rows is None:
            return "the data are a stream, of which nothing can be tried before training"
        if trainer.args.torch_compile or is_sharded(model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "the model is compiled, or its weights are spread over processes"
        if recomputes(base_model(model), trainer.args):
            return "with checkpointing the block is called again in the backward pass, as a whole"
        if not _blocks(model):
            return f"{type(base_model(model)).__name__} has no blocks"
        kinds = [ROWS[name] for name in given if name in ROWS] or ROWS.values()  # else fast finds one of them
        for kind in kinds:
            reason = self._with_rows_of(kind(trainer), few_rows)
            if reason is None:
                return None
        return reason

    def _with_rows_of(self, rows: unpad.PaddingFree, few_rows: Callable[[], Mapping[str, Any]]) -> str | None:
        """Try it out on rows that another accelerator makes; return what would change, or `None`."""
        try:
            return rows.why_not(few_rows) or self._try_out(rows.transform(few_rows()))
        except Exception as error:  # whatever it is, such a model does not take it
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            rows.detach()

    def _try_out(self, inputs: Mapping[str, Any]) -> str | None:
        """Do the step of a row in both ways; return what would change, or `None`."""
        if not torch.is_tensor(inputs.get("logits_to_keep")):
            return "all positions have to pass the head"
        step = self.step(inputs)
        trial = Trial(self.trainer, step)
        with self.attached():
            self._want(inputs, at_most=1.0)
            return trial.difference(step)

    def transform(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row as it is, and remember where its labels are predicted."""
        if self.shortened is not None:
            self._want(inputs, LARGEST_SHARE)
        return inputs

    def _want(self, inputs: Mapping[str, Any], at_most: float) -> None:
        keep, self.shortened.wanted = inputs.get("logits_to_keep"), None
        if torch.is_tensor(keep):
            wanted, n = keep.unique(), inputs["input_ids"].shape[1]
            if len(wanted) <= at_most * n:
                self.shortened.wanted, self.shortened.positions = wanted, n

    def attach(self) -> None:
        """Put hooks on the last block; again where Trainer has made the model anew."""
        block = _blocks(self.trainer.model)[-1]
        if self.shortened is None or self.shortened.block is not block:
            self.detach()
            self.shortened = Shortened(block)

    def detach(self) -> None:
        """Take hooks off it."""
        if self.shortened is not None:
            self.shortened.close()
        self.shortened = None


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in base_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]
