"""Finishing: in the last epochs a reader's adapters act everywhere, so that what is saved is stock LoRA."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from ..adapters import find_reader
from ..files import require

logger = logging.getLogger(__name__)


class FinishEverywhere(TrainerCallback):
    """
    Let the adapters of a reader act everywhere from a step on; on resume, too, by the number of the step.

    Args:
        trainer (`Trainer`): its model is a reader.
        epochs (`float`): how many, at the end.
        begun (`bool`): whether the checkpoint that the run goes on from is stock LoRA already.
    """

    def __init__(self, trainer: Any, epochs: float, begun: bool = False):
        self.trainer, self.epochs, self.begun = trainer, epochs, begun
        self.first: int | None = None  # number of steps that are done when it begins

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Find out with which step it begins."""
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.first = state.max_steps - max(round(self.epochs * steps), 1)
        remedy = f"the run has {state.max_steps} steps, {steps} an epoch; give less, or train a LoraConfig"
        require(self.first > 0, "finish_epochs", self.epochs, remedy)
        if self.begun and state.global_step < self.first:
            logger.warning(
                "finish_epochs=%g: adapters of the checkpoint act everywhere already, and this run is longer: from "
                "step %d to %d they leave prompts alone again",
                self.epochs,
                state.global_step + 1,
                self.first,
            )
        self.set(state.global_step >= self.first)  # a run that goes on from its end does no further step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say it aloud where training was stopped before it began."""
        if state.global_step <= self.first:
            logger.warning(
                "finish_epochs=%g: training ended after step %d, before adapters act everywhere (from step %d on): "
                "what is saved is a reader, no stock LoRA",
                self.epochs,
                state.global_step,
                self.first + 1,
            )

    def start_step(self, step: int) -> None:
        """Let them act where it is time; called before anything of a step is done, `step` are done before it."""
        if step == self.first:
            logger.info("adapters act everywhere from step %d on: what is saved is stock LoRA", step + 1)
        self.set(step >= self.first)

    def set(self, everywhere: bool) -> None:
        """Let the active adapters act everywhere, or on completions only."""
        reader = find_reader(self.trainer.model)
        for name in reader.active_adapters:
            reader.peft_config[name].everywhere = everywhere
