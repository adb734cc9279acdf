"""
What the scores cost, against sacrebleu and nltk as they come, one after the other, in one process.

    python eval/benchmarks/metrics.py --predictions predictions.txt --references testset_w_refs.csv
    python eval/benchmarks/metrics.py --long 1000      # TER alone, pairs of 100 words
    python eval/benchmarks/metrics.py --large 100000 --references trainset.csv    # time and memory of many instances

NIST, ROUGE-L and CIDEr, which neither library has as the challenge has them, are ours on both sides. Without files:
the test set of the generated corpus, each prediction the first reference with some of its words replaced. A row goes
to results/metrics.jsonl: seconds of both (medians of interleaved runs), their ratio, whether all numbers are equal,
and what 1,000 bootstrap resamples cost beside scoring once. The libraries take too long for the other two: they get a
part (`plain_instances`), their seconds are scaled, and equality is that of the part's TER.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import add_quick, store
from joblib.externals.loky import get_reusable_executor
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.lib_ter import translation_edit_rate
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from darel_hf.nlg.corpus import make_corpus
from darel_hf.nlg.metrics import NIST, CIDEr, NLGMetrics, RougeL, open_wordnet
from darel_hf.nlg.texts import match, read_predictions, read_references

RESAMPLES = 1000  # measured on ten times as many: their cost is lost in the noise of scoring otherwise


def plainly(predictions: list[str], references: list[list[str]], wordnet: Any) -> dict[str, float]:
    """Return the scores as the libraries compute them."""
    most = max(map(len, references))
    columns = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    metrics = {"bleu": BLEU(lowercase=True), "ter": TER(), "nist": NIST(), "rouge_l": RougeL(), "cider": CIDEr()}
    metrics |= {"chrf": CHRF(), "chrf++": CHRF(word_order=2)}
    scores = {name: metric.corpus_score(predictions, columns).score for name, metric in metrics.items()}
    words = Tokenizer13a()
    values = [
        meteor_score([words(ref.lower()).split() for ref in group], words(text.lower()).split(), wordnet=wordnet)
        for text, group in zip(predictions, references, strict=True)
    ]
    return {**scores, "meteor": sum(values) / len(values)}


def corrupted(references: list[list[str]]) -> list[str]:
    """Return the first reference of each instance with a fifth of its words drawn from all words."""
    draw = random.Random(0)
    words = [word for group in references for word in group[0].split()]
    return [
        " ".join(draw.choice(words) if draw.random() < 0.2 else word for word in group[0].split())
        for group in references
    ]


def timed(call: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def cpu_seconds() -> float:
    """Return what this process and its workers, which are ended for that, have used: load of others is not in it."""
    get_reusable_executor().shutdown(wait=True)
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def large(options: argparse.Namespace) -> None:
    """Score `options.large` instances of one reference each, and compare 1,000 resamples and memory."""
    texts = [text for instance in read_references(options.references) for text in instance.texts]
    draw = random.Random(0)
    references = [[draw.choice(texts)] for _ in range(options.large)]
    predictions = corrupted(references)
    only = ["bleu", "ter", "meteor", "nist", "rouge_l", "cider", "chrf", "chrf++"]
    started = cpu_seconds()
    ours, scores = timed(lambda: NLGMetrics(wordnet="none", only=only, progress=True)(predictions, references))
    our_cpu = cpu_seconds() - started
    with_intervals, _ = timed(
        lambda: NLGMetrics(wordnet="none", bootstrap=RESAMPLES, only=only, progress=True)(predictions, references)
    )
    memory = {
        "main_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "largest_worker_peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }
    part = options.plain
    started = cpu_seconds()
    plain, expected = timed(
        lambda: plainly(predictions[:part], references[:part], SimpleNamespace(synsets=lambda word: []))
    )
    plain_cpu = (cpu_seconds() - started) * options.large / part
    check = NLGMetrics(wordnet="none", only=["ter", "bleu"])(predictions[:part], references[:part])
    store(
        "metrics",
        {
            "instances": options.large,
            "references": options.large,
            "predictions": "corrupted references, drawn with replacement",
            "bootstrap": RESAMPLES,
            "wordnet": "none",
            "plain_instances": part,
        },
        {
            "scores": {name: scores[name] for name in only},
            "equal_to_the_last_digit": {name: check[name] == expected[name] for name in ("ter", "bleu")},
            "our_seconds": ours,
            "our_cpu_seconds": our_cpu,
            "with_intervals_seconds": with_intervals,
            "plain_seconds": plain * options.large / part,
            "plain_cpu_seconds": plain_cpu,
            "cpu_ratio": plain_cpu / our_cpu,
            **memory,
        },
    )


def long(options: argparse.Namespace) -> None:
    """Compute the TER of `options.long` pairs of 100 words, half of them unrelated."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(200)]
    references = [[" ".join(draw.choices(words, k=100))] for _ in range(options.long)]
    predictions = corrupted(references)
    predictions = [" ".join(draw.choices(words, k=100)) if i % 2 else text for i, text in enumerate(predictions)]
    ours, scores = timed(lambda: NLGMetrics(only=["ter"])(predictions, references))
    part = min(options.plain, 20)
    pairs = list(zip(predictions, references, strict=True))[:part]
    plain, expected = timed(lambda: [translation_edit_rate(a.split(), b[0].split())[0] for a, b in pairs])
    check = NLGMetrics(only=["ter"])(predictions[:part], references[:part])["ter"]
    store(
        "metrics",
        {
            "instances": options.long,
            "words": 100,
            "predictions": "half corrupted, half unrelated",
            "plain_instances": part,
        },
        {
            "scores": {"ter": scores["ter"]},
            "equal_to_the_last_digit": {"ter": check == 100 * (sum(expected) / (100.0 * part))},
            "our_seconds": ours,
            "plain_seconds": plain * options.long / part,
            "ratio": plain * options.long / part / ours,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions")
    parser.add_argument("--references")
    parser.add_argument("--wordnet", help="folder; default: wherever it is found; none: exact and stems only")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs of runs")
    parser.add_argument("--large", type=int, help="score so many instances of one reference instead")
    parser.add_argument("--long", type=int, help="compute TER of so many pairs of 100 words instead")
    parser.add_argument("--plain", type=int, default=500, help="instances that the libraries get of these")
    add_quick(parser)
    options = parser.parse_args()
    if options.long:
        return long(options)
    if options.large:
        return large(options)
    if options.quick:
        options.pairs, options.wordnet = 1, options.wordnet or "none"
    if options.references is None:
        folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
        make_corpus(folder)
        references = [instance.texts for instance in read_references(folder / "testset_w_refs.csv")]
        predictions = corrupted(references)
    else:
        predictions, references = match(read_predictions(options.predictions), read_references(options.references))
    metrics = NLGMetrics(wordnet=options.wordnet)
    if "meteor" not in metrics.metrics:
        raise SystemExit(metrics.notes[0])
    folder = metrics.metrics["meteor"].wordnet
    wordnet = open_wordnet(folder) if folder else SimpleNamespace(synsets=lambda word: [])
    resampled = NLGMetrics(wordnet=options.wordnet, bootstrap=10 * RESAMPLES)
    rows = []
    for number in range(options.pairs):
        arms = {
            "plain": lambda: plainly(predictions, references, wordnet),
            "ours": lambda: metrics(predictions, references),
            "bootstrap": lambda: resampled(predictions, references),
        }
        row, results = {}, {}
        for name in sorted(arms, reverse=bool(number % 2)):
            row[name], results[name] = timed(arms[name])
        rows.append(row)
        print({name: round(seconds, 2) for name, seconds in row.items()}, flush=True)
    equal = {name: results["ours"][name] == results["plain"][name] for name in results["plain"]}
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    store(
        "metrics",
        {
            "instances": len(references),
            "references": sum(map(len, references)),
            "predictions": "corrupted first references" if options.references is None else "of a system",
            "pairs": options.pairs,
        },
        {
            "scores": {name: results["ours"][name] for name in results["plain"]},
            "equal_to_the_last_digit": equal,
            "plain_seconds": median["plain"],
            "our_seconds": median["ours"],
            "ratio": statistics.median(row["plain"] / row["ours"] for row in rows),
            "ratios": [row["plain"] / row["ours"] for row in rows],
            "bootstrap_1000_seconds": statistics.median(row["bootstrap"] - row["ours"] for row in rows) / 10,
        },
    )


if __name__ == "__main__":
    main()
