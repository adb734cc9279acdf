"""Trials that can fail: on a few real rows, another way to compute a step is compared with the trainer's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .scorer import precision, preserve_rng_state, untouched

#: Largest relative difference that is rounding, by precision: of losses, and of gradients. In a bfloat16 model of two
#: layers two right ways were 0.05 and 0.09 away from float64 in their worst gradient, and 0.11 from each other.
ROUNDING = {"exact": (1e-4, 1e-3), "float32": (1e-3, 5e-3), "reduced": (2e-2, 2e-1)}
#: A gradient is compared on its own scale, but on none smaller than this part of the largest one.
SMALLEST_SCALE = 1e-3


@contextlib.contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """
    Move what is trained off the point where it starts, and put it back bit for bit.

    An adapter whose second factor is zero changes no output and has half of its gradients zero: whatever is done to it
    looks right. Of a PEFT model all that is trained is moved, of others what is zero as a whole.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not hasattr(model, "peft_config"):
        trained = [p for p in trained if not p.detach().any()]
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad(), preserve_rng_state():
            torch.manual_seed(0)
            for parameter in trained:
                scale = max(0.1 * parameter.float().square().mean().sqrt().item(), 0.02)
                parameter.add_(scale * torch.randn_like(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)


class Trial:
    """
    Compare other ways to compute a step with the trainer's own, in eval mode, and leave the model as it was.

    Args:
        trainer (`DarelMixin`): its model, its precision, its own loss.
        inputs (`Mapping`): a few rows, as a step gets them, without ids; on the model's device.
        wanted (`Callable`): `() -> loss`, the slow way; its loss and gradients are computed once.
    """

    def __init__(self, trainer: Any, wanted: Callable[[], torch.Tensor]):
        self.trainer, self.model = trainer, trainer.model
        self.loss_rounding, self.gradient_rounding = ROUNDING[precision(trainer.model, trainer.autocast)]
        self.loss, self.gradients = self._step(wanted)

    def _step(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = self.model
        with untouched(model), preserve_rng_state(), moved(model), self.trainer.autocast():
            model.eval()
            model.zero_grad(set_to_none=True)
            loss = call()
            loss.backward()
            gradients = {n: p.grad.detach().float().clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach().float(), gradients

    def difference(self, call: Callable[[], torch.Tensor]) -> str | None:
        """
        Compute a step another way; return what differs by more than rounding, as a clause, or `None`.

        Args:
            call (`Callable`): `() -> loss`, called with the model in eval mode and gradients on.
        """
        loss, gradients = self._step(call)
        distance = relative(loss, self.loss)
        if not distance <= self.loss_rounding:
            return f"its loss would change by {distance:.2g} (relative)"
        if gradients.keys() != self.gradients.keys():
            name = min(gradients.keys() ^ self.gradients.keys())
            return f"the gradient of {name} would {'appear' if name in gradients else 'vanish'}"
        largest = max((g.norm().item() for g in self.gradients.values()), default=0.0)
        distances = {
            name: (gradients[name] - wanted).norm().item() / max(wanted.norm().item(), SMALLEST_SCALE * largest, 1e-30)
            for name, wanted in self.gradients.items()
        }
        name = max(distances, key=distances.get, default=None)
        if name is not None and not distances[name] <= self.gradient_rounding:
            return f"the gradient of {name} would change by {distances[name]:.2g} (relative)"
        return None


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the distance of two tensors, relative to the second."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def counts_items(loss_of: Callable[[Any], torch.Tensor], n: int) -> bool:
    """
    Find out whether a loss is divided by the number of items that it is told (Trainer's `num_items_in_batch`).

    Args:
        loss_of (`Callable`): `number of items -> loss`, without randomness: in eval mode.
        n (`int`): label positions of the rows.
    """
    one, two = (loss_of(torch.tensor(max(n, 1) * times)).float() for times in (1, 2))
    return bool((one - two).abs() > 0.25 * one.abs())
