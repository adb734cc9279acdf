"""
Images: accuracy against time of plain training, of its controls, of the papers' baselines and of DAREL.

    python eval/benchmarks/vision.py --data_dir FOLDER [--arms full,random_0.5] [--seeds 3] [--narrow 4]

The folder has train.parquet and test.parquet (img, label), such as CIFAR-10. ResNet18, by default with a quarter of
its channels on 3,000 images, so that two cores can do it. Every seed runs all arms one after the other; times are
relative to the plain run of the same seed, everything counted (measuring, scoring, training the scoring network). A
row an arm goes to results/vision.jsonl, the table to vision.md, the picture to vision.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, store
from transformers import TrainingArguments

from darel_hf import DarelConfig
from darel_hf.image_job import ImageArguments, load_data, plot_accuracy_time, run


def arms(rule: str, online_rule: str) -> dict[str, tuple[dict[str, Any], dict[str, Any], float]]:
    """Return DAREL's settings, the task's settings, and the fraction of the epochs, of each arm."""
    budget = {"offline_rule": rule, "online_rule": online_rule, "budget_memory": 0.8}
    grouped = {"group_column": "label"}
    made: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {"full": ({}, {}, 1.0)}
    for t in (0.8, 0.65, 0.5):
        made[f"fewer_{t}"] = ({}, {}, t)
        made[f"random_{t}"] = ({"offline_keep": t, "offline_rule": "random", **grouped}, {}, 1.0)
        made[f"ids_{t}"] = ({"offline_keep": t, "offline_rule": "ids", **grouped}, {}, 1.0)
        made[f"darel_{t}"] = ({**budget, "budget_time": t}, {}, 1.0)
    made["adonis_0.5"] = ({"online_keep": 0.5, "online_rule": "adonis"}, {}, 1.0)
    made["adonis_0.3"] = ({"online_keep": 0.3, "online_rule": "adonis"}, {}, 1.0)
    for algebra in ("dual", "complex", "double", "quaternion"):
        made[algebra] = ({}, {"algebra": algebra}, 1.0)
        made[f"{algebra}_darel_0.5"] = ({**budget, "budget_time": 0.5}, {"algebra": algebra}, 1.0)
    for stage in ("offline", "online"):
        for name in ("hardest", "easiest", "middle", "trimmed", "stratified", "percentile", "infobatch", "random"):
            keep = {"offline_keep": 0.5} if stage == "offline" else {"online_keep": 0.5, "rescore_every": 100}
            groups = grouped if stage == "offline" and name != "infobatch" else {}
            made[f"{stage}_{name}"] = ({**keep, f"{stage}_rule": name, **groups}, {}, 1.0)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument(
        "--arms",
        default="full,fewer_0.8,fewer_0.5,random_0.8,random_0.5,ids_0.5,adonis_0.5,darel_0.8,darel_0.65,darel_0.5",
    )
    parser.add_argument("--plain", default="full", help="the arm that times are relative to")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--narrow", type=int, default=4)
    parser.add_argument("--max_train_samples", type=int, default=3000)
    parser.add_argument("--offline_rule", default="stratified")
    parser.add_argument("--online_rule", default="stratified")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--scorer_epochs", type=int, default=1, help="of the network that scores")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="vision", help="of the files of results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
    known = arms(options.offline_rule, options.online_rule)
    names = options.arms.split(",")
    settings = {k: v for k, v in vars(options).items() if k != "data_dir"} | {"data": Path(options.data_dir).name}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    data = None
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in names:
            darel, task, share = known[name]
            arguments = ImageArguments(
                data_dir=options.data_dir,
                narrow=options.narrow,
                max_train_samples=options.max_train_samples,
                channels_last=options.channels_last,
                scorer_epochs=options.scorer_epochs,
                **task,
            )
            data = data or load_data(arguments, seed=0)
            training = TrainingArguments(
                output_dir=str(folder / f"{name}-{seed}"),
                num_train_epochs=max(1, round(share * options.epochs)),
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=256,
                optim="sgd",
                learning_rate=options.learning_rate,
                weight_decay=5e-4,
                max_grad_norm=options.max_grad_norm,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                bf16=options.bf16,
                dataloader_num_workers=options.workers,
                dataloader_persistent_workers=options.workers > 0,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
            )
            result = run(arguments, DarelConfig(**darel), training, data=data)
            rows[name].append(result)
            print(
                f"seed {seed} {name}: accuracy {result['accuracy']:.4f}, {result['seconds']:.1f} s, scoring "
                f"{result['scoring_seconds']:.1f} s, predicted {result['predicted_time']:.2f}",
                flush=True,
            )
    plain = [result["seconds"] for result in rows.get(options.plain, [])]
    points = []
    for name in names:
        values = rows[name]
        ratios = [value["seconds"] / full for value, full in zip(values, plain, strict=False)]
        accuracies = [value["accuracy"] for value in values]
        store(
            options.name,
            {**settings, "arm": name, "darel": known[name][0]},
            {
                "accuracy": float(np.mean(accuracies)),
                "accuracy_spread": float(np.std(accuracies, ddof=1)) if len(values) > 1 else None,
                "accuracies": accuracies,
                "seconds": [value["seconds"] for value in values],
                "scoring_seconds": [value["scoring_seconds"] for value in values],
                "time": float(np.median(ratios)) if ratios else None,
                "times": ratios,
                "predicted_time": [value["predicted_time"] for value in values],
                "rows_backpropagated": [value["rows_backpropagated"] for value in values],
                "parameters": values[0]["parameters"],
            },
        )
        points.append({"arm": name, "accuracy": accuracies, "time": ratios})
    if plain and len(names) > 1:
        plot_accuracy_time(points, RESULTS / f"{options.name}.png")
        (RESULTS / f"{options.name}.md").write_text(markdown(points, settings), encoding="utf-8")


def markdown(points: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Return the table of a run: accuracy in per cent and time relative to plain, over seeds."""
    lines = [
        "| arm | accuracy, mean | spread | time, median | smallest to largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in points:
        accuracy, times = 100 * np.array(point["accuracy"]), np.array(point["time"])
        spread = f"{accuracy.std(ddof=1):.1f}" if len(accuracy) > 1 else "-"
        span = f"{times.min():.2f} to {times.max():.2f}"
        lines.append(f"| {point['arm']} | {accuracy.mean():.1f} | {spread} | {np.median(times):.2f} | {span} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "arms")
    return "\n".join(lines) + f"\n\nSettings: {conditions}.\n"


if __name__ == "__main__":
    main()
