"""
What DAREL costs when it is off, and what the scoring pass costs.

    python eval/benchmarks/overhead.py [--data_dir FOLDER --model_name_or_path FOLDER]

1. Keep 1.0: the time inside our overrides (what they take beyond the methods below them), as a fraction of the run,
   and the ratio to plain Trainer of interleaved runs.
2. The offline pass against one epoch of plain training, in the same process, interleaved.

A row goes to results/overhead.jsonl.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from common import Task, parser, seconds_of, store
from transformers import Trainer

from darel_hf import DarelConfig, DarelMixin

METHODS = ("get_train_dataloader", "get_batch_samples", "training_step", "compute_loss", "log", "create_scheduler")
METHODS += ("_get_train_sampler", "_set_signature_columns_if_needed")


def timed(cls: type, clock: list[float]) -> type:
    """Return a subclass that adds the time inside the overridden methods to `clock`."""

    def wrap(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return getattr(super(made, self), name)(*args, **kwargs)
            finally:
                clock[0] += time.perf_counter() - started

        return method

    made = type(f"Timed{cls.__name__}", (cls,), {name: wrap(name) for name in METHODS})
    return made


def own_share(task: Task) -> float:
    """Return the time inside our overrides without the methods below them, as a fraction of one run at keep 1.0."""
    inner, outer = [0.0], [0.0]
    below = timed(Trainer, inner)
    trainer = task.trainer(DarelConfig(), cls=timed(type("Darel", (DarelMixin, below), {}), outer))
    seconds = seconds_of(trainer)
    return (outer[0] - inner[0]) / seconds


def main() -> None:
    task = Task(parser(__doc__).parse_args())
    seconds_of(task.trainer())  # warms up
    share = own_share(task)
    ratios, plain_runs = [], []
    for number in range(task.options.pairs):
        arms = [None, DarelConfig()]
        times = {}
        for darel in arms if number % 2 == 0 else arms[::-1]:
            times[darel is None] = seconds_of(task.trainer(darel))
        plain_runs.append(times[True])
        ratios.append(times[False] / times[True])
    passes = []
    for _ in range(task.options.pairs):
        epoch = seconds_of(task.trainer(num_train_epochs=1))
        selecting = task.trainer(DarelConfig(offline_keep=0.8, offline_rule="middle"), num_train_epochs=1)
        selecting.train()
        passes.append(selecting.report.seconds["offline"] / epoch)
    store(
        "overhead",
        task.settings,
        {
            "own_share_at_keep_1": share,
            "ratio_to_trainer": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "plain_seconds": plain_runs,
            "offline_pass_in_epochs": {"median": statistics.median(passes), "min": min(passes), "max": max(passes)},
        },
    )


if __name__ == "__main__":
    main()
