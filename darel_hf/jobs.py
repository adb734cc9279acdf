"""What the recipes share: settings from YAML and the command line, the hub, and one training with its account."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .files import refuse_used_folder, require
from .report import scoring_seconds
from .training import checkpoints


def parse_settings(classes: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Read settings from a YAML file (the first argument, if it ends in .yaml) and the command line, which wins.

    Raises:
        ValueError: for a key that no class knows; names the closest ones.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(list(classes))
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = argv.pop(0)
        require(Path(path).is_file(), "settings", path, "no such file")
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        require(isinstance(settings, dict), "settings", path, "the file must hold `key: value` lines")
        known = {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}
        for key in settings:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            require(key in known, "settings", key, f"unknown key in {path}{hint}")
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(args=argv)


def require_hub(name: str, kind: str, option: str) -> None:
    """Raise an `OSError` within seconds if something on the hub is neither cached nor to be reached."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(name, "config.json", repo_type=kind)
    if isinstance(cached, str) or (Path(hub.constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").exists():
        return
    try:
        hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
    except Exception as error:  # every failure to reach it, of whichever HTTP client, means the same to the user
        raise OSError(
            f"{option}: the {kind} {name!r} cannot be had from the hub ({type(error).__name__}). Give folders on this "
            "machine with --data_dir and --model_name_or_path, or try everything without a network: darel demo"
        ) from None


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the fraction of samples whose most likely class is the right one, for `compute_metrics`."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def claim_folder(training: TrainingArguments, resume: bool) -> Path:
    """Return the output folder; raises `ValueError` if it holds another run that is not to be resumed."""
    folder = Path(training.output_dir)
    if training.process_index == 0 and not resume:
        refuse_used_folder(folder, "another run", "go on with --resume, or name a new folder")
    return folder


def train_once(trainer: Any, folder: Path, resume: bool) -> dict[str, Any]:
    """
    Train, from the newest complete checkpoint if asked to, save the model, and account for it.

    Args:
        trainer ([`DarelTrainer`]): ready to train.
        folder (`Path`): its output folder.
        resume (`bool`): go on with what is there.

    Returns:
        `dict`: `seconds` (scoring included), `scoring_seconds`, `steps`, `train_loss`, `train_samples`,
        `rows_backpropagated`, `predicted_time` (relative to plain training) and `versions`.
    """
    complete = [path for path in checkpoints.all_in(folder) if checkpoints.problem(path) is None]
    started = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=True if resume and complete else None)
    seconds = time.perf_counter() - started
    trainer.save_model()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    samples = len(trainer.train_dataset)
    results = {
        "seconds": seconds,
        "scoring_seconds": 0.0,
        "steps": trainer.state.global_step,
        "train_loss": logged[-1] if logged else trained.metrics["train_loss"],
        "train_samples": samples,
        "rows_backpropagated": round(samples * (trainer.state.epoch or 0)),
        "predicted_time": 1.0,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if trainer.report is not None:
        report = trainer.report.to_dict()
        results["scoring_seconds"] = scoring_seconds(report["seconds"])
        results |= {name: report[name] for name in ("rows_backpropagated", "predicted_time")}
        results["seconds"] = report["seconds"]["total"]  # of all processes that the run was resumed in
    return results
