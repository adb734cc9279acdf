"""`FastLora`: PEFT's LoRA layers with a forward and a backward pass of their own, in fewer passes over memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ACCELERATOR_FACTS
from ..scoring import is_sharded
from .base import Accelerator, register_accelerator

logger = logging.getLogger(__name__)

#: What autocast casts; doubles it leaves alone.
CASTS = {torch.float32, torch.bfloat16, torch.float16}
#: In what weights and adapters may be added up: the sum loses nothing that the output would not lose.
MERGES = {torch.float32, torch.float64}

#: Multiplications of a layer, T i o, below which fewer passes save less than Python takes to arrange them.
SMALL = 2**18


def why_stock(layer: nn.Module) -> str | None:
    """
    Return what keeps a LoRA layer computing as PEFT has it, in a few words, or `None`.

    Args:
        layer (`nn.Module`): any of PEFT's LoRA layers, in the state in which it is.
    """
    if type(layer) not in (Linear, FastLinear):
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D):
        return f"a base that is {type(base).__name__}"
    if type(base.weight) is not nn.Parameter:  # quantised, or spread over processes
        return f"a base whose weight is {type(base.weight).__name__}"
    if base.weight.requires_grad:
        return "a base that is trained, too"
    if "forward" in vars(layer):
        return "a forward of somebody else's (accelerate's, where weights are offloaded)"
    if layer.disable_adapters:
        return "adapters switched off"
    if layer.merged:
        return "merged adapters"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} active adapters"
    (name,) = active
    if name in layer.lora_variant:
        return f"a variant, {type(layer.lora_variant[name]).__name__}"
    if type(layer.lora_dropout[name]) is not nn.Identity:
        return f"lora_dropout={getattr(layer.lora_dropout[name], 'p', '?')}"
    if layer.lora_bias[name]:
        return "lora_bias=True"
    factors = layer.lora_A[name], layer.lora_B[name]
    if any(type(factor) is not nn.Linear or _is_called(factor) for factor in factors):
        return "factors that somebody listens to"
    return None


def _is_called(module: nn.Module) -> bool:
    """Whether somebody wants to be asked when a module is called, so that its weights alone do not do."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


class FastLinear(Linear):
    """
    PEFT's LoRA layer on `nn.Linear` and `Conv1D`, with the same weights under the same names, in fewer passes.

    `y = x W^T + b + s (x A^T) B^T`, s = alpha / r. Where [`why_stock`] has something to say about the layer, or
    `torch.compile` traces it, or types are mixed without autocast, it computes as PEFT does; so do small calls.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Compute the layer.

        Args:
            x (`torch.Tensor`): float `[..., i]`.
            *args, **kwargs: where there are any, PEFT's own forward gets all of them.

        Returns:
            float `[..., o]`, under autocast in its type, else in that of x.
        """
        if args or kwargs or torch.compiler.is_compiling() or why_stock(self) is not None:
            return super().forward(x, *args, **kwargs)
        if x.numel() * self.out_features < SMALL:
            return super().forward(x)
        base = self.base_layer
        weight, bias = base.weight, base.bias
        found = _operands(self, x, weight, bias)
        if found is None:
            return super().forward(x)
        x, a, b, scale = found
        if _is_called(base):
            output = base(x)
            return _Added.apply(output.to(x.dtype), x, a, b, scale).to(output.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return _Whole.apply(x, weight.to(x.dtype), bias, isinstance(base, Conv1D), a, b, scale)


def added(layer: nn.Module, x: torch.Tensor, output: torch.Tensor, columns: slice) -> torch.Tensor | None:
    """
    Return what a LoRA layer makes of x where its base is known to have made `output` of it.

    Args:
        layer (`nn.Module`): any of PEFT's LoRA layers.
        x (`torch.Tensor`): float `[..., i]`.
        output (`torch.Tensor`): some columns of what the base makes of x, float `[..., c]`.
        columns (`slice`): which these are.

    Returns:
        `[..., c]`; `None` where PEFT alone knows, see [`why_stock`], or types are mixed without autocast.
    """
    found = None if why_stock(layer) is not None else _operands(layer, x, output)
    if found is None:
        return None
    x, a, b, scale = found
    return _Added.apply(output.to(x.dtype), x, a, b[columns], scale)


def _operands(
    layer: nn.Module, x: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float] | None:
    """Return x, A, B in the type in which a layer computes, and s; `None` where types are mixed without autocast."""
    name, device = next(name for name in layer.active_adapters if name in layer.lora_A), x.device.type
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    types = {tensor.dtype for tensor in (x, a, b, *others) if tensor is not None}
    if not torch.is_autocast_enabled(device):
        return (x, a, b, scale) if len(types) == 1 else None
    if not types <= CASTS:
        return None
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), a.to(dtype), b.to(dtype), scale


def _merges(tensor: torch.Tensor) -> bool:
    """Whether matrix products keep all digits of a sum of weights and adapters."""
    try:
        return tensor.dtype in MERGES and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch does not tell where a backend was given a precision of its own
        return False


