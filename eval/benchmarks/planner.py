"""
Predicted against measured: the planner's error for random settings.

    python eval/benchmarks/planner.py [--settings 20] [--padding_free] [--data_dir FOLDER --model_name_or_path FOLDER]

Fractions, rules and eta are drawn; a full run is repeated every four settings, and a run's time is taken relative to
the full runs before and after it. A row goes to results/planner.jsonl, a picture to planner.png.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from common import RESULTS, Task, parser, seconds_of, store

from darel_hf import DarelConfig

EVERY = 4  # settings between two full runs


def draw(generator: np.random.Generator, padding_free: bool) -> DarelConfig:
    """Draw settings: both stages, either stage, rules with and without scores."""
    offline, online = generator.choice([True, False], size=2, p=[0.7, 0.3])
    online = online or not offline
    settings: dict[str, Any] = {"unpad": True} if padding_free else {}
    if offline:
        settings["offline_keep"] = round(float(generator.uniform(0.4, 0.95)), 2)
        settings["offline_rule"] = str(generator.choice(["trimmed", "random"], p=[0.75, 0.25]))
    if online:
        settings["online_keep"] = round(float(generator.uniform(0.2, 0.8)), 2)
        settings["online_rule"] = str(generator.choice(["hardest", "random"], p=[0.75, 0.25]))
        settings["rescore_every"] = int(generator.integers(1, 4))
    return DarelConfig(**settings)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--settings", type=int, default=20)
    made.add_argument("--padding_free", action="store_true", help="all settings are tried without padding")
    options = made.parse_args()
    if options.quick:
        options.settings = 2
    task = Task(options)
    generator = np.random.default_rng(0)
    seconds_of(task.trainer(num_train_epochs=1))  # warms up
    full, runs = [seconds_of(task.trainer())], []
    for number in range(task.options.settings):
        config = draw(generator, task.options.padding_free)
        trainer = task.trainer(config)
        seconds = seconds_of(trainer)
        runs.append((len(full), config, seconds, trainer.report.plan.predicted_time))
        if number % EVERY == EVERY - 1 or number == task.options.settings - 1:
            full.append(seconds_of(task.trainer()))
    rows = []
    for before, config, seconds, predicted in runs:
        measured = seconds / statistics.mean(full[before - 1 : before + 1])
        chosen = {name: value for name, value in config.to_dict().items() if value != getattr(DarelConfig(), name)}
        rows.append({"settings": chosen, "predicted": predicted, "measured": measured})
    errors = [row["predicted"] - row["measured"] for row in rows]
    absolute = [abs(error) for error in errors]
    store(
        "planner",
        task.settings,
        {
            "error": {
                "median_absolute": statistics.median(absolute),
                "worst": max(absolute),
                "median": statistics.median(errors),
            },
            "full_seconds": full,
            "runs": rows,
        },
    )
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw predicted against measured time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    both = [row[name] for row in rows for name in ("predicted", "measured")]
    span = [0.95 * min(both), 1.05 * max(both)]
    axes.plot(span, span, color="black", linewidth=0.6)
    axes.plot([row["measured"] for row in rows], [row["predicted"] for row in rows], "o", color="tab:blue")
    axes.set_xlabel("measured time relative to plain training")
    axes.set_ylabel("predicted")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "planner.png", dpi=130)


if __name__ == "__main__":
    main()
