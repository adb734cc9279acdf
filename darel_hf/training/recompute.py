"""`Recomputation`: activations that are computed again in the backward pass where a memory budget asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..adapters import recomputes
from ..scoring import base_model, is_sharded


class Recomputation:
    """
    Switch transformers' activation checkpointing on and off: the same gradients in less memory and more time.

    Args:
        trainer (`DarelMixin`): its model and arguments.

    Attributes:
        on (`bool`): whether it was switched on here.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.on = trainer, False
        self._model: Any = None  # of which it was

    def possible(self) -> bool:
        """Whether it can be switched on here: it is off, and this model and these arguments take it."""
        trainer, args, model = self.trainer, self.trainer.args, base_model(self.trainer.model)
        spread = is_sharded(model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        takes = getattr(model, "supports_gradient_checkpointing", False)
        return takes and not (spread or args.torch_compile or recomputes(model, args))

    def set(self, on: bool) -> None:
        """Switch it on, again where Trainer has made the model anew; or off, where it was switched on here."""
        model = base_model(self.trainer.model)
        if on and model is not self._model:
            reads_tokens = getattr(model, "main_input_name", None) == "input_ids"
            hooked = reads_tokens and bool(model.get_input_embeddings()._forward_hooks)
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            if reads_tokens and not hooked:  # gradients of embeddings, which this way of checkpointing can do without
                model.disable_input_require_grads()
        elif not on and self._model is not None:
            older = self._model
            disable = getattr(older, "activation_checkpointing_disable", None) or older.gradient_checkpointing_disable
            disable()
        self.on, self._model = on, model if on else None

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Compute as if it had not been switched on, for a while."""
        was = self.on
        self.set(False)
        try:
            yield
        finally:
            self.set(was)
