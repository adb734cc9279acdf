"""Keep a time budget while training: re-plan the number of steps, decay the learning rate over progress."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

CHECKS = 20  # times a run is looked at, besides after 4, 8, 16, ... steps
TOLERANCE = 0.01  # of all planned steps: smaller changes are not worth a decision
EARLY_TOLERANCE = 0.25  # likewise for a cut at the first looks, when a few steps say little
SLOW = 5  # times the median: a step that takes longer was slow for a reason of its own (compiling, start-up, saving)
ONCE = 2  # so many of them are taken for what does not come again; more, for what does
GRANTED = 1.25  # how much slower or faster than measured a plain step may be taken to be
GRANTING = 0.25  # part of the run in which that is found out


class Progress:
    """
    Which position of the planned schedule each step of a run stands for.

    A schedule was made for `planned` steps. When a run is to end earlier, what is left of the schedule is spread over
    the steps that are left, so that warm-up, decay and end stay what they were. Decisions are `(step, position, end)`:
    from `step` on, positions go evenly from `position` to `planned` at step `end`.

    Args:
        planned (`int`): optimizer steps that the schedule was made for.
        decisions (`list`, *optional*): of a run that goes on.

    Example:

    ```python
    >>> progress = Progress(100)
    >>> progress.end_at(75, step=50)
    >>> progress.position(50), progress.position(60), progress.position(75)
    (50.0, 70.0, 100.0)
    ```
    """

    def __init__(self, planned: int, decisions: list[list[float]] | None = None):
        self.planned = planned
        self.decisions = [list(decision) for decision in decisions or [[0, 0.0, planned]]]

    @property
    def end(self) -> int:
        """The step at which training ends, as decided last."""
        return int(self.decisions[-1][2])

    def position(self, step: float) -> float:
        """Return the position in the planned schedule, at most `planned`; never goes back."""
        start, position, end = next(d for d in reversed(self.decisions) if d[0] <= step)
        if step >= end:
            return float(self.planned)
        return position + (step - start) * (self.planned - position) / (end - start)

    def end_at(self, end: int, step: int) -> None:
        """Decide, after `step` steps, to end at step `end`, later than `step`."""
        self.decisions.append([step, self.position(step), end])


@dataclass(eq=False)
class KeepBudget(TrainerCallback):
    """
    End training within its time budget: look at the time now and then, and shorten what is left if it must be.

    Steps are never added to what was planned; those taken away may come back if the machine gets faster again.

    Args:
        seconds (`float`): that the run may take from the start of `elapsed`.
        elapsed (`Callable`): `() -> float`, seconds so far, all but evaluation counted.
        step_cost (`Callable`): `step -> float`, what the plan says a step costs, relative to one without scoring.
        step_seconds (`float`): what the plan says a step without scoring takes. A few steps measured alone say little
            of a loop and of a machine whose speed varies, and plain training would meet the same; so during the first
            part of a run the budget, a fraction of plain training's time, follows what steps take without scoring.
        decide (`Callable`): `(function) -> value`, calls a function on the main process and gives all its value.
        decisions (`list`, *optional*): of a run that goes on.
        scoring (`Callable`, *optional*): `() -> float`, the seconds among them that went into scoring; `None` where
            that is part of the steps (`online_backward="sliced"`).
        granted (`float`): of a run that goes on: how much slower than measured its steps have turned out to be.
        share (`float`): the part of plain training's time that the budget is: of what steps are slow for once
            (compiling, start-up), which plain training meets as well, so much is added to the budget.
    """

    seconds: float
    elapsed: Callable[[], float]
    step_cost: Callable[[int], float]
    step_seconds: float
    decide: Callable[[Callable[[], int]], int]
    decisions: list[list[float]] | None = None
    scoring: Callable[[], float] | None = None
    granted: float = 1.0
    share: float = 0.0
    over: bool = field(default=False, init=False)  # whether a run that goes on has nothing left to do
    progress: Progress | None = field(default=None, init=False)

    def schedule(self, scheduler: Any, steps: int) -> None:
        """Let a scheduler go by progress. One that is no `LambdaLR` cannot: then steps stay as they were planned."""
        self.progress = None
        if not isinstance(scheduler, LambdaLR):
            logger.warning(
                "lr_scheduler=%s: it cannot be made to end earlier, so the time budget holds only as far as the "
                "plan's prediction does; choose linear, cosine or another schedule of transformers",
                type(scheduler).__name__,
            )
            return
        # Not after a retry with smaller batches, or for more epochs.
        same = self.decisions and self.decisions[0][2] == steps
        progress = self.progress = Progress(steps, self.decisions if same else None)
        scheduler.lr_lambdas = [_by_progress(planned, progress) for planned in scheduler.lr_lambdas]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; go on with earlier decisions."""
        self.begun, self.begun_step = self.elapsed(), state.global_step
        self.seen, self._times = self.begun, []
        self.over = bool(self.progress and self.decisions) and state.global_step >= self.progress.end
        self.scored = 0.0 if self.scoring is None else self.scoring()
        if self.progress is not None:
            state.max_steps = self.progress.end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the time a few times a run, and decide when training ends."""
        progress, step = self.progress, state.global_step
        if progress is None or not self.begun_step < step < progress.end:
            return
        now = self.elapsed()
        self._times.append((now - self.seen) / self.step_cost(step - 1))
        self.seen = now
        done = step - self.begun_step
        early = done < progress.planned // CHECKS
        if step % max(4, progress.planned // CHECKS) and not (done >= 4 and done & (done - 1) == 0):
            return  # neither one of the looks that are evenly spaced, nor after a power of two
        end = self.decide(lambda: self._affordable_end(step, early))
        cut = progress.end - end  # below 0: what was cut comes back, as soon as it can be had
        if abs(cut) > (EARLY_TOLERANCE if early and cut > 0 else TOLERANCE) * progress.planned:
            progress.end_at(end, step)
            state.max_steps = end
            logger.info("time budget: training now ends at step %d of %d planned", end, progress.planned)

    def _affordable_end(self, step: int, early: bool) -> int:
        now, (unit, once) = self.elapsed(), usual_step(self._times)
        if not early and step <= GRANTING * self.progress.planned:
            training = unit
            if self.scoring is not None:
                units = sum(self.step_cost(s) for s in range(self.begun_step, step))
                training = (unit * units - (self.scoring() - self.scored)) / (step - self.begun_step)
            self.granted = min(max(training / self.step_seconds, 1 / GRANTED), GRANTED)
        left, end = self.granted * self.seconds + self.share * once - now, step
        while end < self.progress.planned:
            left -= unit * self.step_cost(end)
            if left < 0:
                break
            end += 1
        return max(end, step + 1)


def usual_step(times: list[float]) -> tuple[float, float]:
    """Return what a step takes on average without the few that were slow once, and what those took beyond that."""
    limit = SLOW * statistics.median(times)
    usual = [time for time in times if time <= limit]
    if len(times) - len(usual) > ONCE:  # it comes again and again
        return statistics.mean(times), 0.0
    unit = statistics.mean(usual)
    return unit, sum(times) - unit * len(times)


def _by_progress(planned: Callable[[float], float], progress: Progress) -> Callable[[int], float]:
    """Return a schedule over steps that is the planned one over progress; one of an earlier `train()` is unwrapped."""
    planned = getattr(planned, "planned", planned)

    def schedule(step: int) -> float:  # a function: schedulers store the state of other callables
        return planned(progress.position(step))

    schedule.planned = planned
    return schedule
