"""The reader: LoRA whose prompts stay those of the frozen base, read through adapted keys and values."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import peft
import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora import Embedding, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import require

logger = logging.getLogger(__name__)

IGNORE = -100
#: Settings of LoRA that act on prompts themselves, on the base, or on rows: with what they must be.
MUST_BE = {
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
}
#: Ways to initialise LoRA that leave the base as it is.
INITS = (True, False, "gaussian", "eva", "orthogonal")


class ReaderType(str, enum.Enum):  # noqa: UP042 - Python 3.10 has no StrEnum
    """The name of the adapter in `adapter_config.json`: PEFT alone does not know it, and refuses to load it."""

    READER = "READER"


@dataclass
class ReaderLoraConfig(LoraConfig):
    """
    LoRA on completions, which read their prompts through adapted keys and values; prompts stay frozen.

    A `LoraConfig` in all but where it acts. Let x be what a layer reads at a position of the prompt when the base runs
    over it without adapters. Positions of the completion are adapted everywhere, and attend to the prompt by
    `k = (W_k + s B_k A_k) x` and `v = (W_v + s B_v A_v) x` (then the model's own norms and rotary embeddings). So x is
    a constant of the run, and what trains is A and B, also through k and v: prompts can be computed once
    (`DarelConfig(prompt_cache=...)`).

    Trains with any Trainer, evaluates and generates (`model.generate`, beams, batches with padding on the left). The
    prompt of a row is what precedes its first label, less its last token, which predicts that label; without labels
    all but the last token of what is given (whose logits are NaN then: no loss is to be read off them); or the first
    `prompt_lengths` tokens (int64 `[B]`, an argument of `model(...)`). Logits at positions of a prompt are of no use.
    Nothing is dropped out in prompts.

    `save_pretrained` writes what PEFT writes. To load it, this package must be imported:
    `from darel_hf import ReaderLoraConfig`, then `PeftModel.from_pretrained(base, folder)`; PEFT alone refuses it.
    No server of LoRA adapters reads it, and it cannot be merged; see [`to_lora`] and `DarelConfig(finish_epochs=...)`.

    Args:
        everywhere (`bool`, defaults to `False`): adapters act on prompts, too: then it is stock LoRA, is saved as
            such, and loads anywhere.
        *: those of `peft.LoraConfig`.

    Raises:
        ValueError: for settings that would change prompts themselves; the message names the field and the remedy.

    Example:

    ```python
    model = get_peft_model(base, ReaderLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ```
    """

    everywhere: bool = field(default=False, metadata={"help": "adapters act on prompts, too: stock LoRA"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ReaderType.READER
        for name, only in MUST_BE.items():
            value = getattr(self, name, only)
            remedy = f"it acts on prompts, which a reader leaves alone; set it to {only!r}"
            require(not value or value == only, name, value, remedy)
        init = self.init_lora_weights
        require(init in INITS, "init_lora_weights", init, f"it changes the base; choose one of {INITS}")

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: once adapters act everywhere, that is stock LoRA."""
        values = super().to_dict()
        if values.pop("everywhere"):
            values["peft_type"] = PeftType.LORA
        return values


class ReaderModel(LoraModel):
    """
    The tuner behind [`ReaderLoraConfig`]: stock LoRA layers, and hooks that keep prompts as the base has them.

    A forward pass is two: one of the base in eval mode without gradient, which remembers what enters each block, and
    the adapted one, in which that is put in place at the positions of prompts. A later block then reads the base's
    states, through adapted keys and values, and nothing that adapters make of a prompt is ever read.
    """

    def _pre_injection_hook(self, model: nn.Module, config: ReaderLoraConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        # PEFT renames what LoRA adapts in experts, when it begins and when it loads, and does so for LoRA alone.
        stock = copy.deepcopy(config)
        stock.peft_type = PeftType.LORA
        convert_peft_config_for_transformers(stock, model=model, conversions=get_model_conversion_mapping(model))
        names = ("target_modules", "target_parameters")
        same = all((getattr(stock, name) or set()) == (getattr(config, name) or set()) for name in names)
        remedy = (
            f"in {type(model).__name__} PEFT adapts experts under other names, which a reader does not know; name "
        )
        require(same, "target_modules", config.target_modules, remedy + "layers of attention, or train a LoraConfig")

    def _post_injection_hook(self, model: nn.Module, config: ReaderLoraConfig, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        # Plain numbers and references, no modules: nn.Module must not take them for parts of the model.
        self._recording, self._inside, self._states, self._prompt = False, False, {}, None
        self._given: int | None = None  # while it generates, the columns that it was given
        self._guessed = False  # whether nobody has said where prompts end
        self._layers = tuple(m for m in model.modules() if isinstance(m, BaseTunerLayer))  # asked for in every block
        causal = {cls.__name__ for cls in type(model).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        remedy = "a reader needs a causal language model of transformers, with its blocks; train a plain LoraConfig"
        config_of_model = getattr(model, "config", None)
        attends = hasattr(config_of_model, "num_attention_heads")  # what a state holds is no key and no value
        require(bool(causal and blocks and attends), "model", type(model).__name__, remedy)
        remedy = "adapters on embeddings change prompts, which a reader leaves alone; take them out"
        embeddings = any(isinstance(module, Embedding) for module in model.modules())
        require(not embeddings, "target_modules", config.target_modules, remedy)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._blank),
            model.register_forward_hook(self._end, always_call=True),
            *(block.register_forward_pre_hook(self._at_block, with_kwargs=True) for block in blocks),
        ]

    @property
    def everywhere(self) -> bool:
        """Whether adapters act on prompts, too, or not at all."""
        if all(layer.disable_adapters for layer in self._layers):
            return True
        found = {self.peft_config[name].everywhere for name in self.active_adapters if name in self.peft_config}
        if len(found) > 1:
            raise ValueError(
                f"active_adapters={self.active_adapters}: some act on prompts and some do not; activate one kind"
            )
        return found != {False}

    # -- a forward pass --

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Find out which positions are prompt, and let the base run over them."""
        if self._recording:
            return None
        lengths = kwargs.pop("prompt_lengths", None)
        self._inside, self._prompt, self._states, self._guessed = True, None, {}, False
        if not self.everywhere:
            inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
            inputs = {**inputs.pop("kwargs", {}), **inputs}
            prompt = self._positions(model, inputs, lengths)
            if prompt is not None and prompt.any():
                self._record(model, inputs)
                self._prompt = prompt
        return args, kwargs

    def _positions(self, model: nn.Module, inputs: Mapping[str, Any], lengths: Any) -> torch.Tensor | None:
        """Return which positions of a call are prompt, bool `[B, L]`; `None`: none is."""
        asked = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
        if asked is None:
            raise ValueError(f"{type(model).__name__} was called without input_ids: the reader finds no prompt")
        cache = next((value for value in inputs.values() if isinstance(value, Cache)), None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if self._given is not None:  # all but the last column, in whatever calls it is read
            columns = past + torch.arange(asked.shape[1], device=asked.device)
            prompt = (columns < self._given - 1).expand(asked.shape[:2])
            if past and prompt.any():
                raise ValueError("a reader takes its prompt in one call, this generation reads it in parts")
            return prompt
        if lengths is None and inputs.get("labels") is None:
            if past:  # what follows a prompt
                return None
            self._guessed = True
            if model.training:
                raise ValueError(
                    "labels: the reader needs them to know where a prompt ends, and this loss keeps them from the "
                    "model; give prompt_lengths=, the tokens of each row's prompt"
                )
        mask = inputs.get("attention_mask")
        used = mask[:, past:].ne(0) if torch.is_tensor(mask) and mask.dim() == 2 else None
        used = torch.ones(asked.shape[:2], dtype=torch.bool, device=asked.device) if used is None else used
        return prompt_positions(used, inputs.get("labels"), lengths)

    def _record(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Let the base run over a batch, without gradient, and remember what enters its blocks."""
        decoder = model.base_model  # without the head, which some trainers replace by one that wants labels
        known = inspect.signature(decoder.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in known and not isinstance(value, Cache)}
        self._recording = True
        try:
            with base_alone(model), torch.no_grad():
                decoder(**inputs | {"use_cache": False})
        finally:
            self._recording = False

    def _at_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._recording:
            self._states[block] = hidden
        elif self._inside or _in_backward():
            if self._prompt is not None and block in self._states:
                hidden = torch.where(self._prompt[..., None], self._states[block], hidden)
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        elif not self.everywhere:
            raise RuntimeError(
                f"{type(block).__name__} was called by other than {type(self.model).__name__}, so the reader knows "
                "no prompt; call the model as a whole, or the base alone (model.disable_adapter())"
            )
        return None

    def _end(self, model: nn.Module, *called: Any) -> None:
        if not self._recording:
            self._inside = False
            # What is checkpointed is computed again in the backward pass, by some transformers with these hooks. To
            # ask a model whether anything is takes as long as a layer of a small one.
            again = self._prompt is not None and model.training and torch.is_grad_enabled() and recomputes(model)
            if not again:
                self._prompt, self._states = None, {}

    def _blank(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Give no logits where nobody has said whether it is prompt: a loss of these must not pass for one."""
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if self._guessed and self._prompt is not None and logits is not None:
            of_no_use = self._prompt[:, self._prompt.shape[1] - logits.shape[1] :]
            output["logits"] = logits.masked_fill(of_no_use[..., None], torch.nan)
        return output

    # -- what PEFT's LoRA does otherwise --

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; raises `ValueError` for a prompt that would be read in parts."""
        given = inspect.signature(self.model.generate).bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        config = given.get("generation_config") or self.model.generation_config
        for name in ("prefill_chunk_size", "cache_implementation"):
            value = given.get(name, getattr(config, name, None))
            remedy = "a reader takes its prompt in one call, into a cache that grows; leave it out"
            require(value is None or self.everywhere or value == "dynamic", name, value, remedy)
        for name in ("past_key_values", "cache"):
            filled = isinstance(given.get(name), Cache) and int(given[name].get_seq_length()) > 0
            remedy = "a reader reads a prompt in one call, and takes what follows a cache for its own words; give all "
            remedy += "tokens, without it"
            require(not filled or self.everywhere, name, type(given.get(name)).__name__, remedy)
        prompt = next((given[k] for k in ("inputs", "input_ids", "inputs_embeds") if given.get(k) is not None), None)
        self._given = None if prompt is None else prompt.shape[1]
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            self._given = None

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ValueError`, unless adapters act everywhere: weights that hold for completions only cannot merge."""
        self._require_everywhere()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Raise as [`ReaderModel.merge_adapter`] does."""
        self._require_everywhere()
        self._remove_hooks()
        return super().merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """Return the base, as PEFT's LoRA does."""
        self._remove_hooks()
        return super().unload()

    def _remove_hooks(self) -> None:
        """Leave the base as it was: adapters that it gets later are none of ours."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _require_everywhere(self) -> None:
        if not all(config.everywhere for config in self.peft_config.values()):
            raise ValueError(
                "a reader cannot be merged: its weights are for completions, not for prompts; to_lora(model) makes "
                "stock LoRA of it and says what that costs, finish_epochs trains it to be one"
            )


def _in_backward() -> bool:
    """Whether autograd is at work: then a block is called to compute again what a forward pass has left out."""
    return torch._C._current_graph_task_id() != -1


def recomputes(model: nn.Module, args: Any = None) -> bool:
    """Whether a model computes activations again in the backward pass, or arguments of training will have it so."""
    if any(getattr(args, f"{name}_checkpointing", False) for name in ("gradient", "activation")):
        return True
    known = hasattr(type(model), "is_activation_checkpointing")  # transformers 5.23 warns of the older name
    return getattr(model, "is_activation_checkpointing" if known else "is_gradient_checkpointing", False)


def prompt_positions(used: torch.Tensor, labels: torch.Tensor | None, lengths: Any = None) -> torch.Tensor:
    """
    Return which positions of a batch are prompt: what precedes the first label, less its last token.

    Args:
        used (`torch.Tensor`): bool `[B, L]`, what is no padding.
        labels (`torch.Tensor`, *optional*): int64 `[B, L]`, -100 where there is none. Without: all but the last token.
        lengths (`torch.Tensor`, *optional*): int64 `[B]`, tokens of each row's prompt, in place of what labels say.

    Returns:
        bool `[B, L]`; what pads a row on the left counts as prompt.

    Raises:
        ValueError: for a row with labels in several places: generation would read the first answer as prompt.

    Example:

    ```python
    >>> import torch
    >>> labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, 4, 5, 6, -100]])
    >>> prompt_positions(torch.ones(2, 5, dtype=torch.bool), labels).int()
    tensor([[1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0]], dtype=torch.int32)
    ```
    """
    columns = torch.arange(used.shape[1], device=used.device)
    first = torch.where(used, columns, used.shape[1]).amin(1, keepdim=True)
    if lengths is not None:
        return columns < first + torch.as_tensor(lengths, device=used.device).reshape(-1, 1)
    if labels is None:
        return columns < torch.where(used, columns, 0).amax(1, keepdim=True)
    labelled = labels.ne(IGNORE)
    starts = labelled & ~nn.functional.pad(labelled, (1, 0))[:, :-1]
    if (starts.sum(1) > 1).any():
        row = int((starts.sum(1) > 1).nonzero()[0])
        raise ValueError(
            f"labels: row {row} of a batch has labels in {int(starts[row].sum())} places, say several answers of a "
            "conversation; generation reads the earlier ones as prompt: make a row of each answer"
        )
    if (labelled & (columns == first)).any(1).all():
        _warn_of_no_prompts()
    return columns < torch.where(labelled, columns, used.shape[1] + 1).amin(1, keepdim=True) - 1


@functools.cache
def _warn_of_no_prompts() -> None:
    """Say once that rows have no prompts: nothing else shows it, before texts are generated."""
    logger.warning(
        "labels: all rows of a batch have one at their first token, so there is no prompt to read, and adapters act "
        "everywhere; generation takes what it is given for a prompt that they leave alone. Set labels of prompts to "
        "-100, or train a LoraConfig"
    )


#: Models that run without adapters just now: to look at all modules again takes as long as a short prompt.
_ALONE: WeakSet[nn.Module] = WeakSet()


@contextlib.contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Run a model without its adapters and in eval mode; what is trained and in which mode stays as it was."""
    if model in _ALONE:
        yield
        return
    modules = list(model.modules())
    training, layers = [m for m in modules if m.training], [m for m in modules if isinstance(m, BaseTunerLayer)]
    # Not PEFT's own switch: it makes adapters trainable again when it is turned back, also those the user has frozen.
    switches = [layer._disable_adapters for layer in layers]
    _ALONE.add(model)
    try:
        for module in training:
            module.training = False
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        _ALONE.discard(model)
        for module in training:
            module.training = True
        for layer, switch in zip(layers, switches, strict=True):
            layer._disable_adapters = switch


def with_prompt_lengths(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Add the `prompt_lengths` of a batch that a reader needs where labels are kept from it; others get nothing."""
    reader, labels = find_reader(model), inputs.get("labels")
    if reader is None or reader.everywhere or "prompt_lengths" in inputs or not torch.is_tensor(labels):
        return dict(inputs)
    mask = inputs.get("attention_mask")
    two = torch.is_tensor(mask) and mask.dim() == 2
    used = mask.ne(0) if two else torch.ones_like(labels, dtype=torch.bool)
    begun = used.cumsum(1) > 0
    return {**inputs, "prompt_lengths": (begun & prompt_positions(used, labels)).sum(1)}


def find_reader(model: nn.Module) -> ReaderModel | None:
    """Return the tuner of a model that has readers, also where they act everywhere by now, else `None`."""
    model = getattr(model, "_orig_mod", model)
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, ReaderModel) else None


def adapts_prompts(model: nn.Module) -> bool:
    """Whether what is trained is LoRA that acts on prompts as on all else, where a reader would leave them alone."""
    configs = getattr(getattr(model, "_orig_mod", model), "peft_config", {}).values()
    return bool(configs) and all(type(c) is LoraConfig and c.alora_invocation_tokens is None for c in configs)


@contextlib.contextmanager
def acting_everywhere(model: nn.Module) -> Iterator[None]:
    """Let the adapters of a reader act everywhere for a while."""
    reader = find_reader(model)
    configs = [reader.peft_config[name] for name in reader.active_adapters]
    before = [config.everywhere for config in configs]
    try:
        for config in configs:
            config.everywhere = True
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.everywhere = value


def to_lora(model: nn.Module, rows: Mapping[str, torch.Tensor] | None = None) -> tuple[float, float] | None:
    """
    Let the adapters of a reader act everywhere, in place: it is stock LoRA from now on, and saved as such.

    Not the same model: a reader that was never trained to act on prompts loses much by it (see docs/reader.md).

    Args:
        model (`PeftModel`): with an active [`ReaderLoraConfig`].
        rows (`Mapping`, *optional*): a batch with labels, to say what that does to the loss.

    Returns:
        the loss on `rows` before and after, or `None` without rows.

    Raises:
        TypeError: if it is no reader.
    """
    reader = find_reader(model)
    require(reader is not None, "model", type(model).__name__, "give a PeftModel with a ReaderLoraConfig", TypeError)

    def loss() -> float:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return model(**rows).loss.item()
        finally:
            model.train(training)

    before = None if rows is None else loss()
    for name in reader.active_adapters:
        reader.peft_config[name].everywhere = True
    return None if rows is None else (before, loss())


# What `peft.utils.register_peft_method` does, for a name that PEFT's own list does not have.
peft.PEFT_TYPE_TO_CONFIG_MAPPING[ReaderType.READER] = ReaderLoraConfig
peft.PEFT_TYPE_TO_TUNER_MAPPING[ReaderType.READER] = ReaderModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[ReaderType.READER] = LoraModel.prefix
