"""
What the five metrics cost, against sacrebleu and nltk as they come, one after the other, in one process.

    python eval/benchmarks/metrics.py --predictions predictions.txt --references testset_w_refs.csv

NIST and ROUGE-L, which neither library has in the challenge's reading, are ours on both sides. Without files: the
test set of the generated corpus, each prediction the first reference with some of its words replaced. A row goes to
results/metrics.jsonl: seconds of both (medians of interleaved runs), their ratio, whether all numbers are equal, and
what 1,000 bootstrap resamples cost beside scoring once.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import add_quick, store
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from darel_hf.nlg.corpus import make_corpus
from darel_hf.nlg.metrics import NIST, NLGMetrics, RougeL, open_wordnet
from darel_hf.nlg.texts import match, read_predictions, read_references

RESAMPLES = 1000  # measured on ten times as many: their cost is lost in the noise of scoring otherwise


def plainly(predictions: list[str], references: list[list[str]], wordnet: Any) -> dict[str, float]:
    """Return the scores as the libraries compute them."""
    most = max(map(len, references))
    columns = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    metrics = {"bleu": BLEU(lowercase=True), "ter": TER(), "nist": NIST(), "rouge_l": RougeL()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions")
    parser.add_argument("--references")
    parser.add_argument("--wordnet", help="folder; default: wherever it is found; none: exact and stems only")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs of runs")
    add_quick(parser)
    options = parser.parse_args()
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
