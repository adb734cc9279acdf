"""
Where does the reader lose? LoRA everywhere, the reader and aLoRA on tasks of other kinds than E2E, tuned alike.

    python eval/benchmarks/beyond.py --model_name_or_path FOLDER [--data_dir FOLDER] [--ranks 16 64] [--quick]
    python eval/benchmarks/beyond.py ... --ranks 4 --targets attention --tuned_at 16

`sst2` (--data_dir has its train.csv, dev.csv, test.csv with columns sentence,label): is a review good or bad? Right is
the likelier word. `sort`: of 24 to 48 words, drawn by seed, the first eight by the alphabet: each needs the whole
prompt read again. Right is a word that is the likeliest one after the right ones before it; who knows the alphabet and
reads nothing is right in 0.37.

`lora` acts everywhere (without padding: the same gradients in less time), `reader` and `alora` train on stored
prompts. Each arm has the learning rate, of --learning_rates, with which the first seed is most often right on the
development split; if that is the lowest or highest, half or twice of it is tried, too, up to two times. It is sought
for each rank and targets, or once, with --tuned_at RANK on all linear layers. The test split chooses nothing, and no
prompt of a split is in another. A seed draws the training rows, their order and the adapters' start.

A row a run goes to results/beyond.jsonl at once; what has a row is not run again, so a call that was killed goes on
where it was. Tables of all rows, with differences to `lora` of the same seed, go to results/beyond.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    QUICK,
    RESULTS,
    add_quick,
    data_and_model,
    has_row,
    latest_rows,
    seconds_of,
    store,
    training_arguments,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.adapters import completion_lora
from darel_hf.comparison.statistics import interval
from darel_hf.nlg.demo import DemoSettings

ARMS = {"lora": {"unpad": True}, "reader": {"prompt_cache": "ram"}, "alora": {"prompt_cache": "ram"}}
TARGETS = {"attention": r".*attn\.\w*(attn|proj)", "all": "all-linear"}
SPLITS = ("train", "dev", "test")
ANSWERS = (" bad", " good")
Pairs = list[tuple[str, str]]


def sst2(folder: str, tokenizer: Any, seed: int) -> dict[str, Pairs]:
    """Reviews, and what they say."""
    pairs = {}
    for split in SPLITS:
        with open(Path(folder) / f"{split}.csv", encoding="utf-8", newline="") as file:
            rows = [(row["sentence"], ANSWERS[int(row["label"])]) for row in csv.DictReader(file)]
        pairs[split] = [(f"Review: {sentence}\nIn a word, it is", word) for sentence, word in rows]
    random.Random(seed).shuffle(pairs["train"])
    return pairs


def sort(folder: str, tokenizer: Any, seed: int) -> dict[str, Pairs]:
    """Words, and the first of them by the alphabet."""
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    words = [text for text in texts if re.fullmatch(" [a-z]{3,}", text)][:100]
    if len(words) < 60:
        raise ValueError(f"model_name_or_path: {len(words)} words are tokens of its tokenizer; the task needs 60")
    pairs = {}
    for split, size in zip(SPLITS, (TASKS["sort"].samples, 500, 1000), strict=True):
        draw = random.Random(f"{split}-{seed if split == 'train' else 0}")  # a string, so that splits differ
        lists = [draw.sample(words, draw.randint(24, 48)) for _ in range(size)]
        pairs[split] = [("".join(drawn) + " =", "".join(sorted(drawn)[:8])) for drawn in lists]
    return pairs


class Task(NamedTuple):
    """How rows are made; how many are trained on, how often; of which words one is the answer (default: of all)."""

    make: Callable[[str, Any, int], dict[str, Pairs]]
    samples: int
    epochs: int
    batch_size: int
    answers: tuple[str, ...] = ()


TASKS = {"sst2": Task(sst2, 3500, 3, 16, ANSWERS), "sort": Task(sort, 1200, 3, 8)}


def tokenized(pairs: Pairs, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Make rows with labels on the answers."""
    rows = []
    for texts in pairs:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "attention_mask": [1] * len(labels), "labels": labels})
    return rows


