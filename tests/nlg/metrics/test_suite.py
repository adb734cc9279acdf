"""All scores together: sacrebleu's numbers, intervals and tests; bad texts and settings."""

import csv
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, TER
from sacrebleu.significance import PairedTest
from texts import columns

from darel_hf.nlg.metrics import (
    NAMES,
    NLGMetrics,
    paired_p_value,
)

E2E = Path(__file__).parents[4] / "shared" / "data" / "e2e_nlg" / "testset_w_refs.csv"


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


@pytest.mark.skipif(not E2E.exists(), reason="needs the E2E test set")
@pytest.mark.parametrize(
    ("system", "bleu", "nist", "rouge", "cider"),
    [
        # From mteval-v13a-sig.pl (Perl), rouge.py and cider_scorer.py with the Java tokenizer, all of
        # github.com/tuetschek/e2e-metrics.
        ("copies the first reference", 1.0000, 14.2365, 1.0, 3.402138),
        ("permutes the first references", 0.1653, 3.5637, 0.3270134999581779, 0.157425),
        ("first reference against the others", 0.6046, 8.9029, 0.6381129068662674, 1.857224),
    ],
)
def test_anchors_on_e2e(system, bleu, nist, rouge, cider):
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
    scores = NLGMetrics(wordnet="none", only=("bleu", "nist", "rouge_l", "cider"))(predictions, references)
    assert scores["bleu"] / 100 == pytest.approx(bleu, abs=6e-5)  # the scripts print four digits
    assert scores["nist"] == pytest.approx(nist, abs=6e-5)
    assert scores["rouge_l"] == pytest.approx(rouge, abs=1e-12)
    assert scores["cider"] == pytest.approx(cider, abs=6e-7)
    assert sacrebleu.__version__ in scores["signatures"]["bleu"]


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
    assert scores == {name: expected[name] for name in NAMES if name != "ser"}
    several = metrics.compute_metrics(Words(), [["the inn is cheap"], ["the inn is", "an inn"]])(Evaluated)
    assert several["ter"] == 0.0


@pytest.fixture
def evaluate():
    """Return Hugging Face `evaluate`."""
    return pytest.importorskip("evaluate")


@pytest.mark.parametrize("name", ["bleu", "ter", "meteor", "nist", "rouge_l", "cider"])
def test_evaluate_modules(name, tmp_path, evaluate):
    folder = Path(__file__).parents[3] / "eval" / "metrics" / name
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    settings_ = {"wordnet": "none"} if name == "meteor" else {}
    one = metric.compute(predictions=["the inn is cheap"], references=["the inn is quiet"], **settings_)
    many = metric.compute(predictions=["the inn is cheap"], references=[["the inn is quiet", "it"]], **settings_)
    expected = NLGMetrics(wordnet="none")(["the inn is cheap"], [["the inn is quiet", "it"]])
    assert many == {name: expected[name], "signature": expected["signatures"][name]}
    assert "nrefs:1|" in one["signature"]


@pytest.mark.parametrize("references", [["ab", ["cd"]], [["ab"], "cd"], "ab", {"a": "ab", "c": "cd"}])
def test_evaluate_modules_refuse_mixed_forms(references, tmp_path, evaluate):
    folder = Path(__file__).parents[3] / "eval" / "metrics" / "bleu"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"references=.*give a list"):
        metric.compute(predictions=["ab", "cd"], references=references)
