"""Finishing: in the last epochs a reader's adapters act everywhere, so that what is saved is stock LoRA."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from ..adapters import find_reader

logger = logging.getLogger(__name__)


class FinishEverywhere(TrainerCallback):
    """
    Let the adapters of a reader act everywhere from a step on; on resume, too, by the number of the step.

    Args:
        trainer (`Trainer`): its model is a reader.
        epochs (`float`): how many, at the end.
    """

    def __init__(self, trainer: Any, epochs: float):
        self.trainer, self.epochs = trainer, epochs
        self.first: int | None = None  # number of steps that are done when it begins

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Find out with which step it begins."""
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.first = max(state.max_steps - round(self.epochs * steps), 0)
        self._set(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let them act where it is time."""
        if self._set(state.global_step) and state.global_step == self.first:
            logger.info("adapters act everywhere from step %d on: what is saved is stock LoRA", self.first + 1)

    def _set(self, step: int) -> bool:
        reader = find_reader(self.trainer.model)
        for name in reader.active_adapters:
            reader.peft_config[name].everywhere = step >= self.first
        return step >= self.first
