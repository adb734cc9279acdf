"""`compare` and `compare_recipe`: is it worth it on your data? Arms times seeds of runs, and what they say."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import require
from . import child
from .arms import OURS, Settings, read_settings, settings_of
from .result import Comparison
from .runs import CHILD, FOLDER, Run, carry_out, check_folder

Arms = Sequence[str] | Mapping[str, Settings | None]


def compare(
    make_trainer: Callable[[Run], Any],
    arms: Arms,
    seeds: int | Sequence[int],
    evaluate: Callable[[Any], float | dict[str, float]],
    *,
    output_dir: str | os.PathLike,
    metric: str = "score",
    settings: Settings | None = None,
    budget: float = 0.5,
    margin: float | None = None,
    lower_is_better: bool | None = None,
    jobs: int = 1,
    retry: bool = False,
    tell: Callable[[str], None] = print,
) -> Comparison:
    """
    Compare arms of a training of your own: each with each seed, in a process of its own, interleaved by seed.

    A call with an `output_dir` that was used before goes on: what has finished, or failed, is not run again.

    Args:
        make_trainer (`Callable`): makes the trainer of a [`Run`]: `run.darel` is the [`DarelConfig`], `run.settings`
            all other settings of the arm (`num_train_epochs`); `run.seed` and `run.output_dir` go into its arguments.
        arms: names ([`darel_hf.comparison.ARMS`]), or a map from names to settings (`None`: the arm of that name).
            The others are compared with the first.
        seeds: how many, from 0 on, or which.
        evaluate (`Callable`): trained trainer -> its score, called `"score"`, or scores by name.
        output_dir: folder for runs, table, chart and page.
        metric (`str`): which score is compared.
        settings (`dict`, *optional*): what all arms start from, as a recipe's YAML has it: `{"num_train_epochs": 5}`.
        budget (`float`): fraction of the time of plain training, for arms that have one.
        margin (`float`, *optional*): how much of the metric an arm may lose and still count as no worse.
        lower_is_better (`bool`, *optional*): by default for names with `loss`, `error` or `perplexity`, and `ter`.
        jobs (`int`): runs at a time. Several slow each other down, and so the times.
        retry (`bool`): run those that failed once more.
        tell (`Callable`): gets a line about each run that ends, and one before.

    `make_trainer` and `evaluate` are found by name in each process: they stand at the top level of a module, or of a
    script that calls this below `if __name__ == "__main__":`.

    Raises:
        ValueError: for bad arguments, and for a folder with runs of other settings, before any run.
        RuntimeError: from within a run, if the script has no such line.
    """
    called = {"make_trainer": child.reference(make_trainer, "make_trainer")}
    called["evaluate"] = child.reference(evaluate, "evaluate")
    title = getattr(make_trainer, "__module__", "").rpartition(".")[2].replace("__main__", Path(sys.argv[0]).name)
    wanted = settings_of(arms, settings or {}, budget)
    numbers = _seeds(seeds, 0)
    return _compare(
        title,
        wanted,
        numbers,
        lambda run: child.command(run.folder),
        called,
        Path(output_dir),
        metric,
        margin,
        lower_is_better,
        jobs,
        retry,
        tell,
    )


def compare_recipe(
    recipe: str | os.PathLike,
    arms: Arms,
    seeds: int | Sequence[int],
    *,
    output_dir: str | os.PathLike,
    metric: str,
    script: str | os.PathLike | None = None,
    settings: Settings | None = None,
    first_seed: int | None = None,
    launch: str | None = None,
    budget: float = 0.5,
    margin: float | None = None,
    lower_is_better: bool | None = None,
    jobs: int = 1,
    retry: bool = False,
    tell: Callable[[str], None] = print,
) -> Comparison:
    """
    Compare arms of a recipe: see [`compare`] for what is not said here.

    Args:
        recipe: YAML file of settings.
        metric (`str`): a key of the `results.json` that the script leaves.
        script (*optional*): what trains by such a file, and writes `results.json` (with `seconds`) to its
            `output_dir` as its last act; default: `train.py` beside the recipe.
        settings (`dict`, *optional*): on top of the recipe, for all arms.
        first_seed (`int`, *optional*): default: the recipe's.
        launch (`str`, *optional*): command in front of the script, such as `accelerate launch --num_processes 2`.
    """
    base = {**read_settings(recipe, "recipe"), **(settings or {})}
    for key in OURS:
        require(key not in (settings or {}), "set", key, "the comparison sets this; leave it out")
    script = Path(recipe).parent / "train.py" if script is None else Path(script)
    require(script.is_file(), "script", str(script), "no such file; name the script that trains by the recipe")
    start = [sys.executable] if launch is None else shlex.split(launch)
    require(shutil.which((start or [""])[0]) is not None, "launch", launch, "no such command")
    numbers = _seeds(seeds, int(base.get("seed", 0)) if first_seed is None else first_seed)

    def command(run: Run) -> list[str]:
        return [*start, str(script), str(run.folder / "settings.yaml")]

    made_by = {"script": str(script.resolve()), "launch": launch or ""}
    title, wanted = Path(recipe).name, settings_of(arms, base, budget)
    return _compare(
        title, wanted, numbers, command, made_by, Path(output_dir), metric, margin, lower_is_better, jobs, retry, tell
    )


def _seeds(seeds: int | Sequence[int], first: int) -> list[int]:
    if isinstance(seeds, int):
        require(seeds >= 1, "seeds", seeds, "give a number of seeds, 1 or more")
        return list(range(first, first + seeds))
    require(len(seeds) == len(set(seeds)) > 0, "seeds", list(seeds), "give different whole numbers")
    return list(seeds)


def _compare(
    title: str,
    arms: dict[str, Settings],
    seeds: list[int],
    command: Callable[[Run], list[str]],
    made_by: dict[str, str],
    folder: Path,
    metric: str,
    margin: float | None,
    lower_is_better: bool | None,
    jobs: int,
    retry: bool,
    tell: Callable[[str], None],
) -> Comparison:
    if CHILD in os.environ:
        raise RuntimeError(
            f"a run of a comparison ({os.environ[CHILD]}) began another one: put the call of compare below "
            'if __name__ == "__main__":'
        )
    require(margin is None or margin > 0, "margin", margin, f"give how much {metric} may be lost, more than 0")
    require(jobs >= 1, "jobs", jobs, "give a number of processes, 1 or more")
    runs = [
        Run(arm, seed, settings, folder / FOLDER / f"{arm}-{seed}")
        for seed in seeds  # all arms of a seed one after the other: a machine that gets slower slows all of them
        for arm, settings in arms.items()
    ]
    check_folder(folder, runs, made_by)

    def check(results: dict[str, Any]) -> None:
        for name, value in ((metric, "metric"), ("seconds", "script")):
            found = sorted(k for k, v in results.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
            require(name in found, value, name, f"the results have no such number, only {', '.join(found)}")

    tell(f"{len(runs)} runs, {jobs} at a time; what they say goes to {folder / FOLDER}/ARM-SEED/log.txt")
    carry_out(runs, command, made_by, check, jobs, retry, tell)
    if lower_is_better is None:
        lower_is_better = metric == "ter" or any(word in metric for word in ("loss", "error", "perplexity"))
    outcomes = {(run.arm, run.seed): run.outcome() for run in runs}
    made = Comparison.of(title, metric, lower_is_better, margin, jobs, arms, outcomes)
    made.write(folder)
    return made
