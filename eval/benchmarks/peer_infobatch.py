"""
InfoBatch's own code beside ours: quality and time of a plain loop with and without it, on the task of `quality`.

    git clone https://github.com/NUS-HPC-AI-Lab/InfoBatch
    python eval/benchmarks/peer_infobatch.py --infobatch InfoBatch --data_dir FOLDER --model_name_or_path FOLDER

It runs in no Trainer: it replaces the iterator of torch's `DataLoader` for the whole process, and its sampler changes
length between epochs. So both arms are a plain PyTorch loop over the same model, data, batch size, AdamW and linear
schedule (by the fraction of epochs that is over: the number of steps is known at the end only). Current torch asks its
sampler for an iterator at every batch, at which it prunes anew and begins again; so the loop hands the loader an
epoch's indices as a list, the one thing that had to be mended. Rows go to results/peer_infobatch.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import store
from quality import add_options, data_of, prepared
from transformers import DataCollatorForSeq2Seq, get_linear_schedule_with_warmup, set_seed

from darel_hf import NLGMetrics
from darel_hf.nlg.task import generate, held_out, load_model, read_pairs, tokenize_pairs
from darel_hf.scoring.losses import per_sample_losses

PRECISION = 1000  # positions of the schedule an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infobatch", required=True, help="folder with a clone of its repository")
    parser.add_argument("--prune_ratio", type=float, default=0.5)
    add_options(parser)
    options = parser.parse_args()
    task, settings, folder = prepared(options)
    del settings["infobatch"]
    held = held_out(read_pairs(Path(task.data_dir) / "testset_w_refs.csv"), task)
    compare = NLGMetrics(bootstrap=1000, wordnet="none", only=("bleu",))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        part = data_of(task, folder / f"data-{seed}", seed, options)
        arguments = replace(task, data_dir=part)
        told, seconds = {}, {}
        for arm in ("plain loop", "infobatch"):
            model, tokenizer, result = train(arguments, options, seed, arm == "infobatch")
            seconds[arm] = result["seconds"]
            told[arm] = generate(model, tokenizer, list(held), arguments, folder / f"{arm}-{seed}.txt")
            compared = compare(told[arm], list(held.values()), baseline=told["plain loop"])
            row = {"arm": arm, "seed": seed, "time": result["seconds"] / seconds["plain loop"], **result}
            row |= {"bleu": compared["bleu"]}
            if arm != "plain loop":
                row |= {"bleu_minus_plain": compared["bleu"] - compared["baseline"]["bleu"]}
                row |= {"bleu_minus_plain_interval": compared["differences"]["bleu"]}
            store("peer_infobatch", settings, row)


def train(arguments: Any, options: argparse.Namespace, seed: int, prunes: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Train in a plain loop; return the model, its tokenizer, seconds and rows."""
    set_seed(seed)
    model, tokenizer = load_model(arguments)
    pairs = read_pairs(Path(arguments.data_dir) / "trainset.csv")
    columns = ["input_ids", "attention_mask", "labels"]
    items = tokenize_pairs(pairs, tokenizer, arguments.max_length).select_columns(columns).to_list()
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.01)
    total = int(PRECISION * options.epochs)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * total), total)
    started, rows = time.perf_counter(), 0
    make_loader, mean = loaders(items, collate, options, prunes)
    model.train()
    for epoch in range(int(options.epochs)):
        loader = make_loader()
        for number, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                losses = per_sample_losses(logits, batch["labels"], shift=True).losses
            mean(losses).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            schedule.last_epoch = int(PRECISION * (epoch + number / len(loader))) - 1
            schedule.step()
            optimizer.step()
            optimizer.zero_grad()
            rows += len(losses)
    return model, tokenizer, {"seconds": time.perf_counter() - started, "rows_backpropagated": rows}


def loaders(
    items: list[dict], collate: Callable, options: argparse.Namespace, prunes: bool
) -> tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor]]:
    """Return what makes the loader of an epoch, and what reduces the losses of a batch."""

    def with_indices(found: list[tuple[int, dict]]) -> tuple[torch.Tensor, Any]:
        return torch.tensor([index for index, _ in found]), collate([item for _, item in found])

    if not prunes:
        plain = torch.utils.data.DataLoader(items, options.batch_size, shuffle=True, collate_fn=collate)
        return lambda: plain, lambda losses: losses.mean()
    sys.path.insert(0, options.infobatch)
    from infobatch import InfoBatch

    pruned = InfoBatch(items, int(options.epochs), options.prune_ratio)
    sampler = pruned.sampler

    def make() -> Any:
        sampler.reset()
        return torch.utils.data.DataLoader(
            pruned, options.batch_size, sampler=list(sampler.sample_indices), collate_fn=with_indices
        )

    return make, pruned.update


if __name__ == "__main__":
    main()
