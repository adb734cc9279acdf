"""
What a step costs when prompts are not computed again: whole runs, interleaved, everything counted.

    python eval/benchmarks/prompts.py [--data_dir FOLDER --model_name_or_path FOLDER] [--ways unpad,reader]
    python eval/benchmarks/prompts.py --layers 6 --width 256 --lengths 512,32 --samples 64 --epochs 3
    python eval/benchmarks/prompts.py --layers 6 --width 256 --lengths 256,64 --same 64 --samples 64 --ways share_1

`plain` is Trainer with LoRA everywhere, `unpad` the same without padding, `share_1`, `share_4` ... the same with
`share_prompts` of that number, `reader` a reader on stored prompts, `device` on such in a GPU's memory, `recompute`
one whose prompts run in every step, `finish_1` a reader whose last epoch trains everywhere, `alora` PEFT's aLoRA on
stored keys and values, `slow` a reader under plain Trainer, `sft_packing` and `sft_padding_free` trl's SFTTrainer with
LoRA everywhere (on a CPU trl says that its rows see each other there: the times are those of its steps). The samples
are all references of a seeded part of the representations, or with --lengths P,C random tokens, every prompt another
or --same samples with each; with --layers and --width the model is a GPT-2 (or --family llama) of that shape with
random weights. Any way but trl's may be followed by settings that it has besides, DAREL's or those of
TrainingArguments: `unpad+last_block+fast_lora`, `reader+fast`, `plain+budget_time=0.5`, `unpad+torch_compile`. Times
are relative to the plain run of the same round; so are steps alone, the last half of each run's, where nothing is
tried out, stored or compiled any more. Beside them, of one batch: FLOPs, and bytes that are saved for the backward
pass, relative to plain; bytes that are stored for all prompts; on a GPU the memory that the loop adds at its peak,
what is stored included. A row a way goes to results/prompts.jsonl, all tables to results/prompts.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from common import RESULTS, Task, parser, seconds_of, store
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.adapters import completion_lora
from darel_hf.comparison.arms import DAREL, parse_setting
from darel_hf.config import ACCELERATOR_FACTS
from darel_hf.nlg.task import tokenize_pairs

READERS: dict[str, dict[str, Any]] = {
    "reader": {"prompt_cache": "ram"},
    "device": {"prompt_cache": "device"},
    "disk": {"prompt_cache": "disk"},
    "recompute": {"prompt_cache": "recompute"},
    "finish_1": {"prompt_cache": "ram", "finish_epochs": 1},
    "alora": {"prompt_cache": "ram"},
    "slow": {},
}
SFT = {"sft_packing": {"packing": True}, "sft_padding_free": {"padding_free": True, "max_length": None}}
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": "all-linear"}


class LastHalf(TrainerCallback):
    """Time the last half of the steps, and see how much memory the loop adds to a GPU's."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to look at memory."""
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to look at the clock."""
        if state.global_step == state.max_steps // 2:
            self.started, self.steps = self._now(args.device), state.max_steps - state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what there was."""
        self.step_seconds = (self._now(args.device) - self.started) / self.steps
        self.peak_bytes = torch.cuda.max_memory_allocated() - self.before if args.device.type == "cuda" else None

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def add_adapters(made: argparse.ArgumentParser) -> None:
    """Add the options of adapters."""
    made.add_argument("--lora_r", type=int, default=8)
    made.add_argument("--targets", help="layers with adapters, with commas between; default: attention and MLP")


def targets_of(options: argparse.Namespace) -> list[str] | str:
    """Return the layers that have adapters, as PEFT takes them."""
    return options.targets.split(",") if options.targets else TARGETS[options.family]


