"""Losses of a batch without gradients, in eval mode, and the model left as it was."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CTC_MAPPING_NAMES

from ..adapters import find_reader, with_prompt_lengths
from ..data import ID_KEY, WEIGHT_KEY, take_rows
from ..files import require
from .losses import FORMS, SampleLosses, per_sample_losses, shift_labels, token_losses

logger = logging.getLogger(__name__)
PerSampleLoss = Callable[[Any, Mapping[str, Any]], torch.Tensor]


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and PEFT wrappers, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, but for one that is spread over devices or quantised: it stays where it was put."""
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return model if placed else model.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP, ZeRO 3): then all of them take part in a forward pass."""
    first = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())  # version 1 hides its own
    return first or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def spread_before_training(args: Any, fsdp: bool) -> tuple[str, Any] | None:
    """Return the setting that leaves processes without whole weights before training, and its value, or `None`."""
    if fsdp and args.world_size > 1 and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        return "fsdp_cpu_ram_efficient_loading", True
    return ("deepspeed zero_stage", 3) if is_deepspeed_zero3_enabled() else None


def is_causal_lm(model: nn.Module) -> bool:
    """Whether position t of the model's logits predicts label t + 1."""
    model = base_model(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if {cls.__name__ for cls in type(model).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave every global random state as it was: scoring and probing must not change what training draws."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """
    Leave the model as it was: its mode, its gradients, its buffers (running statistics), and what a forward pass may
    update though it is not trained (a momentum teacher). The frozen weights of a PEFT model are no such thing.
    """
    training = model.training
    frozen = () if hasattr(model, "peft_config") else [p for p in model.parameters() if not p.requires_grad]
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *frozen)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]  # of earlier micro-batches, say
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        model.train(training)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


@contextlib.contextmanager
def _entering(layer: nn.Module, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect what enters a layer; with `stop`, let it compute nothing."""
    entered: list[torch.Tensor] = []

    def collect(module: nn.Module, args: tuple) -> tuple | None:
        entered.append(args[0])
        return (args[0][:, :0], *args[1:]) if stop else None

    handle = layer.register_forward_pre_hook(collect)
    try:
        yield entered
    finally:
        handle.remove()


class Reading:
    """
    How the losses of samples are read off a model: guessed from its class, then found out on a first batch.

    Attributes:
        shift (`bool`): whether position t predicts label t + 1.
        head (`nn.Module`, *optional*): the language-model head, where it can be called on its own.
        form (`str`): how float labels are read, see [`darel_hf.scoring.losses.FORMS`].
        withheld (`frozenset[str]`): keys of batches that the trainer's own step does not hand the model.
        checked (`bool`): whether a batch has been looked at.
        matches_own_loss (`bool`, *optional*): whether the losses add up to the one that trains; `None`: there is none.
    """

    def __init__(self, model: nn.Module):
        base = base_model(model)
        self.model, self.shift, self.sharded = model, is_causal_lm(model), is_sharded(model)
        self.takes_labels = "labels" in inspect.signature(base.forward).parameters
        # A forward pass that stops at the head, or a head on its own, is not what the hooks of sharded models expect.
        whole = self.sharded or not hasattr(base, "get_output_embeddings")
        self.head = None if whole else base.get_output_embeddings()
        self.form, self.withheld = FORMS[0], frozenset()
        self.checked, self.matches_own_loss = False, None


@dataclass(eq=False)
class BatchScorer:
    """
    Compute the losses of a batch in eval mode, without gradients.

    For language models only the positions that carry a label pass the head, a few hundred at a time, so that the
    logits of a whole batch never exist. The first batch is also scored the plain way: where the two differ (a model
    that does more after its head), the plain way is taken from then on. Its rows are also computed one by one, as a
    trainer does: their losses are what ours must be. Where they are not, that is an error for labels that may have
    been misread (numbers), and a warning where there is more to the loss than cross-entropy.

    Attributes:
        reading ([`Reading`]): what has been found out; scorers of one model share it.

    Args:
        model (`nn.Module`): takes a batch's keys, returns logits. PEFT models welcome.
        per_sample_loss (`Callable`, *optional*): `(outputs, inputs) -> float [B]`, for models whose loss we cannot
            know.
        want_correct (`bool`): also find out how many positions are predicted right.
        want_embeddings (`bool`): also catch what enters the classification head (the last linear layer).
        autocast (`Callable`): returns the context in which the model runs.
        own_loss (`Callable`, *optional*): `inputs -> loss`, the one that trains; default: the model's own.
        reading ([`Reading`], *optional*): what another scorer of the model has found out.
        examples (`Callable`, *optional*): `() -> (batch of a few rows, the first of them alone)`, or `None` where rows
            can be cut out of any batch.
    """

    model: nn.Module
    per_sample_loss: PerSampleLoss | None = None
    want_correct: bool = False
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    want_embeddings: bool = False
    own_loss: Callable[[Mapping[str, Any]], torch.Tensor] | None = None
    reading: Reading | None = None
    examples: Callable[[], tuple[dict, list[dict]] | None] | None = None

    def __post_init__(self) -> None:
        self.reading = self.reading or Reading(self.model)

    @property
    def head(self) -> nn.Module | None:
        """The language-model head, where it can be called on its own."""
        return self.reading.head

    @property
    def sharded(self) -> bool:
        """Whether all processes take part in a forward pass."""
        return self.reading.sharded

    def __call__(self, inputs: Mapping[str, Any]) -> SampleLosses:
        """
        Score a batch.

        Args:
            inputs (`Mapping`): the B rows of a batch, on the model's device.

        Raises:
            ValueError: if there are no labels, the loss cannot be known and there is no `per_sample_loss`, or the
                model has no classification head to take embeddings from.
        """
        inputs = {k: v for k, v in inputs.items() if k not in (ID_KEY, WEIGHT_KEY)}
        with self.scoring():
            if not self.want_embeddings:
                return self._score(inputs)
            linear = [module for module in base_model(self.model).modules() if isinstance(module, nn.Linear)]
            with _entering(linear[-1]) if linear else contextlib.nullcontext([]) as entered:
                samples = self._score(inputs)
            known = bool(entered) and entered[-1].dim() == 2 and len(entered[-1]) == len(samples.losses)
            if not known:
                raise ValueError(
                    "offline_rule: this rule looks at embeddings, and the model has no classification head (a last "
                    "linear layer that gets one vector a sample) to take them from; choose a rule that looks at losses"
                )
            return samples._replace(embeddings=entered[-1].detach().float())

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Bring the model into the state in which it scores, and back into the one that it was in."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self.model.train(training)
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # the root stays whole after a forward pass: no parameters for an optimizer

    def _score(self, inputs: dict[str, Any]) -> SampleLosses:
        has_labels, reading = torch.is_tensor(inputs.get("labels")), self.reading
        if self.per_sample_loss is None and not has_labels:
            remedy = "so the training set (or its collator) must provide labels"
            if not reading.takes_labels:  # it goes by other names, as in question answering
                remedy = f"which {type(base_model(self.model)).__name__} takes no labels for; pass per_sample_loss="
            raise ValueError(
                f"labels: the batch has only the keys {sorted(inputs)}; DAREL ranks samples by their loss, {remedy}"
            )
        if not reading.checked:
            with preserve_rng_state():  # a loss of the user's may draw
                self._check(inputs)
            reading.checked = True
        if self.per_sample_loss is not None:
            losses = self.per_sample_loss(self.model(**self._handed(inputs)), inputs).detach().float()
            require(losses.dim() == 1, "per_sample_loss", tuple(losses.shape), "return one loss a sample, shape [B]")
            ones = torch.ones_like(losses, dtype=torch.int64)
            return SampleLosses(losses, ones, torch.full_like(losses, torch.nan))
        inputs = self._handed(inputs)
        if self.head is not None:
            return self._through_head(inputs)
        return self.read(self._outputs(inputs)[0], inputs["labels"], want_correct=self.want_correct)

    def _handed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what the trainer's own step hands the model, and the labels."""
        return {k: v for k, v in inputs.items() if k not in self.reading.withheld or k == "labels"}

    def _outputs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, float | None]:
        """Return the logits, and the model's own loss if it gives one."""
        if not self.reading.takes_labels:
            inputs = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = self.model(**inputs)
        logits = logits_of(outputs, place=int(self.reading.takes_labels))
        own = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(outputs, tuple) and self.reading.takes_labels:
            own = outputs[0]
        if not torch.is_tensor(logits):
            raise ValueError(
                f"model={type(base_model(self.model)).__name__}: it returns no logits (a fused loss?), so the loss of "
                "one sample cannot be read off; switch the fusion off, or pass per_sample_loss="
            )
        return logits, _number(own)

    def read(self, logits: torch.Tensor, labels: torch.Tensor, **more: Any) -> SampleLosses:
        """Read losses off logits, see [`per_sample_losses`], as has been found out."""
        return per_sample_losses(logits, labels, self.reading.shift, form=self.reading.form, **more)

    def _through_head(self, inputs: dict[str, Any]) -> SampleLosses:
        labels, inputs = inputs["labels"], with_prompt_lengths(self.model, inputs)
        rest = {k: v for k, v in with_decoder_inputs(self.model, inputs).items() if k != "labels"}
        aligned = shift_labels(labels) if self.reading.shift else labels
        return token_losses(self.hidden(**rest), aligned, project=self.head, want_correct=self.want_correct)

    @property
    def tolerance(self) -> float:
        """Differences of losses, relative and absolute, that are rounding in the model's precision."""
        return {"exact": 1e-4, "float32": 2e-3, "reduced": 2e-2}[precision(self.model, self.autocast)]

    def hidden(self, cache: Any = None, prompts: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """
        Return what enters the head, `[B, T, D]`, without calling it.

        Args:
            cache (`Cache`, *optional*): keys and values to go on from.
            prompts (`torch.Tensor`, *optional*): int64 `[B]`, so many tokens of each row are prompt, for a reader.
            **inputs: as the model takes them.
        """
        if prompts is not None and find_reader(self.model) is not None:
            inputs["prompt_lengths"] = prompts
        if cache is not None:  # transformers 5.24 has a new name for it
            known = inspect.signature(base_model(self.model).forward).parameters
            inputs["cache" if "cache" in known else "past_key_values"] = cache
        with _entering(self.head, stop=True) as entered:
            self.model(**inputs)
        return entered[-1]

    def _check(self, inputs: dict[str, Any]) -> None:
        """Find out how losses are read: on up to four rows together, and on the two shortest of them one by one."""
        reading, (batch, rows) = self.reading, self.few_rows(inputs)
        # By the trainer, which also shows what it hands the model. (Sharded models: as many passes in every process.)
        own = [None] if reading.sharded else self._own_losses([batch])
        rows = [] if reading.sharded else rows
        if self.per_sample_loss is not None:
            return
        batch, rows = self._handed(batch), [self._handed(row) for row in rows]
        logits, model_own = self._outputs(batch)
        labels = batch["labels"]
        rounded = precision(self.model, self.autocast) == "reduced"
        outputs = [self._outputs(row) for row in rows] if model_own is not None or rounded else []
        alone = [own for _, own in outputs] if model_own is not None else []
        if own[0] is not None and (model_own is None or not self._same(own[0], model_own)):
            own += self._own_losses(rows)  # it is another than the model's
        else:
            own = [model_own, *alone]
        alone = alone or own[1:]
        if labels.is_floating_point():
            self._find_form(logits, labels, alone)
        elif logits.dim() == 3 and labels.dim() == 2 and own[0] is not None:
            # Whether position t predicts label t or t + 1 is what the loss says, not the model's name; but where it is
            # far from both (a penalty is added), the nearer one is chance.
            wanted = own[0] if model_own is None else model_own
            ways = {shift: abs(_mean(per_sample_losses(logits, labels, shift)) - wanted) for shift in (True, False)}
            reading.shift ^= ways[not reading.shift] < 0.1 * ways[reading.shift]
        plain = self.read(logits, labels)
        # Prompt tuning has positions of its own; where nothing tells what predicts what (CTC), no guess is right.
        apart = labels.dim() == 2 and logits.dim() == 3 and labels.shape[1] != logits.shape[1]
        apart |= type(base_model(self.model)).__name__ in MODEL_FOR_CTC_MAPPING_NAMES.values()
        reading.head = self.head if labels.dim() == 2 and self._head_does(batch, plain) else None
        singly = plain.losses.tolist()
        if rounded:  # a row among others otherwise than alone, which may be more than all of a small loss
            singly = [_mean(self.read(of_row, row["labels"])) for (of_row, _), row in zip(outputs, rows, strict=True)]
        found = [_mean(plain), *singly]
        counted = [plain.n_tokens.sum().item(), *plain.n_tokens.tolist()]
        pairs = [(a, b) for a, b, k in zip(found, own, counted, strict=False) if b is not None and k]
        if pairs:
            reading.matches_own_loss = all(self._same(a, b) for a, b in pairs)
            remedy = (
                f"the model predicts {logits.shape[1]} positions, and which of them a label belongs to is not known; "
            )
            remedy += "pass per_sample_loss="
            require(reading.matches_own_loss or not apart, "labels", tuple(labels.shape), remedy)
            if not reading.matches_own_loss:
                logger.warning(
                    "samples are ranked by %s (%.4g of a first batch or row), the loss that trains is %.4g: it adds "
                    "or weighs something; pass per_sample_loss= to rank by another",
                    "the model's own loss" if batch["labels"].is_floating_point() else "cross-entropy",
                    *max(pairs, key=lambda pair: abs(pair[0] - pair[1])),
                )

    def few_rows(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return up to four rows of a batch, without ids, and the two shortest of them alone."""
        made = None if self.examples is None else self.examples()
        if made is not None:
            return made
        inputs = {key: value for key, value in inputs.items() if key not in (ID_KEY, WEIGHT_KEY)}
        n, mask = rows_of(inputs), inputs.get("attention_mask")
        few = np.arange(min(n, 4))
        if torch.is_tensor(mask) and mask.dim() == 2:
            few = few[np.argsort(mask[: len(few)].sum(1).cpu().numpy(), kind="stable")]
        return take_rows(inputs, few, n), [take_rows(inputs, few[i : i + 1], n) for i in range(min(n, 2))]

    def _same(self, found: float, wanted: float) -> bool:
        return math.isclose(found, wanted, rel_tol=self.tolerance, abs_tol=self.tolerance)

    def _own_losses(self, batches: list[dict[str, Any]]) -> list[float | None]:
        """Return the trainer's own losses of some batches, and learn what it hands the model."""
        if self.own_loss is None:
            return [None] * len(batches)
        seen: set[str] = set()

        def remember(model: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.update(kwargs if not args else ())

        hook = self.model.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            losses = [_number(self.own_loss(batch)) for batch in batches]
        except Exception as error:  # a loss of the user's that needs a run in progress, or a model without any
            logger.info("the loss that trains could not be tried: %s", error)
            return [None] * len(batches)
        finally:
            hook.remove()
        if seen:  # not only those are handed on: a batch with images may come after one without
            self.reading.withheld = frozenset(key for batch in batches for key in batch) - seen
        return losses

    def _find_form(self, logits: torch.Tensor, labels: torch.Tensor, alone: list[float | None]) -> None:
        """Find the way to read float labels that gives the model's own loss of each row; raise where none does."""
        known = bool(alone) and None not in alone
        for form in FORMS if known else ():
            found = per_sample_losses(logits, labels, self.reading.shift, form=form).losses[: len(alone)].tolist()
            if all(map(self._same, found, alone)):
                self.reading.form = form
                return
        remedy = f"read in no way that gives the loss that trains, {alone} of single rows; pass per_sample_loss="
        require(not known, "labels", f"{labels.dtype} {tuple(labels.shape)}", remedy)

    def _head_does(self, batch: dict[str, Any], plain: SampleLosses) -> bool:
        """Whether the shortcut through the head gives the same losses."""
        if self.head is None or batch["labels"].is_floating_point():
            return False
        try:
            found = self._through_head(batch).losses
        except Exception as error:  # any failure of the shortcut only means that this model cannot take it
            logger.info("scoring with full logits: %s", error)
            return False
        return torch.allclose(found, plain.losses, rtol=self.tolerance, atol=self.tolerance)


def precision(model: nn.Module, autocast: Callable[[], contextlib.AbstractContextManager]) -> str:
    """Return in what a model computes: `"exact"` (float32 on a CPU, or more), `"float32"` elsewhere, `"reduced"`."""
    parameter = next(model.parameters())
    with autocast():
        reduced = parameter.dtype.itemsize < 4 or torch.is_autocast_enabled(parameter.device.type)
    return "reduced" if reduced else "exact" if parameter.device.type == "cpu" else "float32"


def first_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the first tensor of a batch."""
    return next(value for value in inputs.values() if torch.is_tensor(value) and value.dim() > 0)


def logits_of(outputs: Any, place: int = 0) -> Any:
    """Return the logits of a model's outputs: by name, at a place of a tuple, or all that there is."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return outputs[place] if isinstance(outputs, tuple) else outputs


def rows_of(inputs: Mapping[str, Any]) -> int:
    """Return how many samples a batch has."""
    labels = inputs.get("labels")
    return len(labels if torch.is_tensor(labels) and labels.dim() else first_of(inputs))


def _number(loss: Any) -> float | None:
    """Return a loss as a number, or `None` where it is none (no single number, or not finite)."""
    one = torch.is_tensor(loss) and loss.numel() == 1 and bool(torch.isfinite(loss))
    return loss.item() if one else None


def scorer_for(trainer: Any, model: nn.Module | None = None, stage: str | None = None) -> BatchScorer:
    """
    Make what scores as a trainer trains: in its precision, by its `per_sample_loss`.

    Args:
        trainer (`DarelMixin`): the trainer.
        model (`nn.Module`, *optional*): another model than the trainer's.
        stage (`str`, *optional*): `"offline"` or `"online"`: find out what the rule of that stage needs.
    """
    needs = () if stage is None else trainer.darel.rule(stage).needs
    model = trainer.model if model is None else model
    wanted = {"want_correct": "correct" in needs, "want_embeddings": "embeddings" in needs}
    known = {"own_loss": trainer.own_loss, "reading": trainer.reading()} if model is trainer.model else {}
    return BatchScorer(
        model,
        trainer.per_sample_loss,
        autocast=trainer.autocast,
        examples=trainer.examples,
        **wanted,
        **known,
    )


def with_decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Add the decoder inputs that an encoder-decoder would make of the labels, for a forward without labels."""
    base = base_model(model)
    decodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if not decodes or "decoder_input_ids" in inputs or not hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return inputs
    return {**inputs, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}


def _mean(samples: SampleLosses) -> float:
    """Return the mean over all label positions of a batch."""
    return ((samples.losses * samples.n_tokens).sum() / samples.n_tokens.sum().clamp(min=1)).item()


def _changes_tokens(model: nn.Module) -> bool:
    """Whether adapters act on or behind single tokens, which a probe may not have: then no probe tells."""
    # Of LoRA and its like, of PEFT's TrainableTokens, of activated LoRA.
    indices = ("trainable_token_indices", "token_indices", "alora_invocation_tokens")
    return any(getattr(config, name, None) for config in model.peft_config.values() for name in indices)


@contextlib.contextmanager
def skip_identity_adapters(scorer: BatchScorer, inputs: Mapping[str, Any]) -> Iterator[bool]:
    """
    Switch adapters off while they change nothing: shown on a probe batch, not assumed (PiSSA starts elsewhere).

    Yields whether they are off. Prompt learning is never skipped: its virtual tokens always change the loss.
    """
    model = scorer.model
    config = getattr(model, "active_peft_config", None)
    if config is None or getattr(config, "is_prompt_learning", False):
        yield False
        return
    with_adapters = scorer(inputs).losses
    # PEFT makes the active adapter trainable when it is switched on again, also what the user has frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            skipped = torch.allclose(with_adapters, scorer(inputs).losses, rtol=1e-5, atol=1e-6)
            skipped = skipped and not _changes_tokens(model)
            if skipped:
                yield True
    finally:
        for parameter, required in trainable:
            parameter.requires_grad_(required)
    if not skipped:
        yield False
