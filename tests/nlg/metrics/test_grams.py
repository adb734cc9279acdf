"""What is counted on arrays: sacrebleu's and nltk's scores to the last digit, however texts are cut up."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from texts import columns

from darel_hf.nlg.metrics import NLGMetrics, grams, meteor, suite
from darel_hf.nlg.texts import read_references

E2E = Path(__file__).parents[4] / "shared" / "data" / "e2e_nlg" / "devset.csv"

# Few words, so that much is in common; odd ones among them.
USUAL = [
    "the",
    "The",
    "inn",
    "cat",
    "cats",
    "running",
    "runs",
    "auto",
    "car",
    "a",
    "b",
    "(hi)",
    "isn't",
    "can't",
    "3.5",
]
ODD = ["&QUOT;", "&amp;", "<skipped>", "£20-25", "...", "x-", "--", "ΑΣ.", "İ", "Café", "日本語", "\ud800", "😀"]
WORDS = st.sampled_from(USUAL + ODD)
SEPARATOR = st.sampled_from([" ", " ", "  ", "", "\t", "\u00a0", "\n"])
TEXT = st.lists(st.tuples(WORDS, SEPARATOR), max_size=14).map(lambda parts: "".join(map("".join, parts)))
INSTANCE = st.tuples(TEXT, TEXT, st.lists(TEXT.filter(str.strip), min_size=1, max_size=4))
CORPUS = st.lists(INSTANCE, min_size=1, max_size=6)
SYNONYMS = {"auto": ["car", "motor_car", "auto"], "cat": ["guy", "cats"], "inn": ["hostel"], "a": ["b", "the"]}


class WordNet:
    """The part of WordNet that nltk's METEOR asks for, with a few synonyms."""

    get_version = str

    @staticmethod
    def synsets(word):
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in SYNONYMS.get(word, [])]
        return [SimpleNamespace(lemmas=lambda: lemmas)]


@pytest.fixture(autouse=True)
def synonyms(monkeypatch):
    monkeypatch.setattr(meteor, "open_wordnet", lambda folder: WordNet)
    meteor._synonyms.cache_clear()
    yield
    meteor._synonyms.cache_clear()


def instances(corpus):
    one, other, references = map(list, zip(*corpus, strict=True))
    return {"one": one, "other": other}, references


def evaluated(corpus, **settings_):
    systems, references = instances(corpus)
    metrics = NLGMetrics(wordnet="none", processes=1, only=[*NAMES, "nist", "cider"], **settings_)
    metrics.metrics["meteor"] = meteor.METEOR("few synonyms")
    return metrics.evaluate(systems, references)


def scores(evaluation):
    return {name: [evaluation._each(name, system)[0] for system in evaluation.systems] for name in evaluation.metrics}


NAMES = {"bleu": BLEU(lowercase=True), "ter": TER(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "meteor": None}


@given(CORPUS)
@example([("a b", "", ["b", "a b"]), ("\ud800", "x", ["\ud800", "x y z x y z x"])])
@settings(deadline=None, max_examples=60)
def test_the_libraries_scores_to_the_last_digit(corpus):
    systems, references = instances(corpus)
    found, words = scores(evaluated(corpus)), Tokenizer13a()
    for k, texts in enumerate(systems.values()):
        for name, metric in NAMES.items():
            if metric is not None:
                assert found[name][k] == metric.corpus_score(texts, columns(references)).score
        expected = [
            meteor_score(
                [words(ref.lower().rstrip()).split() for ref in group],
                words(text.lower().rstrip()).split(),
                wordnet=WordNet,
            )
            for text, group in zip(texts, references, strict=True)
        ]
        assert found["meteor"][k] == sum(expected) / len(expected)


@pytest.mark.skipif(not E2E.exists(), reason="needs the E2E development set")
def test_the_libraries_scores_of_real_texts():
    """References permuted, and each first one against the others."""
    references = [instance.texts for instance in read_references(E2E)][:20]
    permuted = [group[0] for group in references]
    random.Random(0).shuffle(permuted)
    others = [group[1:] or group for group in references]
    for texts, groups in ((permuted, references), ([group[0] for group in references], others)):
        found = NLGMetrics(only=["bleu", "ter", "chrf", "chrf++"], processes=1)(texts, groups)
        for name in ("bleu", "ter", "chrf", "chrf++"):
            assert found[name] == NAMES[name].corpus_score(texts, columns(groups)).score


@pytest.mark.parametrize("protocol", ["e2e", "paper", "lora"])
@given(corpus=CORPUS, size=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_how_texts_are_cut_up_does_not_matter(protocol, corpus, size):
    """In parts of a few instances, and with numbers of n-grams that get too large at once, all is the same."""
    whole = evaluated(corpus, protocol=protocol)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_PART", size)
        patch.setattr(grams, "_LIMIT", 100)
        parts = evaluated(corpus, protocol=protocol)
    assert scores(parts) == scores(whole)
    assert parts.result == whole.result


@given(CORPUS)
@settings(deadline=None, max_examples=15)
def test_systems_do_not_touch_each_other(corpus):
    """A system has the scores, and the words, that it has alone."""
    both = evaluated(corpus)
    alone = evaluated([(other, other, group) for _, other, group in corpus])
    assert {name: found[1] for name, found in scores(both).items()} == {
        name: found[1] for name, found in scores(alone).items()
    }
    assert both.described["other"] == alone.described["one"]
