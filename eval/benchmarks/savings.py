"""
How much faster is it, everything counted? Full runs and shortened ones, interleaved.

    python eval/benchmarks/savings.py [--ways offline_0.7,budget_0.5] [--data_dir FOLDER --model_name_or_path FOLDER]

`offline_0.7` keeps that fraction offline, `random_0.7` draws it, `budget_0.5` lets the planner choose for that
fraction of the time; `by_length_0.7` and `budget_by_length_0.5` are the same with batches of similar length
(`by_length_1.0`: nothing else), `padding_free_0.7` and `budget_padding_free_0.5` without padding. The samples are all
references of a seeded part of the representations, as in the whole training set. A row a way goes to
results/savings.jsonl, the table to savings.md: the median time relative to the plain run of the same round, and beside
it what the offline stage should reach, 1 / (alpha + measured scoring share).
"""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS, Task, latest_rows, parser, seconds_of, store

from darel_hf import DarelConfig

WAYS: dict[str, dict[str, Any]] = {
    "offline": {},
    "random": {"offline_rule": "random"},
    "by_length": {"batch_by_length": True},
    "budget": {},
    "budget_by_length": {"batch_by_length": True},
    "padding_free": {"unpad": True},
    "budget_padding_free": {"unpad": True},
}


def config_of(way: str) -> DarelConfig:
    """Return the settings of a way, as `--ways` names it."""
    kind, _, fraction = way.rpartition("_")
    what = "budget_time" if "budget" in kind else "offline_keep"
    by_itself = {what: float(fraction), "offline_rule": "middle", "fast": False}
    return DarelConfig(**{**by_itself, **WAYS[kind]})


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(samples=400, epochs=5)
    made.add_argument(
        "--ways",
        default="offline_0.9,offline_0.8,offline_0.7,by_length_1.0,by_length_0.8,padding_free_1.0,padding_free_0.7,"
        "budget_0.8,budget_0.5,budget_padding_free_0.5",
    )
    task = Task(made.parse_args(), by_representation=True)
    names = task.options.ways.split(",")
    seconds_of(task.trainer(num_train_epochs=1))  # warms up
    full, runs = [], {name: [] for name in names}
    for _ in range(task.options.pairs):
        full.append(seconds_of(task.trainer()))
        for name in names:
            trainer = task.trainer(config_of(name))
            seconds = seconds_of(trainer)
            parts, plan = trainer.report.seconds, trainer.report.plan
            runs[name].append(
                {
                    "time": seconds / full[-1],
                    "scoring_share": (parts["offline"] + parts["scoring"]) / full[-1],
                    "probe_share": parts["probe"] / full[-1],
                    "predicted": plan.predicted_time,
                    "offline_keep": plan.offline_keep,
                    "online_keep": plan.online_keep,
                    "rescore_every": plan.rescore_every,
                }
            )
    settings = {key: value for key, value in task.settings.items() if key != "ways"}
    for name in names:
        store("savings", settings, {"arm": name, "seed": 0, "full_seconds": full, "runs": runs[name]})
    lines = ["| way | time, median (span) | as fast | 1 / (alpha + scoring) | predicted time |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, (row,) in latest_rows("savings", settings).items():
        times, shares, alphas, predicted = (
            [run[key] for run in row["runs"]] for key in ("time", "scoring_share", "offline_keep", "predicted")
        )
        time = statistics.median(times)
        target = 1 / (statistics.median(alphas) + statistics.median(shares))
        cells = [name, f"{time:.3f} ({min(times):.3f} to {max(times):.3f})", f"{1 / time:.2f}"]
        cells += [f"{target:.2f}" if name.startswith("offline") else "-", f"{statistics.median(predicted):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items())
    (RESULTS / "savings.md").write_text("\n".join(lines) + f"\n\nSettings: {conditions}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
