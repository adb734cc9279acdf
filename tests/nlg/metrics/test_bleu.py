"""BLEU and NIST of the `lora` protocol against an oracle written from their definitions."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import CORPUS, bleu_oracle, clipped, grams, score, words_of

from darel_hf import NLGMetrics
from darel_hf.nlg.metrics import NIST
from darel_hf.nlg.metrics.bleu import ScriptBLEU


def nist_oracle(corpus):
    everything, total = [ref for _, group in corpus for ref in group], 0.0
    seen = sum((grams(ref, n) for ref in everything for n in range(1, 6)), Counter())
    seen[()] = sum(map(len, everything))
    for n in range(1, 6):
        right = sum((Counter(clipped(*pair, n)) for pair in corpus), Counter())
        possible = sum(len(words) - n + 1 for words, _ in corpus)
        bits = sum(count * math.log2(seen[gram[:-1]] / seen[gram]) for gram, count in right.items() if count)
        total += bits / possible if possible else 0.0  # where the scripts divide by zero, nothing
    length = sum(len(words) for words, _ in corpus)
    ratio = min(1.0, length / sum(sum(map(len, group)) / len(group) for _, group in corpus))
    return total * 0.5 ** ((math.log(ratio) / math.log(2 / 3)) ** 2)


def agree(corpus):
    """Assert that both scores are the oracles', by class and by protocol."""
    hypotheses, references = map(list, zip(*corpus, strict=True))
    split = [(words_of(hypothesis), [words_of(ref) for ref in group]) for hypothesis, group in corpus]
    bleu, nist = bleu_oracle(split), nist_oracle(split)
    assert score(ScriptBLEU(), hypotheses, references) == pytest.approx(bleu, rel=1e-9, abs=1e-9)
    assert score(NIST(reading="pymteval"), hypotheses, references) == pytest.approx(nist, rel=1e-9, abs=1e-9)
    found = NLGMetrics("lora", only=("bleu", "nist"))(hypotheses, references)
    assert (found["bleu"], found["nist"]) == (pytest.approx(bleu, rel=1e-9, abs=1e-9), pytest.approx(nist, rel=1e-9))


NAMES = st.sampled_from(["The Eagle", "Café Zürich", "Fitzbillies", "The Rice Boat's", "the Wrestlers", "X&amp;Y"])
PARTS = st.sampled_from(
    [
        "is a family-friendly coffee shop",
        "serves cheap, British food",
        "(price range £20-25)",
        "isn't near Burger King",
        "has a 4.5 out of 5 rating",
        'is "highly" rated: 5 stars',
        "costs more than £30",
        "is n't kid friendly",
        "sells fish/chips at 1,000 m",
    ]
)
ENDS = st.sampled_from([".", "", "!", " .", "?"])
SENTENCE = st.builds(
    lambda name, parts, end: f"{name} {', '.join(parts)}{end}", NAMES, st.lists(PARTS, max_size=3), ENDS
)
E2E = st.lists(
    st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=8)),
    min_size=1, max_size=5,
)  # fmt: skip
SHORT = st.lists(st.sampled_from(["a", "b", "A"]), max_size=6).map(" ".join)
SHORTS = st.lists(st.tuples(SHORT, st.lists(SHORT.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=4)


@given(E2E)
@settings(deadline=None, max_examples=60)
def test_of_texts_like_those_of_e2e(corpus):
    agree(corpus)


@given(CORPUS)
@settings(deadline=None, max_examples=60)
def test_of_made_up_words(corpus):
    agree(corpus)


@given(SHORTS)
@settings(deadline=None, max_examples=100)
def test_of_texts_that_are_very_short_or_empty(corpus):
    """Where a text has fewer than n words, it takes n-grams off the others' count."""
    agree(corpus)


@given(E2E, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_what_does_not_matter(corpus, random):
    """The order of instances and of references, and upper case."""
    hypotheses, references = map(list, zip(*corpus, strict=True))
    mixed = [
        (hypothesis.upper().replace("&AMP;", "&amp;"), random.sample(group, len(group)))
        for hypothesis, group in corpus
    ]
    random.shuffle(mixed)
    others, other_references = map(list, zip(*mixed, strict=True))
    for make in (ScriptBLEU, lambda: NIST(reading="pymteval")):
        assert score(make(), others, other_references) == pytest.approx(
            score(make(), hypotheses, references), rel=1e-9
        )


def test_by_hand():
    """Four words of five right, in one run: precisions 4/5, 3/4, 2/3, 1/2, and the text is as long as a reference."""
    texts, references = ["a b c d x"], [["a b c d e", "y"]]
    assert score(ScriptBLEU(), texts, references) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # Six words in all, each once: log2(6) bits a word, none more for what follows; the mean reference has 3 words.
    assert score(NIST(reading="pymteval"), texts, references) == pytest.approx(4 / 5 * math.log2(6))
    # "a" alone has -1 pairs: 1 of 2 pairs becomes 1 of 1.
    assert score(ScriptBLEU(), ["a b c d e", "a"], [["a b c d e"], ["a"]]) > 100


def test_entities_are_read_before_case():
    """`&QUOT;` is no entity: texts are put in lower case as words."""
    for make in (ScriptBLEU, lambda: NIST(reading="pymteval"), NIST):
        upper, lower = (score(make(), [f"say {quote} to them"], [['say " to them']]) for quote in ("&QUOT;", "&quot;"))
        assert upper < lower
