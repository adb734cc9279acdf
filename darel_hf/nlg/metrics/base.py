"""What our metrics share: the frame of sacrebleu's, with the statistics of all segments at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric, Score
from sacrebleu.utils import sum_of_lists

from .grams import Encoded
from .part import Part


class PartMetric(Metric):
    """A metric whose statistics come from a [`Part`]: all systems, and all of its segments, at a time."""

    @abstractmethod
    def statistics(self, part: Part) -> list[np.ndarray]:
        """Return for each system the statistics of every segment: `[segments, d]`."""

    # ---- sacrebleu's frame ----

    def _cache_references(self, references: Sequence[Sequence[str]]) -> list[list[str]]:
        groups = [[text for text in group if text is not None] for group in zip(*references, strict=True)]
        numbers = {len(group) for group in groups}
        self.num_refs = numbers.pop() if len(numbers) == 1 else -1
        return groups

    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]] | None
    ) -> list[list[float]]:
        groups = self._cache_references(references) if references else self._ref_cache
        return self.statistics(Part([hypotheses], groups))[0].tolist()

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        return self.statistics(Part([[hypothesis]], [ref_kwargs["references"]]))[0][0].tolist()


class SummedMetric(Metric):
    """What our metrics share: texts are taken as they are, and statistics of segments add up to the corpus's."""

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _aggregate_and_compute(self, stats: list[list[float]]) -> Score:
        return self._compute_score_from_stats(sum_of_lists(stats))


class CorpusMetric(PartMetric, SummedMetric):
    """A metric whose weights come from all references: parts are put into numbers apart, and scored together."""

    @abstractmethod
    def encode(self, part: Part) -> Encoded:
        """Return the words of a part as numbers."""

    @abstractmethod
    def statistics_of(self, encoded: Encoded) -> list[np.ndarray]:
        """Return for each system the statistics of every segment: `[segments, d]`."""

    def statistics(self, part: Part) -> list[np.ndarray]:
        return self.statistics_of(self.encode(part))


# ---- Means over segments: ROUGE-L, METEOR, CIDEr ----


class Mean(SummedMetric):
    """A metric whose corpus score is the mean of what segments score; statistics are that and 1."""

    name: str

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        return Score(self.name, float(stats[0] / stats[1]) if stats[1] else 0.0)


class SegmentMean(PartMetric, Mean):
    """One that scores segment by segment, from words; in [0, 1]."""

    @abstractmethod
    def words(self, part: Part) -> list[list[str]]:
        """Return the words of every text of a part."""

    @abstractmethod
    def segment(self, hypothesis: list[str], references: Sequence[list[str]]) -> float:
        """Return the score of one segment."""

    def statistics(self, part: Part) -> list[np.ndarray]:
        words = self.words(part)
        return [
            np.array([(self.segment(own, refs), 1.0) for own, refs in part.pairs(words, system)])
            for system in range(part.systems)
        ]
