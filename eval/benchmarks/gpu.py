"""
What steps cost on a GPU: shapes of models and lengths, and ways of a step, all in one process; steps alone.

    python eval/benchmarks/gpu.py [--data_dir FOLDER --model_name_or_path FOLDER] [--shapes E2E] [--seconds 200]

Shapes have random weights, bfloat16 by autocast, LoRA of r 8 on attention and MLP; ways are those of the benchmark
`prompts`. What counts is a step of the last half of a run, in which nothing is tried out, stored or compiled any more,
relative to the plain one of the same shape, which is measured first; and the memory that the run adds at its peak,
what is stored included. Where a step is of 128 samples, plain training takes them as four batches of 32, since more do
not fit. A way that fails costs its own row; after --seconds no further way begins. --shapes: those whose names match.
--profile: of two steps before those that count, how long the GPU was busy, and which operations took most of its time
and of the processor's (rows to results/gpu_profile.jsonl): what to look at where a way is slow.
Rows go to results/gpu_steps.jsonl, the table to results/gpu_steps.md. --quick: sizes that no claim rests on, on any
machine.
"""

from __future__ import annotations

import gc
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import QUICK, RESULTS, data_and_model, store
from prompts import LastHalf, Runs, parser_of_runs
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities
from transformers import TrainerCallback

from darel_hf.nlg.demo import DemoSettings

LLAMA = "--family llama --layers 16 --width 2048 --vocabulary 32000"
MEDIUM = "--layers 24 --width 1024 --vocabulary 50257"
LONG = "--lengths 512,32 --samples 96 --epochs 3 --batch_size 32"
MANY = "--lengths 512,32 --samples 256 --epochs 3 --batch_size 128"
SHORT = "--epochs 3 --samples 128 --batch_size 32"
FOUR = "plain+per_device_train_batch_size=32+gradient_accumulation_steps=4"
TINY = "--layers 2 --width 64 --samples 16 --batch_size 4 --epochs 2"
#: What is measured, the most telling first: a name, settings, ways, of which the first is what others are relative to.
SHAPES = [
    ("Llama 1B, prompts of 512", f"{LLAMA} {LONG}", "plain device+fast plain+fast recompute device"),
    ("Llama 1B, prompts of 512, 128 samples a step", f"{LLAMA} {MANY}", f"{FOUR} device+fast recompute+fast"),
    ("GPT-2 medium, prompts of 512, 128 samples a step", f"{MEDIUM} {MANY}", f"{FOUR} device+fast"),
    ("GPT-2 medium, E2E", f"{MEDIUM} {SHORT}", "plain device+fast plain+fast device"),
    (
        "GPT-2 medium, E2E, no dropout in attention",
        f"{MEDIUM} {SHORT} --attention_dropout 0",
        "plain device+fast plain+fast",
    ),
    ("GPT-2 medium, E2E, batches of 128", f"{MEDIUM} --epochs 3 --samples 384 --batch_size 128", "plain device+fast"),
    ("GPT-2 medium, prompts of 512", f"{MEDIUM} {LONG}", "plain device+fast plain+torch_compile"),
    ("Llama 1B, eight samples a prompt of 512", f"{LLAMA} {LONG} --same 8", "plain share_1+fast"),
    ("Llama 1B, prompts of 512", f"{LLAMA} {LONG}", "plain+use_liger_kernel"),  # which changes Llama for good: last
]


