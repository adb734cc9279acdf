"""TER is sacrebleu's."""

import pytest
from hypothesis import given, settings
from sacrebleu.metrics import TER
from texts import CORPUS, columns, score

from darel_hf.nlg.metrics import (
    FastTER,
)


def test_ter_by_hand():
    assert score(FastTER(), ["a b c e"], [["a b c d"]]) == 25.0  # one substitution of four
    assert score(FastTER(), ["b c a"], [["a b c"]]) == pytest.approx(100 / 3)  # one shift of three
    assert score(FastTER(), ["a b"], [["a b", "a b c d"]]) == 0.0
    assert score(FastTER(), ["x"], [["a b", "a b c d"]]) == pytest.approx(100 * 2 / 3)  # two edits, mean length three
    assert score(FastTER(), [""], [["a b"]]) == 100.0


@given(CORPUS)
@settings(deadline=None, max_examples=100)
def test_ter_is_sacrebleus(corpus):
    hypotheses, references = map(list, zip(*corpus, strict=True))
    fast, slow = FastTER(), TER()
    assert fast._extract_corpus_statistics(hypotheses, columns(references)) == slow._extract_corpus_statistics(
        hypotheses, columns(references)
    )
    assert score(fast, hypotheses, references) == score(slow, hypotheses, references)
