"""Where what the base makes of prompts is kept: in memory, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .frozen_base import FrozenBase

Prompt = tuple[int, ...]


class Recompute:
    """Keep nothing: the distinct prompts of a batch are run in every step, without gradient."""

    def get(
        self, base: FrozenBase, prompts: Sequence[Prompt], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return what is kept of some prompts.

        Args:
            base ([`FrozenBase`]): computes what is not known.
            prompts (`Sequence[tuple]`): token ids of each, distinct, none of them empty.
            device (`torch.device`): where it is needed.

        Returns:
            `[N, width]`, one prompt after the other, and the positions, int64 `[N]`, that
            [`FrozenBase.keys_and_values`] takes with it.
        """
        kept = base.record(prompts) if prompts else torch.empty(0, 0, device=device)
        return kept, torch.arange(len(kept), device=device)


class Stored:
    """Keep prompts in memory, from when they are first needed."""

    def __init__(self) -> None:
        self.known: dict[Prompt, torch.Tensor] = {}

    def get(
        self, base: FrozenBase, prompts: Sequence[Prompt], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is kept of some prompts, as [`Recompute.get`] does."""
        for prompt in prompts:
            if prompt not in self.known:
                # Alone, so that what is kept does not depend on the batch in which it came first: resume is bit-exact.
                self.known[prompt] = base.record([prompt]).cpu()
        if not prompts:
            return torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
        kept = torch.cat([self.known[prompt] for prompt in prompts]).to(device, non_blocking=True)
        return kept, torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
