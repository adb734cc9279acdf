"""sacrebleu's chrF and chrF++, to the last digit: counted on arrays, characters once for both."""

from __future__ import annotations

import numpy as np
from sacrebleu.metrics import CHRF

from .base import PartMetric
from .grams import in_common
from .part import Part


class FastCHRF(PartMetric, CHRF):
    """
    chrF, or with words chrF++, with sacrebleu's defaults.

    Args:
        word_order (`int`): n-grams of up to so many words count too; 2 is chrF++.
    """

    def __init__(self, word_order: int = 0):
        super().__init__(word_order=word_order)

    def statistics(self, part: Part) -> list[np.ndarray]:
        """Return n-grams of each text, of its best reference, and of both, for each order."""
        rows = part.characters
        if self.word_order:
            words = part.encoded([self._remove_punctuation(text) for text in part.texts])
            more = in_common(words, part.systems, self.word_order)
            rows = [np.concatenate(both, axis=1) for both in zip(rows, more, strict=True)]
        return [self._best(one, part.numbers) for one in rows]

    def _best(self, rows: np.ndarray, numbers: list[int]) -> np.ndarray:
        """Keep of each instance's references the one with the best F, of equal ones the first."""
        if len(rows) == len(numbers):
            return rows
        scores, kept, start = [self._compute_f_score(row) for row in rows.tolist()], [], 0
        for number in numbers:
            kept.append(max(range(start, start + number), key=scores.__getitem__))
            start += number
        return rows[kept]
