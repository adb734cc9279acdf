"""The runs of a comparison: each a process and a folder; what is finished stays, what was cut off starts anew."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import DarelConfig
from ..files import refuse_used_folder, require, write_json, write_text
from .arms import DAREL, OURS, Settings, darel_of

try:
    import fcntl
except ImportError:  # no such locks here: two comparisons at once in one folder are not kept apart
    fcntl = None

FOLDER = "runs"
CHILD = "DAREL_COMPARISON_RUN"  # set in the environment of runs


@dataclass(frozen=True)
class Run:
    """
    One arm with one seed.

    Attributes:
        arm (`str`), seed (`int`): which.
        all_settings (`dict`): of the arm.
        folder (`Path`): `settings.yaml`, `run.json` (what was asked for), `log.txt`, and `output/`, which ends with
            `results.json`; or `failed.json`.
    """

    arm: str
    seed: int
    all_settings: Settings
    folder: Path

    @property
    def darel(self) -> DarelConfig:
        """DAREL's settings of the arm."""
        return darel_of(self.all_settings)

    @property
    def settings(self) -> Settings:
        """All others, `num_train_epochs` among them where the settings of the comparison or the arm name it."""
        return {key: value for key, value in self.all_settings.items() if key not in DAREL and key not in OURS}

    @property
    def output_dir(self) -> str:
        """Folder for the trainer."""
        return str(self.folder / "output")

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def outcome(self) -> dict[str, Any] | None:
        """Return the results, or `{"error": ...}` of a run that failed, or `None` where there is neither (yet)."""
        for path in (Path(self.output_dir) / "results.json", self.folder / "failed.json"):
            with contextlib.suppress(OSError, ValueError):  # a file that is not whole is none
                return dict(json.loads(path.read_text(encoding="utf-8")))
        return None


def check_folder(folder: Path, runs: Sequence[Run], made_by: dict[str, str]) -> None:
    """Raise `ValueError` for a folder with something else in it, or with results of other settings; write nothing."""
    if not (folder / FOLDER).is_dir():
        refuse_used_folder(folder, "something else", "name a new folder")
    for run in runs:
        _check_results(run, run.outcome(), made_by)


def _check_results(run: Run, found: dict[str, Any] | None, made_by: dict[str, str]) -> None:
    """Raise `ValueError` where a run has results by other settings; what failed or was cut off is no loss."""
    changed = [] if found is None or "error" in found else _changed(run, made_by)
    remedy = f"{run.name} was run with {'; '.join(changed[:3])}; name another folder, or another arm"
    require(not changed, "output_dir", str(run.folder.parents[1]), remedy)


def _changed(run: Run, made_by: dict[str, str]) -> list[str]:
    """Return in what a run that was begun differs from what is asked for now."""
    path = run.folder / "run.json"
    if not path.exists():
        return []
    before, now = json.loads(path.read_text(encoding="utf-8")), _asked(run, made_by)
    return [
        f"{key}={before[part].get(key)!r}, now {now[part].get(key)!r}"
        for part in ("settings", "made_by")
        for key in sorted({*before[part], *now[part]})
        if before[part].get(key) != now[part].get(key)
    ]


def _asked(run: Run, made_by: dict[str, str]) -> dict[str, Any]:
    """Return what a run is asked to do, as it comes back from a file."""
    asked = {"arm": run.arm, "seed": run.seed, "settings": run.all_settings, "made_by": made_by}
    return json.loads(json.dumps(asked, default=str))


