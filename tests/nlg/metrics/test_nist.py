"""NIST against an oracle of mteval-v13a.pl, and against nltk."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from nltk.translate.nist_score import corpus_nist
from texts import CORPUS, score

from darel_hf.nlg.metrics import (
    NIST,
)


def nist_oracle(hypotheses, references, order=5):
    """Score as mteval-v13a.pl does, in the order of its subroutines, on words split at spaces."""

    def grams(words, n):
        return Counter(zip(*[words[i:] for i in range(n)], strict=False))

    everything = [ref.split() for group in references for ref in group]
    count = Counter(gram for ref in everything for n in range(1, order + 1) for gram in grams(ref, n).elements())
    total = sum(map(len, everything))
    info = {g: math.log2((count[g[:-1]] if len(g) > 1 else total) / c) for g, c in count.items()}
    result = 0.0
    for n in range(1, order + 1):
        gained = possible = 0.0
        for hypothesis, group in zip(hypotheses, references, strict=True):
            own = grams(hypothesis.split(), n)
            possible += sum(own.values())
            for gram, times in own.items():
                gained += min(times, max(grams(ref.split(), n)[gram] for ref in group)) * info.get(gram, 0.0)
        result += gained / max(possible, 1)
    mean_references = sum(map(len, references)) / len(references)
    ratio = sum(len(h.split()) for h in hypotheses) / (total / mean_references)
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return result * (1 if ratio >= 1 else math.exp(-beta * math.log(ratio) ** 2))


def test_nist_by_hand():
    # Three words, each once: log2(3) a unigram, no bigram tells more; two words for three cost half.
    assert score(NIST(), ["a b"], [["a b c"]]) == pytest.approx(0.5 * math.log2(3), abs=1e-12)
    # Counts of five words: a 3, b 1, c 1; `a b` once among three a; 3 words for a mean of 2.5: no penalty.
    expected = (2 * math.log2(5 / 3) + math.log2(5)) / 3 + math.log2(3) / 2
    assert score(NIST(), ["a a b"], [["a b", "a c a"]]) == pytest.approx(expected, abs=1e-12)


def test_nist_of_odd_texts():
    assert score(NIST(), ["", "a"], [["a"], ["a", "b", "c d"]]) > 0
    assert score(NIST(), [""], [["a"]]) == 0.0
    assert score(NIST(), ["x"], [["a"]]) == 0.0
    assert score(NIST(), ["CAFÉ über £5"], [["Café Über £5"]]) == pytest.approx(math.log2(3), abs=1e-12)


@given(CORPUS)
@settings(deadline=None, max_examples=60)
def test_nist_is_that_of_mteval(corpus):
    hypotheses, references = map(list, zip(*corpus, strict=True))
    assert score(NIST(), hypotheses, references) == pytest.approx(nist_oracle(hypotheses, references), abs=1e-9)


@given(CORPUS)
@settings(deadline=None, max_examples=60)
def test_nist_by_nltk_is_nltks(corpus):
    hypotheses, references = map(list, zip(*corpus, strict=True))
    hypotheses[0] = "a b c d e a"  # nltk divides by zero where no hypothesis has five words
    expected = corpus_nist([[ref.split() for ref in group] for group in references], [h.split() for h in hypotheses])
    assert score(NIST(reading="nltk"), hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_nist_by_nltk_of_short_texts():
    with pytest.raises(ZeroDivisionError):
        corpus_nist([[["a", "b"]]], [["a", "b"]])
    assert score(NIST(reading="nltk"), ["a b"], [["a b"]]) == pytest.approx(1.0)  # two words of one bit
