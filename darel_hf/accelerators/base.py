"""`Accelerator`: what the trainer, the planner and the report know of whatever makes a training step cheaper."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..config import ACCELERATOR_FACTS, AcceleratorFacts
from ..files import require
from ..scoring import SampleLosses, Trial, base_model, is_causal_lm, preserve_rng_state

logger = logging.getLogger(__name__)

#: Classes by name, see [`register_accelerator`].
ACCELERATORS: dict[str, type[Accelerator]] = {}


class CannotAccelerate(RuntimeError):
    """A step of this model cannot be made cheaper like this; the message says why."""


class Accelerator(ABC):
    """
    Make a training step cheaper. One is made for each `train()`, where the settings ask for it.

    Subclasses say what they do in as few of these methods as they need; every call comes from one place in `training/`
    or `budget/`, which know nothing else of them.

    Args:
        trainer (`DarelMixin`): the trainer, its model and settings.

    Attributes:
        facts ([`AcceleratorFacts`]): name, setting, exactness, and with what it does not go.
        falls_back (`bool`): where it cannot be had, training goes on without it and says so; else that is an error.
        value: of its setting.
        asked (`bool`): whether the settings ask for it; else it was found to pay, and where it fails it is left out.
        chooses (`bool`): whether it scores all candidates with the forward pass that trains, see [`Choosing`].
        on_model (`bool`): whether it acts on the model while it is attached, and not on batches alone.
        most (`float`): where a step with it was measured to take more than this of one without, it is left out.
        keeps (`bool`): whether it keeps what it makes of samples for later steps: then scores before training are read
            off its rows.
        own_plain (`bool`): whether `plain` is a step that the model would not take without it: what takes longer is
            then timed against one without it, too, before it is left out.
        first_epoch (`float`): what a step of the first epoch takes relative to later ones, once that was measured.
    """

    facts: AcceleratorFacts
    falls_back = True
    chooses = False
    on_model = False
    most = math.inf
    keeps = False
    own_plain = False
    first_epoch = 1.0

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.value = getattr(trainer.darel, self.facts.setting, None)
        self.asked = True

    def unfit(self) -> str | None:
        """Return why no model of this kind can have it, or `None`; of several, plans say the same words once."""
        return None

    @abstractmethod
    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """
        Return why this trainer cannot have it, or `None`; asked before any compute, and it leaves the model as it was.

        Not asked of a model that is `unfit`.

        Args:
            few_rows (`Callable`, *optional*): makes a batch of a few samples, without ids, to compare with the slow
                way; `None`: the data are a stream, of which nothing can be tried before training.
        """

    def attach(self) -> None:  # noqa: B027 - most have nothing to do
        """Get ready for the loop; called again where Trainer starts anew, perhaps with another model."""

    def detach(self) -> None:  # noqa: B027
        """Leave the model as a plain trainer would; called when training ends, however it ends."""

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Be attached for a while."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    def step(self, inputs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
        """Return what computes the loss of a training step on these inputs, to try out or compare with."""
        items = self.trainer.count_items(inputs)
        return lambda: self.trainer.own_loss(inputs, items, smoothed=True)

    def try_attached(self, inputs: Mapping[str, Any]) -> str | None:
        """Do the step of a batch without it and while it is attached; return what would change, or `None`."""
        step = self.step(inputs)
        trial = Trial(self.trainer, step)
        try:
            with self.attached():
                return trial.difference(step)
        except Exception as error:  # whatever it is, the model has just done the step without
            return f"{type(error).__name__}: {first_line(error)}"

    def transform(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the model trains on in place of a micro-batch, which has no ids and weights any more."""
        return inputs

    def plain(self) -> contextlib.AbstractContextManager:
        """Return a context in which the model trains as it would without what this accelerator is for."""
        return contextlib.nullcontext()

    def acting(self) -> contextlib.AbstractContextManager:
        """Return a context where a step on what it has transformed is one with it; what is on top is timed there."""
        return self.attached() if self.on_model else contextlib.nullcontext()

    def phases(self) -> list[tuple[float, Callable[[], contextlib.AbstractContextManager]]]:
        """
        Return what parts of training differ in what a step costs, for the planner; none: it is one.

        Returns:
            of each part, which fraction of the steps it has, and what makes a context in which a step is one of it.
        """
        return []

    def measure(self, seconds: Callable[[Callable[[], Mapping]], float], inputs: Mapping[str, Any]) -> float | None:
        """
        Return the seconds of a training step with it, for the planner; `None`: a step on given rows takes as long.

        Args:
            seconds (`Callable`): times the making of inputs and a training step on them.
            inputs (`Mapping`): a micro-batch, as accelerators before this one have left it.
        """
        with self.acting():
            return seconds(lambda: self.transform(inputs))

    def told(self, reason: object, remedy: str) -> str:
        """Return a sentence that names the setting, the reason, and after `remedy` the value to set."""
        name, settings = self.facts.setting, self.trainer.darel
        return f"{name}={self.value!r}: {reason}; {remedy} {getattr(type(settings), name)!r}"

    def refuse(self, reason: str) -> NoReturn:
        """Raise `ValueError`: it cannot be had; or [`CannotAccelerate`], where nobody has asked for it."""
        if not self.asked:
            raise CannotAccelerate(reason)
        raise ValueError(self.told(reason, "set it to"))


