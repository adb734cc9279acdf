"""NIST over several references, as mteval-v13a.pl, the E2E scripts with -p, and nltk have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Score, Signature

from ..._version import __version__
from ...files import require
from .base import CorpusMetric
from .grams import Encoded, Order, by_value, orders, sums
from .part import Part

READINGS = ("mteval", "pymteval", "nltk")


class NIST(CorpusMetric):
    """
    The NIST score over several references, on sacrebleu's frame.

    With h the hypotheses' and r the references' n-grams, and the information of an n-gram counted over all references

        info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn))            count() of nothing: all words
        NIST = sum over n = 1..5 of [sum over matches of info / number of h's n-grams] * exp(-beta * ln(L_h / L_r)^2)

    where matches are clipped by the largest count in any one reference, beta makes the penalty 0.5 at a length ratio
    of 2/3, and L_h / L_r is at most 1. Source: Doddington 2002, "Automatic evaluation of machine translation quality
    using n-gram co-occurrence statistics", and the script mteval-v13a.pl, whose L_r is the words of all references
    divided by the mean number of references per segment.

    Args:
        reading (`str`): `"mteval"`; `"pymteval"`, what the E2E scripts compute with `-p`: L_r is the sum of the
            segments' mean lengths, a text shorter than n words counts a negative number of n-grams, an empty one is
            one empty word; or `"nltk"`: `nltk.translate.nist_score.corpus_nist` takes the counts of the one reference
            with the highest precision, per segment and n-gram order. Where the latter two divide by zero (no n-grams
            in all), the order counts 0 here.
        lowercase (`bool`): compare in lower case.
    """

    ORDER = 5
    BETA = -math.log(0.5) / math.log(1.5) ** 2

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            by = {"mteval": "mteval-v13a", "pymteval": "e2e-metrics-p", "nltk": "nltk"}[args["reading"]]
            case = "lc" if args["lowercase"] else "mixed"
            self.info.update(reading=by, order=NIST.ORDER, case=case, tok="13a", version=f"darel_hf-{__version__}")

    _SIGNATURE_TYPE = _Signature

    def __init__(self, reading: str = "mteval", lowercase: bool = True):
        super().__init__()
        require(reading in READINGS, "reading", reading, f"give one of {', '.join(READINGS)}")
        self.reading = reading
        self.lowercase = lowercase

    def encode(self, part: Part) -> Encoded:
        words = part.script_words if self.lowercase else part.cased_words
        return part.encoded([text or [""] for text in words] if self.reading == "pymteval" else words)

    def statistics_of(self, encoded: Encoded) -> list[np.ndarray]:
        """Return information per order, n-grams per order, words of the text, of all references, references, 1."""
        refs, systems = encoded.references, int(encoded.system.max()) + 1
        words = encoded.lengths[refs].astype(np.int64)
        shorter = np.array([words.sum()], np.float64)  # how often what n-grams begin with is in references
        of = self._nltk_gains if self.reading == "nltk" else self._gains
        gains: list[list[Any]] = [[] for _ in range(systems)]
        for order in orders(encoded, self.ORDER, dense=True, places=True):
            cells = order.references
            counts = sums(cells.gram, cells.count, order.bound)
            prefix = order.prefix if order.n > 1 else np.zeros(order.bound, np.int64)
            ratio = np.divide(shorter[prefix], counts, out=np.ones(order.bound), where=counts > 0)
            # log(x, 2), as nltk has it and not log2: its choice among equally good references hangs on the last bit.
            information = by_value(ratio, lambda ratio: math.log(ratio, 2))
            for k, found in enumerate(gains):
                found.append(of(order, k, information))
            shorter = counts
        return [self._fields(encoded, k, words, gains[k]) for k in range(systems)]

    def _gains(self, order: Order, k: int, information: np.ndarray) -> np.ndarray:
        """Return the information that each text has in common with its references, clipped."""
        own = order.of(k)
        gain = information[own.gram] * order.clipped(own)
        return own.total(gain, len(order.encoded.lengths))[order.encoded.texts(k)]

    def _nltk_gains(self, order: Order, k: int, information: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same with the one reference that gives most for each n-gram, and the length of that one."""
        encoded, own = order.encoded, order.of(k)
        shared, refs = order.shared(own), encoded.references
        text = order.references.text[shared.reference]
        gain = information[own.gram[shared.own]] * shared.count
        gains = sums(text, gain, len(encoded.lengths))[refs]
        instance = encoded.instance[refs]
        total = encoded.counts(k, order.n)[instance]
        rate = np.divide(gains, total, out=np.zeros(len(refs)), where=total > 0)
        words = encoded.lengths[refs]
        last = np.append(encoded.groups[1:], len(refs)) - 1
        best = np.lexsort((words, gains, rate, instance))[last]
        return gains[best], words[best]

    def _fields(self, encoded: Encoded, k: int, words: np.ndarray, gains: list[Any]) -> np.ndarray:
        length, ones = encoded.counts(k, 1), np.ones(encoded.instances)
        if self.reading == "nltk":  # lengths are those of the best reference, summed over orders
            totals = [encoded.counts(k, n) for n in range(1, self.ORDER + 1)]
            best = sum(ref_length.astype(np.int64) for _, ref_length in gains)
            return np.stack([*(gain for gain, _ in gains), *totals, self.ORDER * length, best, ones, ones], axis=1)
        references = np.add.reduceat(words, encoded.groups)
        if self.reading == "pymteval":
            totals = [length - n for n in range(self.ORDER)]
            mean = references / np.diff(np.append(encoded.groups, len(words)))
            return np.stack([*gains, *totals, length, mean, ones, ones], axis=1)
        totals = [encoded.counts(k, n) for n in range(1, self.ORDER + 1)]
        numbers = np.add.reduceat((words > 0).astype(np.int64), encoded.groups)
        return np.stack([*gains, *totals, length, references, numbers, ones], axis=1)

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        gains, totals = stats[: self.ORDER], stats[self.ORDER : 2 * self.ORDER]
        length, ref_length, references, segments = stats[2 * self.ORDER :]
        known = (total > 0 or (total < 0 and self.reading == "pymteval") for total in totals)
        precision = sum(gain / total for gain, total, fine in zip(gains, totals, known, strict=True) if fine)
        ratio = length * references / (ref_length * segments) if ref_length > 0 else 0.0
        penalty = math.exp(-self.BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio >= 1)
        return Score("NIST", float(precision * penalty))