def _merged(weight: torch.Tensor, transposed: bool, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `(W + s B A)^T`, `[i, o]`, of a weight `[o, i]`, or `[i, o]` where it is kept transposed."""
    if transposed:
        return torch.addmm(weight, a.T, b.T, alpha=scale)
    return torch.addmm(weight, b, a, alpha=scale).T


def _factor_gradients(
    ctx: Any, x: torch.Tensor, z: torch.Tensor | None, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """
    Return the gradients of A and B, and `dZ = s B^T G^T`, `[r, T]`.

    All products have the short side r in front: `dB = s (Z G)^T` with `Z = A x^T`, and `dA = dZ x`. That is several
    times as fast on a CPU as the other way round, where r is no multiple of the width of its registers.
    """
    *_, needs_a, needs_b, _ = ctx.needs_input_grad
    dz = (b.T * ctx.scale) @ g.T
    db = None
    if needs_b:
        if z is None or torch.is_grad_enabled():  # what was saved has no gradient of its own
            z = a @ x.T
        db = ((z @ g) * ctx.scale).T
    return dz @ x if needs_a else None, db, dz


class _Whole(torch.autograd.Function):
    """
    `Y = X W^T + b + s (X A^T) B^T`, of all T rows of x.

    By the number of operations, `X (W + s B A)^T` is cheaper where T > i, and its gradient by X where T > o (there the
    merged weight is made again: it is larger than all else that is saved). Saved are x and, where it was needed,
    `A X^T`. What is chosen depends on shapes only: a run that is resumed computes the same.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, a, b, scale):
        rows, z = x.reshape(-1, x.shape[-1]), None
        if rows.shape[0] > rows.shape[1] and _merges(x):
            made = _merged(weight, transposed, a, b, scale)
            y = rows @ made if bias is None else torch.addmm(bias, rows, made)
        else:
            made, z = weight if transposed else weight.T, a @ rows.T
            y = rows @ made if bias is None else torch.addmm(bias, rows, made)
            y.addmm_(z.T, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, z)
        ctx.scale, ctx.transposed = scale, transposed
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        x, weight, a, b, z = ctx.saved_tensors
        rows, g, dx = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), None
        da, db, dz = _factor_gradients(ctx, rows, z, g, a, b)
        if ctx.needs_input_grad[0]:
            if g.shape[0] > g.shape[1] and _merges(x):
                dx = g @ _merged(weight, ctx.transposed, a, b, ctx.scale).T
            else:
                dx = g @ (weight.T if ctx.transposed else weight)
                dx.addmm_(dz.T, a)
            dx = dx.view(x.shape)
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, da, db, None


class _Added(torch.autograd.Function):
    """`Y + s (X A^T) B^T`, where others want the base layer to be called, or give its output Y themselves."""

    @staticmethod
    def forward(ctx, y, x, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        z = a @ rows.T
        ctx.save_for_backward(x, a, b, z)
        ctx.scale = scale
        return torch.addmm(y.reshape(-1, y.shape[-1]), z.T, b.T, alpha=scale).view(y.shape)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, z = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        da, db, dz = _factor_gradients(ctx, rows, z, g, a, b)
        dx = (dz.T @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        return gradient, dx, da, db, None


@register_accelerator
class FastLora(Accelerator):
    """
    Let the LoRA layers of a model compute in fewer passes, see [`FastLinear`]. Exact.

    A layer changes its class, to a subclass of its own, and nothing else: weights, names and what is saved are PEFT's.
    Layers that cannot, stay as they are, and one line says which and why.
    """

    facts = ACCELERATOR_FACTS["fast_lora"]
    on_model = True
    most = 1.02

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the arguments, the layers, or what a few samples show."""
        trainer, model, args = self.trainer, self.trainer.model, self.trainer.args
        if args.torch_compile or hasattr(model, "_orig_mod"):
            return "torch_compile=True puts passes together itself"
        if is_sharded(model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "weights are spread over processes"
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        if not layers:
            return f"{type(model).__name__} has no LoRA layers of PEFT"
        reasons = {name: reason for name, layer in layers.items() if (reason := why_stock(layer)) is not None}
        kinds, first = Counter(reasons.values()), {reason: name for name, reason in reversed(reasons.items())}
        stock = "; ".join(f"{kind} ({n} of {len(layers)} LoRA layers, {first[kind]})" for kind, n in kinds.items())
        if len(reasons) == len(layers):
            return f"there are {stock}"
        problem = None if few_rows is None else self.try_attached(few_rows())
        if problem is None and stock:
            logger.warning("fast_lora=True: there are %s; these layers compute as PEFT has them", stock)
        return problem

    def attach(self) -> None:
        """Make layers fast."""
        for layer in self.trainer.model.modules():
            if type(layer) is Linear and why_stock(layer) is None:
                layer.__class__ = FastLinear

    def detach(self) -> None:
        """Make layers PEFT's again."""
        for layer in self.trainer.model.modules():
            if type(layer) is FastLinear:
                layer.__class__ = Linear
