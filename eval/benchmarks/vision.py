"""
Images: accuracy against time of plain training, of its controls, of the papers' baselines and of DAREL.

    python eval/benchmarks/vision.py --data_dir FOLDER [--arms full,random_0.5] [--seeds 3] [--narrow 4]

The folder has train.parquet and test.parquet (img, label), such as CIFAR-10. ResNet18, by default with a quarter of
its channels on 3,000 images, so that two cores can do it. Every seed runs all arms one after the other; times are
relative to the plain run of the same seed, everything counted (measuring, scoring, training the scoring network). A
row a run goes to results/vision.jsonl at once; after every seed the table, vision.md, and the picture, vision.png, are
made from all rows of the same settings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import RESULTS, add_quick, latest_rows, store
from PIL import Image
from transformers import TrainingArguments

from darel_hf import DarelConfig
from darel_hf.vision.task import ImageArguments, load_data, plot_accuracy_time, run

WIDER = 1.375  # hypercomplex networks with so much more channels have nearly as many parameters as the real one


def arms(rule: str, online_rule: str, narrow: float) -> dict[str, tuple[dict[str, Any], dict[str, Any], float]]:
    """Return DAREL's settings, the task's settings, and the fraction of the epochs, of each arm."""
    grouped = {"group_column": "label"}
    budget = {"offline_rule": rule, "online_rule": online_rule, "budget_memory": 0.8, **grouped}
    made: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {"full": ({}, {}, 1.0)}
    for t in (0.8, 0.65, 0.5):
        made[f"fewer_{t}"] = ({}, {}, t)
        made[f"random_{t}"] = ({"offline_keep": t, "offline_rule": "random", **grouped}, {}, 1.0)
        made[f"ids_{t}"] = ({"offline_keep": t, "offline_rule": "ids", **grouped}, {}, 1.0)
        made[f"darel_{t}"] = ({**budget, "budget_time": t}, {}, 1.0)
    by_loss = {"offline_rule": "stratified", "online_rule": "stratified", **grouped}
    made["stratified_darel_0.5"] = ({**by_loss, "budget_memory": 0.8, "budget_time": 0.5}, {}, 1.0)
    made["adonis_0.5"] = ({"online_keep": 0.5, "online_rule": "adonis"}, {}, 1.0)
    made["adonis_0.3"] = ({"online_keep": 0.3, "online_rule": "adonis"}, {}, 1.0)
    for algebra in ("dual", "complex", "double", "quaternion"):
        made[algebra] = ({}, {"algebra": algebra}, 1.0)
        made[f"{algebra}_darel_0.5"] = ({**budget, "budget_time": 0.5}, {"algebra": algebra}, 1.0)
        wide = {"algebra": algebra, "narrow": narrow / WIDER}
        made[f"wide_{algebra}"] = ({}, wide, 1.0)
        made[f"wide_{algebra}_darel_0.5"] = ({**budget, "budget_time": 0.5}, wide, 1.0)
    for stage in ("offline", "online"):
        for name in ("hardest", "easiest", "middle", "trimmed", "stratified", "percentile", "infobatch", "random"):
            keep = {"offline_keep": 0.5} if stage == "offline" else {"online_keep": 0.5, "rescore_every": 5}
            groups = grouped if stage == "offline" and name != "infobatch" else {}
            made[f"{stage}_{name}"] = ({**keep, f"{stage}_rule": name, **groups}, {}, 1.0)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="default, with --quick only: made-up images")
    parser.add_argument(
        "--arms",
        default="full,fewer_0.8,fewer_0.5,random_0.8,random_0.5,ids_0.5,adonis_0.5,darel_0.8,darel_0.65,darel_0.5,"
        "wide_double,wide_double_darel_0.5",
    )
    parser.add_argument("--plain", default="full", help="the arm that times are relative to; none: no times")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.2)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--narrow", type=int, default=4)
    parser.add_argument("--max_train_samples", type=int, default=3000)
    parser.add_argument("--offline_rule", default="random")
    parser.add_argument("--online_rule", default="random")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--scorer_epochs", type=int, default=1, help="of the network that scores")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="vision", help="of the files of results")
    parser.add_argument("--made_up", type=int, help="so many made-up images in place of --data_dir")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.arms, options.seeds, options.epochs, options.max_train_samples = "full,darel_0.8,wide_dual", 1, 2, 200
    elif options.data_dir is None and not options.made_up:
        parser.error("--data_dir: give a folder with images, or --made_up their number, where only times count")
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="darel-bench-"))
    if options.data_dir is None:
        made_up_images(folder / "made_up", options.made_up or 200)
        options.data_dir = str(folder / "made_up")
    known = arms(options.offline_rule, options.online_rule, options.narrow)
    names = options.arms.split(",")
    what_is_run = ("data_dir", "arms", "seeds", "first_seed", "name", "plain", "quick")
    settings = {k: v for k, v in vars(options).items() if k not in what_is_run and v is not None} | {
        "data": Path(options.data_dir).name
    }
    data = None
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        plain = None
        for name in names:
            darel, task, share = known[name]
            arguments = ImageArguments(
                data_dir=options.data_dir,
                max_train_samples=options.max_train_samples,
                channels_last=options.channels_last,
                scorer_epochs=options.scorer_epochs,
                **{"narrow": options.narrow, **task},
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
                use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=options.workers,
                dataloader_persistent_workers=options.workers > 0,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
            )
            result = run(arguments, DarelConfig(**darel), training, data=data)
            plain = result["seconds"] if name == options.plain else plain
            measured = ("accuracy", "seconds", "scoring_seconds", "predicted_time", "rows_backpropagated")
            store(
                options.name,
                {**settings, "darel": darel, "task": task, "share_of_epochs": share},
                {
                    "arm": name,
                    "seed": seed,
                    "plain": options.plain,
                    "time": None if plain is None else result["seconds"] / plain,
                    **{key: result[key] for key in measured},
                },
            )
        summarize(options.name, settings, options.plain)


def made_up_images(folder: Path, count: int) -> None:
    """Write images of noise, brighter from class to class: enough to show that everything runs."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, n in (("train", count), ("test", count // 4)):
        labels = draw.integers(0, 10, n)
        pixels = (draw.integers(0, 128, (n, 32, 32, 3)) + 12 * labels[:, None, None, None]).astype(np.uint8)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(10)})
        rows = {"img": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))


def summarize(name: str, settings: dict[str, Any], plain: str) -> None:
    """Make the table and the picture from all stored rows of these settings and times."""
    points = {
        arm: {
            "arm": arm,
            "accuracy": [row["accuracy"] for row in rows],
            "time": [row["time"] for row in rows if row["time"] is not None],
        }
        for arm, rows in latest_rows(name, settings, plain=plain).items()
    }
    (RESULTS / f"{name}.md").write_text(markdown([*points.values()], settings), encoding="utf-8")
    if plain in points:
        plot_accuracy_time([point for point in points.values() if point["time"]], RESULTS / f"{name}.png")


def markdown(points: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Return the table of a run: accuracy in per cent and time relative to plain, over seeds."""
    lines = [
        "| arm | accuracy, mean | spread | time, median | smallest to largest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in points:
        accuracy, times = 100 * np.array(point["accuracy"]), point["time"]
        spread = f"{accuracy.std(ddof=1):.1f}" if len(accuracy) > 1 else "-"
        median, span = (f"{np.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}") if times else ("-", "-")
        lines.append(f"| {point['arm']} | {accuracy.mean():.1f} | {spread} | {median} | {span} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items())
    return "\n".join(lines) + f"\n\nSettings: {conditions}.\n"


if __name__ == "__main__":
    main()