class Profile(TrainerCallback):
    """Look at the two steps before those that are timed."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to look."""
        if state.global_step == max(state.max_steps // 2 - 2, 0):
            self.looking = profile(activities=[*supported_activities()])
            self.looking.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look no more."""
        if state.global_step == state.max_steps // 2:
            self.looking.stop()

    def found(self) -> dict[str, Any]:
        """Return seconds of a step: how long the GPU was busy, and of what most."""
        events, result = self.looking.key_averages(), {}
        for where in ("device", "cpu"):
            # Kernels have events of their own, and their time stands once more at the operation that has called them.
            own = [event for event in events if (event.device_type == DeviceType.CPU) == (where == "cpu")]
            times = {event.key: getattr(event, f"self_{where}_time_total") / 2e6 for event in own}
            counts = {event.key: event.count / 2 for event in own}
            result[f"{where}_busy_seconds"] = sum(times.values())
            most = sorted(times, key=lambda key: -times[key])[:12]
            result[f"{where}_most"] = [[key[:80], times[key], counts[key]] for key in most]
        return result


def measure(runs: Runs, way: str, look: bool = False) -> dict[str, Any]:
    """Return what a step of a way costs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    started, watch = time.perf_counter(), LastHalf()
    trainer, looked = runs.trainer(way), Profile()
    if look:
        trainer.add_callback(looked)
    trainer.add_callback(watch)
    trainer.train()
    plan = getattr(getattr(trainer, "report", None), "plan", None)
    return {
        "step_seconds": watch.step_seconds,
        "peak_bytes": watch.peak_bytes,
        "steps": watch.steps,
        "run_seconds": time.perf_counter() - started,
        "plan": None if plan is None else str(plan).splitlines(),
        **(looked.found() if look else {}),
    }


def main() -> None:
    made = parser_of_runs()
    made.description = __doc__
    made.add_argument("--seconds", type=float, default=300.0, help="after so many no further way begins")
    made.add_argument("--profile", action="store_true", help="what a step's time goes into; rows to gpu_profile")
    made.add_argument("--shapes", default="", help="an expression that their names match; default: all")
    given, began = made.parse_args(), time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
    small = DemoSettings(warm_up_representations=20, warm_up_epochs=1, width=64, layers=2)
    data, model, _ = data_and_model(given, folder, small)  # once for all shapes
    plain: dict[str, float] = {}
    for name, settings, ways in SHAPES:
        if not re.search(given.shapes, name):
            continue
        words = [*settings.split(), "--data_dir", data, "--model_name_or_path", model, "--threads", str(given.threads)]
        options = made.parse_args([*words, *(TINY.split() if QUICK else []), *([] if QUICK else ["--bf16"])])
        if QUICK and options.lengths:
            options.lengths = "24,6"
        runs = Runs(options)
        for number, way in enumerate(ways.split()):
            if time.perf_counter() - began > given.seconds:
                print(f"{name}, {way}: no time is left")
                continue
            try:
                found = measure(runs, way, given.profile)
            except Exception as error:  # one way less
                print(f"{name}, {way}: {type(error).__name__}: {str(error)[:400]}", flush=True)
                continue
            if number == 0 and name not in plain:
                plain[name] = found["step_seconds"]
            found["steps_of_plain"] = found["step_seconds"] / plain.get(name, float("nan"))
            left_out = ("ways", "quick", "pairs", "seconds", "shapes", "profile")
            kept = {k: v for k, v in runs.settings.items() if k not in left_out and v not in (None, False)}
            store(
                "gpu_profile" if given.profile else "gpu_steps",
                {**kept, "shape": name},
                {"arm": way, "seed": 0, **found},
            )
        if not given.profile:
            write_table()


def write_table() -> None:
    """Write the latest row of each way, by shape and GPU."""
    tables: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in (RESULTS / "gpu_steps.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = row["settings"]["shape"], row["hardware"]["gpu"] or "no GPU"
        tables.setdefault(key, {})[row["arm"]] = row
    parts = []
    for (shape, gpu), ways in tables.items():
        lines = [f"**{shape}** ({gpu})\n", "| way | step, ms | of plain | memory, GiB |", "| --- | --- | --- | --- |"]
        for way, row in ways.items():
            peak, seconds = row["peak_bytes"], row["step_seconds"]
            memory = "-" if peak is None else f"{peak / 2**30:.1f}"
            lines.append(f"| {way} | {1e3 * seconds:.0f} | {row['steps_of_plain']:.2f} | {memory} |")
        parts.append("\n".join(lines) + "\n")
    (RESULTS / "gpu_steps.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
