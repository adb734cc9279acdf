"""Training image classifiers: what the CIFAR recipe runs, from files to accuracy, account and pictures."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..config import DarelConfig
from ..data import CarryIds, add_ids, sample_ids
from ..files import write_json
from ..jobs import accuracy, claim_folder, require_hub, train_once
from ..report import DROPPED, KEPT, chart, figure_at
from ..scoring import BatchScorer, score_dataset
from ..training import DarelTrainer
from .hypercomplex import to_hypercomplex
from .images import ImageClassifier, load_images, load_weights, make_network


@dataclass
class ImageArguments:
    """
    Settings of the task, beside `DarelConfig` and `TrainingArguments`.

    Parameters that control **the network**:

    Args:
        model (`str`): name of a torchvision network.
        algebra (`str`, *optional*): make it hypercomplex, see [`darel_hf.vision.hypercomplex.to_hypercomplex`].
        narrow (`float`): divide its channels by so much.
        small_stem (`bool`): the ResNet stem for small images.
        channels_last (`bool`): memory layout that convolutions on GPUs like.

    Parameters that control **data and augmentation**:

        data_dir (`str`, *optional*): folder with `train.parquet` and `test.parquet`, or `train/` and `test/` with a
            folder of images a class. Without it the data come from the hub.
        dataset_name, dataset_revision (`str`): where they are there.
        image_size (`int`, *optional*): pixels a side that images are resized to.
        max_train_samples, max_test_samples (`int`, *optional*): the first of a shuffle with `seed`.
        padding (`int`), flip (`bool`): augmentation in training, see [`ImageClassifier`].
        momentum (`float`): of SGD (Nesterov's), where `optim` is `sgd`.

    Parameters that control **the offline scores** of a network that is trained from scratch, whose own losses say
    nothing before it is trained:

        scorer (`str`, *optional*): folder with weights of such a network that a training has left, or name of a
            torchvision network, whose pre-trained weights are then tuned for `scorer_epochs`. Without it, a narrow
            network of the same kind is trained for `scorer_epochs`. Its time is counted.
        scorer_epochs (`int`), scorer_narrow (`int`): of that training, and how much narrower it is.

    Parameters that control **the run**: `resume` goes on with what is in `output_dir`.
    """

    model: str = field(default="resnet18", metadata={"help": "name of a torchvision network"})
    algebra: str | None = field(default=None, metadata={"help": "complex, double, dual or quaternion"})
    narrow: float = field(default=1.0, metadata={"help": "divide the channels by so much"})
    small_stem: bool = field(default=True, metadata={"help": "the ResNet stem for small images"})
    channels_last: bool = field(default=False, metadata={"help": "memory layout that convolutions on GPUs like"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with train.parquet and test.parquet"})
    dataset_name: str = field(default="uoft-cs/cifar100", metadata={"help": "data set on the hub"})
    dataset_revision: str | None = field(default=None, metadata={"help": "its revision"})
    image_size: int | None = field(default=None, metadata={"help": "pixels a side that images are resized to"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many images"})
    max_test_samples: int | None = field(default=None, metadata={"help": "test on so many images"})
    padding: int = field(default=4, metadata={"help": "crop at random after padding by so many pixels"})
    flip: bool = field(default=True, metadata={"help": "flip half of the images"})
    momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum of SGD, where optim is sgd"})
    scorer: str | None = field(default=None, metadata={"help": "weights or torchvision network that scores"})
    scorer_epochs: int = field(default=2, metadata={"help": "epochs that a scoring network is trained for"})
    scorer_narrow: int = field(default=4, metadata={"help": "how much narrower a scoring network is"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})


def load_data(args: ImageArguments, seed: int) -> dict[str, Any]:
    """Return the data sets `train` and `test`."""
    source = args.data_dir
    if source is None:
        require_hub(args.dataset_name, "dataset", "data_dir")
        source = args.dataset_name
    data = {s: load_images(source, s, args.image_size, args.dataset_revision) for s in ("train", "test")}
    for split, limit in (("train", args.max_train_samples), ("test", args.max_test_samples)):
        if limit is not None and limit < len(data[split]):
            order = np.random.default_rng(seed).permutation(len(data[split]))[:limit]
            data[split] = data[split].select(np.sort(order))
    return data


def number_of_classes(dataset: Any) -> int:
    """Return the classes of the column `label`."""
    feature = dataset.features["label"]
    return getattr(feature, "num_classes", None) or int(max(dataset.with_format(None)["label"])) + 1


def make_model(args: ImageArguments, classes: int) -> ImageClassifier:
    """Build the network of the settings."""
    network = make_network(args.model, classes, args.small_stem, args.narrow)
    if args.algebra is not None:
        network = to_hypercomplex(network, args.algebra, args.image_size or 32)
    return ImageClassifier(network, args.padding, args.flip, channels_last=args.channels_last)


def make_scorer(args: ImageArguments, data: Any, classes: int, training: TrainingArguments) -> nn.Module:
    """
    Return a network that scores: loaded, or trained for a few epochs in the same way as the one that is to be trained.

    Raises:
        ValueError: for weights that are not there or of another network.
    """
    plain = partial(ImageClassifier, padding=args.padding, flip=args.flip, channels_last=args.channels_last)
    if _has_weights(args):
        return load_weights(plain(make_network(args.model, classes, args.small_stem, args.narrow)), args.scorer)
    if args.scorer is not None:
        network = make_network(args.scorer, classes, weights="DEFAULT")
    else:
        network = make_network(args.model, classes, args.small_stem, args.narrow * args.scorer_narrow)
    settings = {"num_train_epochs": args.scorer_epochs, "save_strategy": "no", "eval_strategy": "no"}
    settings |= {"load_best_model_at_end": False, "report_to": "none", "push_to_hub": False}
    model = plain(network)
    trainer = Trainer(
        model=model,
        args=replace(training, **settings),
        train_dataset=data,
        optimizer_cls_and_kwargs=_sgd(args, training),
    )
    trainer.train()
    return model


def _has_weights(args: ImageArguments) -> bool:
    """Whether `scorer` names weights, not a network."""
    return args.scorer is not None and (Path(args.scorer).exists() or os.sep in args.scorer)


def _sgd(args: ImageArguments, training: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """Return SGD with momentum where SGD is asked for: not every transformers 5.x takes it from `optim_args`."""
    if training.optim != "sgd":
        return None
    return torch.optim.SGD, {"lr": training.learning_rate, "momentum": args.momentum, "nesterov": args.momentum > 0}


def run(
    args: ImageArguments, darel: DarelConfig, training: TrainingArguments, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Train, evaluate, and account for it.

    `training.output_dir` ends with the weights, `results.json` (accuracy and time, everything counted), and with DAREL
    `darel/report.json`, `darel/samples.parquet` and pictures of what was kept and removed.

    Args:
        args ([`ImageArguments`]), darel ([`DarelConfig`]), training (`TrainingArguments`): the settings.
        data (`dict`, *optional*): `train` and `test`, if they are loaded already.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError, OSError: for bad input, before any compute.
    """
    folder = claim_folder(training, args.resume)
    training.remove_unused_columns = False  # the columns of a table of images are not what the model gets
    data = data or load_data(args, training.seed)
    classes = number_of_classes(data["train"])
    torch.manual_seed(training.seed)
    model = make_model(args, classes)
    needed = darel.may_select("offline") and darel.rule("offline").reads_losses and darel.scores is None
    scorer: Any = partial(make_scorer, args, data["train"], classes, training)
    if _has_weights(args):
        scorer = scorer()  # raises now, not when it is wanted
    trainer = DarelTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=_sgd(args, training),
        darel=darel,
        scorer=scorer if needed else None,
    )
    finished = folder / "trained.json"
    if args.resume and finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        load_weights(model, folder)
    else:
        results = train_once(trainer, folder, args.resume)
        if trainer.is_world_process_zero():
            if trainer.report is not None and trainer.report.plan.offline_keep < 1:
                draw_selection(trainer, data["train"], folder)
            write_json(finished, results)
    started = time.perf_counter()
    evaluated = trainer.evaluate()
    results |= {
        "accuracy": evaluated["eval_accuracy"],
        "test_loss": evaluated["eval_loss"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "evaluation_seconds": time.perf_counter() - started,
    }
    if trainer.is_world_process_zero():
        write_json(folder / "results.json", results)
    trainer.accelerator.wait_for_everyone()
    return results


# ---- Pictures ----


def draw_selection(trainer: DarelTrainer, data: Any, folder: Path, label: int = 0, most: int = 1000) -> None:
    """
    Draw what the offline stage kept: `losses.png`, `embeddings.png` and `removed_kept.png`.

    The second shows up to `most` images of one class in the plane of their embeddings' two main directions, by the
    trained network, with the class's prototype (their mean) marked; the third the images of all classes with the
    lowest and the highest losses, removed and kept.
    """
    from sklearn.decomposition import PCA

    report = trainer.report
    if np.isfinite(report.offline_losses).sum() > 1:
        report.plot_losses(folder / "losses.png")
    labels = np.asarray(data.with_format(None)["label"])
    members = np.flatnonzero(labels == label)[:most]
    scorer = BatchScorer(trainer.model, autocast=trainer.accelerator.autocast, want_embeddings=True)
    points = np.zeros((len(members), 2))
    if len(members) > 2:
        one_class, collator = add_ids(data.select(members), members), CarryIds(trainer.data_collator)
        scores = score_dataset(scorer, one_class, collator, trainer._prepare_inputs, max_rows=128, progress_bar=False)
        points = PCA(2).fit_transform(scores.embeddings)
    rows = report.ledger.rows(sample_ids(data, report.config.id_column))
    kept = report.kept[rows[members]]
    names = getattr(data.features["label"], "names", None)
    name = names[label] if names else str(label)

    title = f"class {name}: {report.config.offline_rule}, keep {report.plan.offline_keep:.2f}"
    texts = {"title": title, "xlabel": "first main direction of the embeddings", "ylabel": "second"}
    with chart(folder / "embeddings.png", (6, 5), **texts) as axes:
        for chosen, colour, text in ((kept, KEPT, "kept"), (~kept, DROPPED, "removed")):
            counted = f"{text} ({chosen.sum():,})"
            axes.scatter(*points[chosen].T, s=12, alpha=0.6, color=colour, linewidths=0, label=counted)
        axes.scatter(*points.mean(0), marker="*", s=260, color="black", label="prototype")
    _draw_extremes(report.kept[rows], report.offline_losses[rows], data, names, folder / "removed_kept.png")


def _draw_extremes(
    kept: np.ndarray, losses: np.ndarray, data: Any, names: list[str] | None, path: Path, columns: int = 10
) -> None:
    """Draw a grid of images: removed and kept ones with the lowest and the highest losses."""
    losses = np.nan_to_num(losses, nan=0.0)
    order = np.argsort(losses, kind="stable")
    rows = []
    for chosen, text in ((~kept, "removed"), (kept, "kept")):
        part = order[chosen[order]]
        rows += [(f"{text},\nlowest losses", part[:columns]), (f"{text},\nhighest losses", part[::-1][:columns])]
    with figure_at(path, (1.05 * columns + 1.2, 1.25 * len(rows))) as figure:
        for line, (text, samples) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, row in zip(line, samples, strict=False):
                item = data[int(row)]
                axes.imshow(item["pixel_values"].permute(1, 2, 0).numpy())
                title = names[item["labels"]] if names else str(item["labels"])
                axes.set_title(f"{title}\n{losses[row]:.2f}", fontsize=7)
            line[0].text(-0.15, 0.5, text, ha="right", va="center", fontsize=8, transform=line[0].transAxes)


def plot_accuracy_time(points: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """
    Draw accuracy against time relative to plain training.

    Args:
        points (`list[dict]`): one an arm: `arm`, `accuracy` and `time` (lists over seeds).
        path: PNG.
    """
    texts = {"xlabel": "time relative to plain training, scoring counted", "ylabel": "test accuracy (%)"}
    with chart(path, (7, 4.5), **texts) as axes:
        for point in points:
            times, values = np.asarray(point["time"]), 100 * np.asarray(point["accuracy"])
            middle = (times.mean(), values.mean())
            axes.errorbar(*middle, yerr=values.std(), xerr=times.std(), fmt="o", capsize=3)
            axes.annotate(point["arm"], middle, xytext=(6, 4), textcoords="offset points", fontsize=8)