def carry_out(
    runs: Sequence[Run],
    command: Callable[[Run], list[str]],
    made_by: dict[str, str],
    check: Callable[[dict[str, Any]], None],
    jobs: int,
    retry: bool,
    tell: Callable[[str], None],
) -> None:
    """
    Do all runs that are not done, in their order, `jobs` at a time; afterwards each has an outcome.

    Args:
        runs: see [`Run`].
        command (`Callable`): run -> what is started for it; it writes `output/results.json` as its last act.
        made_by (`dict`): what besides the settings must be the same if the folder is used again.
        check (`Callable`): raises for results that are of no use, which ends everything.
        jobs (`int`): processes at a time.
        retry (`bool`): do those that failed once more.
        tell (`Callable`): gets a line about each run that ends.
    """
    stop = threading.Event()
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)

    def one(run: Run) -> tuple[Run, dict[str, Any] | None, bool]:
        with _held(run, stop, tell) as lock:
            found = run.outcome()
            _check_results(run, found, made_by)  # once more: of a run that was waited for
            again = found is None or ("error" in found and (retry or bool(_changed(run, made_by))))
            if again and not stop.is_set():
                _start(run, command(run), made_by, lock, stop)
                found = run.outcome()
            return run, found, again

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(one, run) for run in runs}
        try:
            ended = 0
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                ends = [future.result() for future in done]
                for run, found, again in sorted(ends, key=lambda end: runs.index(end[0])):
                    ended += 1
                    if "error" in found:
                        said = f"failed: {found['error']}"
                    else:
                        check(found)
                        said = f"{found['seconds']:.1f} s of training"
                    tell(f"{ended} of {len(runs)}  {run.name}: {said}{'' if again else ' (done before)'}")
        finally:
            stop.set()  # after an error or Ctrl-C: what runs is ended, what waits does not begin
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def _held(run: Run, stop: threading.Event, tell: Callable[[str], None]) -> Iterator[int]:
    """
    Hold the lock of a run; its process inherits it, so that it is held as long as either lives.

    A run may outlive the comparison that started it, if that was killed. It is waited for, and counts.
    """
    descriptor = os.open(run.folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        told = fcntl is None
        while fcntl is not None and not stop.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not told:
                    tell(f"{run.name} still runs, started by another comparison: waiting for it")
                told = True
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _start(run: Run, command: list[str], made_by: dict[str, str], lock: int, stop: threading.Event) -> None:
    """Start the process of a run and wait for it; an error is written down with the last line of its log."""
    output, log = Path(run.output_dir), run.folder / "log.txt"
    # What had been trained is used if training was over; half a training starts anew, so that its time is that of one.
    resume = (output / "trained.json").exists() and not _changed(run, made_by)
    if not resume:
        shutil.rmtree(output, ignore_errors=True)
    (run.folder / "failed.json").unlink(missing_ok=True)
    settings = {**run.all_settings, "seed": run.seed, "output_dir": str(output)}
    settings |= {"resume": True} if resume else {}
    write_text(run.folder / "settings.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(run.folder / "run.json", _asked(run, made_by))
    inherited = {} if fcntl is None else {"pass_fds": (lock,)}
    with open(log, "ab") as file:
        began = file.tell()
        environment = {**os.environ, CHILD: run.name}
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        # A session of its own: Ctrl-C ends the comparison, which ends its runs, and none of them counts as failed.
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams, **inherited)
    while process.poll() is None:
        if stop.wait(0.1):
            os.killpg(process.pid, signal.SIGTERM) if hasattr(os, "killpg") else process.terminate()
            process.wait()
            return
    if process.returncode or run.outcome() is None:
        with open(log, "rb") as file:
            file.seek(began)
            text = file.read().decode("utf-8", "replace")
        write_json(run.folder / "failed.json", {"error": _why(process.returncode, text)})
        (output / "results.json").unlink(missing_ok=True)  # of a process that failed after all


def _why(code: int, log: str) -> str:
    """Return why a process failed: the signal, or the last line of its log that looks like an error, or the last."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in log.splitlines()]
    launchers = ("ChildFailedError", "CalledProcessError")  # say that something failed, not what
    lines = [line for line in lines if line and not any(name in line for name in launchers)]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception|Interrupt|Exit)\b|(\S+: )?error:)", line)]
    if code == 0:
        return "it ended without results.json"
    return (errors or lines or [f"exit status {code}"])[-1]
