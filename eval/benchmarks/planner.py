"""
Predicted against measured: the planner's error for random settings, with accelerators.

    python eval/benchmarks/planner.py [--settings 20] [--from_setting 0] [--processor_time]

Drawn are the adapter (LoRA everywhere or a reader) and its rank, batch size, epochs, samples, accelerators (none, one,
or what `fast=True` finds), and what is selected: nothing, fractions of either stage or of both, with and without
scores, or a time budget. Each run has a plain one right before it, to which its time is relative: the same
adapter under plain Trainer, or LoRA everywhere where the reader's prompts are cached, which is what plans compare
with. With --processor_time all clocks, the planner's too, count the processor's seconds of this process: for machines
that do other things beside. A row a setting goes to results/planner.jsonl; rows of other calls with the same options
count as well, the error over all of them is printed, and a picture goes to planner.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

if "--processor_time" in sys.argv:  # before anybody takes the other clock
    time.perf_counter = time.process_time

from common import RESULTS, Task, parser, seconds_of, store
from transformers import Trainer

from darel_hf import DarelConfig

#: By adapter, what is drawn of accelerators; `fast` is False where a budget is not to look for more.
ACCELERATORS: dict[str, list[dict[str, Any]]] = {
    "all": [
        {},
        {"unpad": True},
        {"unpad": True, "fast_lora": True, "last_block": True},
        {"share_prompts": 1},
        {"share_prompts": 4},
        {"fast_lora": True},
        {"fast": True},
        {"fast": True},
    ],
    "reader": [{}, {"prompt_cache": "ram"}, {"prompt_cache": "recompute"}, {"fast": True}, {"fast": True}],
}
STEPS = (40, 100)  # a run has between so many plain steps of 8 rows; (12, 40) in the rows that say nothing of it


@dataclass(frozen=True)
class Drawn:
    """One run: adapter, rank, batch size, epochs, samples, and DAREL's settings."""

    adapter: str
    rank: int
    batch_size: int
    epochs: int
    samples: int
    darel: dict[str, Any]


def draw(number: int) -> Drawn:
    """Draw the settings of that number, whichever others are drawn."""
    generator = np.random.default_rng([28, number])
    adapter = "all" if generator.random() < 0.5 else "reader"
    darel = dict(ACCELERATORS[adapter][generator.integers(len(ACCELERATORS[adapter]))])
    epochs = int(generator.integers(1, 6))
    selected = str(generator.choice(["nothing", "offline", "online", "both", "budget"], p=[0.2, 0.15, 0.2, 0.15, 0.3]))
    if selected == "nothing" and not darel:
        selected = "budget"
    if selected in ("offline", "both"):
        darel["offline_keep"] = round(float(generator.uniform(0.4, 0.95)), 2)
        darel["offline_rule"] = str(generator.choice(["trimmed", "random"], p=[0.6, 0.4]))
    if selected in ("online", "both"):
        darel["online_keep"] = round(float(generator.uniform(0.2, 0.8)), 2)
        darel["online_rule"] = str(generator.choice(["hardest", "random"], p=[0.6, 0.4]))
        darel["rescore_every"] = int(generator.integers(1, 4))
    if selected == "budget":
        darel["budget_time"] = round(float(generator.uniform(0.35, 0.8)), 2)
        darel |= {"offline_rule": "middle", "fast": darel.get("fast", False)}
    samples = int(8 * generator.integers(*STEPS) / epochs)
    return Drawn(
        adapter=adapter,
        rank=int(generator.choice([4, 8, 16])),
        batch_size=int(generator.choice([4, 8, 16])),
        epochs=epochs,
        samples=max(samples, 48),
        darel=darel,
    )