class Choosing(Accelerator):
    """An accelerator whose one forward pass over all candidates both scores and trains."""

    chooses = True

    @abstractmethod
    def start_step(self) -> None:
        """Begin an optimizer step, also where an earlier one was not ended."""

    @abstractmethod
    def score(self, inputs: Mapping[str, Any]) -> tuple[SampleLosses, torch.Tensor]:
        """Return the differentiable losses of all candidates, and what ranks them, float `[c]`."""

    @abstractmethod
    def loss(self, inputs: Mapping, samples: SampleLosses, rows: Any, weights: Any, counted: Any) -> torch.Tensor:
        """Return the loss that a step on the chosen rows alone would have; `counted`: Trainer's, of all candidates."""

    @abstractmethod
    def settle(self, loss: torch.Tensor) -> torch.Tensor:
        """End a micro-batch after its backward pass; return the loss to log."""


def register_accelerator(cls: type[Accelerator]) -> type[Accelerator]:
    """
    Make an accelerator one that settings can ask for, by the field that its `facts` name.

    Raises:
        ValueError: for a name that is taken.
    """
    name = cls.facts.name
    require(name not in ACCELERATORS, "accelerator", name, "there is an accelerator of this name; choose another")
    ACCELERATOR_FACTS.setdefault(name, cls.facts)
    ACCELERATORS[name] = cls
    return cls


def make_accelerators(
    trainer: Any, few_rows: Callable[[], Mapping[str, Any]] | None, first_found: Callable[[Any], Any]
) -> tuple[list[Accelerator], dict[str, str]]:
    """
    Make and try out what the settings of a trainer ask for; what cannot be had is an error or, said aloud, left out.

    Args:
        trainer (`DarelMixin`): the trainer.
        few_rows (`Callable`, *optional*): see [`Accelerator.why_not`].
        first_found (`Callable`): of what the processes found, the first that is not `None`, the same on all.

    Returns:
        those that can be had, in the order in which they act on a batch; and why others cannot.
    """
    made, left_out = [], {}
    for name in trainer.darel.accelerators:
        accelerator = ACCELERATORS[name](trainer)
        reason = _reason(accelerator, few_rows, first_found)
        if reason is None:
            made.append(accelerator)
        elif accelerator.falls_back:
            left_out[name] = reason
            logger.warning("%s", accelerator.told(reason, "going on with"))
        else:
            accelerator.refuse(reason)
    left_out |= find_exact(trainer, made, left_out, few_rows, first_found)
    return in_order(made), left_out