@torch.inference_mode()
def evaluate(model: Any, rows: list[dict[str, Any]], collator: Any, answers: list[int]) -> tuple[float, float]:
    """Return which share of the answers' words is the likeliest, and their loss; of `answers` the first token."""
    right, losses = [], []
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    for start in range(0, len(rows), 64):
        batch = collator(rows[start : start + 64]).to(model.device)
        logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        counted = labels != -100
        if answers:
            counted &= counted.cumsum(1) == 1
        logits, labels = logits[counted].float(), labels[counted]
        if answers:
            others = torch.ones(logits.shape[1], dtype=torch.bool)
            others[answers] = False
            logits = logits.masked_fill(others.to(logits.device), -torch.inf)
        right.append(logits.argmax(-1) == labels)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(right).double().mean().item(), torch.cat(losses).double().mean().item()


def result_of(options: argparse.Namespace, settings: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Train, and return how often the answers of the development and the test split are right."""
    task, tokenizer = TASKS[settings["task"]], AutoTokenizer.from_pretrained(options.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs, seen = task.make(options.data_dir, tokenizer, seed), set[str]()
    for split in reversed(SPLITS):  # no prompt of one is in another
        pairs[split] = [pair for pair in pairs[split] if pair[0] not in seen]
        seen |= {prompt for prompt, _ in pairs[split]}
    pairs["train"] = pairs["train"][: settings["samples"]]
    rows = {split: tokenized(part[: 32 if QUICK else None], tokenizer) for split, part in pairs.items()}
    answers = [tokenized([("", word)], tokenizer)[0]["input_ids"][0] for word in task.answers]
    if len(set(answers)) < len(answers):
        raise ValueError(f"model_name_or_path: {task.answers} begin alike for its tokenizer; take another model")
    set_seed(seed)  # adapters begin at random
    base = AutoModelForCausalLM.from_pretrained(options.model_name_or_path)
    rank, targets = settings["rank"], TARGETS[settings["targets"]]
    transposed = base.config.model_type == "gpt2"  # how its projections store their weights
    lora = (ReaderLoraConfig if arm == "reader" else LoraConfig)(
        r=rank,
        lora_alpha=settings["lora_alpha"],
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
    )
    if arm == "alora":
        lora = completion_lora(lora, rows["train"], tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    with tempfile.TemporaryDirectory(prefix="darel-bench-") as folder:
        args = training_arguments(Path(folder), task.epochs, seed, argparse.Namespace(**settings, bf16=False))
        data = {"train_dataset": rows["train"], "data_collator": collator}
        trainer = DarelTrainer(model=get_peft_model(base, lora), args=args, darel=DarelConfig(**ARMS[arm]), **data)
        result: dict[str, Any] = {"arm": arm, "seed": seed, "seconds": seconds_of(trainer)}
    result["train_loss"] = trainer.state.log_history[-1]["train_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    for split in ("dev", "test"):
        result[f"{split}_right"], result[f"{split}_loss"] = evaluate(model, rows[split], collator, answers)
    return result


def tuned(measure: Callable[[float], float], rates: list[float]) -> float:
    """Return the rate with the highest measure; where that is at the border, those beyond are tried."""
    found = {rate: measure(rate) for rate in sorted(rates)}
    for _ in range(2):
        best = max(found, key=lambda rate: found[rate])
        if len(found) == 1 or min(found) < best < max(found):
            break
        beyond = 2 * best if best == max(found) else best / 2
        found[beyond] = measure(beyond)
    return max(found, key=lambda rate: found[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, help="default: all, sst2 with --data_dir only")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["all"])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--tuned_at", type=int, metavar="RANK", help="of the runs on all layers that choose rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--data_dir", help="folder with the files of SST-2")
    parser.add_argument("--model_name_or_path", help="base model; default: the demo's, warmed up shortly")
    parser.add_argument("--threads", type=int, default=1)
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.ranks, options.seeds, options.learning_rates = [4], 2, [1e-3]
    options.task = options.task or [name for name in TASKS if name != "sst2" or options.data_dir]
    files = [Path(options.data_dir or ".") / f"{split}.csv" for split in SPLITS]
    if "sst2" in options.task and not all(file.exists() for file in files):
        parser.error(f"--data_dir {options.data_dir}: for sst2 give a folder with train.csv, dev.csv and test.csv")
    torch.set_num_threads(options.threads)
    model = Path(options.model_name_or_path or "demo model").name
    if options.model_name_or_path is None:
        none, folder = (
            argparse.Namespace(data_dir=None, model_name_or_path=None),
            tempfile.mkdtemp(prefix="darel-bench-"),
        )
        options.model_name_or_path = data_and_model(none, Path(folder), DemoSettings(warm_up_representations=20))[1]

    def run(task: str, rank: int, targets: str, arm: str, rate: float, seed: int) -> float:
        """Make sure that the row of a run is stored; return how often it was right on the development split."""
        of = TASKS[task]
        settings = {"task": task, "model": model, "samples": 32 if QUICK else of.samples, "epochs": of.epochs}
        settings |= {"batch_size": of.batch_size, "rank": rank, "lora_alpha": 4 * rank, "targets": targets}
        settings["learning_rate"] = rate
        if QUICK or not has_row("beyond", settings, arm, seed):
            store("beyond", settings, result_of(options, settings, arm, seed))
            (RESULTS / "beyond.md").write_text(tables(), encoding="utf-8")
        return next(row["dev_right"] for row in latest_rows("beyond", settings)[arm] if row["seed"] == seed)

    for task, rank, targets, arm in product(options.task, options.ranks, options.targets, options.arms):
        at = (options.tuned_at, "all") if options.tuned_at else (rank, targets)
        best = tuned(partial(run, task, *at, arm, seed=options.first_seed), options.learning_rates)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            run(task, rank, targets, arm, best, seed)


def tables() -> str:
    """Return a table for every task, rank and targets, and what the development split said of learning rates."""
    kinds: dict[str, dict[str, dict[float, dict[int, dict[str, Any]]]]] = {}
    for line in (RESULTS / "beyond.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rate = row["settings"].pop("learning_rate")
        kind = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        kinds.setdefault(kind, {}).setdefault(row["arm"], {}).setdefault(rate, {})[row["seed"]] = row
    parts = []
    for kind, by_arm in kinds.items():
        lines = [
            "| arm | learning rate: right on dev, first seed | chosen | right on test, mean (spread) | test loss "
            "| minus lora, by seed | mean (interval, all of them 95 %) | told apart from lora | seeds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        of_lora: dict[int, float] = {}
        for arm in (arm for arm in ARMS if arm in by_arm):
            first = min(seed for rows in by_arm[arm].values() for seed in rows)
            dev = {rate: rows[first]["dev_right"] for rate, rows in sorted(by_arm[arm].items()) if first in rows}
            rate = max(dev, key=lambda rate: dev[rate])
            rows = by_arm[arm][rate]
            right = {seed: row["test_right"] for seed, row in sorted(rows.items())}
            spread = f" ({np.std(list(right.values()), ddof=1):.3f})" if len(right) > 1 else ""
            cells = [arm, ", ".join(f"{rate:g}: {value:.3f}" for rate, value in dev.items()), f"{rate:g}"]
            cells.append(f"{np.mean(list(right.values())):.3f}{spread}")
            cells.append(f"{np.mean([row['test_loss'] for row in rows.values()]):.3f}")
            cells += compared([right[seed] - of_lora[seed] for seed in right if seed in of_lora], len(by_arm) - 1)
            of_lora = right if arm == "lora" else of_lora
            lines.append(f"| {' | '.join([*cells, str(len(right))])} |")
        parts.append("\n".join(lines) + f"\n\nSettings: {kind}.\n")
    return "\n".join(parts)


def compared(differences: list[float], comparisons: int) -> list[str]:
    """Say what the differences of all seeds tell, where so many arms are compared with one."""
    if not differences:
        return ["-"] * 3
    found = interval(differences, comparisons)
    by_seed = ", ".join(f"{difference:+.3f}" for difference in differences)
    if np.isnan(found.low):
        return [by_seed, f"{found.mean:+.3f}", "-"]
    verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "no"
    return [by_seed, f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})", verdict]


if __name__ == "__main__":
    main()
