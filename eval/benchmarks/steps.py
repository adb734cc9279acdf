"""
The cost of a step: plain, scored and then trained, from a refreshed ledger, and with one forward pass.

    python eval/benchmarks/steps.py [--layers 6 --width 768] [--backends eager,inductor] [--bf16] [--quick]

A GPT-2 of the given shape with random weights (cost does not depend on them), full and with LoRA, on random tokens.
For each fraction A the candidate batch has `rows` rows, A of which are trained on. Ways of a step, all interleaved,
medians over rounds, relative to the plain training step on the whole candidate batch of the same backend:

    score      a forward pass in eval mode without gradients, then a training step on the kept rows: f + A at best
    ledger     a training step on the kept rows by remembered scores, two times of three: f / 3 + A at best
    sliced     one forward pass over the candidates, a backward pass over the kept rows: f + A (1 - f) at best

f, the forward pass in train mode over a training step, is measured in the same rounds; what scores is never compiled.
Beside time: FLOPs as FlopCounterMode counts them (eager; `sliced` from the same counts), and what a step on the kept
rows saves for its backward pass, relative to plain (`sliced` saves what plain saves).
A row a setting goes to results/steps.jsonl; steps.md and steps.png are made of them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, add_quick, latest_rows, store
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from darel_hf.accelerators.sliced import SlicedStep
from darel_hf.scoring import BatchScorer
from darel_hf.scoring.losses import per_sample_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ETA = 3  # of `ledger`: every third epoch is scored afresh


def build(options: argparse.Namespace, lora: bool) -> torch.nn.Module:
    """Return the model, in train mode, without dropout: masks are the only thing that `sliced` would not share."""
    config = GPT2Config(
        n_layer=options.layers, n_head=options.width // 64, n_embd=options.width, vocab_size=options.vocabulary,
        n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if lora:
        adapters = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
    return model.train().to(DEVICE)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Ways:
    """The ways of a step for one model, backend and batch; each is called with the number of kept rows."""

    def __init__(self, model: torch.nn.Module, backend: str, inputs: dict[str, torch.Tensor], bf16: bool):
        self.model, self.inputs = model, inputs
        self.autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=bf16)
        self.scorer = BatchScorer(model, autocast=self.autocast)
        self.one = SlicedStep(model, backend=backend)

        def losses(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return per_sample_losses(model(input_ids=ids).logits, labels, shift=True, dense=True).losses

        self.losses = torch.compile(losses, dynamic=True) if backend == "inductor" else losses

    def train(self, rows: int) -> None:
        with self.autocast():
            losses = self.losses(self.inputs["input_ids"][:rows], self.inputs["labels"][:rows])
        losses.mean().backward()

    def forward(self, rows: int) -> None:
        with self.autocast():
            self.losses(self.inputs["input_ids"][:rows], self.inputs["labels"][:rows])

    def score(self, rows: int) -> None:
        self.scorer(self.inputs).losses.argsort()
        self.train(rows)

    def sliced(self, rows: int) -> None:
        with self.autocast():
            samples = self.one(self.inputs)
        kept = samples.losses.detach().argsort(descending=True)[:rows].tolist()
        self.one.keep(kept)
        samples.losses[kept].mean().backward()


def timed(calls: dict[Any, Callable[[], None]], rounds: int, model: torch.nn.Module) -> dict[Any, float]:
    """Return the median seconds of each call, all of them interleaved."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            started = clock()
            call()
            if number:  # the first round warms up and compiles
                seconds[key].append(clock() - started)
            model.zero_grad(set_to_none=True)
    return {key: statistics.median(values) for key, values in seconds.items()}


