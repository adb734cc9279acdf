"""`BasePrecision`: frozen matrices are kept in bfloat16 while training lasts, all is computed under autocast."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ACCELERATOR_FACTS
from ..scoring import Trial, base_model, is_sharded
from .base import Accelerator, first_line, register_accelerator

logger = logging.getLogger(__name__)

#: What autocast computes in; and what a gradient and a loss of a few rows may differ by before it is no rounding.
DTYPE = torch.bfloat16
LOSS_ROUNDING, GRADIENT_ROUNDING = 2e-2, 0.5


def frozen_matrices(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a model whose weights are plain parameters that nobody trains, and are at hand."""
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    layers = [layer for layer in layers if type(layer.weight) is nn.Parameter and not layer.weight.requires_grad]
    return [layer for layer in layers if layer.weight.device.type != "meta"]  # else they are offloaded


@register_accelerator
class BasePrecision(Accelerator):
    """
    Keep the frozen matrices of a model in bfloat16 while training lasts, and compute under autocast. Approximate.

    What is computed is what `bf16=True` computes, bit for bit, with or without that: autocast would round a frozen
    float32 matrix in every forward pass, here it is done once. All else (adapters, norms, biases, embeddings) stays as
    it is. A linear layer is given another parameter; the one that it had is put back when training ends, and what is
    saved meanwhile has that. An embedding that shares its matrix with the head keeps it.
    """

    facts = ACCELERATOR_FACTS["base_precision"]
    on_model = True
    falls_back = False

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self._model: nn.Module | None = None  # whose layers have other parameters just now
        self._before: list[tuple[nn.Module, nn.Parameter]] = []
        self._hooks: list[Any] = []
        self._contexts: list[Any] = []  # of calls in progress

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the arguments, the model, or what a few samples show."""
        trainer, model, args = self.trainer, self.trainer.model, self.trainer.args
        kind, frozen = args.device.type, [p for p in model.parameters() if not p.requires_grad]
        if not frozen:
            return f"nothing is frozen in {type(base_model(model)).__name__}, and what is trained stays in float32"
        if args.fp16:
            return "fp16=True computes in float16, not in bfloat16"
        if is_sharded(model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "weights are spread over processes"
        if getattr(base_model(model), "is_quantized", False):
            return "the base is quantised, and smaller than that already"
        if not torch.amp.is_autocast_available(kind) or (kind == "cuda" and not torch.cuda.is_bf16_supported(False)):
            return f"this device ({kind}) does not compute in bfloat16"
        if args.torch_compile and not args.bf16:
            return "torch_compile=True compiles the model in the precision of the arguments; set bf16=True, too"
        kinds = {layer.weight.dtype for layer in frozen_matrices(model)}
        if torch.float32 not in kinds:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds)) or "of other kinds"
            return f"no frozen linear layer is in float32 (they are {known})"
        return None if few_rows is None else self._try_out(few_rows())

    def _try_out(self, inputs: Mapping[str, Any]) -> str | None:
        """Do the step of a batch in both precisions; return what would change by more than rounding, or `None`."""
        step = self.step(inputs)
        trial = Trial(self.trainer, step)
        trial.loss_rounding, trial.gradient_rounding = LOSS_ROUNDING, GRADIENT_ROUNDING
        try:
            with self.attached():
                return trial.difference(step)
        except (RuntimeError, TypeError, ValueError) as error:  # its code asks for the type of a weight, say
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"{type(error).__name__}: {first_line(error)}"

    def attach(self) -> None:
        """Give frozen layers rounded weights, and let the model compute under autocast."""
        if self._model is not self.trainer.model:  # Trainer may have made it anew
            self.detach()
            try:
                self._round(self.trainer.model)
            except BaseException:  # memory that is short, say: not half of it
                self.detach()
                raise

    def _round(self, model: nn.Module) -> None:
        inner, rounded = base_model(model), {}
        self._model = model
        for layer in frozen_matrices(model):
            weight = layer.weight
            if weight.dtype == torch.float32:
                if id(weight) not in rounded:  # several layers may have the same
                    rounded[id(weight)] = nn.Parameter(weight.detach().to(DTYPE), requires_grad=False)
                self._before.append((layer, weight))
                layer.weight = rounded[id(weight)]
                self._hooks.append(layer.register_state_dict_post_hook(partial(_as_it_was, weight)))
        for module in {inner, getattr(inner, "base_model", inner)}:  # the latter is called alone by some
            self._hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self.trainer.computing = self._autocast

    def transform(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the inputs; raises `ValueError` where a callback, say, trains a rounded weight: it would be lost."""
        if any(layer.weight.requires_grad for layer, _ in self._before):
            layer = next(layer for layer, _ in self._before if layer.weight.requires_grad)
            name = next(name for name, module in self._model.named_modules() if module is layer)
            reason = f"{name}.weight is trained from now on, and what is trained stays in float32"
            raise ValueError(self.told(reason, "set it to"))
        return inputs

    def detach(self) -> None:
        """Give layers the parameters back that they had; say aloud where what they have now was changed meanwhile."""
        model, found = self._model, [(layer, layer.weight, weight) for layer, weight in self._before]
        for layer, weight in self._before:
            layer.weight = weight
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks, self._contexts = [], [], []
        if model is not None:
            self._model, self.trainer.computing = None, None
        with contextlib.suppress(torch.OutOfMemoryError):
            changed = [layer for layer, rounded, weight in found if not torch.equal(rounded, weight.to(rounded))]
            if changed:
                logger.warning(
                    "base_precision=%r: %d frozen weights (%s.weight is one) were changed while training lasted, by a "
                    "callback, say; they are as before again. Change them after training, or leave base_precision out",
                    self.value,
                    len(changed),
                    next(name for name, module in model.named_modules() if module is changed[0]),
                )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.trainer.args.device.type, DTYPE)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():  # else whoever compiles has entered it
            self._contexts.append(self._autocast())
            self._contexts[-1].__enter__()

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if self._contexts:
            self._contexts.pop().__exit__(None, None, None)
        # A loss is computed in float32, also where that is not done by the model: as accelerate has it.
        computed = output is None or (isinstance(output, Mapping) and output.get("loss") is not None)
        return None if computed else convert_to_fp32(output)


def _as_it_was(weight: nn.Parameter, layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Put the parameter that a layer had into a state dict of it."""
    known = state.get(f"{prefix}weight")
    if known is not None:
        state[f"{prefix}weight"] = weight if isinstance(known, nn.Parameter) else weight.detach()