class Runs:
    """Trainers of all ways, on the same rows."""

    def __init__(self, options: Any):
        self.options, self.folder = options, Path(tempfile.mkdtemp(prefix="darel-bench-"))
        self.task = Task(options, by_representation=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.task.args.model_name_or_path)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if options.lengths:
            prompt, completion = map(int, options.lengths.split(","))
            random = torch.Generator().manual_seed(0)
            shape = (options.samples, prompt + completion)
            tokens = torch.randint(5, len(self.tokenizer), shape, generator=random)
            tokens[:, :prompt] = tokens[torch.arange(options.samples) // options.same * options.same, :prompt]
            ids = tokens.tolist()
            rows = [
                {"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * prompt + row[prompt:]}
                for row in ids
            ]
            self.data = datasets.Dataset.from_list(rows)
        else:
            self.data = tokenize_pairs(self.task.pairs, self.tokenizer, 256).remove_columns(["mr", "ref"])
        self.collator, self.made = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100), 0

    def model(self, way: str) -> torch.nn.Module:
        """Return a model with adapters on attention and MLP, of the kind that a way trains."""
        way = way.partition("+")[0]
        rank = self.options.lora_r
        settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
        settings["target_modules"] = targets_of(self.options)
        config = LoraConfig(**settings) if way not in READERS else ReaderLoraConfig(**settings)
        if way == "alora":
            config = completion_lora(LoraConfig(**settings), self.data, self.tokenizer)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where billions are drawn in no time
            base = self.base()
        return base if getattr(self.options, "full", False) else get_peft_model(base, config)

    def base(self) -> torch.nn.Module:
        """Return a model without adapters: the one that is given, or one with random weights."""
        width, layers = self.options.width, self.options.layers
        tokens = getattr(self.options, "vocabulary", None) or len(self.tokenizer)
        if self.options.family == "llama":
            shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
            heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256)}
            return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, **shape, **heads))
        if layers:
            shape = {"n_layer": layers, "n_embd": width, "n_head": max(width // 64, 4)}
            dropout = getattr(self.options, "attention_dropout", None)  # GPT-2's own keeps kernels for rows away
            shape |= {} if dropout is None else {"attn_pdrop": dropout}
            return GPT2LMHeadModel(GPT2Config(vocab_size=tokens, n_positions=1024, **shape))
        return AutoModelForCausalLM.from_pretrained(self.task.args.model_name_or_path)

    @property
    def settings(self) -> dict[str, Any]:
        """What was run."""
        targets = targets_of(self.options)
        named = {"targets": targets if isinstance(targets, str) else ",".join(targets)}
        return {**self.task.settings, "lora_r": self.options.lora_r, **named}

    @property
    def layers(self) -> int:
        """How many the model has that is given."""
        return AutoConfig.from_pretrained(self.task.args.model_name_or_path).num_hidden_layers

    def trainer(self, way: str) -> Trainer:
        """Return a fresh trainer of a way."""
        self.made += 1
        settings = {
            "output_dir": str(self.folder / f"run-{self.made}"),
            "num_train_epochs": self.options.epochs,
            "per_device_train_batch_size": self.options.batch_size,
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "bf16": self.options.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "seed": 0,
        }
        if way in SFT:
            from trl import SFTConfig, SFTTrainer

            args = SFTConfig(**{"max_length": 1024, **settings, **SFT[way]}, completion_only_loss=True)
            columns = {"input_ids": self.data["input_ids"]}
            columns["completion_mask"] = [[int(x != -100) for x in row] for row in self.data["labels"]]
            data = datasets.Dataset.from_dict(columns)
            return SFTTrainer(self.model(way), args=args, train_dataset=data, processing_class=self.tokenizer)
        name, *besides = way.split("+")
        more = dict(
            parse_setting(one if "=" in one else f"{one}={'bf16' if one == 'base_precision' else 'true'}", "ways")
            for one in besides
        )
        settings |= {key: value for key, value in more.items() if key not in DAREL}
        more = {key: value for key, value in more.items() if key in DAREL}
        cls: Any = Trainer if name in ("plain", "slow") and not more else DarelTrainer
        darel = {"plain": {}, **READERS}.get(name, {"unpad": True})
        if name.startswith("share_"):
            darel = {"share_prompts": int(name.removeprefix("share_"))}
        darel = {**darel, **more}
        return cls(
            model=self.model(way),
            args=TrainingArguments(**settings),
            train_dataset=self.data,
            data_collator=self.collator,
            **({"darel": DarelConfig(**darel)} if cls is DarelTrainer else {}),
        )

    def one_batch(self, way: str) -> dict[str, float]:
        """Return FLOPs of a step on one batch, and the bytes that it saves for its backward pass."""
        trainer = self.trainer(way)
        batch = self.collator([self.data[i] for i in range(min(self.options.batch_size, len(self.data)))])
        batch = trainer._prepare_inputs(dict(batch))
        trainer.model.to(trainer.args.device).train()
        accelerators, stored = [], 0
        if isinstance(trainer, DarelTrainer):
            from darel_hf.accelerators import ACCELERATORS

            accelerators = [ACCELERATORS[name](trainer) for name in trainer.darel.accelerators]
            assert all(a.why_not(lambda: batch) is None for a in accelerators)
            inputs = batch
            for accelerator in accelerators:
                accelerator.attach()
                inputs = accelerator.transform(inputs)  # fills
        saved: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as flops, trainer.accelerator.autocast():
            inputs = batch
            for accelerator in accelerators:
                inputs = accelerator.transform(inputs)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss = trainer.model(**inputs).loss
            loss.backward()
        if way.partition("+")[0] in ("reader", "device", "disk", "alora"):
            stored = self.stored(accelerators[0].base.row_bytes)
        for accelerator in accelerators:
            accelerator.detach()
        return {"flops": flops.get_total_flops(), "saved_bytes": sum(saved.values()), "stored_bytes": stored}

    def stored(self, row_bytes: int) -> int:
        """Return the bytes that all distinct prompts take."""
        prompts = {tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in self.data}
        return sum(map(len, prompts)) * row_bytes


def parser_of_runs() -> argparse.ArgumentParser:
    """Return the parser of what [`Runs`] takes."""
    made = parser(__doc__)
    made.set_defaults(samples=200, epochs=5, pairs=5, threads=1)
    made.add_argument("--ways", default="unpad,reader,recompute")
    made.add_argument("--lengths", help="tokens of prompts and completions, random; default: those of the texts")
    made.add_argument("--same", type=int, default=1, help="samples of each random prompt")
    made.add_argument("--layers", type=int, help="a GPT-2 of this depth with random weights")
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--vocabulary", type=int, help="of such a model; default: that of the tokenizer")
    made.add_argument("--family", choices=sorted(TARGETS), default="gpt2", help="of a model with random weights")
    made.add_argument("--attention_dropout", type=float, help="of such a GPT-2; default: its own, 0.1")
    made.add_argument("--bf16", action="store_true")
    add_adapters(made)
    return made


def main() -> None:
    runs = Runs(parser_of_runs().parse_args())
    options = runs.options
    names, full = options.ways.split(","), []
    times: dict[str, list[float]] = {name: [] for name in names}
    predicted: dict[str, list[float]] = {name: [] for name in names}
    costs = {}
    for way in ("plain", *names):  # warms up, too
        with suppress(ImportError, AssertionError):  # torch counts no heads that share keys
            # What is chosen while training is prepared (`fast`, budgets) is not known of a batch.
            known = way not in (*SFT, "slow") and set(way.split("+")[1:]) <= set(ACCELERATOR_FACTS)
            costs[way] = runs.one_batch(way) if known else {}
    last: dict[str, list[LastHalf]] = {name: [] for name in ("plain", *names)}
    for _ in range(options.pairs):
        for name in ("plain", *names):
            trainer = runs.trainer(name)
            last[name].append(LastHalf())
            trainer.add_callback(last[name][-1])
            seconds = seconds_of(trainer)
            if name == "plain":
                full.append(seconds)
                continue
            times[name].append(seconds / full[-1])
            if getattr(trainer, "report", None) is not None:
                predicted[name].append(trainer.report.plan.predicted_time)
    settings = runs.settings
    usual = (("same", 1), ("family", "gpt2"), ("attention_dropout", None))
    settings = {key: value for key, value in settings.items() if key != "ways" and (key, value) not in usual}
    if options.layers:
        kind = {"gpt2": "GPT-2", "llama": "Llama"}[options.family]
        settings["model"] = f"{kind} of {options.layers} layers and width {options.width}, random"
    if options.lengths:
        settings["data"] = "random tokens"
    if "WORLD_SIZE" in os.environ:  # by a launcher: what DistributedDataParallel adds is in all times
        settings["processes"] = int(os.environ["WORLD_SIZE"])
    for name in names:
        row = {"arm": name, "seed": 0, "full_seconds": full, "times": times[name], "predicted": predicted[name]}
        pairs = list(zip(last[name], last["plain"], strict=True))
        row["steps_of_plain"] = statistics.median(one.step_seconds / plain.step_seconds for one, plain in pairs)
        row["plain_step_seconds"] = statistics.median(plain.step_seconds for plain in last["plain"])
        if last[name][0].peak_bytes is not None:
            row["peak_of_plain"] = statistics.median(one.peak_bytes / plain.peak_bytes for one, plain in pairs)
            row["plain_peak_bytes"] = last["plain"][0].peak_bytes
        if costs.get(name):
            row |= {f"{key}_of_plain": costs[name][key] / costs["plain"][key] for key in ("flops", "saved_bytes")}
            row["stored_bytes"] = costs[name]["stored_bytes"]
        store("prompts", settings, row)
    shares = {"steps alone": "steps_of_plain", "FLOPs": "flops_of_plain", "saved for backward": "saved_bytes_of_plain"}
    shares["peak on the GPU"] = "peak_of_plain"
    (RESULTS / "prompts.md").write_text(tables_of("prompts", shares, stored=True), encoding="utf-8")


def tables_of(name: str, shares: dict[str, str], stored: bool = False) -> str:
    """Return a table for all settings that there are rows of; `shares`: results by column; the latest row counts."""
    tables: dict[str, dict[str, Any]] = {}
    all_settings: dict[str, dict[str, Any]] = {}
    for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gpu = {"gpu": row["hardware"]["gpu"]} if row["hardware"]["gpu"] else {}
        key = json.dumps(settings := {**row["settings"], **gpu}, sort_keys=True)
        tables.setdefault(key, {})[row["arm"]] = row
        all_settings.setdefault(key, settings)
    parts = []
    for key, rows in tables.items():
        columns = ["way", "time, median (span)", "as fast", "predicted", *shares, *(["stored"] if stored else [])]
        lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
        for arm, row in rows.items():
            time = statistics.median(row["times"])
            cells = [arm, f"{time:.3f} ({min(row['times']):.3f} to {max(row['times']):.3f})", f"{1 / time:.2f}"]
            cells.append(f"{statistics.median(row['predicted']):.3f}" if row["predicted"] else "-")
            cells += [f"{row[share]:.2f}" if share in row else "-" for share in shares.values()]
            if stored:
                cells.append(f"{row['stored_bytes'] / 2**20:.1f} MiB" if row.get("stored_bytes") else "-")
            lines.append(f"| {' | '.join(cells)} |")
        said = ", ".join(
            f"{setting} {value}" for setting, value in all_settings[key].items() if value not in (None, False)
        )
        parts.append("\n".join(lines) + f"\n\nSettings: {said}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
