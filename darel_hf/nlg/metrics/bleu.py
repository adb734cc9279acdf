"""BLEU as the E2E scripts compute it with `-p`, which LoRA's paper and its followers report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.base import Score, Signature
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from ..._version import __version__
from .base import SummedMetric
from .nist import ngrams


class ScriptBLEU(SummedMetric):
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

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer13a()

    def _preprocess_segment(self, sent: str) -> str:
        return self.tokenizer(sent).lower()

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"words": [ref.split() or [""] for ref in refs]}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        """Return matches and n-grams per order, and the length of the closest reference (of two, the shorter)."""
        words, references = hypothesis.split() or [""], ref_kwargs["words"]
        matches = []
        for n in range(1, self.ORDER + 1):
            most: Counter = Counter()
            for ref in references:
                most |= Counter(ngrams(ref, n))
            matches.append((Counter(ngrams(words, n)) & most).total())
        closest = min((abs(len(ref) - len(words)), len(ref)) for ref in references)[1]
        return [*matches, *(len(words) - n for n in range(self.ORDER)), closest]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        matches, totals, reference = stats[: self.ORDER], stats[self.ORDER : -1], stats[-1]
        logs = [math.log(max(m, 1e-15) / max(t, 1e-9)) for m, t in zip(matches, totals, strict=True)]
        penalty = math.exp(1.0 - reference / (totals[0] or 1e-5)) if totals[0] <= reference else 1.0
        return Score("BLEU", 100 * penalty * math.exp(sum(logs) / self.ORDER))
