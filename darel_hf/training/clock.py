"""`Clock`: the seconds of one `train()`, and what they went into."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..budget import clock


class Clock:
    """
    Count the seconds of a run, whoever spends them.

    Args:
        device (`torch.device`): of the model; what it was asked for so far is waited for.

    Attributes:
        seconds (`dict`): by part: `probe` (measuring costs), `offline`, `scoring` (online forward passes), `selection`
            and `evaluation`; of this process.
    """

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()
        self.seconds = dict.fromkeys(("probe", "offline", "scoring", "selection", "evaluation"), 0.0)
        self._counting: set[str] = set()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, in all processes that it was resumed in."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def count(self, part: str, wait: bool = True) -> Iterator[None]:
        """Add the seconds of a block to a part, once where blocks lie within each other; `wait`: for the device."""
        if part in self._counting:
            yield
            return
        self._counting.add(part)
        started = clock(self.device) if wait else time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += (clock(self.device) if wait else time.perf_counter()) - started
            self._counting.remove(part)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember."""
        return {"seconds": self.seconds, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`Clock.state_dict`] returned."""
        self.seconds.update(state["seconds"])
        self.started -= state["elapsed"]
