"""NIST over several references, as mteval-v13a.pl, the E2E scripts with -p, and nltk have it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sacrebleu.metrics.base import Score, Signature
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from ..._version import __version__
from ...files import require
from .base import SummedMetric

READINGS = ("mteval", "pymteval", "nltk")


class NIST(SummedMetric):
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
        self.tokenizer = Tokenizer13a()

    def _preprocess_segment(self, sent: str) -> str:
        words = self.tokenizer(sent)  # before case: `&QUOT;` is no entity
        return words.lower() if self.lowercase else words

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"words": [self._split(ref) for ref in refs]}

    def _split(self, text: str) -> list[str]:
        return text.split() or ([""] if self.reading == "pymteval" else [])

    def _cache_references(self, references: Sequence[Sequence[str]]) -> list[Any]:
        cache = super()._cache_references(references)
        total: Counter[tuple[str, ...]] = Counter()
        for info in cache:
            for ref in info["words"]:
                for n in range(1, self.ORDER + 1):
                    total.update(ngrams(ref, n))
        total[()] = sum(len(ref) for info in cache for ref in info["words"])
        # log(x, 2), as nltk has it and not log2: its choice among equally good references hangs on the last bit.
        self.information = {gram: math.log(total[gram[:-1]] / count, 2) for gram, count in total.items() if gram}
        return cache

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        words = self._split(hypothesis)
        orders = range(1, self.ORDER + 1)
        of = self._nltk_statistics if self.reading == "nltk" else self._mteval_statistics
        counted = [[Counter(ngrams(ref, n)) for n in orders] for ref in ref_kwargs["words"]]
        return of(words, [Counter(ngrams(words, n)) for n in orders], ref_kwargs["words"], counted)

    def _gain(self, hypothesis: Counter, reference: Counter) -> float:
        return sum(self.information[gram] * count for gram, count in (hypothesis & reference).items())

    def _mteval_statistics(
        self, hypothesis: list[str], counts: list[Counter], words: Any, counted: Any
    ) -> list[float]:
        """Return information per order, n-grams per order, words of the hypothesis, of all references, references."""
        gains, totals = [], []
        fewest = 0 if self.reading == "mteval" else -self.ORDER
        for n, own in enumerate(counts):
            merged: Counter = Counter()
            for orders in counted:
                merged |= orders[n]
            gains.append(self._gain(own, merged))
            totals.append(max(fewest, len(hypothesis) - n))
        if self.reading == "pymteval":
            return [*gains, *totals, len(hypothesis), sum(map(len, words)) / len(words), 1, 1]
        return [*gains, *totals, len(hypothesis), sum(map(len, words)), sum(1 for ref in words if ref), 1]

    def _nltk_statistics(self, hypothesis: list[str], counts: list[Counter], words: Any, counted: Any) -> list[float]:
        """Return the same fields; lengths are those of the best reference, summed over orders as nltk does."""
        gains, totals, length = [], [], 0
        for n, own in enumerate(counts):
            total = sum(own.values())
            best = []
            for ref, orders in zip(words, counted, strict=True):
                gain = self._gain(own, orders[n])
                best.append((gain / total if total else 0, gain, total, len(ref)))
            _, gain, _, ref_length = max(best)
            gains.append(gain)
            totals.append(total)
            length += ref_length
        return [*gains, *totals, self.ORDER * len(hypothesis), length, 1, 1]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        gains, totals = stats[: self.ORDER], stats[self.ORDER : 2 * self.ORDER]
        length, ref_length, references, segments = stats[2 * self.ORDER :]
        known = (total > 0 or (total < 0 and self.reading == "pymteval") for total in totals)
        precision = sum(gain / total for gain, total, fine in zip(gains, totals, known, strict=True) if fine)
        ratio = length * references / (ref_length * segments) if ref_length > 0 else 0.0
        penalty = math.exp(-self.BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio >= 1)
        return Score("NIST", float(precision * penalty))


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of a text, in order."""
    return zip(*(words[i:] for i in range(n)), strict=False)
