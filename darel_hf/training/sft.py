"""`DarelSFTTrainer`: trl's `SFTTrainer` with DAREL; apart from the other trainers, because trl is optional."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .trainer import DarelMixin

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("DarelSFTTrainer needs trl: pip install 'darel_hf[trl]'") from error


class DarelSFTTrainer(DarelMixin, SFTTrainer):
    """
    `trl.SFTTrainer` with DAREL, see [`DarelMixin`]: text, prompt-completion and conversational data.

    trl's `packing` and `padding_free` are refused: a row of a batch must be one sample.
    `DarelConfig(unpad=True)` takes the padding away later.
    """

    @contextlib.contextmanager
    def _without_metrics(self) -> Iterator[None]:
        """Keep what is measured and tried out of trl's metrics."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    def _prepare_run(self) -> None:
        with self._without_metrics():
            super()._prepare_run()

    def own_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the loss as the class below."""
        with self._without_metrics():
            return super().own_loss(*args, **kwargs)

    def training_step(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Do the training step of the class below; remember its tokens, before accelerators change the batch."""
        mask = inputs.get("attention_mask")
        self._tokens = torch.ones_like(inputs["input_ids"]).sum() if mask is None else mask.sum()
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._tokens = None

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the class below; trl counts the tokens of the batch before accelerators change it."""
        tokens = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._tokens is not None and self._run is not None and self._run.online.accelerators:
            used = self.accelerator.gather_for_metrics(self._tokens.to(loss.device)).sum().item()
            self._total_train_tokens = tokens + used // getattr(self, "_tp_size", 1)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    _tokens: torch.Tensor | None = None  # of the micro-batch in progress

    def losses_of_outputs(self, outputs: Any) -> torch.Tensor | None:
        """Read them off trl's fused head, which gives log-probabilities of the labels and no logits."""
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        return None if log_probs is None or mask is None else -log_probs.sum(1) / mask.sum(1).clamp(min=1)
