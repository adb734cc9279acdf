"""
What DPO costs when the prompt of a pair is computed once: whole runs of trl's trainer, interleaved.

    python eval/benchmarks/preferences.py [--layers 6 --width 256 --lengths 256,64 --samples 48] [--ways shared]

`plain` is trl's DPOTrainer with LoRA on attention and MLP, `shared` the same within `shared_prefixes`, its trial of
the first batch counted, and `padding_free` trl's own (on a CPU its rows see each other: the times are those of its
steps). Pairs are random tokens; the answers of a pair differ in length by up to a half. A row a way goes to
results/preferences.jsonl, the table to results/preferences.md.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from common import RESULTS, parser, seconds_of, store
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from darel_hf import shared_prefixes

VOCABULARY = 8192


class Runs:
    """Trainers of all ways, on the same pairs."""

    def __init__(self, options: Any):
        self.options, self.folder, self.made = options, Path(tempfile.mkdtemp(prefix="darel-bench-")), 0
        vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
        prompt, answer = map(int, options.lengths.split(","))
        random = torch.Generator().manual_seed(0)

        def text(length: int) -> str:
            return " ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (length,), generator=random).tolist())

        def length() -> int:
            return int(torch.randint(answer // 2, answer + 1, (1,), generator=random))

        rows = [(text(prompt), text(length()), text(length())) for _ in range(options.samples)]
        columns = ("prompt", "chosen", "rejected")
        self.data = datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])

    def trainer(self, way: str) -> DPOTrainer:
        """Return a fresh trainer of a way."""
        self.made += 1
        options, size = self.options, sum(map(int, self.options.lengths.split(",")))
        shape = {"n_layer": options.layers, "n_embd": options.width, "n_head": options.width // 64}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=2 * size, **shape)
        args = DPOConfig(
            output_dir=str(self.folder / f"run-{self.made}"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            max_length=2 * size,
            padding_free=way == "padding_free",
            gradient_checkpointing=False,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            bf16=options.bf16,
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM")
        model = GPT2LMHeadModel(config)
        return DPOTrainer(
            model=model, args=args, train_dataset=self.data, processing_class=self.tokenizer, peft_config=lora
        )

    def seconds(self, way: str) -> float:
        """Return the seconds of a whole run."""
        trainer = self.trainer(way)
        with shared_prefixes(trainer.model) if way == "shared" else contextlib.nullcontext():
            return seconds_of(trainer)


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(samples=48, epochs=1, pairs=5, threads=1, batch_size=4)
    made.add_argument("--ways", default="shared")
    made.add_argument("--lengths", default="256,64", help="tokens of prompts and answers")
    made.add_argument("--layers", type=int, default=6)
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--bf16", action="store_true")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    runs, names = Runs(options), options.ways.split(",")
    full, times = [], {name: [] for name in names}
    for _ in range(options.pairs):
        full.append(runs.seconds("plain"))
        for name in names:
            times[name].append(runs.seconds(name) / full[-1])
    settings = {
        key: getattr(options, key) for key in ("lengths", "samples", "epochs", "batch_size", "layers", "width")
    }
    settings["threads"] = options.threads
    settings |= {"bf16": True} if options.bf16 else {}
    for name in names:
        store("preferences", settings, {"arm": name, "seed": 0, "full_seconds": full, "times": times[name]})
    lines = ["| way | time, median (span) | settings |", "| --- | --- | --- |"]
    rows = map(json.loads, (RESULTS / "preferences.jsonl").read_text(encoding="utf-8").splitlines())
    for row in {(row["arm"], json.dumps([row["settings"], row["hardware"]["gpu"]])): row for row in rows}.values():
        said = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        said += f", {row['hardware']['gpu']}" if row["hardware"]["gpu"] else ""
        span = f"{min(row['times']):.3f} to {max(row['times']):.3f}"
        lines.append(f"| {row['arm']} | {statistics.median(row['times']):.3f} ({span}) | {said} |")
    (RESULTS / "preferences.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
