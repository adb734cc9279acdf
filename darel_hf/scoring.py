"""Losses without gradients: score a batch, or a whole data set fast (sharded over ranks, resumable, cached)."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .batching import share_prompts, token_batches
from .config import require
from .data import ID_KEY, WEIGHT_KEY, feature_length, take_rows
from .files import atomic_path
from .ledger import check_finite
from .losses import SampleLosses, per_sample_losses, shift_labels, token_losses

logger = logging.getLogger(__name__)

PerSampleLoss = Callable[[Any, Mapping[str, Any]], torch.Tensor]

#: Positions, padding included, in one batch of the offline pass, by device: caches are small, GPUs are wide.
MAX_TOKENS = {"cpu": 1024}
MAX_TOKENS_ELSEWHERE = 16384
WINDOW = 4096  # samples that are read, sorted by length and saved together


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and PEFT wrappers, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP, ZeRO 3): then all of them take part in a forward pass."""
    first = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())  # version 1 hides its own
    return first or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


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


class _StopAtHead:
    """Catch the hidden states that enter a language-model head, and let the head compute nothing."""

    def __init__(self, head: nn.Module):
        self.head, self.hidden = head, None

    def _catch(self, module: nn.Module, args: tuple) -> tuple:
        self.hidden = args[0]
        return (args[0][:, :0], *args[1:])

    def __enter__(self) -> _StopAtHead:
        self.handle = self.head.register_forward_pre_hook(self._catch)
        return self

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


class _CatchEmbeddings:
    """Catch what enters the last linear layer of a classifier, float32 `[B, D]`."""

    def __init__(self, model: nn.Module):
        layers = [module for module in base_model(model).modules() if isinstance(module, nn.Linear)]
        self.head, self.caught = layers[-1] if layers else None, None

    def _catch(self, module: nn.Module, args: tuple) -> None:
        self.caught = args[0].detach().float()

    def __enter__(self) -> _CatchEmbeddings:
        self.handle = self.head.register_forward_pre_hook(self._catch) if self.head is not None else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self.handle is not None:
            self.handle.remove()

    def of(self, n: int) -> torch.Tensor:
        if self.caught is None or self.caught.dim() != 2 or len(self.caught) != n:
            raise ValueError(
                "offline_rule: this rule looks at embeddings, and the model has no classification head (a last linear "
                "layer that gets one vector a sample) to take them from; choose a rule that looks at losses"
            )
        return self.caught


