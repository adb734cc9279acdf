"""`DarelSFTTrainer`: trl's `SFTTrainer` with DAREL; apart from the other trainers, because trl is optional."""

from __future__ import annotations

from typing import Any

import torch

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("DarelSFTTrainer needs trl: pip install 'darel_hf[trl]'") from error

from .trainer import DarelMixin


class DarelSFTTrainer(DarelMixin, SFTTrainer):
    """
    `trl.SFTTrainer` with DAREL, see [`DarelMixin`]: text, prompt-completion and conversational data.

    trl's `packing` and `padding_free` are refused: a row of a batch must be one sample.
    `DarelConfig(unpad=True)` takes the padding away later.
    """

    def losses_of_outputs(self, outputs: Any) -> torch.Tensor | None:
        """Read them off trl's fused head, which gives log-probabilities of the labels and no logits."""
        log_probs, mask = getattr(outputs, "log_probs", None), getattr(outputs, "label_mask", None)
        return None if log_probs is None or mask is None else -log_probs.sum(1) / mask.sum(1).clamp(min=1)
