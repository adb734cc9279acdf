"""`Clock`: the seconds of one `train()`, and what they went into."""

from __future__ import annotations

import contextlib
import math
import time
from array import array
from collections.abc import Iterator
from typing import Any

import torch

from ..budget import clock, usual_step


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
        self._steps, self._begun = array("d"), math.nan

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

    def begin_loop(self) -> None:
        """Begin to count what steps take; again where Trainer begins anew."""
        self._steps, self._begun = array("d"), math.nan

    def begin_step(self) -> None:
        """Note that an optimizer step begins; the one before it has ended, with all that came after it."""
        now = self.elapsed - sum(self.seconds.values())
        if self._begun <= now:  # not the first
            self._steps.append(now - self._begun)
        self._begun = now

    @property
    def usual_step(self) -> float:
        """Seconds of an optimizer step and its loading, scoring left out; NaN before two have begun."""
        return usual_step(self._steps)[0] if self._steps else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember."""
        return {"seconds": self.seconds, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`Clock.state_dict`] returned."""
        self.seconds.update(state["seconds"])
        self.started -= state["elapsed"]
