"""What our metrics share: the frame of sacrebleu's."""

from __future__ import annotations

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
