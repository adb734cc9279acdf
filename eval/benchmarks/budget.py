"""
Does `budget_time` keep its word? Full runs and budget runs, interleaved.

    python eval/benchmarks/budget.py [--budget 0.5] [--data_dir FOLDER --model_name_or_path FOLDER]

A row goes to results/budget.jsonl: the median time of the budget runs relative to the median full run, with the spread
of the full runs beside it.
"""

from __future__ import annotations

import statistics

from common import Task, parser, seconds_of, store

from darel_hf import DarelConfig


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--budget", type=float, default=0.5)
    task = Task(made.parse_args())
    seconds_of(task.trainer(num_train_epochs=1))  # warms up
    full, budget, plans = [], [], []
    for _ in range(task.options.pairs):
        full.append(seconds_of(task.trainer()))
        trainer = task.trainer(DarelConfig(budget_time=task.options.budget))
        budget.append(seconds_of(trainer))
        plans.append(trainer.report.to_dict()["plan"])
    ratios = [ours / plain for ours, plain in zip(budget, full, strict=True)]
    store(
        "budget",
        task.settings,
        {
            "budget": task.options.budget,
            "measured": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "error": statistics.median(ratios) / task.options.budget - 1,
            "full_seconds": full,
            "budget_seconds": budget,
            "plans": plans,
        },
    )


if __name__ == "__main__":
    main()