class BatchScorer:
    """
    Compute the losses of a batch in eval mode, without gradients.

    For language models only the positions that carry a label pass the head, a few hundred at a time, so that the
    logits of a whole batch never exist. The first batch is also scored the plain way: where the two differ (a model
    that does more after its head), the plain way is taken from then on; and where the plain losses are not the model's
    own, a warning says so.

    Attributes:
        shift (`bool`): whether position t predicts label t + 1.
        head (`nn.Module`, *optional*): the language-model head, where it can be called on its own.

    Args:
        model (`nn.Module`): takes a batch's keys, returns logits. PEFT models welcome.
        per_sample_loss (`Callable`, *optional*): `(outputs, inputs) -> float [B]`, for models whose loss we cannot
            know.
        want_correct (`bool`): also find out how many positions are predicted right.
        want_embeddings (`bool`): also catch what enters the classification head (the last linear layer).
        autocast (`Callable`): returns the context in which the model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: PerSampleLoss | None = None,
        want_correct: bool = False,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        want_embeddings: bool = False,
    ):
        self.model, self.per_sample_loss, self.autocast = model, per_sample_loss, autocast
        self.want_correct, self.want_embeddings = want_correct, want_embeddings
        self.shift = is_causal_lm(model)
        base = base_model(model)
        self._takes_labels = "labels" in inspect.signature(base.forward).parameters
        self.sharded = is_sharded(model)
        # A forward pass that stops at the head, or a head on its own, is not what the hooks of sharded models expect.
        whole = self.sharded or not hasattr(base, "get_output_embeddings")
        self.head = None if whole else base.get_output_embeddings()
        self.checked = False
        self.matches_own_loss: bool | None = None  # None: the model gives no loss to compare with

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
            with _CatchEmbeddings(self.model) as embeddings:
                samples = self._score(inputs)
            return samples._replace(embeddings=embeddings.of(len(samples.losses)))

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
        if self.per_sample_loss is not None:
            losses = self.per_sample_loss(self.model(**inputs), inputs).detach().float()
            require(losses.dim() == 1, "per_sample_loss", tuple(losses.shape), "return one loss a sample, shape [B]")
            ones = torch.ones_like(losses, dtype=torch.int64)
            return SampleLosses(losses, ones, torch.full_like(losses, torch.nan))
        if not torch.is_tensor(inputs.get("labels")):
            raise ValueError(
                f"labels: the batch has only the keys {sorted(inputs)}; DAREL ranks samples by their loss, so the "
                "training set (or its collator) must provide labels, or pass per_sample_loss="
            )
        if not self.checked:
            n = len(inputs["labels"])
            self._check(take_rows(inputs, np.arange(min(n, 4)), n))
            self.checked = True
        return self._through_head(inputs) if self.head is not None else self._plain(inputs)[0]

    def _plain(self, inputs: dict[str, Any]) -> tuple[SampleLosses, torch.Tensor | None]:
        """Return the losses read off full logits, and the model's own mean loss if it gives one."""
        labels = inputs["labels"]
        if not self._takes_labels:
            inputs = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = self.model(**inputs)
        if isinstance(outputs, Mapping):
            logits, own = outputs.get("logits"), outputs.get("loss")
        else:
            own, logits = (outputs[0], outputs[1]) if self._takes_labels else (None, outputs[0])
        if not torch.is_tensor(logits):
            raise ValueError(
                f"model={type(base_model(self.model)).__name__}: it returns no logits (a fused loss?), so the loss of "
                "one sample cannot be read off; switch the fusion off, or pass per_sample_loss="
            )
        samples = per_sample_losses(logits, labels, self.shift, want_correct=self.want_correct)
        if not self.checked and torch.is_tensor(own) and own.numel() == 1 and logits.dim() == 3 and labels.dim() == 2:
            # Whether position t predicts label t or t + 1 is what the model's own loss says, not its name.
            other = per_sample_losses(logits, labels, not self.shift, want_correct=self.want_correct)
            if abs(_mean(other) - own.item()) < abs(_mean(samples) - own.item()):
                self.shift, samples = not self.shift, other
        return samples, own

    def _through_head(self, inputs: dict[str, Any]) -> SampleLosses:
        labels = inputs["labels"]
        rest = {k: v for k, v in with_decoder_inputs(self.model, inputs).items() if k != "labels"}
        aligned = shift_labels(labels) if self.shift else labels
        return token_losses(self.hidden(**rest), aligned, project=self.head, want_correct=self.want_correct)

    @property
    def tolerance(self) -> float:
        """Differences of losses, relative and absolute, that are rounding in the model's precision."""
        parameter = next(self.model.parameters())
        with self.autocast():
            reduced = parameter.dtype != torch.float32 or torch.is_autocast_enabled(parameter.device.type)
        return 2e-2 if reduced or parameter.device.type != "cpu" else 1e-3

    def hidden(self, cache: Any = None, **inputs: Any) -> torch.Tensor:
        """Return what enters the head, `[B, T, D]`, without calling it; `cache`: keys and values to go on from."""
        if cache is not None:  # transformers 5.24 has a new name for it
            known = inspect.signature(base_model(self.model).forward).parameters
            inputs["cache" if "cache" in known else "past_key_values"] = cache
        with _StopAtHead(self.head) as stop:
            self.model(**inputs)
        return stop.hidden

    def _check(self, inputs: dict[str, Any]) -> None:
        plain, own = self._plain(inputs)
        tolerance = self.tolerance
        if self.head is not None and inputs["labels"].dim() == 2:
            try:
                same = torch.allclose(self._through_head(inputs).losses, plain.losses, rtol=tolerance, atol=tolerance)
            except Exception as error:  # any failure of the shortcut only means that this model cannot take it
                logger.info("scoring with full logits: %s", error)
                same = False
            self.head = self.head if same else None
        else:
            self.head = None
        if torch.is_tensor(own) and own.numel() == 1 and plain.n_tokens.sum() > 0 and torch.isfinite(own):
            mean = _mean(plain)
            self.matches_own_loss = math.isclose(mean, own.item(), rel_tol=tolerance, abs_tol=tolerance)
            if not self.matches_own_loss:
                logger.warning(
                    "samples are ranked by cross-entropy (%.4f on a first batch), the model's own loss is %.4f: it "
                    "adds or weighs something; pass per_sample_loss= to rank by the model's own loss",
                    mean,
                    own.item(),
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
            if skipped:
                yield True
    finally:
        for parameter, required in trainable:
            parameter.requires_grad_(required)
    if not skipped:
        yield False


@dataclass(frozen=True)
class Scores:
    """
    Saved or fresh scores of a data set.

    Attributes:
        ids (`np.ndarray`): int64 `[n]`.
        losses (`np.ndarray`): float32 `[n]`, eval mode, nats per label position.
        n_tokens (`np.ndarray`): int32 `[n]`, label positions.
        correct (`np.ndarray`): float32 `[n]`, fraction of positions predicted right; NaN where not asked for.
        origin (`dict`): fingerprints of what they come from: `data`, `model`, `loss`.
        embeddings (`np.ndarray`, *optional*): float32 `[n, D]`, what enters the classification head.
    """

    ids: np.ndarray
    losses: np.ndarray
    n_tokens: np.ndarray
    correct: np.ndarray
    origin: dict[str, str]
    embeddings: np.ndarray | None = None


def save_scores(scores: Scores, path: str | os.PathLike) -> None:
    """Write scores as parquet (`sample_id`, `loss`, `n_tokens`, `correct`, perhaps `embedding`), atomically."""
    columns = {
        "sample_id": scores.ids,
        "loss": scores.losses,
        "n_tokens": scores.n_tokens,
        "correct": scores.correct,
    }
    if scores.embeddings is not None:
        width = scores.embeddings.shape[1]
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(scores.embeddings.reshape(-1), width)
    table = pa.table(columns).replace_schema_metadata({"darel": json.dumps(scores.origin)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def load_scores(path: str | os.PathLike, field: str = "scores") -> Scores:
    """
    Read scores from parquet. Columns `sample_id` and `loss` are needed, `n_tokens` and `correct` optional.

    Args:
        path (`str` or path): the file.
        field (`str`): the setting that names it, for errors.

    Raises:
        ValueError: if the file is missing, is no parquet file, or lacks a column; for NaN or infinite losses.
    """
    require(Path(path).is_file(), field, str(path), "no such file; make it with `darel score`")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field}={str(path)!r}: not a readable parquet file ({reason}); make it again") from None
    for name in ("sample_id", "loss"):
        remedy = f"column {name!r} is missing, there are only {table.column_names}"
        require(name in table.column_names, field, str(path), remedy)
    n = table.num_rows

    def column(name: str, dtype: type, default: float) -> np.ndarray:
        if name not in table.column_names:
            return np.full(n, default, dtype=dtype)
        return table[name].to_numpy().astype(dtype)

    ids, losses = column("sample_id", np.int64, 0), column("loss", np.float32, 0)
    check_finite(ids, losses)
    try:
        origin = json.loads((table.schema.metadata or {}).get(b"darel", b"{}"))
    except ValueError:
        origin = {}
    embeddings = None
    if "embedding" in table.column_names:
        embeddings = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    n_tokens, correct = column("n_tokens", np.int32, 0), column("correct", np.float32, np.nan)
    return Scores(ids, losses, n_tokens, correct, origin, embeddings)


def match_scores(scores: Scores, ids: np.ndarray, data: str, path: str, field: str = "scores") -> Scores:
    """
    Put saved scores into the order of `ids`.

    Raises:
        ValueError: if an id has no score, or the scores say that they come from other data than the one with
            fingerprint `data`.
    """
    known = scores.origin.get("data", data)
    remedy = f"made from other data (fingerprint {known}, this training set has {data}); score this data set"
    require(known == data, field, path, remedy)
    require(len(np.unique(scores.ids)) == len(scores.ids), field, path, "sample ids occur more than once")
    missing = np.setdiff1d(ids, scores.ids)
    remedy = f"no score for {len(missing)} of {len(ids)} samples, ids {missing[:10].tolist()}; score this data set"
    require(len(missing) == 0, field, path, remedy)
    order = np.argsort(scores.ids)
    rows = order[np.searchsorted(scores.ids[order], ids)]
    embeddings = None if scores.embeddings is None else scores.embeddings[rows]
    return Scores(ids, scores.losses[rows], scores.n_tokens[rows], scores.correct[rows], scores.origin, embeddings)


def model_fingerprint(model: nn.Module, without_adapters: bool = False) -> str:
    """
    Hash a model's class and weights: 32 hexadecimal digits.

    Args:
        model (`nn.Module`): PEFT models welcome.
        without_adapters (`bool`): leave out the adapters' weights (those that are switched off change no score).
    """
    digest = hashlib.blake2b(type(base_model(model)).__name__.encode(), digest_size=16)
    configs = [getattr(base_model(model), "config", None)]
    if not without_adapters:
        configs += getattr(model, "peft_config", {}).values()  # scales, for one, are in no weight
    for config in configs:
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        places = ("_name_or_path", "base_model_name_or_path", "transformers_version", "revision")
        digest.update(repr(sorted((k, str(v)) for k, v in settings.items() if k not in places)).encode())
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if without_adapters else None
    for name, tensor in model.state_dict().items():
        if prefix is not None and prefix in name:
            continue
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if torch.is_tensor(tensor) and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_max_tokens(device: torch.device) -> int:
    """Return how many positions a batch of the offline pass has on this device."""
    return MAX_TOKENS.get(device.type, MAX_TOKENS_ELSEWHERE)


def rows_without_tokens(device: torch.device, batch_size: int) -> int:
    """Return the rows of a batch of the offline pass for samples that are no token sequences, such as images."""
    return batch_size if device.type == "cpu" else 8 * batch_size  # caches of CPUs are small


def score_dataset(
    scorer: BatchScorer,
    dataset: Any,
    collator: Callable[[list], Mapping],
    prepare: Callable[[Mapping], Mapping],
    *,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    max_rows: int = 256,
    progress_bar: bool = True,
    parts: str | os.PathLike | None = None,
    origin: dict[str, str] | None = None,
    prompts_once: bool = True,
) -> Scores:
    """
    Score every sample of a data set.

    Args:
        scorer ([`BatchScorer`]): scores one batch.
        dataset: map-style data set whose items carry their id under `ID_KEY`.
        collator (`Callable`): makes a batch of items and keeps the ids, see [`darel_hf.data.CarryIds`].
        prepare (`Callable`): moves a batch to the model's device.
        rank, world_size (`int`): this process scores every `world_size`-th sample; all get all scores.
        max_tokens (`int`, *optional*): positions a batch, padding included; the default suits the device.
        max_rows (`int`): samples a batch.
        progress_bar (`bool`): show one if the pass takes longer than two seconds.
        parts (path, *optional*): folder for finished parts; a pass that was killed goes on from them.
        origin (`dict`, *optional*): fingerprints to store with the scores.
        prompts_once (`bool`): compute prompts that several samples share once, where a trial shows the same losses.

    Returns:
        [`Scores`], ids ascending; equal on every rank.

    Raises:
        ValueError: for NaN or infinite losses (names the ids); see also [`BatchScorer`].
    """
    if max_tokens is None:
        max_tokens = default_max_tokens(next(scorer.model.parameters()).device)
    mine = np.arange(rank, len(dataset), world_size)
    together = scorer.sharded and world_size > 1  # then every rank has to run as many forward passes
    if together and rank >= len(dataset):
        mine = np.zeros(1, np.int64)  # a sample that another rank scores too: the same row twice, one is dropped below
    windows = [mine[start : start + WINDOW] for start in range(0, len(mine), WINDOW)]
    while together and len(windows) < -(-math.ceil(len(dataset) / world_size) // WINDOW):
        windows.append(mine[:1])
    done: list[np.ndarray] = []
    hidden = rank != 0 or not progress_bar
    progress = tqdm(total=len(mine), desc="scoring", unit=" samples", delay=2, leave=False, disable=hidden)
    for number, window in enumerate(windows):
        part = None if parts is None else Path(parts) / f"rank{rank}of{world_size}-{number}.npy"
        found = _read_part(part)
        if all(gather_object([found is not None])) if together else found is not None:
            done.append(found)
            progress.update(len(window))
        else:
            done.append(
                _score_window(
                    scorer,
                    dataset,
                    window,
                    collator,
                    prepare,
                    max_tokens,
                    max_rows,
                    progress,
                    together,
                    prompts_once,
                )
            )
            if part is not None and len(mine) > WINDOW:
                with atomic_path(part) as temporary:
                    np.save(temporary, done[-1])
    progress.close()
    everyone = gather_object(done) if world_size > 1 else done
    rows = np.concatenate(everyone)
    rows = rows[np.unique(rows["id"], return_index=True)[1]]
    check_finite(rows["id"], rows["loss"])
    columns = {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names}
    embeddings = columns["embedding"] if columns["embedding"].shape[1] else None
    return Scores(columns["id"], columns["loss"], columns["n_tokens"], columns["correct"], origin or {}, embeddings)


def _read_part(part: Path | None) -> np.ndarray | None:
    """Return a finished part of an earlier pass, or `None` if there is none that can be read."""
    if part is None or not part.exists():
        return None
    try:
        return np.load(part, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        logger.warning("%s cannot be read (%s); its samples are scored again", part, error)
        return None


def _row_type(width: int) -> np.dtype:
    """Return the record of one sample, with an embedding of `width` numbers."""
    fields = [("id", np.int64), ("loss", np.float32), ("n_tokens", np.int32), ("correct", np.float32)]
    return np.dtype([*fields, ("embedding", np.float32, (width,))])


def _score_window(
    scorer: BatchScorer,
    dataset: Any,
    window: np.ndarray,
    collator: Callable,
    prepare: Callable,
    max_tokens: int,
    max_rows: int,
    progress: Any,
    together: bool,
    prompts_once: bool,
) -> np.ndarray:
    """Return one record of `_row_type` a sample; if `together`, all ranks run as many forward passes."""
    positions = window.tolist()
    items = dataset.__getitems__(positions) if hasattr(dataset, "__getitems__") else [dataset[i] for i in positions]

    def plain(rows: Sequence[int]) -> SampleLosses:
        return scorer(prepare(collator([items[i] for i in rows])))

    shared = None if together or not prompts_once else share_prompts(scorer, items, plain)
    if shared is not None:
        scored = shared.batches(max_tokens, max_rows)
    else:
        lengths = np.array([feature_length(item) for item in items])
        batches = list(token_batches(lengths, max_tokens, max_rows))
        if together:
            batches += [batches[-1][:1]] * (max(gather_object([len(batches)])) - len(batches))
        scored = ((batch_rows, plain(batch_rows)) for batch_rows in batches)
    collected = []
    for batch_rows, samples in scored:
        embeddings = samples.embeddings
        rows = np.empty(len(batch_rows), _row_type(0 if embeddings is None else embeddings.shape[1]))
        rows["id"] = [items[i][ID_KEY] for i in batch_rows]
        rows["loss"], rows["n_tokens"], rows["correct"] = (values.cpu().numpy() for values in samples[:3])
        if embeddings is not None:
            rows["embedding"] = embeddings.cpu().numpy()
        collected.append(rows)
        progress.update(len(batch_rows))
    return np.concatenate(collected)
