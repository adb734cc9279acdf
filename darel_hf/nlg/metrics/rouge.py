"""ROUGE-L as the COCO and E2E scripts have it."""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics.base import Signature

from ..._version import __version__
from .base import SegmentMean
from .part import Part


class RougeL(SegmentMean):
    """
    ROUGE-L as in the COCO and E2E scripts: F with beta 1.2 of the longest common subsequence (LCS).

    Precision and recall are each the best over the references. Source: Lin and Och 2004.
    """

    name = "ROUGE-L"
    BETA = 1.2

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(impl="coco", beta=RougeL.BETA, case="lc", tok="ptb", punct="no")
            self.info["version"] = f"darel_hf-{__version__}"

    _SIGNATURE_TYPE = _Signature

    def words(self, part: Part) -> list[list[str]]:
        """Return the words; a text without any has one, the empty word, as where the scripts split at blanks."""
        return [words or [""] for words in part.ptb]

    def segment(self, hypothesis: list[str], references: Sequence[list[str]]) -> float:
        precision = recall = 0.0
        for ref in references:
            common = lcs_length(hypothesis, ref)
            precision = max(precision, common / max(1, len(hypothesis)))
            recall = max(recall, common / max(1, len(ref)))
        if precision == 0 or recall == 0:
            return 0.0
        return (1 + self.BETA**2) * precision * recall / (recall + self.BETA**2 * precision)


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel rows (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matched = row & where.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()
