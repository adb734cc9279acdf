"""One run of a comparison of one's own trainers, in its process: make the trainer, train, evaluate, write results."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import require, write_json
from .runs import Run


def reference(function: Callable[..., Any], name: str) -> str:
    """Return how another process finds a function: `module:name`, or `file.py:name` for that of a script."""
    home, called = getattr(function, "__module__", None), getattr(function, "__qualname__", repr(function))
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    where = str(Path(script).resolve()) if home == "__main__" and script else home
    there = where not in (None, "__main__") and getattr(sys.modules.get(home), called, None) is function
    remedy = "each run is a process of its own: give a function from the top level of a module or a script file"
    require(there, name, called, remedy)
    return f"{where}:{called}"


def _function(found: str) -> Callable[..., Any]:
    home, name = found.rsplit(":", 1)
    if home.endswith(".py"):
        return runpy.run_path(home, run_name="__comparison__")[name]
    return getattr(importlib.import_module(home), name)


def command(folder: Path) -> list[str]:
    """Return what starts the run in `folder` with the module paths of this process."""
    code = f"import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {__name__} import main; main(sys.argv[1])"
    return [sys.executable, "-c", code, str(folder), json.dumps([os.path.abspath(path) for path in sys.path])]


def main(folder: str | Path) -> None:
    """Do the run in `folder`, see [`darel_hf.comparison.compare`]."""
    folder = Path(folder)
    asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run = Run(asked["arm"], asked["seed"], asked["settings"], folder)
    trainer = _function(asked["made_by"]["make_trainer"])(run)
    started = time.perf_counter()
    trainer.train()
    results: dict[str, Any] = {"seconds": time.perf_counter() - started, "steps": trainer.state.global_step}
    report = getattr(trainer, "report", None)
    if report is not None:
        results |= {"rows_backpropagated": report.rows_backpropagated, "predicted_time": report.plan.predicted_time}
    scores = _function(asked["made_by"]["evaluate"])(trainer)
    if not isinstance(scores, dict):
        scores = {"score": scores}
    if trainer.is_world_process_zero():
        write_json(Path(run.output_dir) / "results.json", {**results, **{k: float(v) for k, v in scores.items()}})
