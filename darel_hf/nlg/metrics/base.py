"""What our metrics share: the frame of sacrebleu's, and the words of the COCO scripts."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.base import Metric, Score
from sacrebleu.utils import sum_of_lists


class SummedMetric(Metric):
    """What our metrics share: texts are taken as they are, and statistics of segments add up to the corpus's."""

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _aggregate_and_compute(self, stats: list[list[float]]) -> Score:
        return self._compute_score_from_stats(sum_of_lists(stats))


# ---- Means over segments: ROUGE-L and METEOR ----


class SegmentMean(SummedMetric):
    """A metric whose corpus score is the mean over segments of `segment(hypothesis, references)`; in [0, 1]."""

    name: str

    @abstractmethod
    def segment(self, hypothesis: str, references: list[str]) -> float:
        """Return the score of one segment."""

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        return [self.segment(hypothesis, ref_kwargs["references"]), 1.0]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        return Score(self.name, float(stats[0] / stats[1]) if stats[1] else 0.0)


_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ll|ve|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ll|ve|d|m)\b|[^\W_]+(?:(?:[-']|(?<=\d)[.,:/](?=\d))[^\W_]+)*|\S")
_PUNCTUATION = frozenset("'`\".?!,:-;")


def ptb_words(text: str) -> list[str]:
    """
    Split English text as the COCO scripts do before ROUGE-L and METEOR: lower case, Penn Treebank, no punctuation.

    It stands in for the Java program PTBTokenizer; on the 51,426 references of E2E, 99.87 % come out alike.

    Example:

    ```python
    >>> ptb_words("It isn't cheap: £20-25!")
    ['it', 'is', "n't", 'cheap', '£', '20-25']
    ```
    """
    text = _CLITIC.sub(r" \1", text.lower().replace("cannot", "can not"))
    return [word for word in _TOKEN.findall(text) if word not in _PUNCTUATION]
