"""BLEU: sacrebleu's, and as the E2E scripts compute it with `-p`, which LoRA's paper and its followers report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Score, Signature

from ..._version import __version__
from .base import PartMetric, SummedMetric
from .grams import Encoded, orders, sums
from .part import Part


class FastBLEU(PartMetric, BLEU):
    """sacrebleu's BLEU with its default tokenizer, in lower case, to the last digit; counts are made on arrays."""

    def __init__(self) -> None:
        super().__init__(lowercase=True, tokenize="13a")

    def statistics(self, part: Part) -> list[np.ndarray]:
        """Return the lengths of each text and of the closest reference, matches and n-grams per order."""
        encoded = part.encoded(part.words)
        matched = matches(encoded, part.systems, self.max_ngram_order)
        found = []
        for k in range(part.systems):
            totals = [encoded.counts(k, n) for n in range(1, self.max_ngram_order + 1)]
            found.append(np.stack([encoded.counts(k, 1), encoded.closest(k), *matched[k], *totals], axis=1))
        return found


class ScriptBLEU(PartMetric, SummedMetric):
    """
    BLEU of `measure_scores.py -p` in github.com/tuetschek/e2e-metrics, times 100.

    It differs from sacrebleu's and mteval-v13a's where texts are shorter than four words: those count a negative
    number of n-grams, an empty one is one empty word, and where nothing matches, a count is 1e-15, not smoothed.
    """

    ORDER = 4

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(case="lc", tok="13a", smooth="1e-15", impl="e2e-metrics-p")
            self.info["version"] = f"darel_hf-{__version__}"

    _SIGNATURE_TYPE = _Signature

    def statistics(self, part: Part) -> list[np.ndarray]:
        """Return matches and n-grams per order, and the length of the closest reference (of two, the shorter)."""
        encoded = part.encoded([words or [""] for words in part.script_words])
        matched = matches(encoded, part.systems, self.ORDER)
        found = []
        for k in range(part.systems):
            totals = [encoded.counts(k, 1) - n for n in range(self.ORDER)]
            found.append(np.stack([*matched[k], *totals, encoded.closest(k)], axis=1))
        return found

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        matches, totals, reference = stats[: self.ORDER], stats[self.ORDER : -1], stats[-1]
        logs = [math.log(max(m, 1e-15) / max(t, 1e-9)) for m, t in zip(matches, totals, strict=True)]
        penalty = math.exp(1.0 - reference / (totals[0] or 1e-5)) if totals[0] <= reference else 1.0
        return Score("BLEU", 100 * penalty * math.exp(sum(logs) / self.ORDER))


def matches(encoded: Encoded, systems: int, most: int) -> list[list[np.ndarray]]:
    """Return for each system and order how many n-grams of each text are in a reference, clipped."""
    found: list[list[np.ndarray]] = [[] for _ in range(systems)]
    for order in orders(encoded, most):
        for k, of_system in enumerate(found):
            own = order.of(k)
            of_system.append(sums(encoded.instance[own.text], order.clipped(own), encoded.instances).astype(np.int64))
    return found
