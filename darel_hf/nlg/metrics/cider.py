"""CIDEr as the COCO and E2E scripts have it."""

from __future__ import annotations

import math

import numpy as np
from sacrebleu.metrics.base import Signature

from ..._version import __version__
from .base import CorpusMetric, Mean
from .grams import REFERENCE, Cells, Encoded, Order, by_value, distinct_of, orders, sums
from .part import Part


class CIDEr(CorpusMetric, Mean):
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

    def encode(self, part: Part) -> Encoded:
        return part.encoded(part.ptb)

    def statistics_of(self, encoded: Encoded) -> list[np.ndarray]:
        refs, systems = encoded.references, int(encoded.system.max()) + 1
        instance = encoded.instance[refs]
        # A text's length is the number of its pairs of words.
        lengths = [encoded.counts(k, 2) for k in range(systems)]
        gaps = [length[instance] - encoded.counts(REFERENCE, 2) for length in lengths]
        penalties = [by_value(gap, lambda gap: math.exp(-(gap**2) / (2 * self.SIGMA**2))) for gap in gaps]
        totals = np.zeros((systems, self.ORDER, encoded.instances))
        for order in orders(encoded, self.ORDER, dense=True, places=True):
            rare = math.log(encoded.instances) - by_value(self._frequency(order), math.log)
            theirs = order.references
            their_weights = theirs.count * rare[theirs.gram]
            norms = _norms(encoded, theirs, their_weights)
            for k in range(systems):
                own = order.of(k)
                weights = own.count * rare[own.gram]
                shared = order.shared(own)
                mine, their = weights[shared.own], their_weights[shared.reference]
                text = theirs.text[shared.reference]
                value = sums(text, np.minimum(mine, their) * their, len(encoded.lengths))[refs]
                both = _norms(encoded, own, weights)[encoded.texts(k)][instance] * norms[refs]
                value = np.divide(value, both, out=value, where=both != 0)
                totals[k, order.n - 1] = sums(instance, value * penalties[k], encoded.instances)
        numbers = np.bincount(instance)
        return [np.stack([10 * sum(total) / self.ORDER / numbers, np.ones(len(numbers))], axis=1) for total in totals]

    def _frequency(self, order: Order) -> np.ndarray:
        """Return for each n-gram in how many instances a reference has it; what none has weighs as what one has."""
        cells = order.references
        seen = distinct_of(order.encoded.instance[cells.text].astype(np.int64) * order.bound + cells.gram)
        return np.maximum(np.bincount(seen % order.bound, minlength=order.bound), 1)


def _norms(encoded: Encoded, cells: Cells, weights: np.ndarray) -> np.ndarray:
    """Return the norm of every text's weights."""
    return np.sqrt(cells.total(weights**2, len(encoded.lengths)))
