"""
What the scores cost, in time and memory, against sacrebleu and nltk as they come, one after the other.

    python eval/benchmarks/metrics.py --predictions predictions.txt --references testset_w_refs.csv
    python eval/benchmarks/metrics.py --large 100000 --references trainset.csv    # so many instances, drawn from these
    python eval/benchmarks/metrics.py --long 1000      # TER alone, pairs of 100 words

NIST, ROUGE-L and CIDEr, which neither library has as the challenge has them, are ours on both sides. Without
predictions each is the first reference with a fifth of its words drawn from all; without references, those of the
generated corpus. Every run is a process of its own, whose clock starts when modules are imported and texts are read:
the start of workers is in it. A row goes to results/metrics.jsonl: seconds and CPU seconds, workers counted (medians
of interleaved runs), the largest memory of the process and of a worker, whether all numbers are equal, and the CPU
seconds of 1,000 resamples in addition. For `--long` the libraries get a part (`plain_instances`), and their seconds
are scaled.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from joblib.externals.loky import get_reusable_executor
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from darel_hf.nlg.metrics import NIST, CIDEr, NLGMetrics, RougeL, find_wordnet, open_wordnet

RESAMPLES = 1000
ONLY = ["bleu", "ter", "meteor", "nist", "rouge_l", "cider", "chrf", "chrf++"]


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


# ---- One run, in a process of its own, which imports nothing that scoring does not ----


def run(arm: str, texts: Path) -> None:
    """Score, and print as JSON the scores and what they cost."""
    given = json.loads(texts.read_text(encoding="utf-8"))
    predictions, references, only, wordnet = (given[key] for key in ("predictions", "references", "only", "wordnet"))
    reader = SimpleNamespace(synsets=lambda word: []) if wordnet == "none" else open_wordnet(wordnet)
    reader.synsets("inn")  # opened before the clock starts, on both sides
    before = cost()
    if arm == "plain" and only == ["ter"]:
        scores = {"ter": TER().corpus_score(predictions, [[group[0] for group in references]]).score}
    elif arm == "plain":
        scores = plainly(predictions, references, reader)
    else:
        bootstrap = RESAMPLES if arm == "resampled" else 0
        scores = NLGMetrics(wordnet=wordnet, only=only, bootstrap=bootstrap)(predictions, references)
    seconds = time.perf_counter() - before["started"]
    get_reusable_executor().shutdown(wait=True)  # what workers have used is known when they have ended
    after = cost()
    found = {
        "scores": {name: scores[name] for name in only},
        "seconds": seconds,
        "cpu_seconds": after["cpu_seconds"] - before["cpu_seconds"],
        "start_gb": before["peak_gb"],
        "peak_gb": after["peak_gb"],
        "worker_peak_gb": after["worker_peak_gb"],
    }
    print(json.dumps(found))


def cost() -> dict[str, float]:
    """Return what this process, and workers that have ended, have used so far."""
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # A process's ru_maxrss begins with that of whoever started it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "started": time.perf_counter(),
        "cpu_seconds": sum(use.ru_utime + use.ru_stime for use in (own, workers)),
        "peak_gb": int(peak.split()[1]) / 2**20,
        "worker_peak_gb": workers.ru_maxrss / 2**20,
    }


def run_apart(arm: str, texts: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, __file__, "--run", arm, str(path)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    shown = {name: round(value, 2) for name, value in answer.items() if name != "scores"}
    print(arm, len(texts["predictions"]), shown, flush=True)
    return answer


# ---- All of them ----


def drawn(options: argparse.Namespace) -> tuple[list[str], list[list[str]], dict[str, Any]]:
    """Return predictions, references, and what a row says of them."""
    from darel_hf.nlg.corpus import make_corpus
    from darel_hf.nlg.texts import match, read_predictions, read_references

    draw = random.Random(0)
    if options.long:
        words = [f"w{i}" for i in range(200)]
        references = [[" ".join(draw.choices(words, k=100))] for _ in range(options.long)]
        predictions = corrupted(references)
        predictions = [" ".join(draw.choices(words, k=100)) if i % 2 else text for i, text in enumerate(predictions)]
        return predictions, references, {"words": 100, "predictions": "half corrupted, half unrelated"}
    if options.references is None:
        folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
        make_corpus(folder)
        options.references = folder / "testset_w_refs.csv"
    if options.predictions is not None:
        predictions, references = match(read_predictions(options.predictions), read_references(options.references))
        return predictions, references, {"predictions": "of a system"}
    references = [instance.texts for instance in read_references(options.references)]
    if options.large:
        texts = [text for group in references for text in group]
        references = [[draw.choice(texts)] for _ in range(options.large)]
    return corrupted(references), references, {"predictions": "corrupted first references"}


def main() -> None:
    from common import add_quick, store

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions")
    parser.add_argument("--references")
    parser.add_argument("--wordnet", help="folder; default: wherever it is found; none: exact and stems only")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved rounds of runs")
    parser.add_argument("--large", type=int, help="score so many instances of one reference, once")
    parser.add_argument("--long", type=int, help="compute TER of so many pairs of 100 words, once")
    parser.add_argument("--plain", type=int, help="instances that the libraries get; default: all, 20 of --long")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.wordnet = 1, options.wordnet or "none"
    if options.large or options.long:
        options.pairs, options.wordnet = 1, "none"
    wordnet = "none" if options.wordnet == "none" else find_wordnet(options.wordnet)
    if wordnet is None:
        raise SystemExit("no WordNet was found: name its folder by --wordnet, or none")
    predictions, references, settings = drawn(options)
    part = min(len(predictions), options.plain or (20 if options.long else len(predictions)))
    texts = {"only": ["ter"] if options.long else ONLY, "wordnet": wordnet}
    whole = {"predictions": predictions, "references": references, **texts}
    some = {"predictions": predictions[:part], "references": references[:part], **texts}
    arms = {"ours": whole, "plain": some} | ({} if options.long else {"resampled": whole})
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="darel-bench-") as folder:
        for number in range(options.pairs):
            for arm in sorted(arms, reverse=bool(number % 2)):
                found[arm].append(run_apart(arm, arms[arm], Path(folder)))
        check = found["ours"][0] if part == len(predictions) else run_apart("ours", some, Path(folder))

    def median(arm: str, what: str) -> float:
        return statistics.median(one[what] for one in found[arm])

    scale = len(predictions) / part
    row = {
        "scores": found["ours"][0]["scores"],
        "equal_to_the_last_digit": {
            name: check["scores"][name] == value for name, value in found["plain"][0]["scores"].items()
        },
    }
    for arm in ("ours", "plain"):
        times = scale if arm == "plain" else 1
        row |= {f"{arm}_seconds": times * median(arm, "seconds")}
        row |= {f"{arm}_cpu_seconds": times * median(arm, "cpu_seconds")}
        row |= {f"{arm}_{what}": median(arm, what) for what in ("start_gb", "peak_gb", "worker_peak_gb")}
    pairs = list(zip(found["plain"], found["ours"], strict=True))
    row |= {"ratio": statistics.median(scale * a["seconds"] / b["seconds"] for a, b in pairs)}
    row |= {
        "cpu_ratio": statistics.median(scale * plain["cpu_seconds"] / ours["cpu_seconds"] for plain, ours in pairs)
    }
    if "resampled" in found:
        gained = zip(found["resampled"], found["ours"], strict=True)
        gains = [more["cpu_seconds"] - one["cpu_seconds"] for more, one in gained]
        row |= {"bootstrap_1000_cpu_seconds": statistics.median(gains)}
        row |= {"resampled_peak_gb": median("resampled", "peak_gb")}
    settings = {
        "instances": len(predictions),
        "references": sum(map(len, references)),
        **settings,
        "pairs": options.pairs,
        "wordnet": "none" if wordnet == "none" else "found",
        "plain_instances": part,
    }
    store("metrics", settings, row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
