"""
Cheaper scores: what an offline pass costs, and whether it still ranks samples the same.

    python eval/benchmarks/scores.py [--data_dir FOLDER --model_name_or_path FOLDER] [--samples 2000]

Each way scores the same samples; the first is what `DarelTrainer` does by default (eval mode, batches sorted by
length, labelled positions only through the head, adapters that are the identity switched off, what several samples
begin with computed once, in one row a batch); each other one changes what its name says, or is of a reader, whose
prompts the pass stores for training. Cost is processor time (on a GPU: time) of the pass relative to an epoch of plain
training, interleaved, medians of three. Spearman's correlation is to the losses of the first. The samples are all
references of a seeded part of the representations, as in the whole training set. A row goes to results/scores.jsonl,
the table to scores.md.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import RESULTS, Task, parser, store
from scipy.stats import spearmanr
from torch import nn

from darel_hf import DarelConfig
from darel_hf.accelerators import PromptCache, share_rows
from darel_hf.data import CarryIds, add_ids
from darel_hf.scoring import BatchScorer, score_dataset, share_prompts


def with_layers(model: nn.Module, fraction: float) -> nn.Module:
    """Return a copy of a GPT-2 with the first layers only: early exit, through the last norm and the head."""
    made = copy.deepcopy(model)
    layers = made.transformer.h
    made.transformer.h = layers[: max(1, round(fraction * len(layers)))]
    made.config.n_layer = len(made.transformer.h)
    return made


def main() -> None:
    made = parser(__doc__)
    task = Task(made.parse_args(), by_representation=True)
    trainer = task.trainer()
    columns = trainer.train_dataset.select_columns(["input_ids", "attention_mask", "labels"])
    dataset = add_ids(columns, np.arange(len(columns)))
    collator = CarryIds(trainer.data_collator)
    plain = copy.deepcopy(trainer.model).unload()  # the base model, as if there had never been adapters
    device = trainer.args.device.type
    bf16 = functools.partial(torch.autocast, device, torch.bfloat16)
    clock = time.process_time if device == "cpu" else time.perf_counter  # scores are read, so a GPU is waited for

    def way(
        scored: nn.Module,
        autocast: Callable = contextlib.nullcontext,
        whole_head: bool = False,
        share: Callable | None = share_rows,
        **options: Any,
    ) -> Callable[[], Any]:
        scorer = BatchScorer(scored, autocast=autocast)
        if whole_head:
            scorer.reading.head = None

        def score() -> Any:
            return score_dataset(
                scorer, dataset, collator, trainer._prepare_inputs, progress_bar=False, share=share, **options
            )

        return score

    reader = task.trainer(DarelConfig(prompt_cache="ram"), lora_on="reader")
    cache = PromptCache(reader)
    cache.why_not(lambda: collator.collator([columns[i] for i in range(4)]))
    known = way(reader.model, share=functools.partial(share_rows, accelerators=[cache]))

    def stored() -> Any:
        cache.detach()
        cache.store = None
        return known()

    batch = task.options.batch_size
    ways = {
        "default": way(plain),
        "keys and values of prompts copied": way(plain, share=share_prompts),
        "with adapters": way(trainer.model),
        "so, and keys and values copied": way(trainer.model, share=share_prompts),
        "a reader, keys and values copied": way(reader.model, share=share_prompts),
        "a reader, prompts stored for training": stored,
        "a reader, prompts stored before": known,
        "every prompt for each sample": way(plain, share=None),
        f"so, and batches of {batch}": way(plain, share=None, max_rows=batch),
        "so, and whole logits": way(plain, whole_head=True, share=None),
        "half of the positions a batch": way(plain, max_tokens=512),
        "twice the positions a batch": way(plain, max_tokens=2048),
        "bfloat16": way(plain, bf16),
        "two thirds of the layers": way(with_layers(plain, 2 / 3)),
        "half of the layers": way(with_layers(plain, 1 / 2)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("epoch", *ways)}
    found = {}
    for _ in range(3):
        runs = {"epoch": task.trainer(num_train_epochs=1).train, **ways}
        for name, run in runs.items():
            started = clock()
            found[name] = run()
            seconds[name].append(clock() - started)
    epoch = statistics.median(seconds["epoch"])
    rows = {
        name: {
            "epochs": statistics.median(seconds[name]) / epoch,
            "spearman": float(spearmanr(found["default"].losses, found[name].losses).statistic),
        }
        for name in ways
    }
    store("scores", task.settings, {"epoch_seconds": seconds["epoch"], "ways": rows})
    lines = ["| way | cost, training epochs | Spearman to default |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['epochs']:.3f} | {row['spearman']:.4f} |" for name, row in rows.items()]
    conditions = ", ".join(f"{key} {value}" for key, value in task.settings.items())
    (RESULTS / "scores.md").write_text("\n".join(lines) + f"\n\nSettings: {conditions}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
