"""
Scale: ledger, rules, merging and sampling at 10 thousand to 10 million samples.

    python eval/benchmarks/scale.py [--largest 10000000] [--ranks 8]

Memory of the ledger a sample; seconds of every rule but those that need embeddings (half kept), of the correction for
lengths, of merging an epoch of records of several simulated ranks, of saving and restoring, of looking up a batch.
A row a size goes to results/scale.jsonl, the picture to scale.png. Times are of one core.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from common import RESULTS, add_quick, store

from darel_hf import RULES, LossLedger, Samples
from darel_hf.selection import length_corrected

BATCH = 64


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the smallest of a few timings."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(n: int, ranks: int) -> dict[str, Any]:
    """Return what n samples cost."""
    generator = np.random.default_rng(0)
    repeats = 3 if n <= 10**6 else 1
    ids = np.arange(n)
    losses, lengths = generator.gamma(4, 0.5, n), generator.integers(5, 80, n)
    correct = generator.random(n)
    tracemalloc.start()
    ledger = LossLedger(ids)
    memory = tracemalloc.get_traced_memory()[0] / n
    tracemalloc.stop()
    samples = Samples(ids, losses, lengths, correct=correct, reference=generator.gamma(4, 0.4, n))
    result: dict[str, Any] = {"samples": n, "ledger_bytes_per_sample": memory}
    rules = [rule for rule in RULES.values() if "embeddings" not in rule.needs and rule.name != "adonis"]
    result["rules"] = {
        rule.name: seconds(lambda rule=rule: rule(samples, 0.5, np.random.default_rng(0)), repeats) for rule in rules
    }
    result["length_correction"] = seconds(lambda: length_corrected(samples), repeats)

    # An epoch of candidate batches, dealt out to the ranks, recorded and merged as at the beginning of the next epoch.
    order = generator.permutation(n)
    by_rank = []
    for rank in range(ranks):
        scribe = LossLedger(ids)
        mine = order[rank::ranks]
        for start in range(0, len(mine), BATCH):
            part = mine[start : start + BATCH]
            scribe.record_scores(part, losses[part], lengths[part], step=0)
            scribe.record_training(part[: BATCH // 2])
        by_rank.append(scribe.take_pending())
    result["merge"] = seconds(lambda: LossLedger(ids).merge(by_rank, rank=0), repeats)
    merged = LossLedger(ids)
    merged.merge(by_rank, rank=ranks)
    assert np.array_equal(merged.loss, losses.astype(np.float32)) and merged.times_scored.sum() == n
    result["state"] = seconds(lambda: LossLedger(ids).load_state_dict(merged.state_dict()), repeats)
    result["lookup_of_a_batch"] = seconds(lambda: ledger.rows(order[:BATCH]), 20)
    sparse = LossLedger(np.sort(generator.choice(2**62, n)))
    result["lookup_of_a_batch_of_sparse_ids"] = seconds(lambda: sparse.rows(sparse.ids[order[:BATCH]]), 20)
    return result


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw seconds over samples, with the slopes of n and n log n."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    n = np.array([row["samples"] for row in rows], float)
    curves = {f"rule {name}": [row["rules"][name] for row in rows] for name in rows[0]["rules"]}
    curves |= {name: [row[name] for row in rows] for name in ("length_correction", "merge", "state")}
    for number, (name, values) in enumerate(curves.items()):
        axes.loglog(n, values, marker="o", ms=3, label=name, ls="-" if number < 9 else "-.")
    first = min(values[0] for values in curves.values())
    axes.loglog(n, first * n / n[0], "k:", lw=1, label="n")
    axes.loglog(n, first * n * np.log(n) / (n[0] * np.log(n[0])), "k--", lw=1, label="n log n")
    axes.set_xlabel("samples")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "scale.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=10**7)
    parser.add_argument("--ranks", type=int, default=8)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.largest = 10**5
    rows, n = [], 10**4
    while n <= options.largest:
        rows.append(measure(n, options.ranks))
        store("scale", {"largest": options.largest, "ranks": options.ranks}, rows[-1])
        n *= 10
    plot(rows)


if __name__ == "__main__":
    main()
