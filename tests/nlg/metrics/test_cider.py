"""CIDEr against its definition, written out slowly."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from texts import CORPUS, score

from darel_hf.nlg.metrics import CIDEr


def cider_twin(hypotheses, references):
    """Score as the definition says, with vectors over all n-grams."""

    def counts(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        for reference in group:
            gap = sum(counts(hypothesis, 2).values()) - sum(counts(reference, 2).values())
            for n in range(1, 5):
                have = Counter(gram for others in references for gram in set().union(*(counts(o, n) for o in others)))
                a, b = (
                    {gram: k * (math.log(len(references)) - math.log(max(1, have[gram]))) for gram, k in found.items()}
                    for found in (counts(hypothesis, n), counts(reference, n))
                )
                dot = sum(min(a[g], b.get(g, 0.0)) * b.get(g, 0.0) for g in a)
                norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
                cosine = dot / norms if norms else dot
                total += 10 * cosine * math.exp(-(gap**2) / 72) / 4 / len(group)
    return total / len(hypotheses)


@given(CORPUS)
@settings(deadline=None, max_examples=80)
def test_cider_is_its_definition(corpus):
    hypotheses, references = map(list, zip(*corpus, strict=True))
    assert score(CIDEr(), hypotheses, references) == pytest.approx(cider_twin(hypotheses, references), abs=1e-9)


def test_cider_by_hand():
    # Every n-gram is in one of two instances: all weigh log 2, so equal texts have cosine 1 for each order they reach.
    assert score(CIDEr(), ["a b c d", "x"], [["a b c d"], ["y z"]]) == pytest.approx(10 / 2)
    assert score(CIDEr(), ["a b", "x"], [["a b"], ["y z"]]) == pytest.approx(10 * 2 / 4 / 2)
    assert score(CIDEr(), ["a b c d"], [["a b c d"]]) == 0.0  # of one instance nothing is rare
