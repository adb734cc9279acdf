"""Texts of systems with their references, and what several metrics derive from them: words, once for each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TypeVar

import numpy as np
from sacrebleu.metrics import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from .grams import REFERENCE, Encoded, in_common
from .ptb import ptb_words

Text = TypeVar("Text")


class Part:
    """
    Texts of systems and their references, for all or some of the instances.

    Args:
        systems (`Sequence`): for each system one text an instance.
        references (`Sequence`): for each instance one or more texts.
    """

    def __init__(self, systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]):
        self.systems = len(systems)
        self.texts = [*chain(*systems), *chain(*references)]
        self.numbers = [len(group) for group in references]
        self._tokenize = Tokenizer13a()

    @cached_property
    def words(self) -> list[list[str]]:
        """Words of every text as BLEU has them, lower case."""
        return [self._tokenize(text.lower().rstrip()).split() for text in self.texts]

    @cached_property
    def cased_words(self) -> list[list[str]]:
        return [self._tokenize(text).split() for text in self.texts]

    @cached_property
    def script_words(self) -> list[list[str]]:
        """The same as mteval-v13a has them, which puts words in lower case, not texts: `&QUOT;` is no entity."""
        return [
            words if _plain(text) else self._tokenize(text).lower().split()
            for text, words in zip(self.texts, self.words, strict=True)
        ]

    @cached_property
    def characters(self) -> list[np.ndarray]:
        """What chrF counts, with the orders that are sacrebleu's default; see [`in_common`]."""
        texts = ["".join(text.split()) for text in self.texts]
        return in_common(Encoded.of_characters(texts, *self._whose), self.systems, CHRF.CHAR_ORDER)

    @cached_property
    def ptb(self) -> list[list[str]]:
        """Words of every text as the COCO scripts have them."""
        return [ptb_words(text) for text in self.texts]

    def pairs(self, of_texts: Sequence[Text], system: int) -> Iterator[tuple[Text, Sequence[Text]]]:
        """Yield, instance by instance, what stands in a list as long as `texts` for a system and for references."""
        n = len(self.numbers)
        start = self.systems * n
        for i, number in enumerate(self.numbers):
            yield of_texts[system * n + i], of_texts[start : start + number]
            start += number

    def encoded(self, words: Sequence[Sequence[str]]) -> Encoded:
        """Return words of every text as numbers."""
        return Encoded.of_words(words, *self._whose)

    @cached_property
    def _whose(self) -> tuple[np.ndarray, np.ndarray]:
        """The system and the instance of every text."""
        each, n = np.arange(len(self.numbers), dtype=np.int32), len(self.numbers)
        system = np.repeat(np.arange(self.systems, dtype=np.int32), n)
        system = np.concatenate([system, np.full(sum(self.numbers), REFERENCE, np.int32)])
        return system, np.concatenate([np.tile(each, self.systems), np.repeat(each, self.numbers)])


def _plain(text: str) -> bool:
    """Whether a tokenizer and lower case can change places: no entities, no letters that look at others."""
    return text.isascii() and "&" not in text and "<" not in text and "-\n" not in text
