"""ROUGE-L, and the words of the COCO scripts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import WORD, score

from darel_hf.nlg.metrics import (
    RougeL,
    lcs_length,
    ptb_words,
)


def lcs_oracle(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@given(st.lists(WORD, max_size=12), st.lists(WORD, max_size=12))
@settings(deadline=None)
def test_lcs(a, b):
    assert lcs_length(a, b) == lcs_oracle(a, b)


def test_rouge_by_hand():
    # The common subsequence has three words: precision 1, recall 1/2.
    expected = (1 + 1.44) * 0.5 / (0.5 + 1.44)
    assert score(RougeL(), ["The cat sat."], [["the cat on the mat sat"]]) == pytest.approx(expected)
    # Precision and recall are the best of any reference, not of the same.
    expected = (1 + 1.44) * 1 * 1 / (1 + 1.44)
    assert score(RougeL(), ["a b"], [["a b c d", "a"]]) == pytest.approx(expected)
    assert score(RougeL(), ["", "x"], [["a"], ["a", "b"]]) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Café's open, isn't it?", ["the", "café", "'s", "open", "is", "n't", "it"]),
        (
            "£20-25 (cheap); 3.5/5 family-friendly!",
            ["£", "20-25", "(", "cheap", ")", "3.5", "/", "5", "family-friendly"],
        ),
        ("You cannot 'go'. They'll see", ["you", "can", "not", "go", "they", "'ll", "see"]),
        ("  ", []),
    ],
)
def test_words(text, words):
    assert ptb_words(text) == words
