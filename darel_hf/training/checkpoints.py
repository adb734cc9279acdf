"""DAREL's part of a checkpoint: written before Trainer makes it complete, checked before it is used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from ..config import DarelConfig
from ..files import atomic_path, require, write_json

logger = logging.getLogger(__name__)

FOLDER = "darel"
TORCH_FILES = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "*_model*.bin")


def save(checkpoint: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write arrays (safetensors) and all other values (JSON) into the checkpoint folder, each file atomically."""
    folder = Path(checkpoint) / FOLDER
    for leftover in folder.glob(".*"):  # of a process that was killed while it wrote here; nobody else writes now
        leftover.unlink()
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items() if isinstance(value, np.ndarray)}
    with atomic_path(folder / "ledger.safetensors") as temporary:
        save_file(arrays, temporary)
    write_json(folder / "state.json", {name: value for name, value in state.items() if name not in arrays})


def expected_files(args: Any, sharded: bool) -> list[str]:
    """
    Return the names of what Trainer writes into a checkpoint after us, and what a resumed run cannot do without.

    Args:
        args (`TrainingArguments`): of the run that writes it.
        sharded (`bool`): whether optimizer states are spread over processes, in files of other names.
    """
    if args.save_only_model:
        return []
    # Hosts that share no folder have their own processes' files only.
    ranks = min(args.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
    states = ["rng_state.pth"] if args.world_size <= 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    return states if sharded else ["optimizer.pt", "scheduler.pt", *states]


def load(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Read what [`save`] wrote. Raises `ValueError` for a checkpoint without it."""
    folder = Path(checkpoint) / FOLDER
    remedy = "made without DAREL (or by another version); resume it with Trainer"
    require((folder / "state.json").is_file(), "resume_from_checkpoint", str(checkpoint), remedy)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return {**state, **load_file(folder / "ledger.safetensors")}


def check_same(state: dict[str, Any], checkpoint: str, data: str, config: DarelConfig) -> None:
    """Raise `ValueError` if a checkpoint is of other data, or of other settings than these."""
    remedy = (
        f"made from another data set (fingerprint {state['data']}, this training set has {data}); resume with that"
    )
    require(state["data"] == data, "resume_from_checkpoint", str(checkpoint), remedy)
    before = DarelConfig().to_dict() | state["config"]  # a setting that it does not know was off
    # While it was off by default, a run that did not name it has written that.
    older = "budget_allows" not in state["config"]
    unread = {f"{stage}_rule" for stage in ("offline", "online") if not config.may_select(stage)}  # nobody asks them
    for name, value in config.to_dict().items():
        saved = before[name]
        if name in unread or (older and name == "fast" and not saved and not value):
            continue
        remedy = f"the checkpoint {checkpoint} was made with {saved!r}; resume with that"
        require(saved == value or name in ("scores", "online_backward"), name, value, remedy)


def _saved_adapter(checkpoint: str | os.PathLike, name: str) -> dict[str, Any]:
    """Return the settings of an adapter in a checkpoint, as PEFT has saved them; empty where there are none."""
    path = Path(checkpoint, *([] if name == "default" else [name]), "adapter_config.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_lora(checkpoint: str | os.PathLike, model: Any) -> bool:
    """Whether an adapter that is active in a model is stock LoRA in a checkpoint."""
    return any(_saved_adapter(checkpoint, name).get("peft_type") == "LORA" for name in model.active_adapters)


def check_adapters(checkpoint: str, model: Any, finishes: bool) -> None:
    """
    Raise `ValueError` if a checkpoint's adapters act elsewhere than the model's: weights of either kind fit the other.

    Args:
        checkpoint (`str`): the folder.
        model (`nn.Module`): what its weights will be loaded into.
        finishes (`bool`): whether its readers become stock LoRA in the last epochs.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        saved = _saved_adapter(checkpoint, name)
        own = json.loads(json.dumps(config.to_dict(), default=str))
        for key in ("peft_type", "alora_invocation_tokens") if saved else ():
            become = finishes and key == "peft_type" and {saved.get(key), own.get(key)} == {"READER", "LORA"}
            remedy = (
                f"the adapter {name!r} has {key}={saved.get(key)!r} there and {own.get(key)!r} in the model: they "
            )
            remedy += "act at other positions; resume with adapters of the same kind"
            require(become or saved.get(key) == own.get(key), "resume_from_checkpoint", checkpoint, remedy)


def problem(checkpoint: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint, naming the file, or `None` if it is complete and readable."""
    checkpoint, expected = Path(checkpoint), []
    for name in (TRAINER_STATE_NAME, f"{FOLDER}/state.json"):
        path = checkpoint / name
        if path.name != TRAINER_STATE_NAME and not path.parent.exists():
            continue
        try:
            expected = json.loads(path.read_text(encoding="utf-8")).get("files", [])
        except (OSError, ValueError):
            return f"{path} is missing or cut off"
    for name in expected:
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if path.name.startswith("."):  # a temporary file of a process that was killed
            continue
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError):
            return f"{path} is cut off"
    # Of Trainer's and PEFT's own files; what else lies there is the user's.
    for path in sorted(path for pattern in TORCH_FILES for path in checkpoint.glob(pattern)):
        if not zipfile.is_zipfile(path):
            return f"{path} is cut off"
    return None


def all_in(output_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: -int(path.name.rsplit("-", 1)[1]))


def resolve(wanted: str | bool, output_dir: str) -> str:
    """
    Return the checkpoint to resume from.

    A folder that is the newest of its run but not complete stands for the newest complete one: that is what scripts
    find with `get_last_checkpoint` after a run was killed while it saved.

    Args:
        wanted (`str` or `True`): a checkpoint folder, or the newest complete one in `output_dir`.
        output_dir (`str`): folder of the run.

    Raises:
        ValueError: if there is no complete checkpoint, or the one that was named is not; names the newest complete
            one.
    """
    found = all_in(output_dir if wanted is True else Path(wanted).parent)
    first = found[0] if wanted is True and found else wanted
    trouble = None if first is True else problem(first)
    if first is not True and trouble is None:
        _let_go_first(found, Path(first))
        return str(first)
    complete = next((path for path in found if problem(path) is None), None)
    if found and Path(str(first)) == found[0] and complete is not None:
        logger.warning("%s; going back to the checkpoint before it that is complete, %s", trouble, complete)
        _let_go_first(found, complete)
        return str(complete)
    remedy = f"no complete checkpoint in it{f' ({trouble})' if trouble else ''}; train without resuming"
    require(wanted is not True, "output_dir", output_dir, remedy)
    last = "there is no complete one beside it" if complete is None else f"the newest complete one is {complete}"
    raise ValueError(f"resume_from_checkpoint={str(wanted)!r}: {trouble}; {last}")


def _let_go_first(found: list[Path], chosen: Path) -> None:
    """
    Let what is left of checkpoints before the chosen one be deleted before it.

    Rotation deletes what was changed longest ago, and one that was killed has just changed what it was deleting: whole
    checkpoints would go before that.
    """
    for path in found[found.index(chosen) + 1 :] if chosen in found else ():
        if problem(path) is not None:
            with contextlib.suppress(OSError):
                os.utime(path, (0, 0))


def explain_full_disk(error: BaseException, output_dir: str) -> OSError | None:
    """Return an error that names what was being written and the newest complete checkpoint; `None`: no full disk."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):  # safetensors and torch.save raise errors of their own that say little
        full = full or "No space left" in str(error) or shutil.disk_usage(output_dir).free < 2**16
    if not full:
        return None
    found = all_in(output_dir)
    broken = next((str(path) for path in found if problem(path) is not None), output_dir)
    good = next((path for path in found if problem(path) is None), None)
    last = (
        f"the newest complete checkpoint is {good}; resume from it" if good else "there is no complete checkpoint yet"
    )
    return OSError(
        errno.ENOSPC, f"{broken}: the disk is full ({type(error).__name__}: {str(error)[:200]}); make room; {last}"
    )


def short_hash(*values: Any) -> str:
    """Hash JSON values to 16 hexadecimal digits, for file names."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
