"""Metrics against vectors worked by hand, independent implementations, and what the official scripts print."""

import csv
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.nist_score import corpus_nist
from sacrebleu.metrics import BLEU, TER
from sacrebleu.significance import PairedTest

from darel_hf.metrics import (
    METEOR,
    NIST,
    FastTER,
    JavaMETEOR,
    NLGMetrics,
    RougeL,
    find_wordnet,
    lcs_length,
    paired_p_value,
    ptb_words,
)

E2E = Path(__file__).parents[2] / "shared" / "data" / "e2e_nlg" / "testset_w_refs.csv"
JARS = [Path("/usr/share/java/meteor-1.5.jar"), Path.home() / "meteor-1.5" / "meteor-1.5.jar"]


def columns(references):
    most = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(most)]


def score(metric, hypotheses, references):
    return metric.corpus_score(hypotheses, columns(references)).score


WORD = st.sampled_from(["a", "b", "c", "d", "e"])
TEXT = st.lists(WORD, min_size=1, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=6)


# ---- NIST ----


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


# ---- TER ----


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


# ---- ROUGE-L ----


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
        ("£20-25 (cheap); 3.5/5 family-friendly!", ["£", "20-25", "(", "cheap", ")", "3.5/5", "family-friendly"]),
        ("You cannot 'go'. They'll see", ["you", "can", "not", "go", "they", "'ll", "see"]),
        ("  ", []),
    ],
)
def test_words(text, words):
    assert ptb_words(text) == words


# ---- METEOR ----


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """Write a WordNet with one synset, `car` and `auto`, in the layout of Princeton's files."""
    folder = tmp_path_factory.mktemp("wordnet")
    for pos, name in {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}.items():
        (folder / f"{name}.exc").write_text("")
        data = "  1 WordNet 3.0 Copyright of this little file\n"
        index = ""
        if pos == "n":
            offset = len(data)
            data += f"{offset:08d} 06 n 02 car 0 auto 0 000 | a vehicle\n"
            index = "".join(f"{word} n 1 0 1 1 {offset:08d}  \n" for word in ("auto", "car"))
        (folder / f"data.{name}").write_text(data)
        (folder / f"index.{name}").write_text(index)
    return folder


def test_meteor_by_hand(wordnet):
    exact = METEOR(None)
    assert score(exact, ["the cat sat"], [["the cat sat"]]) == pytest.approx(1 - 0.5 / 27)  # one chunk of three words
    # Two chunks of two words: the penalty is 0.5; the better reference counts.
    assert score(exact, ["b a"], [["a b", "x"]]) == pytest.approx(0.5)
    # Precision 1, recall 1/2: F = 0.5 / (0.9 + 0.05); one chunk of one word costs half. The stems agree.
    assert score(exact, ["cats"], [["cat food"]]) == pytest.approx(0.5 * 0.5 / 0.95)
    assert score(exact, ["", "auto"], [["a", "b"], ["car"]]) == 0.0
    assert score(METEOR(str(wordnet)), ["auto"], [["car"]]) == pytest.approx(0.5)


def test_meteors_signature_says_what_it_matches(wordnet):
    def signature(where):
        return NLGMetrics(wordnet=where)(["auto"], [["car"]])["signatures"]["meteor"]

    assert "impl:nltk|match:exact,stem,wordnet3.0" in signature(wordnet)
    assert "impl:nltk|match:exact,stem|" in signature("none")


def test_wordnet_must_be_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"wordnet=.*no WordNet there"):
        find_wordnet(tmp_path)
    monkeypatch.setattr("darel_hf.metrics.DEBIAN_WORDNET", str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    scores = NLGMetrics()(["a b"], [["a b"]])
    assert scores["meteor"] is None and "nltk.downloader wordnet" in scores["notes"][0]
    assert scores["ter"] == 0.0


def test_damaged_wordnet(tmp_path):
    for name in ("data.noun", "index.noun", "data.adj"):
        (tmp_path / name).write_text("garbage\n")
    with pytest.raises(ValueError, match=r"wordnet=.*cannot be read"):
        NLGMetrics(wordnet=tmp_path)


def test_wordnet_unpacked_in_nltks_data(wordnet, tmp_path, monkeypatch):
    shutil.copytree(wordnet, tmp_path / "corpora" / "wordnet")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    assert find_wordnet() == find_wordnet("nltk") == "nltk"


def test_debians_layout_has_no_list_of_names(wordnet):
    assert not (wordnet / "lexnames").exists()
    assert find_wordnet(wordnet) == str(wordnet)


@pytest.mark.skipif(
    not (shutil.which("java") and any(path.exists() for path in JARS)), reason="needs Java and meteor-1.5.jar"
)
def test_meteor_by_java():
    jar = next(path for path in JARS if path.exists())
    whole = score(JavaMETEOR(jar), ["the cat sat on the mat"], [["the cat sat on the mat"]])
    assert whole == 1.0


@pytest.mark.parametrize("answer", ["", "oops", "1 2 3"])
def test_a_jar_that_is_no_meteor(tmp_path, monkeypatch, answer):
    """A program that answers anything else is found out before anything is scored."""
    (tmp_path / "java").write_text(f"#!/bin/sh\nwhile read line; do echo '{answer}'; done\n")
    (tmp_path / "java").chmod(0o755)
    (tmp_path / "m.jar").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match=r"meteor_jar=.*(no answer|not Meteor)"):
        NLGMetrics(meteor_jar=tmp_path / "m.jar")