def find_exact(
    trainer: Any,
    made: list[Accelerator],
    left_out: Mapping[str, str],
    few_rows: Callable[[], Mapping[str, Any]] | None,
    first_found: Callable[[Any], Any],
) -> dict[str, str]:
    """
    Make and try out what `fast` finds beside others; of those that exclude each other the one that does most.

    Asked again, once some of them were left out after all, it finds what these had excluded.

    Args:
        trainer (`DarelMixin`): the trainer.
        made (`list[Accelerator]`): those that are there; those that are found are added.
        left_out (`Mapping[str, str]`): those that are not looked at again.
        few_rows, first_found: see [`make_accelerators`].

    Returns:
        why others cannot be had.
    """
    reasons = {}
    for name, value, reason in trainer.darel.candidates():
        accelerator = _found(trainer, name, value)
        known = name in left_out or any(name == other.facts.name for other in made)
        if known or any(_exclude(other.facts, accelerator.facts) for other in made):
            continue  # what is there does all that it would
        if reason is None and few_rows is None:
            reason = "of a stream nothing can be tried out before training"
        reason = _reason(accelerator, few_rows, first_found) if reason is None else reason
        if reason is None:
            made.append(accelerator)
        else:
            reasons[name] = reason
    return reasons


def make_allowed(
    trainer: Any,
    name: str,
    value: Any,
    beside: Sequence[Accelerator],
    few_rows: Callable[[], Mapping[str, Any]],
    first_found: Callable[[Any], Any],
) -> tuple[Accelerator | None, str | None]:
    """
    Make and try out an accelerator that a budget may use, see [`make_accelerators`].

    Args:
        trainer (`DarelMixin`): the trainer.
        name (`str`): of the accelerator.
        value: of its setting.
        beside (`Sequence[Accelerator]`): those that are there.
        few_rows, first_found: see [`make_accelerators`].

    Returns:
        the accelerator, or why it cannot be had.
    """
    accelerator = _found(trainer, name, value)
    for other in beside:
        if _exclude(other.facts, accelerator.facts):
            return None, f"it does not go with {other.facts.name}"
    try:
        dataclasses.replace(trainer.darel, budget_allows=None, **{accelerator.facts.setting: value})
    except ValueError as error:
        return None, str(error)
    reason = _reason(accelerator, few_rows, first_found)
    return (accelerator, None) if reason is None else (None, reason)


def in_order(accelerators: Iterable[Accelerator]) -> list[Accelerator]:
    """Return accelerators in the order in which they act on a batch."""
    order = list(ACCELERATOR_FACTS)
    return sorted(accelerators, key=lambda accelerator: order.index(accelerator.facts.name))


def _found(trainer: Any, name: str, value: Any) -> Accelerator:
    """Make an accelerator that no setting asks for."""
    accelerator = ACCELERATORS[name](trainer)
    accelerator.value, accelerator.asked = value, False
    return accelerator


def _exclude(one: AcceleratorFacts, other: AcceleratorFacts) -> bool:
    return one.setting in other.not_with or other.setting in one.not_with


def _reason(accelerator: Accelerator, few_rows: Any, first_found: Callable[[Any], Any]) -> str | None:
    """Return why an accelerator cannot be had, the same on all processes; raise what is no reason."""
    error, reason = None, None
    try:
        with preserve_rng_state():
            reason = accelerator.unfit() or accelerator.why_not(few_rows)
    except Exception as found:  # of any kind: the other processes wait
        if should_reduce_batch_size(found):
            reason = f"trying it out takes more memory than there is ({first_line(found)})"
        elif accelerator.asked:
            error = found
        else:
            reason = f"{type(found).__name__}: {first_line(found)}"
    error = first_found(error)
    if error is not None:
        raise error
    return first_found(reason)  # of any process: they must all do the same


def not_causal(model: nn.Module) -> str | None:
    """Return what is wrong with a model for what is for causal language models only, or `None`."""
    model = base_model(model)
    return None if is_causal_lm(model) else f"{type(model).__name__} is no causal language model"


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
