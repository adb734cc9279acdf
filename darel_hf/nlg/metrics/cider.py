"""CIDEr as the COCO and E2E scripts have it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.base import Signature

from ..._version import __version__
from .base import SegmentMean
from .nist import ngrams
from .ptb import ptb_words


class CIDEr(SegmentMean):
    """
    CIDEr-D as the scripts compute it: ten times the mean similarity of n-grams, n = 1..4, to each reference.

    N-grams weigh their count times the logarithm of (instances / instances whose references have them). Similarity is
    the cosine with counts clipped to the reference's, times exp(-(difference in length)^2 / 72), where a text's length
    is the number of its pairs of words. Source: Vedantam et al. 2015. The weights come from the references of the
    whole file: the score of one instance depends on the others, and one instance alone scores 0.
    """

    name = "CIDEr"
    ORDER = 4
    SIGMA = 6.0

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(impl="coco", order=CIDEr.ORDER, sigma=CIDEr.SIGMA, case="lc", tok="ptb", punct="no")
            self.info["version"] = f"darel_hf-{__version__}"

    _SIGNATURE_TYPE = _Signature

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": [ptb_words(ref) for ref in refs]}

    def _cache_references(self, references: Sequence[Sequence[str]]) -> list[Any]:
        cache = super()._cache_references(references)
        frequency: Counter[tuple[str, ...]] = Counter()
        for info in cache:
            orders = range(1, self.ORDER + 1)
            frequency.update({gram for words in info["references"] for n in orders for gram in ngrams(words, n)})
        self.instances = math.log(len(cache))
        # What one instance alone has weighs as what none has.
        self.frequency = {gram: math.log(count) for gram, count in frequency.items() if count > 1}
        return cache

    def segment(self, hypothesis: str, references: list[list[str]]) -> float:
        own, norms, length = self._vector(ptb_words(hypothesis))
        total = [0.0] * self.ORDER
        for reference in references:
            other, other_norms, other_length = self._vector(reference)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * self.SIGMA**2))
            for n in range(self.ORDER):
                value = sum(
                    min(weight, other[n][gram]) * other[n][gram] for gram, weight in own[n].items() if gram in other[n]
                )
                if norms[n] != 0 and other_norms[n] != 0:
                    value /= norms[n] * other_norms[n]
                total[n] += value * penalty
        return 10 * sum(total) / self.ORDER / len(references)

    def _vector(self, words: list[str]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Return weights by n-gram and their norm, for each order, and the length."""
        vectors = []
        for n in range(1, self.ORDER + 1):
            counts = Counter(ngrams(words, n))
            vectors.append(
                {gram: count * (self.instances - self.frequency.get(gram, 0.0)) for gram, count in counts.items()}
            )
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, max(0, len(words) - 1)
