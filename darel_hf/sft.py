"""`DarelSFTTrainer`: trl's `SFTTrainer` with DAREL; apart from the other trainers, because trl is optional."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("DarelSFTTrainer needs trl: pip install 'darel_hf[trl]'") from error

from .padding_free import is_flat
from .trainer import DarelMixin


class DarelSFTTrainer(DarelMixin, SFTTrainer):
    """
    `trl.SFTTrainer` with DAREL, see [`DarelMixin`]: text, prompt-completion and conversational data.

    trl's `packing` and `padding_free` are refused: a row of a batch must be one sample.
    `DarelConfig(unpad=True)` takes the padding away later.
    """

    def _prepare_run(self) -> None:
        """Prepare as the class below; what is measured on the way is kept out of trl's metrics of training."""
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        try:
            super()._prepare_run()
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the class below; without padding, trl's count of tokens is that of the row."""
        tokens = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if is_flat(inputs) and self.model.training:  # trl has summed up the mask, which holds places
            row = torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
            row = self.accelerator.gather_for_metrics(row).sum().item()
            self._total_train_tokens = tokens + row // getattr(self, "_tp_size", 1)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def losses_of_outputs(self, outputs: Any) -> torch.Tensor | None:
        """Read them off trl's fused head, which gives log-probabilities of the labels and no logits."""
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        return None if log_probs is None or mask is None else -log_probs.sum(1) / mask.sum(1).clamp(min=1)
