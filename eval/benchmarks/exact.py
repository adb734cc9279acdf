"""
Nothing of a step in vain: whole runs with what changes no gradient, and what is left of a step; everything counted.

The full run, on a quiet machine (an hour or two; DATA is the folder of E2E's files, MODEL that of the base model):

    run="python eval/benchmarks/exact.py --data_dir DATA --model_name_or_path MODEL --pairs 5"
    $run --samples 400 --epochs 5
    $run --samples 400 --epochs 5 --full
    $run --samples 64 --epochs 3 --layers 12 --width 768 --ways whole,rounded
    $run --samples 160 --epochs 3 --parts

Ways are those of the benchmark `prompts`, by default LoRA of r 8 in batches of 8: `plain+fast` and `reader+fast` are
the wholes, with LoRA everywhere and with a reader; `alone` and `without` are lists of each exact accelerator alone and
of the wholes without it; `base_precision` comes on top. With --full all weights are trained. Times are relative to the
plain run of the same round; those of steps alone, of a run's last half, too. Beside them, of a run of its own in a
process of its own: FLOPs of the loop and the memory that it adds at its peak (on a CPU, of the process), relative
to plain. Rows go to results/exact.jsonl, tables to results/exact.md.

--parts writes what is left of a step, in milliseconds of processor time with one thread, to results/exact_parts.jsonl:
forward, backward, the optimizer with clipping, loading with collating, what is left of Trainer's and accelerate's
Python, and what is ours before the forward pass; and, of forward and backward, what a model of as many layers and
width 16 takes: Python, the calling of operators, and the softmax of the head.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, seconds_of, store
from prompts import LastHalf, Runs, add_adapters, tables_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from darel_hf.training.online import OnlineStage

#: Each exact accelerator alone, and the wholes of LoRA everywhere and of a reader without one of theirs.
ALONE = ("unpad", "share_1", "unpad+last_block", "plain+fused_activation", "plain+fast_lora", "reader")
WITHOUT = (
    "unpad+last_block+fused_activation+fast_lora",
    "share_1+fused_activation+fast_lora",
    "share_1+last_block+fast_lora",
    "share_1+last_block+fused_activation",
    "slow+fused_activation+fast_lora",
    "reader+fast_lora",
    "reader+fused_activation",
)
WHOLE = ("plain+fast", "reader+fast")
ROUNDED = ("plain+base_precision", "plain+fast+base_precision", "reader+fast+base_precision")
LISTS = {"alone": ALONE, "without": WITHOUT, "whole": WHOLE, "rounded": ROUNDED}
PARTS = ("forward", "backward", "optimizer", "loading", "Trainer", "ours")


class Loop(TrainerCallback):
    """Count FLOPs of the loop, and the memory that it adds."""

    def __init__(self) -> None:
        self.flops = FlopCounterMode(display=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self.before = _memory(args.device, reset=True)
        self.flops.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        self.flops.__exit__(None, None, None)
        self.peak = _memory(args.device) - self.before


def _memory(device: torch.device, reset: bool = False) -> int:
    """Return the peak of the bytes that are in use; with `reset`, those in use, and begin with that peak anew."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # what measuring has left behind is not in use
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, AttributeError):  # no Linux, or another C library
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Timer(TrainerCallback):
    """Say what a trainer spends its processor time on, by wrapping what it calls; for one run of one trainer."""

    def __init__(self, trainer: Trainer):
        self.spent: dict[str, float] = defaultdict(float)
        self.started: dict[str, float] = {}
        for owner, name, part in (
            (trainer, "get_batch_samples", "loading"),
            (trainer, "_clip_grad_norm", "optimizer"),
            (trainer.accelerator, "backward", "backward"),
        ):
            setattr(owner, name, self.timed(getattr(owner, name), part))
        trainer.model.register_forward_pre_hook(lambda *called: self.begin("forward"))
        trainer.model.register_forward_hook(lambda *called: self.end("forward"))
        trainer.add_callback(self)

    def timed(self, function: Callable, part: str) -> Callable:
        """Return a function whose time counts for a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end(part)

        return call

    def begin(self, part: str) -> None:
        """Begin with a part."""
        self.started[part] = time.process_time()

    def end(self, part: str) -> None:
        """End it."""
        self.spent[part] += time.process_time() - self.started[part]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the loop: what came before it is no step."""
        self.spent.clear()
        self.begin("all")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the update."""
        self.begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it."""
        self.end("optimizer")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out what is left."""
        self.end("all")
        self.steps = state.global_step


def parts_of(runs: Runs, way: str) -> dict[str, float]:
    """Return the milliseconds of a step of a way, by part."""
    trainer = runs.trainer(way)
    timer, begin_row = Timer(trainer), OnlineStage.begin_row
    OnlineStage.begin_row = lambda *args: timer.timed(begin_row, "ours")(*args)
    try:
        trainer.train()
    finally:
        OnlineStage.begin_row = begin_row
    timer.spent["Trainer"] = timer.spent.pop("all") - sum(timer.spent[part] for part in PARTS if part != "Trainer")
    return {part: 1e3 * timer.spent[part] / timer.steps for part in PARTS}


def apart(function: Callable, *args: Any) -> Any:
    """Return what a function returns in a process of its own."""
    context = multiprocessing.get_context("fork")  # it has the data and the model's folder
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*args)))
    child.start()
    found = queue.get()
    child.join()
    return found


def costs_of(runs: Runs, way: str) -> dict[str, float]:
    """Return FLOPs of the loop of a way, and the bytes that it adds at its peak."""
    trainer, loop = runs.trainer(way), Loop()
    trainer.add_callback(loop)
    trainer.train()
    return {"flops": loop.flops.get_total_flops(), "peak_bytes": loop.peak}


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(samples=400, epochs=5, pairs=5, threads=1)
    made.add_argument("--ways", default="whole,alone,without,rounded", help="ways of `prompts`, or lists of them")
    made.add_argument("--layers", type=int, help="a GPT-2 of this depth with random weights")
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--full", action="store_true", help="train all weights; then the way is plain+fast")
    made.add_argument("--bf16", action="store_true", help="Trainer's, for all ways")
    add_adapters(made)
    made.add_argument("--times_only", action="store_true", help="no FLOPs and no memory")
    made.add_argument("--parts", action="store_true", help="what is left of a step, in place of whole runs")
    options = made.parse_args()
    options.lengths, options.same, options.family = None, 1, "gpt2"
    if options.full:
        options.ways = "plain+fast"
    if options.parts:
        options.threads, options.ways = 1, "plain,whole"
    runs = Runs(options)
    names = list(dict.fromkeys(way for name in options.ways.split(",") for way in LISTS.get(name, (name,))))
    settings = {**runs.settings, **({"lora_r": None} if options.full else {})}
    left_out = ("ways", "parts", "times_only", "lengths", "same", "family")
    settings = {key: value for key, value in settings.items() if key not in left_out}
    if options.layers:
        settings["model"] = f"GPT-2 of {options.layers} layers and width {options.width}, random"
    if options.parts:
        compare_parts(runs, names, settings)
        return
    costs = {} if options.times_only else {way: apart(costs_of, runs, way) for way in ("plain", *names)}
    full, times, predicted, steps = [], defaultdict(list), defaultdict(list), defaultdict(list)
    for _ in range(options.pairs):
        for way in ("plain", *names):
            trainer, last = runs.trainer(way), LastHalf()
            trainer.add_callback(last)
            seconds = seconds_of(trainer)
            steps[way].append(last.step_seconds)
            if way == "plain":
                full.append(seconds)
                continue
            times[way].append(seconds / full[-1])
            if getattr(trainer, "report", None) is not None:
                predicted[way].append(trainer.report.plan.predicted_time)
    for way in names:
        row = {"arm": way, "seed": 0, "full_seconds": full, "times": times[way], "predicted": predicted[way]}
        row["steps_of_plain"] = statistics.median(map(truediv, steps[way], steps["plain"]))
        if costs:
            row |= {f"{key}_of_plain": costs[way][key] / costs["plain"][key] for key in costs["plain"]}
            row["peak_bytes"] = costs[way]["peak_bytes"]
        store("exact", settings, row)
    columns = {"steps alone": "steps_of_plain", "FLOPs": "flops_of_plain", "peak memory": "peak_bytes_of_plain"}
    (RESULTS / "exact.md").write_text(tables_of("exact", columns), encoding="utf-8")


def compare_parts(runs: Runs, names: list[str], settings: dict[str, Any]) -> None:
    """Store what is left of a step of each way, the median over rounds, and print a table."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    calls: dict[str, list[float]] = defaultdict(list)
    own = runs.options.layers, runs.options.width
    for _ in range(runs.options.pairs):
        for way in names:
            runs.options.layers, runs.options.width = own
            found[way].append(parts_of(runs, way))
            runs.options.layers, runs.options.width = own[0] or runs.layers, 16
            small = parts_of(runs, way)
            calls[way].append(small["forward"] + small["backward"])
    runs.options.layers, runs.options.width = own
    print(f"| way | {' | '.join(PARTS)} | of forward and backward, calls |\n|{' --- |' * (len(PARTS) + 2)}")
    for way in names:
        row = {part: statistics.median(parts[part] for parts in found[way]) for part in PARTS}
        store(
            "exact_parts",
            settings,
            {"arm": way, "seed": 0, "milliseconds": row, "calls": statistics.median(calls[way])},
        )
        cells = [f"{value:.1f} ({value / sum(row.values()):.1%})" for value in row.values()]
        print(f"| {way} | {' | '.join(cells)} | {statistics.median(calls[way]):.1f} |")


if __name__ == "__main__":
    main()
