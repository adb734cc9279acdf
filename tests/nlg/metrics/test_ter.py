"""TER is sacrebleu's."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import TER
from sacrebleu.metrics.lib_ter import translation_edit_rate
from texts import CORPUS, WORD, columns, score

from darel_hf.nlg.metrics import (
    FastTER,
)
from darel_hf.nlg.metrics.ter import edits


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


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_long_texts_within_the_beam(data):
    """Where lengths differ, or texts are long, sacrebleu looks only near the diagonal; so does this."""
    word = st.sampled_from([f"w{i}" for i in range(data.draw(st.sampled_from([3, 12, 60])))])
    hypothesis = data.draw(st.lists(word, min_size=1, max_size=data.draw(st.sampled_from([8, 40, 90]))))
    reference = data.draw(st.lists(word, min_size=1, max_size=data.draw(st.sampled_from([8, 40, 90]))))
    if data.draw(st.booleans()):  # the reference, with a part moved far
        cut = data.draw(st.integers(0, len(reference)))
        hypothesis = reference[cut:] + hypothesis[:5] + reference[:cut]
    assert edits(hypothesis, reference) == translation_edit_rate(hypothesis, reference)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 130), (130, 2), (1, 200), (60, 110), (110, 60)])
def test_lengths_far_apart(n, m):
    draw = random.Random(n)
    for _ in range(3):
        hypothesis, reference = draw.choices("abcdefgh", k=n), draw.choices("abcdefgh", k=m)
        assert edits(hypothesis, reference) == translation_edit_rate(hypothesis, reference)[0]


@given(st.lists(WORD, max_size=8), st.lists(WORD, max_size=8), st.integers(0, 8))
@settings(deadline=None)
def test_what_is_enough_changes_no_minimum(hypothesis, reference, enough):
    exact = edits(hypothesis, reference)
    assert min(enough, edits(hypothesis, reference, 0, enough)) == min(enough, exact)
