"""N-grams of many texts, counted on arrays: how often each is in a text, and what texts share with references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

REFERENCE = -1  # stands for a system's number where a text is a reference
_LIMIT = 2**62  # what keys are kept below


@dataclass(frozen=True)
class Encoded:
    """
    Texts as numbers: those of systems and their references, one after the other.

    Attributes:
        tokens (`np.ndarray`): int32, the number of every word (or character) of every text.
        lengths (`np.ndarray`): int32 `[texts]`.
        system (`np.ndarray`): int32 `[texts]`, whose a text is, or `REFERENCE`.
        instance (`np.ndarray`): int32 `[texts]`, growing within each system and within the references.
        size (`int`): how many distinct tokens there are.
        vocabulary (`tuple`): what the numbers stand for, where encoded texts are to be joined.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    system: np.ndarray
    instance: np.ndarray
    size: int
    vocabulary: tuple[str, ...] = ()

    @staticmethod
    def of_words(texts: Sequence[Sequence[str]], system: np.ndarray, instance: np.ndarray) -> Encoded:
        number: dict[str, int] = {}
        numbers = (number.setdefault(word, len(number)) for words in texts for word in words)
        tokens = np.fromiter(numbers, np.int32)
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        return Encoded(tokens, lengths, system, instance, len(number), tuple(number))

    @staticmethod
    def of_characters(texts: Sequence[str], system: np.ndarray, instance: np.ndarray) -> Encoded:
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        number = np.cumsum(np.bincount(codes) > 0, dtype=np.int32) - 1
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        return Encoded(number[codes], lengths, system, instance, int(number[-1]) + 1 if len(number) else 1)

    @staticmethod
    def join(parts: Sequence[Encoded]) -> Encoded:
        """Put parts together that follow each other: each counts its own instances from 0, and has all systems."""
        number: dict[str, int] = {}
        tokens, instances, first = [], [], 0
        for part in parts:
            common = np.array([number.setdefault(word, len(number)) for word in part.vocabulary], np.int32)
            tokens.append(common[part.tokens])
            instances.append(part.instance + np.int32(first))
            first += part.instances
        lengths, system = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lengths", "system"))
        return Encoded(np.concatenate(tokens), lengths, system, np.concatenate(instances), len(number), tuple(number))

    @cached_property
    def instances(self) -> int:
        return int(self.instance.max()) + 1

    @cached_property
    def references(self) -> np.ndarray:
        """Which texts are references, instance by instance."""
        return self.texts(REFERENCE)

    @cached_property
    def groups(self) -> np.ndarray:
        """Where in `references` those of each instance begin."""
        return np.searchsorted(self.instance[self.references], np.arange(self.instances))

    def texts(self, system: int) -> np.ndarray:
        """Return which texts are a system's, instance by instance."""
        return np.flatnonzero(self.system == system)

    def closest(self, system: int) -> np.ndarray:
        """Return the length of the reference that is closest in length to each text; of two, the shorter."""
        lengths = self.lengths[self.references].astype(np.int64)
        gaps = np.abs(lengths - self.lengths[self.texts(system)][self.instance[self.references]])
        return np.minimum.reduceat((gaps << 32) + lengths, self.groups) & (2**32 - 1)

    def counts(self, system: int, n: int) -> np.ndarray:
        """Return how many n-grams each text of a system has."""
        return np.maximum(self.lengths[self.texts(system)] - (n - 1), 0)


class Cells(NamedTuple):
    """N-grams, each once for a text that has it, in the order of texts: arrays of one length."""

    text: np.ndarray
    gram: np.ndarray
    count: np.ndarray
    first: np.ndarray  # the place in `tokens` where a text has it first; empty where it was not asked for

    def total(self, values: np.ndarray, size: int) -> np.ndarray:
        """Return sums of cells' values by text, each in the order in which the text has them: float64 `[size]`."""
        in_order = np.argsort(self.first)
        return sums(self.text[in_order], values[in_order], size)


class Shared(NamedTuple):
    """
    N-grams that a reference has in common with a text: int64 arrays of one length.

    In the order of references and, where it was asked for, of the first places in the text.
    """

    own: np.ndarray  # which cell of the text's system
    reference: np.ndarray  # which cell of the references
    count: np.ndarray  # how often both have it


