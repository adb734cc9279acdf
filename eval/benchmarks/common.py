"""What the benchmarks share: the task, the record of the conditions, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.nlg.corpus import TASK, make_corpus
from darel_hf.nlg.demo import DemoSettings, warm_up
from darel_hf.nlg.task import NLGArguments, group_references, load_model, read_pairs, tokenize_pairs

#: Quick runs show that everything runs; no claim rests on them, and they leave the rows of results alone.
QUICK = "--quick" in sys.argv
RESULTS = Path("outputs/benchmarks") if QUICK else Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data_dir", help="folder with the E2E files; default: the generated corpus")
    made.add_argument("--model_name_or_path", help="base model; default: the demo's, warmed up shortly")
    made.add_argument("--samples", type=int, default=1000, help="training pairs, the first of a seeded shuffle")
    made.add_argument("--epochs", type=int, default=2)
    made.add_argument("--batch_size", type=int, default=8)
    made.add_argument("--pairs", type=int, default=3, help="interleaved pairs of runs")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    add_quick(made)
    return made


def add_quick(made: argparse.ArgumentParser) -> None:
    """Add the option that all benchmarks have."""
    made.add_argument("--quick", action="store_true", help="show that it runs, in a minute; results to outputs/")


def data_and_model(options: argparse.Namespace, folder: Path, sizes: DemoSettings) -> tuple[str, str, dict[str, str]]:
    """Return the folders of data and base model, made where none is given, and what a row calls them."""
    data, model = options.data_dir, options.model_name_or_path
    names = {
        "data": "generated corpus" if data is None else Path(data).name,
        "model": "demo model" if model is None else Path(model).name,
    }
    if data is None:
        make_corpus(data := str(folder / "data"), task=TASK)
    if model is None:
        texts = [pair["ref"] for pair in read_pairs(Path(data) / "trainset.csv")]
        warm_up(Path(model := str(folder / "model")), sizes, texts)
    return data, model, names


class Task:
    """LoRA fine-tuning on E2E or the generated corpus, made anew for every run."""

    def __init__(self, options: argparse.Namespace, by_representation: bool = False):
        self.options = options
        if options.quick:
            options.samples, options.epochs, options.pairs = 80, 1, 1
        torch.set_num_threads(options.threads)
        self.folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
        sizes = DemoSettings(warm_up_representations=20 if options.quick else 100, warm_up_epochs=1)
        data, model, self.names = data_and_model(options, self.folder, sizes)
        self.args = NLGArguments(model_name_or_path=model, data_dir=data)
        pairs = read_pairs(Path(data) / "trainset.csv")
        parts = [[pair] for pair in pairs]
        if by_representation:  # all references of a representation, or none: as in the whole training set
            parts = [[{"mr": mr, "ref": text} for text in texts] for mr, texts in group_references(pairs).items()]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
        self.pairs = [pair for i in order for pair in parts[i]][: options.samples]
        self.runs = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What was run: the options, with names in place of paths."""
        options = {k: v for k, v in vars(self.options).items() if k not in ("data_dir", "model_name_or_path", "quick")}
        return {
            **options,
            **self.names,
            "lora_r": self.args.lora_r,
            "seed": 0,
        }

    def trainer(
        self,
        darel: DarelConfig | None = None,
        cls: type[Trainer] | None = None,
        lora_on: str | None = None,
        **settings: Any,
    ) -> Trainer:
        """Return a fresh trainer; plain if `darel` is None."""
        self.runs += 1
        model, tokenizer = load_model(replace(self.args, lora_on=lora_on or self.args.lora_on))
        cls = cls or (Trainer if darel is None else DarelTrainer)
        return cls(
            model=model,
            args=TrainingArguments(
                **{
                    "output_dir": str(self.folder / f"run-{self.runs}"),
                    "num_train_epochs": self.options.epochs,
                    "per_device_train_batch_size": self.options.batch_size,
                    "learning_rate": 2e-4,
                    "logging_steps": 50,
                    "save_strategy": "no",
                    "report_to": "none",
                    "disable_tqdm": True,
                    "dataloader_pin_memory": False,
                    "seed": 0,
                    **settings,
                }
            ),
            train_dataset=tokenize_pairs(self.pairs, tokenizer, 256),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            **({} if darel is None else {"darel": darel}),
        )


def training_arguments(
    folder: Path, epochs: float, seed: int, options: argparse.Namespace, **settings: Any
) -> TrainingArguments:
    """Return what all runs share that quality is measured of."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=getattr(options, "gradient_accumulation_steps", None) or 1,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.01,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
        dataloader_pin_memory=False,
        **{"learning_rate": options.learning_rate, "bf16": options.bf16, **settings},
    )


def seconds_of(trainer: Trainer) -> float:
    """Train and return the seconds it took, everything counted."""
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def current_commit() -> str:
    """Return the commit that is checked out, with a mark if the package differs from it."""
    commit, changes = (
        subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "../../darel_hf"])
    )
    return commit + ("+changes" if changes else "")


COMMIT = current_commit()  # of the code that runs: the folder may have gone on by the time a row is stored


def conditions(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a number needs beside it: settings, hardware, versions, commit."""
    packages = ("darel_hf", "torch", "transformers", "peft", "accelerate", "sacrebleu", "nltk")
    return {
        "settings": settings,
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {name: version(name) for name in packages},
        "commit": COMMIT,
        "date": time.strftime("%Y-%m-%d"),
    }


def latest_rows(name: str, settings: dict[str, Any], **results: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the stored rows of these settings and results by arm; the latest of an arm and seed counts."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if settings.items() <= row["settings"].items() and results.items() <= row.items():
            found[row["arm"], row["seed"]] = row
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in found.values():
        by_arm.setdefault(row["arm"], []).append(row)
    return by_arm


def has_row(name: str, settings: dict[str, Any], arm: str, seed: int) -> bool:
    """Whether the results of an arm and seed are stored already."""
    stored = latest_rows(name, settings) if (RESULTS / f"{name}.jsonl").exists() else {}
    return any(row["seed"] == seed for row in stored.get(arm, []))


def store(name: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Append one row to `results/<name>.jsonl` and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    row = {"benchmark": name, **results, **conditions(settings)}
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({"benchmark": name, **results}, indent=2))