def trainer_of(task: Task, drawn: Drawn, plain: str | None = None) -> Trainer:
    """Return a fresh trainer of what was drawn; `plain`: of plain training with that adapter in its place."""
    lora = {"lora_on": plain or drawn.adapter, "lora_r": drawn.rank, "lora_dropout": 0.0}
    task.args, pairs = replace(task.args, **lora, lora_target_modules="c_attn,c_proj,c_fc"), task.pairs
    try:
        task.pairs = pairs[: drawn.samples]
        return task.trainer(
            None if plain else DarelConfig(**drawn.darel),
            num_train_epochs=drawn.epochs,
            per_device_train_batch_size=drawn.batch_size,
        )
    finally:
        task.pairs = pairs


def run(task: Task, drawn: Drawn) -> dict[str, Any]:
    """Train plainly, then as drawn; return what was predicted and measured."""
    caches = drawn.adapter == "reader" and (drawn.darel.get("fast") or "prompt_cache" in drawn.darel)
    plain = "all" if caches else drawn.adapter
    full = seconds_of(trainer_of(task, drawn, plain))
    trainer = trainer_of(task, drawn)
    seconds = seconds_of(trainer)
    plan = trainer.report.plan
    assert caches == ("prompt_cache" in trainer.report.in_use)  # else it was compared with another plain run
    return {
        "predicted": plan.predicted_time,
        "measured": seconds / full,
        "full_seconds": full,
        "seconds": {part: value for part, value in trainer.report.seconds.items() if value},
        "overhead": plan.overhead,
        "factors": plan.costs.factors,
        "steps": trainer.state.global_step,
        "predicted_step": plan.step_time,
        "measured_step": trainer.report.step_time,
        "step_seconds": plan.costs.step_seconds,
        "kept": plan.kept,
    }


def rows_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stored rows of these options, the latest of each setting."""
    lines = (RESULTS / "planner.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if settings.items() <= row["settings"].items()]
    return list({row["settings"]["number"]: row for row in rows}.values())


def options_of() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    made.set_defaults(threads=1)
    made.add_argument("--settings", type=int, default=20)
    made.add_argument("--from_setting", type=int, default=0, help="go on with this one")
    made.add_argument("--processor_time", action="store_true", help="count the processor's seconds of this process")
    options = made.parse_args()
    if options.quick:
        options.settings = 2
    return options


def main() -> None:
    options = options_of()
    task = Task(options, by_representation=True)
    told = ("settings", "from_setting", "samples", "epochs", "batch_size", "pairs", "lora_r")  # drawn, or no matter
    settings = {key: value for key, value in task.settings.items() if key not in told}
    settings["steps_of_8"] = list(STEPS)
    seconds_of(trainer_of(task, Drawn("all", 4, 8, 1, 80, {}), "all"))  # warms up
    for number in range(options.from_setting, options.settings):
        drawn = draw(number)
        row = run(task, drawn)
        store("planner", {**settings, "number": number, **vars(drawn)}, row)
    rows = rows_of(settings)
    errors = {row["settings"]["number"]: row["predicted"] - row["measured"] for row in rows}
    absolute = [abs(error) for error in errors.values()]
    said = f"{len(rows)} settings: median error {statistics.median(absolute):.3f}, worst {max(absolute):.3f}"
    print(said, f"(median signed {statistics.median(errors.values()):+.3f})")
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw predicted against measured time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    both = [row[name] for row in rows for name in ("predicted", "measured")]
    span = [0.95 * min(both), 1.05 * max(both)]
    axes.plot(span, span, color="black", linewidth=0.6)
    kinds = {"LoRA everywhere": ("all", "o", "tab:blue"), "reader": ("reader", "s", "tab:orange")}
    for name, (kind, marker, colour) in kinds.items():
        some = [row for row in rows if row["settings"]["adapter"] == kind]
        x, y = ([row[which] for row in some] for which in ("measured", "predicted"))
        axes.plot(x, y, marker, color=colour, label=name)
    axes.legend(frameon=False)
    axes.set_xlabel("measured time relative to plain training")
    axes.set_ylabel("predicted")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "planner.png", dpi=130)


if __name__ == "__main__":
    main()