@dataclass
class Order:
    """
    The n-grams of one order.

    Attributes:
        n (`int`): words in each.
        cells ([`Cells`]): of all texts.
        bound (`int`): no number of an n-gram reaches it; with `dense` there are so many.
        prefix (`np.ndarray`): with `dense`, the number, among those one word shorter, of what each begins with.
    """

    encoded: Encoded
    n: int
    cells: Cells
    bound: int
    prefix: np.ndarray

    def of(self, system: int) -> Cells:
        kept = self.encoded.system[self.cells.text] == system
        return Cells(*(column[kept] if len(column) else column for column in self.cells))

    @cached_property
    def references(self) -> Cells:
        return self.of(REFERENCE)

    def shared(self, own: Cells) -> Shared:
        """Return what each reference shares with the text of the same instance."""
        ours, theirs = (
            self.encoded.instance[cells.text].astype(np.int64) * self.bound + cells.gram
            for cells in (own, self.references)
        )
        if not len(ours):
            return Shared(*(np.zeros(0, np.int64) for _ in Shared._fields))
        where = np.searchsorted(ours, theirs)
        where[where == len(ours)] = 0
        found = np.flatnonzero(ours[where] == theirs)
        where = where[found]
        if len(own.first):
            in_order = np.lexsort((own.first[where], self.references.text[found]))
            where, found = where[in_order], found[in_order]
        return Shared(where, found, np.minimum(own.count[where], self.references.count[found]))

    def clipped(self, own: Cells) -> np.ndarray:
        """Return of each cell how often it counts: at most as often as the reference that has most of it."""
        shared, most = self.shared(own), np.zeros(len(own.text), np.int64)
        np.maximum.at(most, shared.own, shared.count)
        return most


def orders(encoded: Encoded, most: int, dense: bool = False, places: bool = False) -> Iterator[Order]:
    """
    Yield the n-grams of 1, 2, ... `most` tokens.

    An n-gram is a number: that of what it begins with, times the number of distinct tokens, plus its last token. Where
    these get too large, or with `dense`, they are replaced by their ranks. `first` is known with `places` only.
    """
    lengths = encoded.lengths.astype(np.int64)
    tokens, text = encoded.tokens, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    place = np.arange(len(tokens), dtype=np.int32)
    room = np.repeat(np.cumsum(lengths, dtype=np.int32), lengths) - place  # tokens from here to the text's end
    gram, bound = np.zeros(len(tokens), np.int64), 1
    prefix = first = np.zeros(0, np.int64)
    for n in range(1, most + 1):
        fits = room[place] >= n
        place, gram = place[fits], gram[fits]
        if not dense and bound * encoded.size >= _LIMIT:  # dense numbers are few
            _, gram, bound = _ranks(gram)
        gram = gram * encoded.size + tokens[place + (n - 1)]
        bound *= encoded.size
        if dense or bound * len(lengths) >= _LIMIT:
            distinct, gram, bound = _ranks(gram)
            prefix = distinct // encoded.size
        key = text[place] * np.int64(bound) + gram
        if places:
            key, index, count = np.unique(key, return_index=True, return_counts=True)
            first = place[index]
        else:
            key, count = np.unique(key, return_counts=True)
        owner, key = np.divmod(key, bound)
        cells = Cells(owner.astype(np.int32), key, count.astype(np.int32), first)
        del owner, count  # while others work with these, what is twice as wide is gone
        yield Order(encoded, n, cells, bound, prefix)


def in_common(encoded: Encoded, systems: int, most: int) -> list[np.ndarray]:
    """
    Return for each system n-grams of the text, of a reference, and of both, order by order, for each reference.

    Returns:
        `list[np.ndarray]`: int64 `[references, 3 * most]`. Where a reference has none, those of the text are 0.
    """
    refs = encoded.references
    rank = np.zeros(len(encoded.lengths), np.int64)
    rank[refs] = np.arange(len(refs))
    columns: list[list[np.ndarray]] = [[] for _ in range(systems)]
    for order in orders(encoded, most):
        theirs = encoded.counts(REFERENCE, order.n)
        for k, of_system in enumerate(columns):
            shared = order.shared(order.of(k))
            both = sums(rank[order.references.text[shared.reference]], shared.count, len(refs))
            own = encoded.counts(k, order.n)[encoded.instance[refs]]
            of_system += [np.where(theirs > 0, own, 0), theirs, both.astype(np.int64)]
    return [np.stack(one, axis=1) for one in columns]


def _ranks(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    distinct, rank = np.unique(gram, return_inverse=True)
    return distinct, rank, len(distinct)


def sums(where: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Return the sums of values by where they belong, each added up in order: float64 `[size]`."""
    return np.bincount(where, values, size).astype(np.float64, copy=False)  # of nothing it makes whole numbers


def distinct_of(values: np.ndarray) -> np.ndarray:
    """Return distinct values in order, as `np.unique` does, whose way of today takes several times as long."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def by_value(values: np.ndarray, function: Callable[[float], float]) -> np.ndarray:
    """Apply a function of Python's to numbers, once for each distinct one: numpy's differ from it in the last bit."""
    distinct = distinct_of(values)
    results = np.array([function(value) for value in distinct.tolist()], np.float64)
    return results[np.searchsorted(distinct, values)]