def test_a_missing_jar_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"meteor_jar=.*no such file"):
        NLGMetrics(meteor_jar=tmp_path / "meteor-1.5.jar")
    with pytest.raises(ValueError, match="paper protocol"):
        NLGMetrics("paper", meteor_jar=tmp_path / "meteor-1.5.jar")


# ---- All together ----


def made_up(n, seed=0):
    draw = random.Random(seed)
    words = ["the", "inn", "serves", "cheap", "food", "near", "a", "quiet", "river", "and", "families", "like", "it"]

    def text():
        return " ".join(draw.choices(words, k=draw.randint(4, 12)))

    references = [[text() for _ in range(draw.randint(1, 4))] for _ in range(n)]
    hypotheses = [draw.choice([group[0], text()]) for group in references]
    return hypotheses, references, [text() for _ in range(n)]


def test_scores_are_sacrebleus_and_parallel_ones_the_same():
    hypotheses, references, _ = made_up(40)
    one = NLGMetrics(wordnet="none", processes=1)(hypotheses, references)
    two = NLGMetrics(wordnet="none", processes=2)(hypotheses, references)
    assert one == two
    assert one["bleu"] == BLEU(lowercase=True).corpus_score(hypotheses, columns(references)).score
    assert one["ter"] == TER().corpus_score(hypotheses, columns(references)).score
    assert one["signatures"]["bleu"].startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_by_hand():
    scores = NLGMetrics(wordnet="none", only=("bleu",))(["The cat sat on mats"], [["the cat sat on the mat"]])
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; five words for six.
    expected = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scores["bleu"] == pytest.approx(expected)
    assert scores["ter"] is None and scores["n"] == 1
    assert "nrefs:1" in scores["signatures"]["bleu"]


def test_the_order_of_references_does_not_matter():
    hypotheses, references, _ = made_up(20)
    turned = [group[::-1] for group in references]
    metrics = NLGMetrics(wordnet="none")
    first, second = metrics(hypotheses, references), metrics(hypotheses, turned)
    assert all(first[name] == pytest.approx(second[name], abs=1e-9) for name in metrics.metrics)


def test_protocols_say_which_they_are():
    hypotheses, references, _ = made_up(10)
    e2e = NLGMetrics("e2e", wordnet="none")(hypotheses, references)
    paper = NLGMetrics("paper", wordnet="none")(hypotheses, references)
    assert (e2e["protocol"], paper["protocol"]) == ("e2e", "paper")
    assert "reading:mteval-v13a" in e2e["signatures"]["nist"] and "case:lc" in e2e["signatures"]["nist"]
    assert "reading:nltk" in paper["signatures"]["nist"] and "case:mixed" in paper["signatures"]["nist"]
    assert e2e["nist"] != paper["nist"]


def test_intervals_are_sacrebleus():
    hypotheses, references, baseline = made_up(60)
    ours = NLGMetrics(wordnet="none", bootstrap=1000, only=("bleu", "ter"))(hypotheses, references, baseline)
    systems = [("baseline", baseline), ("ours", hypotheses)]
    metrics = {"BLEU": BLEU(lowercase=True), "TER": TER()}
    _, theirs = PairedTest(systems, metrics, columns(references), test_type="bs", n_samples=1000)()
    for name in ("bleu", "ter"):
        expected = theirs[name.upper()][1]
        low, high = ours["intervals"][name]
        assert (high - low) / 2 == pytest.approx(expected.ci, rel=0.02)
        assert low < ours[name] < high
        assert ours["p_values"][name] == expected.p_value == 1 / 1001  # the systems differ beyond doubt
    assert "bs:1000|seed:12345" in ours["signatures"]["bleu"]


def test_p_values_are_those_of_chance():
    """Where there is no difference, p-values are uniform: five per cent of them lie below 0.05."""
    draw = np.random.default_rng(0)
    values = np.array([paired_p_value(draw.normal(shift, 1, 500), shift) for shift in draw.normal(size=1000)])
    for level in (0.05, 0.1, 0.5):
        assert np.mean(values <= level) == pytest.approx(level, abs=0.04)


