"""What a frozen base computes of prompts: recorded once, and made into adapted keys and values again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ..adapters import base_alone
from ..scoring import IGNORE, preserve_rng_state
from .unpad import flatten

#: Attention modules that take part, and what is known of each.
LAYERS: WeakKeyDictionary[nn.Module, Layer] = WeakKeyDictionary()


class _Enough(Exception):
    """An attention module has computed its keys and values."""


@dataclass(eq=False)
class Layer:
    """
    An attention module, and how it makes keys and values of what it reads.

    Attributes:
        module (`nn.Module`): it.
        base ([`FrozenBase`]): to which it belongs.
        linears (`list[nn.Module]`): frozen linear layers whose outputs make keys and values; these are kept.
        widths (`list[int]`): of what is kept at each position: what the module reads, then the outputs of `linears`;
            or of keys and values.
        shapes (`list[torch.Size]`): of keys and of values at a position, heads and their width, where they are kept.
        arguments (`tuple`): positional and named ones of a call, without hidden states.
    """

    module: nn.Module
    base: FrozenBase
    linears: list[nn.Module] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    arguments: tuple[tuple, dict[str, Any]] = ((), {})


class FrozenBase:
    """
    Run a model's base over prompts, and make adapted keys and values of what was recorded of them.

    Which modules attend, which of their linear layers make keys and values, and what rotary embeddings and norms do is
    found out by running them, not by their names. A module is asked for keys and values by calling it on what it once
    read; its frozen linear layers then compute nothing, they give what they gave at that time.

    Where completions read prompts as the base does, its keys and values are kept themselves.

    The model must use an attention function that calls [`FrozenBase.called`] first.

    Args:
        model (`nn.Module`): a causal language model, PEFT's wrapper taken off.
        tokens (`Sequence[int]`): any two tokens or more, to find all that out with.
        adapted (`bool`): whether keys and values of prompts are adapted.

    Attributes:
        layers (`list[Layer]`): attention modules in the order in which they run.
        dtype (`torch.dtype`), row_bytes (`int`): of what is kept, and of one position of it.
        precision (`torch.dtype`, *optional*): that of autocast when all this was found out, see [`autocast_dtype`].
        step (`Any`): what the attention function reads in the step in progress; `None`: nothing is to be read.
    """

    exploring: FrozenBase | None = None  # the one that looks for attention modules just now

    def __init__(self, model: nn.Module, tokens: Sequence[int], adapted: bool = True):
        self.model, self.adapted, self.layers, self.step = model, adapted, [], None
        self.precision = autocast_dtype(next(model.parameters()).device)
        self._doing: str | None = None  # "record" or "replay"; None: the model runs for somebody else
        self._read: list[torch.Tensor] = []  # what attention modules read, [N, D] each, while recording
        self._outputs: dict[nn.Module, torch.Tensor] = {}  # of linear layers, recorded or to be given
        self._hooks: list[Any] = []
        # Positions that arguments of calls are known for; whether these are those of one prompt, from its beginning.
        self._longest, self._is_table, self._refresh = 0, True, False
        FrozenBase.exploring = self
        try:
            self._run([tuple(tokens)])
        finally:
            FrozenBase.exploring = None
        if adapted:
            for layer in self.layers:
                self._hooks.append(layer.module.register_forward_pre_hook(self._at_attention, with_kwargs=True))
            self.record([tuple(tokens)])
            # In train mode dropout would draw: a run that was resumed would go on with other numbers.
            with base_alone(model), preserve_rng_state():
                for layer, read in zip(self.layers, list(self._read), strict=True):
                    self._sort_linears(layer, read)
        probe = self.record([tuple(tokens)])
        self.dtype, self.row_bytes = probe.dtype, probe.shape[1] * probe.element_size()

    def _sort_linears(self, layer: Layer, read: torch.Tensor) -> None:
        """Find out which linear layers make keys and values: those on whose outputs they depend, says autograd."""
        linears, outputs = list(linears_of(layer.module)), {}

        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            outputs[module] = output.detach().float().requires_grad_()
            return outputs[module].to(output.dtype)

        hooks = [linear.register_forward_hook(keep) for linear in linears]
        try:
            with torch.enable_grad():
                found = self._call(layer, read[None], torch.arange(len(read), device=read.device))
                total = sum(states.float().sum() for states in found)
                gradients = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        layer.widths = [read.shape[-1]]
        for (linear, output), gradient in zip(outputs.items(), gradients, strict=True):
            if gradient is None:  # it makes queries, which a prompt has no use for
                self._hook(linear, output.shape[-1])
            elif _is_plain(linear):  # others, such as DoRA, need more of their base than its output: it is run again
                frozen = getattr(linear, "base_layer", linear)
                layer.linears.append(frozen)
                layer.widths.append(output.shape[-1])
                self._hook(frozen)

    def _hook(self, linear: nn.Module, zeros: int | None = None) -> None:
        """Let a linear layer give what is known in place of computing it, or so many zeros a position."""

        def skip(module: nn.Module, args: tuple) -> tuple | None:
            return (args[0][:, :0], *args[1:]) if self._doing == "replay" else None

        def give(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if self._doing == "replay":
                return self._outputs[module] if zeros is None else output.new_zeros(1, self._positions, zeros)
            if self._doing == "record":
                self._outputs[module] = output[0]
            return None

        self._hooks += [linear.register_forward_pre_hook(skip), linear.register_forward_hook(give)]

    def close(self) -> None:
        """Take all hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            LAYERS.pop(layer.module, None)
        self._hooks, self.layers = [], []

    @staticmethod
    def called(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> Layer | None:
        """
        Take part in a call of an attention function; return the layer if somebody else runs the model, else `None`.

        Args:
            module (`nn.Module`): the attention module.
            key, value (`torch.Tensor`): `[1, heads, N, d]`.
        """
        base = FrozenBase.exploring
        if base is not None:
            LAYERS[module] = Layer(module, base)
            base.layers.append(LAYERS[module])
        layer = LAYERS.get(module)
        if layer is not None and layer.base._doing == "replay":
            raise _Enough(key, value)
        if layer is not None and layer.base._doing == "record" and not layer.base.adapted:
            layer.base._read += [key[0].transpose(0, 1), value[0].transpose(0, 1)]
        return None if layer is None or base is not None or layer.base._doing else layer

    # -- recording --

    @torch.no_grad()
    def _run(self, prompts: Sequence[tuple[int, ...]]) -> None:
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        ids[mask] = torch.tensor([token for prompt in prompts for token in prompt])
        row = flatten({"input_ids": ids, "attention_mask": mask.long(), "labels": torch.full_like(ids, IGNORE)})
        del row["labels"]
        with base_alone(self.model):
            self.model.base_model(**{key: value.to(device) for key, value in row.items()}, use_cache=False)

    def record(self, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """
        Compute what is kept of prompts.

        Args:
            prompts (`Sequence[tuple]`): token ids of each, none of them empty.

        Returns:
            `[N, width]`, the positions of one prompt after the other, in the dtype in which the model computes.
        """
        length = sum(map(len, prompts))
        # Of one prompt, arguments such as rotary embeddings serve as a table by position for all that are shorter.
        self._refresh = len(prompts) > 1 or not self._is_table or length > self._longest
        if self._refresh:
            self._longest, self._is_table = length, len(prompts) == 1
        self._doing, self._outputs, self._read = "record", {}, []
        try:
            self._run(prompts)
        finally:
            self._doing = None
        if not self.adapted:
            for layer, key, value in zip(self.layers, self._read[::2], self._read[1::2], strict=True):
                layer.shapes = [key.shape[1:], value.shape[1:]]
                layer.widths = [shape.numel() for shape in layer.shapes]
            return torch.cat([states.flatten(1) for states in self._read], dim=-1)
        parts: list[torch.Tensor] = []
        for layer, read in zip(self.layers, self._read, strict=True):
            parts += [read, *(self._outputs[linear] for linear in layer.linears)]
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=-1)

    def reach(self, prompt: tuple[int, ...]) -> None:
        """Get ready for a prompt that was recorded at another time: know the arguments of calls up to its end."""
        if self.adapted and not (self._is_table and self._longest >= len(prompt)):
            self.record([prompt])

    def _at_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._doing != "record":
            return
        self._read.append((args[0] if args else kwargs["hidden_states"])[0])
        if self._refresh:
            kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items() if k != "hidden_states"}
            kwargs |= {"attention_mask": None} if "attention_mask" in kwargs else {}
            LAYERS[module].arguments = tuple(None if isinstance(v, Cache) else v for v in args[1:]), kwargs

    # -- replaying --

    def keys_and_values(
        self, layer: Layer, kept: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Make adapted keys and values of what was kept of prompts, with gradients for adapters.

        Args:
            layer ([`Layer`]): of which.
            kept (`torch.Tensor`): its part of what [`FrozenBase.record`] returned, `[N, sum(layer.widths)]`.
            positions (`torch.Tensor`): int64 `[N]`, where each is in its prompt; after `record` of several prompts,
                where each is in what that has returned.

        Returns:
            each `[1, heads, N, d]`, as attention functions get them.
        """
        if not self.adapted:
            states = zip(kept.split(layer.widths, dim=-1), layer.shapes, strict=True)
            return tuple(part.unflatten(1, shape).transpose(0, 1)[None] for part, shape in states)
        read, *outputs = kept.split(layer.widths, dim=-1)
        self._outputs = {linear: output[None] for linear, output in zip(layer.linears, outputs, strict=True)}
        try:
            return self._call(layer, read[None], positions)
        finally:
            self._outputs = {}

    def _call(self, layer: Layer, read: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args, kwargs = take_positions(layer.arguments, positions, self._longest)
        self._doing, self._positions = "replay", read.shape[1]
        try:
            layer.module(read, *args, **kwargs)
        except _Enough as enough:
            return enough.args
        finally:
            self._doing = None
        raise RuntimeError(f"{type(layer.module).__name__} has called no attention function")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what matrix products are computed in just now, whatever the types of weights; `None`: by these."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def linears_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the linear layers of a module; those of PEFT as one, with what is inside."""
    for child in module.children():
        if isinstance(child, (nn.Linear, Conv1D, BaseTunerLayer)):
            yield child
        else:
            yield from linears_of(child)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer's base counts by its output alone."""
    return not getattr(linear, "lora_variant", None)


def take_positions(value: Any, positions: torch.Tensor, length: int) -> Any:
    """Take what belongs to some positions, int64 `[K]`, out of arguments of a call with so many positions."""
    if isinstance(value, (tuple, list)):
        return type(value)(take_positions(item, positions, length) for item in value)
    if isinstance(value, dict):
        return {key: take_positions(item, positions, length) for key, item in value.items()}
    if not torch.is_tensor(value):
        return value
    dimension = next((d for d in range(min(value.dim(), 2))[::-1] if value.shape[d] == length), None)
    return value if dimension is None else value.index_select(dimension, positions)
