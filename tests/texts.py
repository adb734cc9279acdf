"""Made-up texts, and scores of them, that the tests of metrics share."""

import math
from collections import Counter

from hypothesis import strategies as st


def columns(references):
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


def score(metric, hypotheses, references):
    return metric.corpus_score(hypotheses, columns(references)).score


WORD = st.sampled_from(["a", "b", "c", "d", "e"])


TEXT = st.lists(WORD, min_size=1, max_size=9).map(" ".join)


CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=6)


ENTITIES = {"&quot;": '"', "&lt;": "<", "&gt;": ">", "&amp;": "&"}


def words_of(text):
    """Symbols are words, but for `'`; a stop or comma is unless it is between digits, a dash after a digit."""
    for entity in ("&quot;", "&amp;", "&lt;", "&gt;"):
        text = text.replace(entity, ENTITIES[entity])
    spaced, padded = "", f" {text} "
    for before, here, after in zip(padded, padded[1:], padded[2:], strict=False):
        before_digit, after_digit = before in "0123456789", after in "0123456789"
        alone = here in '!"#$%&()*+/:;<=>?@[\\]^_`{|}~' or (here in ".," and not (before_digit and after_digit))
        spaced += f" {here} " if alone or (here == "-" and before_digit) else here
    return spaced.lower().split() or [""]  # an empty text is one empty word


def grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def clipped(hypothesis, references, n):
    """How often each n-gram counts: as often as it is there, and in that reference that has most of it."""
    own = grams(hypothesis, n)
    return {gram: min(count, max(grams(ref, n)[gram] for ref in references)) for gram, count in own.items()}


def bleu_oracle(corpus):
    """BLEU of pairs of words and lists of references' words, times 100, as the E2E scripts have it with `-p`."""
    logs, length, closest = 0.0, sum(len(words) for words, _ in corpus), 0
    for n in range(1, 5):
        right = sum(sum(clipped(*pair, n).values()) for pair in corpus)
        possible = sum(len(words) - n + 1 for words, _ in corpus)  # below zero for texts that are that short
        logs += math.log(max(right, 1e-15)) - math.log(max(possible, 1e-9))
    for words, references in corpus:
        closest += sorted((abs(len(ref) - len(words)), len(ref)) for ref in references)[0][1]
    return 100 * math.exp(logs / 4 + min(0.0, 1 - closest / length))