def flops(call: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def saved_bytes(call: Callable[[], None], model: torch.nn.Module) -> int:
    """Return the bytes of activations that are saved for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        call()
    return sum(size for pointer, size in found.items() if pointer not in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=16, help="of a candidate batch")
    parser.add_argument("--lengths", default="32,128", help="tokens of a row")
    parser.add_argument("--keeps", default="0.125,0.25,0.5,0.75,1.0")
    parser.add_argument("--backends", default="eager,inductor")
    parser.add_argument("--tuning", default="lora,full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    add_quick(parser)
    parser.add_argument("--name", default="steps", help="of the files of results")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.vocabulary, options.lengths = 2, 64, 500, "16"
        options.keeps, options.backends, options.rounds = "0.5,1.0", "eager", 1
    torch.set_num_threads(options.threads)
    what_is_run = ("lengths", "keeps", "backends", "tuning", "name", "quick")
    settings = {k: v for k, v in vars(options).items() if k not in what_is_run and v is not False}
    for tuning in options.tuning.split(","):
        for backend in options.backends.split(","):
            for length in map(int, options.lengths.split(",")):
                torch.manual_seed(0)
                torch._dynamo.reset()
                ids = torch.randint(1, options.vocabulary, (options.rows, length)).to(DEVICE)
                model, inputs = build(options, tuning == "lora"), {"input_ids": ids, "labels": ids.clone()}
                ways = Ways(model, backend, inputs, options.bf16)
                for row in measured(ways, [float(keep) for keep in options.keeps.split(",")], options):
                    row = {"arm": f"{tuning} {backend} {length} {row['keep']}", "seed": 0, **row}
                    row |= {"tuning": tuning, "backend": backend, "length": length}
                    store(options.name, settings, row)
    rows = [row for rows in latest_rows(options.name, settings).values() for row in rows]
    (RESULTS / f"{options.name}.md").write_text(markdown(rows, settings), encoding="utf-8")
    plot(rows, RESULTS / f"{options.name}.png")


def measured(ways: Ways, keeps: list[float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row of results for each fraction."""
    everything = options.rows
    calls: dict[Any, Callable[[], None]] = {
        "plain": lambda: ways.train(everything),
        "forward": lambda: ways.forward(everything),
    }
    for keep in keeps:
        kept = max(1, round(keep * everything))
        for way in ("score", "train", "sliced"):
            calls[way, keep] = lambda way=way, kept=kept: getattr(ways, way)(kept)
    seconds = timed(calls, options.rounds, ways.model)
    plain, forward = seconds["plain"], seconds["forward"]
    f = forward / plain
    eager = Ways(ways.model, "eager", ways.inputs, options.bf16)
    eager.scorer(eager.inputs)  # its first call looks whether the model's own loss is the same
    plain_flops, forward_flops = flops(lambda: eager.train(everything)), flops(lambda: eager.forward(everything))
    scoring_flops = flops(lambda: eager.scorer(eager.inputs))
    saved = saved_bytes(lambda: eager.train(everything), eager.model)
    rows = []
    for keep in keeps:
        kept = max(1, round(keep * everything))
        subset_flops = flops(lambda kept=kept: eager.train(kept))
        share = kept / everything
        backward_flops = (plain_flops - forward_flops) * share
        subset_saved = saved_bytes(lambda kept=kept: eager.train(kept), eager.model)
        ledger = (seconds["score", keep] + (ETA - 1) * seconds["train", keep]) / ETA
        rows.append(
            {
                "keep": keep,
                "f": f,
                "plain_seconds": plain,
                "score": seconds["score", keep] / plain,
                "ledger": ledger / plain,
                "sliced": seconds["sliced", keep] / plain,
                "limit_score": f + share,
                "limit_ledger": f / ETA + share,
                "limit_sliced": f + share * (1 - f),
                "flops_score": (scoring_flops + subset_flops) / plain_flops,
                "flops_sliced": (forward_flops + backward_flops) / plain_flops,
                "saved_score": subset_saved / saved,
            }
        )
        eager.model.zero_grad(set_to_none=True)
    return rows


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Return the table of all settings."""
    names = ["tuning", "backend", "length", "keep", "f", "score", "limit_score", "ledger", "limit_ledger", "sliced"]
    names += ["limit_sliced", "flops_score", "flops_sliced", "saved_score"]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in rows:
        cells = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items())
    return "\n".join(lines) + f"\n\nTimes relative to the plain step of the same backend. Settings: {conditions}.\n"


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    """Draw the time of each way over A, with the limits as dotted lines, a panel a setting."""
    from matplotlib.figure import Figure

    panels: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["tuning"], row["backend"], row["length"]), []).append(row)
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (panel, of_panel) in zip(grid.flat, panels.items(), strict=False):
        of_panel.sort(key=lambda row: row["keep"])
        keeps = [row["keep"] for row in of_panel]
        for way, color in (("score", "tab:red"), ("ledger", "tab:gray"), ("sliced", "tab:blue")):
            axes.plot(keeps, [row[way] for row in of_panel], "o-", color=color, label=way, markersize=4)
            axes.plot(keeps, [row[f"limit_{way}"] for row in of_panel], ":", color=color)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set_title(f"{panel[0]}, {panel[1]}, {panel[2]} tokens", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("A, fraction of rows kept")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("time of a step / plain")
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
