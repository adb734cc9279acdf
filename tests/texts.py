"""Made-up texts, and scores of them, that the tests of metrics share."""

from hypothesis import strategies as st


def columns(references):
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


def score(metric, hypotheses, references):
    return metric.corpus_score(hypotheses, columns(references)).score


WORD = st.sampled_from(["a", "b", "c", "d", "e"])


TEXT = st.lists(WORD, min_size=1, max_size=9).map(" ".join)


CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=6)
