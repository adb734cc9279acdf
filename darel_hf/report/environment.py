"""What a run was made with: versions, machine, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("darel_hf", "torch", "transformers", "accelerate", "peft", "datasets", "trl", "numpy")


def describe(args: Any) -> dict[str, Any]:
    """
    Return what explains a run afterwards, as a plain dict for JSON.

    Args:
        args (`TrainingArguments`): of the run; the device and the number of processes are theirs.
    """
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device),
        "processes": args.world_size,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the working folder, with a plus sign if files in it differ, or `None` outside of git."""
    try:
        found = [
            subprocess.run(["git", *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] + ("+" if found[1] else "")
