"""Attention among the samples of a batch that were put into one row: what they begin with is there only once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
#: Whether this torch has that kernel, with windows and scales: since 2.11.
HAS_VARLEN = varlen_attn is not None and {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters)

#: Keys and values, `[1, heads, N, d]` each.
Pair = tuple[torch.Tensor, torch.Tensor]
#: Types in which CPUs attend to one sample after the other in several times as long as in float32: for every new
#: length a kernel is made first. So they don't.
NARROW = {torch.bfloat16, torch.float16}
#: `(query, key, value, mask, is_causal) -> [B, T, heads, d]`, where mask is `None` or `[B or 1, 1, T, L]`.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]


def holds_places(mask: Any) -> bool:
    """Whether what a model hands on for a mask says where samples are, see [`attend`]."""
    return torch.is_tensor(mask) and mask.dtype == torch.int64 and mask.dim() == 4


def places_of(used: torch.Tensor) -> torch.Tensor:
    """
    Return where each sample is in a row of all that is used, in the form that our attention takes for a mask.

    Args:
        used (`torch.Tensor`): bool `[B, L]`, N of them true.

    Returns:
        int64 `[1, 1, B, L]`, see [`attend`]: nothing is in common.
    """
    columns, lengths = torch.arange(used.shape[1], device=used.device), used.sum(1, keepdim=True)
    places = columns + lengths.cumsum(0) - lengths
    # A mask with four dimensions reaches attention as it is, in every model: so this does.
    return places.masked_fill(columns >= lengths, int(lengths.sum()))[None, None]


def rows_of_places(rows: Sequence[Sequence[int]], keys: int) -> torch.Tensor:
    """
    Return where each sample is, as [`places_of`] does, of places that are known.

    Args:
        rows (`Sequence[Sequence[int]]`): the places of each of B samples, of at most L positions.
        keys (`int`): how many places there are.

    Returns:
        int64 `[1, 1, B, L]`, see [`attend`].
    """
    table = np.full((len(rows), max(map(len, rows))), keys, np.int64)
    for row, places in zip(table, rows, strict=True):
        row[: len(places)] = places
    return torch.from_numpy(table)[None, None]


@dataclass
class Rows:
    """
    What of a row of samples each of them is, and what it has in common with those before it.

    Attributes:
        stored (`int`): P, positions whose keys and values are given besides those of the row: its places begin at P.
        pieces (`list[int]`): lengths of what keys are cut into, in the order of places: what is of the same samples.
        samples (`list[tuple]`): of each that has positions of its own: how many; the numbers of the pieces that
            it sees, in order; and how many positions of these are not its own.
        order (`np.ndarray`): int64 `[M]`, the places of these samples, one after the other.
    """

    stored: int
    pieces: list[int]
    samples: list[tuple[int, list[int], int]]
    order: np.ndarray
    _made: dict[Any, Any] = field(default_factory=dict)  # masks and places, the same in all layers

    @classmethod
    def find(cls, places: torch.Tensor, keys: int, stored: int) -> Rows:
        """Find out from places, int64 `[B, L]`, among so many keys."""
        table = places.cpu().numpy()
        rows = [row[: np.count_nonzero(row < keys)] for row in table]
        starts = [np.flatnonzero(np.diff(row, prepend=-2) != 1) for row in rows]
        cuts, counts, cursor = {0, stored, keys}, [], stored
        for row, begin in zip(rows, starts, strict=True):
            own = int(np.count_nonzero(row >= cursor))
            cuts.update(row[begin].tolist(), (row[[*begin[1:] - 1, -1]] + 1).tolist() if len(row) else (), [cursor])
            counts.append(own)
            cursor += own
        bounds = np.array(sorted(cuts))
        samples, order = [], [np.empty(0, np.int64)]
        for row, own in zip(rows, counts, strict=True):
            if own:
                seen = np.flatnonzero(np.isin(bounds[:-1], row)).tolist()
                samples.append((own, seen, len(row) - own))
                order.append(row)
        return cls(stored, np.diff(bounds).tolist(), samples, np.concatenate(order))

    @cached_property
    def _pieces_stored(self) -> int:
        """How many of the pieces are stored; the others are of the row."""
        return int(np.searchsorted(np.cumsum(self.pieces), self.stored, side="right")) if self.stored else 0

    @property
    def apart(self) -> bool:
        """Whether samples have nothing in common, and nothing stored."""
        return not any(shared for *_, shared in self.samples)

    def one_by_one(
        self, call: Call, query: torch.Tensor, keys: Pair, stored: Pair | None, window: int | None
    ) -> torch.Tensor:
        """
        Attend to one sample after the other: nothing is padded; for CPUs, where calls are cheap.

        Args:
            call (`Callable`): see `Call`.
            query (`torch.Tensor`): `[1, heads, N, d]`.
            keys, stored: of the row, and of what precedes it.
            window (`int`, *optional*): positions that a position sees, itself included.

        Returns:
            `[1, N, heads, d]`.
        """
        parts = [self._cut(*pair) for pair in zip(keys, stored or (None, None), strict=True)]
        queries, outputs = query.split([own for own, *_ in self.samples], dim=2), []
        for q, (own, seen, shared) in zip(queries, self.samples, strict=True):
            k, v = (torch.cat([part[i] for i in seen], dim=2) if len(seen) > 1 else part[seen[0]] for part in parts)
            causal = not shared and (window is None or own <= window)
            outputs.append(call(q, k, v, None if causal else self._mask(own, shared, window, q), causal))
        return torch.cat(outputs, dim=1)

    def _cut(self, states: torch.Tensor, stored: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Cut into pieces, all at once: the backward pass then puts them together in one go."""
        first = self._pieces_stored
        before = () if stored is None else stored.split(self.pieces[:first], dim=2)
        return *before, *states.split(self.pieces[first:], dim=2)

    def _mask(self, own: int, shared: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return what to add to scores, `[1, 1, own, shared + own]`: -inf for what is not seen; `None`: nothing."""
        if own == 1 and (window is None or shared < window):
            return None
        key = (own, shared, window, like.dtype)
        if key not in self._made:
            distance = torch.arange(shared, shared + own)[:, None] - torch.arange(shared + own)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(own, shared + own, dtype=like.dtype, device=like.device)
            self._made[key] = mask.masked_fill(hidden.to(like.device), -torch.inf)[None, None]
        return self._made[key]

    def packed(
        self, query: torch.Tensor, keys: Pair, stored: Pair | None, window: int | None, scale: float | None
    ) -> torch.Tensor:
        """
        Attend to all samples in one call that knows where each begins, as [`Rows.one_by_one`]; see [`has_kernel`].

        Args:
            query (`torch.Tensor`): `[1, heads, N, d]`.
            keys, stored: of the row, and of what precedes it.
            window (`int`, *optional*): positions that a position sees, itself included.
            scale (`float`, *optional*): of scores; default: d^-0.5.

        Returns:
            `[1, N, heads, d]`.
        """
        if "packed" not in self._made:
            lengths = np.array([(own, shared + own) for own, _, shared in self.samples], np.int32)
            starts = torch.from_numpy(np.concatenate([np.zeros((1, 2), np.int32), lengths.cumsum(0, dtype=np.int32)]))
            queries, seen = starts.T.contiguous().to(query.device)
            order = None if self.apart else torch.from_numpy(self.order).to(query.device)
            self._made["packed"] = queries, seen, *lengths.max(0).tolist(), order
        *bounds, order = self._made["packed"]
        states, groups = [], query.shape[1] // keys[0].shape[1]
        for own, before in zip(keys, stored or (None, None), strict=True):
            part = (own if before is None else torch.cat([before, own], dim=2))[0].transpose(0, 1)
            part = part if order is None else part.index_select(0, order)
            states.append(part if groups == 1 else part.repeat_interleave(groups, dim=1))  # as torch 2.11 wants it
        sees = (-1 if window is None else window - 1, 0)
        return varlen_attn(query[0].transpose(0, 1), *states, *bounds, scale=scale, window_size=sees)[None]

    def at_once(
        self,
        call: Call,
        query: torch.Tensor,
        keys: Pair,
        stored: Pair | None,
        window: int | None,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Attend to all samples at once, padded; for devices on which calls are dear; as [`Rows.one_by_one`]."""
        n = query.shape[2]
        if "places" not in self._made:
            queries, shared = self._queries(places, n)
            taken = [where.clamp(max=most - 1).flatten() for where, most in ((queries, n), (places, self.stored + n))]
            self._made["places"] = queries, shared, *taken
        queries, shared, asking, asked = self._made["places"]
        if stored is not None:
            keys = tuple(torch.cat(pair, dim=2) for pair in zip(stored, keys, strict=True))

        def rows(states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            return states[0].index_select(1, where).unflatten(1, (len(places), -1)).transpose(0, 1)

        # Causal attention never looks ahead, to where the padding is: so it needs no mask, only the sample's start.
        causal = self.apart and (window is None or places.shape[1] <= window)
        seen = None if causal else self._seen(queries, shared, places.shape[1], window)
        # Of cuDNN's attention a plan is built for each new shape, forward and backward, half a second and more each.
        others = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with others if query.is_cuda else nullcontext():
            output = call(rows(query, asking), *(rows(states, asked) for states in keys), seen, causal).flatten(0, 1)
        return output.new_zeros(n + 1, *output.shape[1:]).index_copy(0, queries.flatten(), output)[None, :n]

    def _queries(self, places: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return where a padded batch finds its queries: each position of the row once.

        Returns:
            int64 `[B, T]`, N for padding; int64 `[B, 1]`, how many positions of a sample are before its first query.
        """
        keys = self.stored + n
        ends = places.masked_fill(places >= keys, self.stored - 1).amax(1, keepdim=True) + 1
        begin = ends.cummax(0).values.roll(1, 0).index_fill(0, torch.tensor([0], device=places.device), self.stored)
        shared = (places < begin).sum(1, keepdim=True)
        own = (places < keys).sum(1, keepdim=True) - shared
        columns = torch.arange(max(int(own.max()), 1), device=places.device)
        return (begin - self.stored + columns).masked_fill(columns >= own, n), shared

    def _seen(self, queries: torch.Tensor, shared: torch.Tensor, width: int, window: int | None) -> torch.Tensor:
        """Return which columns each query sees, bool `[B, 1, T, L]`."""
        if ("seen", window) not in self._made:
            device = queries.device
            at = shared + torch.arange(queries.shape[1], device=device)
            distance = at[..., None] - torch.arange(width, device=device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            seen[..., 0] |= ~seen.any(-1)  # what pads must see something
            self._made["seen", window] = seen[:, None]
        return self._made["seen", window]


def on_cpu(device: torch.device) -> bool:
    """Whether calls are cheap on a device."""
    return device.type == "cpu"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what matrix products are computed in just now, whatever the types of weights; `None`: by these."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def has_kernel(query: torch.Tensor, *states: torch.Tensor) -> bool:
    """Whether torch attends to rows of any lengths at once, without padding: in 16 bits, on GPUs since Ampere."""
    if not HAS_VARLEN or not query.is_cuda or torch.version.cuda is None or query.dtype not in NARROW:
        return False
    alike = {(one.dtype, one.shape[-1]) for one in (query, *states)} == {(query.dtype, query.shape[-1])}
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return alike and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


_FOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by mask: all layers of a model are handed the same


def _in(dtype: torch.dtype, *pairs: Pair | None) -> list[Pair | None]:
    """Return keys and values in a type."""
    return [None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)) for pair in pairs]


def attend(
    call: Call,
    query: torch.Tensor,
    keys: Pair,
    mask: torch.Tensor,
    window: int | None,
    stored: Pair | None = None,
    given: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """
    Attend within samples that were put into one row.

    Args:
        call (`Callable`): see `Call`.
        query (`torch.Tensor`): `[1, heads, N, d]`.
        keys: keys and values of the row, `[1, heads, N, d]` each.
        mask (`torch.Tensor`): int64 `[1, 1, B, L]`: the places of each sample among `[stored | row]`, one after the
            other, then P + N. What a sample has in common with those before it comes first, and what it has of its own
            follows theirs in the row.
        window (`int`, *optional*): positions that a position sees, itself included.
        stored (*optional*): keys and values of P positions before, `[1, heads, P, d]` each.
        given (`Mapping`, *optional*): what else transformers gave an attention function; without it no kernel is used.

    Returns:
        `[1, N, heads, d]`.
    """
    before = 0 if stored is None else stored[0].shape[2]
    rows = _FOUND.get(mask)
    if rows is None or rows.stored != before:
        rows = _FOUND[mask] = Rows.find(mask[0, 0], before + query.shape[2], before)
    if on_cpu(query.device):
        if not {states.dtype for states in (query, *keys, *(stored or ()))} & NARROW:
            return rows.one_by_one(call, query, keys, stored, window)
        with torch.autocast(query.device.type, enabled=False):
            wide = _in(torch.float32, keys, stored)
            return rows.one_by_one(call, query.float(), *wide, window).to(keys[1].dtype)
    narrow = autocast_dtype(query.device)
    if narrow is not None:  # as torch's own attention does: rotary embeddings leave float32
        query, (keys, stored) = query.to(narrow), _in(narrow, keys, stored)
    beyond = given is None or given.get("dropout") or given.get("position_bias") is not None  # what no kernel does
    if not beyond and has_kernel(query, *keys, *(stored or ())):
        return rows.packed(query, keys, stored, window, given.get("scaling"))
    return rows.at_once(call, query, keys, stored, window, mask[0, 0])