def test_a_system_does_not_differ_from_itself():
    hypotheses, references, _ = made_up(30)
    scores = NLGMetrics(wordnet="none", bootstrap=200)(hypotheses, references, hypotheses)
    assert set(scores["p_values"].values()) == {1.0}
    assert all(scores["baseline"][name] == scores[name] for name in scores["p_values"])
    one = NLGMetrics(wordnet="none", bootstrap=200)(["a b"], [["a b"]], ["c"])  # nothing can be said of one instance
    assert set(one["p_values"].values()) == {1.0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "references for 2 instances, and 1 predictions; number 2 of the references"),
        (["a", "b"], [["a"]], "number 2 of the predictions has no counterpart"),
        ([], [], "nothing to score"),
        (["a"], [[]], "instance 1 has no reference"),
        (["a"], [["", " "]], "instance 1 has no reference"),
        (["a"], [[3]], "instance 1 has no reference, or one that is no text"),
        ([None], [["a"]], "number 1 is no text"),
        ("a", [["a"]], "list of texts"),
    ],
)
def test_bad_texts(predictions, references, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NLGMetrics(wordnet="none")(predictions, references)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"protocol": "mt"}, "protocol='mt'"),
        ({"bootstrap": -1}, "bootstrap=-1"),
        ({"processes": 0}, "processes=0"),
        ({"only": ("rouge",)}, "only="),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        NLGMetrics(wordnet="none", **keywords)
    with pytest.raises(ValueError, match="bootstrap=0"):
        NLGMetrics(wordnet="none")(["a"], [["a"]], ["b"])


# ---- What the official scripts print ----


@pytest.mark.skipif(not E2E.exists(), reason="needs the E2E test set")
@pytest.mark.parametrize(
    ("system", "bleu", "nist", "rouge"),
    [
        # From mteval-v13a-sig.pl (Perl) and rouge.py with the Java tokenizer, of github.com/tuetschek/e2e-metrics.
        ("copies the first reference", 1.0000, 14.2365, 1.0),
        ("permutes the first references", 0.1653, 3.5637, 0.3270134999581779),
        ("first reference against the others", 0.6046, 8.9029, 0.6381129068662674),
    ],
)
def test_anchors_on_e2e(system, bleu, nist, rouge):
    groups = {}
    with open(E2E, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["mr"], []).append(row["ref"])
    references = list(groups.values())
    assert (len(references), sum(map(len, references))) == (630, 4693)
    predictions = [group[0] for group in references]
    if system.startswith("permutes"):
        random.Random(0).shuffle(predictions)
    if system.endswith("others"):
        predictions = [group[0] for group in references if len(group) > 1]
        references = [group[1:] for group in references if len(group) > 1]
    scores = NLGMetrics(wordnet="none", only=("bleu", "nist", "rouge_l"))(predictions, references)
    assert scores["bleu"] / 100 == pytest.approx(bleu, abs=6e-5)  # the scripts print four digits
    assert scores["nist"] == pytest.approx(nist, abs=6e-5)
    assert scores["rouge_l"] == pytest.approx(rouge, abs=1e-4)
    assert sacrebleu.__version__ in scores["signatures"]["bleu"]


# ---- As `compute_metrics` and as `evaluate` modules ----


def test_compute_metrics_of_a_trainer():
    class Words:
        pad_token_id = 0
        words = ("<pad>", "the", "inn", "is", "cheap")

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(self.words[i] for i in row if i > 0) for row in ids]

    class Evaluated:
        predictions = np.array([[1, 2, 3, 4], [1, 2, 3, -100]])
        label_ids = np.array([[1, 2, 3, 4], [1, 2, 4, -100]])

    metrics = NLGMetrics(wordnet="none")
    scores = metrics.compute_metrics(Words())(Evaluated)
    expected = metrics(["the inn is cheap", "the inn is"], [["the inn is cheap"], ["the inn cheap"]])
    assert scores == {name: expected[name] for name in ("bleu", "ter", "meteor", "nist", "rouge_l")}
    several = metrics.compute_metrics(Words(), [["the inn is cheap"], ["the inn is", "an inn"]])(Evaluated)
    assert several["ter"] == 0.0


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Return Hugging Face `evaluate`, its copies of modules in one temporary folder."""
    module = pytest.importorskip("evaluate")
    module.config.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    return module


@pytest.mark.parametrize("name", ["bleu", "ter", "meteor", "nist", "rouge_l"])
def test_evaluate_modules(name, tmp_path, evaluate):
    folder = Path(__file__).parents[1] / "eval" / "metrics" / name
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    settings_ = {"wordnet": "none"} if name == "meteor" else {}
    one = metric.compute(predictions=["the inn is cheap"], references=["the inn is quiet"], **settings_)
    many = metric.compute(predictions=["the inn is cheap"], references=[["the inn is quiet", "it"]], **settings_)
    expected = NLGMetrics(wordnet="none")(["the inn is cheap"], [["the inn is quiet", "it"]])
    assert many == {name: expected[name], "signature": expected["signatures"][name]}
    assert "nrefs:1|" in one["signature"]
