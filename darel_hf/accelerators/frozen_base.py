"""What a frozen base computes of prompts: recorded once, and made into adapted keys and values again and again."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ..adapters import base_alone
from ..scoring import preserve_rng_state
from .fast_lora import added
from .row_attention import autocast_dtype
from .share_prompts import put_once

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
        linears (`list[FrozenLinear]`): frozen linear layers whose outputs make keys and values; these are kept.
        widths (`list[int]`): of what is kept at each position: what the module reads, then the outputs of `linears`;
            or of keys and values.
        shapes (`list[torch.Size]`): of keys and of values at a position, heads and their width, where they are kept.
        arguments (`tuple`): positional and named ones of a call, without hidden states.
    """

    module: nn.Module
    base: FrozenBase
    linears: list[FrozenLinear] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    arguments: tuple[tuple, dict[str, Any]] = ((), {})


class FrozenLinear:
    """
    A linear layer, PEFT's around it included, that is given what its frozen part once made, and adds what adapters do.

    Args:
        base ([`FrozenBase`]): says what is done.
        linear (`nn.Module`): the layer.
        columns (`slice`, *optional*): of its output, those that are kept; others are zero when it is given.
        width (`int`): of its output.

    Attributes:
        name (`str`): of the layer in the model.
        output (`torch.Tensor`, *optional*): `[N, columns]`, recorded, or to be given.
    """

    def __init__(self, base: FrozenBase, linear: nn.Module, columns: slice | None, width: int):
        self.base, self.columns, self.width = base, columns, width
        self.name = next(name for name, module in base.model.named_modules() if module is linear)
        self.output: torch.Tensor | None = None
        self._made: torch.Tensor | None = None
        self._inside: list[Any] = []  # hooks on the frozen part, for as long as a call lasts
        self.hooks = [linear.register_forward_pre_hook(self._skip), linear.register_forward_hook(self._give)]

    def forget(self) -> None:
        """Let go of tensors, and of the frozen part."""
        for hook in self._inside:
            hook.remove()
        self.output, self._made, self._inside = None, None, []

    def _skip(self, linear: nn.Module, args: tuple) -> tuple | None:
        if self.base._doing != "replay":
            return None
        if self.output is not None:
            output = self.output[None]
            if isinstance(linear, BaseTunerLayer):
                output = added(linear, args[0], output, self.columns)
            if output is None:  # PEFT alone knows what adapters add
                frozen, given = linear.base_layer, self._padded(self.output[None])
                self._inside.append(frozen.register_forward_pre_hook(_without_positions))
                self._inside.append(frozen.register_forward_hook(lambda *called: given))
                return None
            self._made = self._padded(output)
        return _without_positions(linear, args)

    def _give(self, linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.base._doing == "record" and self.columns is not None:
            self.output = output[0, :, self.columns]
        if self.base._doing != "replay" or self._inside:
            return None
        return output.new_zeros(1, self.base._positions, self.width) if self._made is None else self._made

    def _padded(self, output: torch.Tensor) -> torch.Tensor:
        missing = self.columns.start, self.width - self.columns.stop
        return nn.functional.pad(output, missing) if any(missing) else output


def _without_positions(module: nn.Module, args: tuple) -> tuple:
    """Leave a layer nothing to compute."""
    return args[0][:, :0], *args[1:]


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
        layout (`str`): a checksum of what each part of a position is.
        precision (`torch.dtype`, *optional*): that of autocast when all this was found out, see [`autocast_dtype`].
        step (`Any`): what the attention function reads in the step in progress; `None`: nothing is to be read.
    """

    exploring: FrozenBase | None = None  # the one that looks for attention modules just now

    def __init__(self, model: nn.Module, tokens: Sequence[int], adapted: bool = True):
        self.model, self.adapted, self.layers, self.step = model, adapted, [], None
        self.precision = autocast_dtype(next(model.parameters()).device)
        self._doing: str | None = None  # "record" or "replay"; None: the model runs for somebody else
        self._read: list[torch.Tensor] = []  # what attention modules read, [N, D] each, while recording
        self._positions = 0  # of the call that is replayed
        self._hooks: list[Any] = []
        # Positions that arguments of calls are known for; whether these are those of one prompt, from its beginning.
        self._longest, self._is_table, self._refresh = 0, True, False
        try:
            self._explore(tuple(tokens))
        except BaseException:  # memory that is short, say: no hook stays behind
            self.close()
            raise

    def _explore(self, tokens: tuple[int, ...]) -> None:
        """Find out which modules attend, and what is kept of a position."""
        FrozenBase.exploring = self
        try:
            self._run(self._row([tokens])[0])
        finally:
            FrozenBase.exploring = None
        if self.adapted:
            for layer in self.layers:
                self._hooks.append(layer.module.register_forward_pre_hook(self._at_attention, with_kwargs=True))
            self.record([tokens])
            # In train mode dropout would draw: a run that was resumed would go on with other numbers.
            with base_alone(self.model), preserve_rng_state():
                for layer, read in zip(self.layers, list(self._read), strict=True):
                    self._sort_linears(layer, read)
        probe, _ = self.record([tokens])
        self.dtype, self.row_bytes = probe.dtype, probe.shape[1] * probe.element_size()
        kept = [[(linear.name, str(linear.columns)) for linear in layer.linears] for layer in self.layers]
        self.layout = f"{zlib.crc32(repr(kept).encode()):08x}"

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
                # Not the sum, which norms may leave without any.
                total = sum((states.float() * torch.rand_like(states, dtype=torch.float)).sum() for states in found)
                gradients = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        layer.widths = [read.shape[-1]]
        for (linear, output), gradient in zip(outputs.items(), gradients, strict=True):
            width = output.shape[-1]
            if gradient is None:  # it makes queries, which a prompt has no use for
                self._hooks += FrozenLinear(self, linear, None, width).hooks
            elif _is_plain(linear):  # others, such as DoRA, need more of their base than its output: it is run again
                columns = self._columns(layer, read, linear, gradient)
                layer.linears.append(FrozenLinear(self, linear, columns, width))
                layer.widths.append(columns.stop - columns.start)
                self._hooks += layer.linears[-1].hooks

    def _columns(self, layer: Layer, read: torch.Tensor, linear: nn.Module, gradient: torch.Tensor) -> slice:
        """Find out which outputs of a linear layer make keys and values: others, say of queries, can be NaN."""
        used = gradient.flatten(0, -2).ne(0).any(0).nonzero()
        every = slice(0, gradient.shape[-1])
        columns = slice(int(used.min()), int(used.max()) + 1) if len(used) else every

        def spoil(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            spoiled = torch.full_like(output, torch.nan)
            spoiled[..., columns] = output[..., columns]
            return spoiled

        hook = linear.register_forward_hook(spoil)
        try:
            found = self._call(layer, read[None], torch.arange(len(read), device=read.device))
        finally:
            hook.remove()
        return columns if all(states.isfinite().all() for states in found) else every

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

    def _row(self, prompts: Sequence[tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
        """Put prompts into a row, what they begin with in common once; return where each is in it, too."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        ids[mask] = torch.tensor([token for prompt in prompts for token in prompt])
        row, places = put_once({"input_ids": ids}, mask)
        return {key: value.to(device) for key, value in row.items()}, places

    def alone(self) -> contextlib.AbstractContextManager:
        """Return a context in which to record several times: to switch all modules takes as long as a short prompt."""
        return base_alone(self.model)

    @torch.no_grad()
    def _run(self, row: dict[str, torch.Tensor]) -> None:
        with base_alone(self.model):
            self.model.base_model(**row, use_cache=False)

    def record(self, prompts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, list[np.ndarray]]:
        """
        Compute what is kept of prompts, of what they begin with in common once.

        Args:
            prompts (`Sequence[tuple]`): token ids of each, none of them empty.

        Returns:
            `[N, width]`, in the dtype in which the model computes, the positions of a prompt in order; and where those
            of each prompt are, int64 `[n]`.
        """
        row, places = self._row(prompts)
        length = row["input_ids"].shape[1]
        # Of one prompt, arguments such as rotary embeddings serve as a table by position for all that are shorter.
        self._refresh = len(prompts) > 1 or not self._is_table or length > self._longest
        if self._refresh:
            self._longest, self._is_table = length, len(prompts) == 1
        self._doing, self._read = "record", []
        try:
            self._run(row)
        finally:
            self._doing = None
        if not self.adapted:
            for layer, key, value in zip(self.layers, self._read[::2], self._read[1::2], strict=True):
                layer.shapes = [key.shape[1:], value.shape[1:]]
                layer.widths = [shape.numel() for shape in layer.shapes]
            return torch.cat([states.flatten(1) for states in self._read], dim=-1), places
        parts: list[torch.Tensor] = []
        for layer, read in zip(self.layers, self._read, strict=True):
            parts += [read, *(linear.output for linear in layer.linears)]
            for linear in layer.linears:
                linear.forget()
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=-1), places

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
        for linear, output in zip(layer.linears, outputs, strict=True):
            linear.output = output
        return self._call(layer, read[None], positions)

    def _call(self, layer: Layer, read: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        args, kwargs = take_positions(layer.arguments, positions, self._longest)
        self._doing, self._positions = "replay", read.shape[1]
        try:
            layer.module(read, *args, **kwargs)
        except _Enough as enough:
            return enough.args
        finally:
            self._doing = None
            for linear in layer.linears:
                linear.forget()
        raise RuntimeError(f"{type(layer.module).__name__} has called no attention function")


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
