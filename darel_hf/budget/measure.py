"""Measure, on a few real batches, what a training step and a scoring pass cost in time and memory."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..accelerators import Accelerator, CheapScores, first_line, share_rows
from ..data import ID_KEY, feature_length, token_batches
from ..scoring import (
    BatchScorer,
    default_max_tokens,
    read_window,
    rows_without_tokens,
    scorer_for,
    to_device,
    untouched,
)
from .plan import Costs
from .typical import typical_batches

logger = logging.getLogger(__name__)

BATCHES = 6  # batches that are timed at most; one more warms up
PAIRS = 7  # pairs of steps that compare two batch sizes
SHARE = 0.02  # of the run's batches, where a budget is decided by it: at most so many are timed, but at least two


def _batch_of(trainer: Any, collator: Callable, items: list[Mapping]) -> dict[str, Any]:
    """Collate items, on the model's device and without ids."""
    return {key: value for key, value in trainer._prepare_inputs(collator(items)).items() if key != ID_KEY}


def _collated(trainer: Any, dataset: Any, collator: Callable, parts: Sequence[Sequence[int]]) -> list[Mapping]:
    """Collate the batches of these positions."""
    return [_batch_of(trainer, collator, [dataset[int(i)] for i in part]) for part in parts]


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has done what it was asked for so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    started = clock(device)
    call()
    return clock(device) - started


def _loss(trainer: Any, batch: Mapping) -> torch.Tensor:
    trainer.model.train()
    items = trainer.count_items(batch)  # as in training: losses may rely on it
    with trainer.autocast():
        return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)


def _step(trainer: Any, batch: Mapping) -> None:
    _loss(trainer, batch).backward()


def _optimizer_step(trainer: Any) -> Callable[[], Any]:
    """Return the step of an optimizer like Trainer's on copies of the trainable weights."""
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    try:
        given = trainer.optimizer_cls_and_kwargs
        cls, kwargs = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        optimizer = cls(copies, **{k: v for k, v in kwargs.items() if k not in ("params", "model", "optimizer_dict")})
    except (TypeError, ValueError):  # an optimizer that wants more than parameters; AdamW stands in for its cost
        optimizer = torch.optim.AdamW(copies)

    def step() -> None:
        if trainer.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm)
        optimizer.step()

    return step


def measure_costs(
    trainer: Any,
    dataset: Any,
    collator: Callable,
    rows: int,
    candidates: int,
    most: float,
    *,
    offline: bool = True,
    offline_scorer: torch.nn.Module | None = None,
    accelerators: Sequence[Accelerator] = (),
    visited: Sequence[int] | None = None,
) -> Costs | None:
    """
    Time a training step and, as far as they are wanted, a scoring forward of as many rows and the offline pass.

    The model, its gradients and the optimizer are left as they were; the caller keeps the random state.

    Args:
        trainer (`Trainer`): before `train()`.
        dataset: map-style, unused columns removed; ids in its items are left out.
        collator (`Callable`): makes batches of its items.
        rows (`int`): batch size b.
        candidates (`int`): rows of a candidate batch, which are padded to more columns; 0: none will be scored.
        most (`float`): at most so many batches are timed, but at least two: of one, chance makes too much.
        offline (`bool`): whether there may be an offline pass.
        offline_scorer (`nn.Module`, *optional*): what scores in the offline pass; default: the model itself.
        accelerators (`Sequence[Accelerator]`): what will make steps cheaper; they are timed one on top of the other.
        visited (`Sequence[int]`, *optional*): the samples of an epoch in the order of the run, where that is not drawn
            at random: batches of accelerators are cut out of it.

    Returns:
        [`Costs`], over a few batches; `None` where a training step cannot be tried (FSDP, DeepSpeed, out of memory).
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    device = trainer.args.device
    scorer, first = (
        scorer_for(trainer, model)
        for model in (trainer.model, trainer.model if offline_scorer is None else to_device(offline_scorer, device))
    )
    count = min(max(int(most), 2), BATCHES)
    accumulation, workers = trainer.args.gradient_accumulation_steps, trainer.args.dataloader_num_workers
    trains = False  # what scoring says is an error, unless that memory is short; what a step says is a warning
    try:
        parts = typical_batches(dataset, rows, count)
        started = time.perf_counter()
        batches = _collated(trainer, dataset, collator, parts)
        loading = (time.perf_counter() - started) / len(batches)
        ours, scored = batches, []
        if visited is not None:
            ours = _collated(trainer, dataset, collator, typical_batches(dataset, rows, count, visited))
        if candidates:
            parts = typical_batches(dataset, candidates, max(count // 2, 1))
            scored = _collated(trainer, dataset, collator, parts)
        with untouched(trainer.model):

            def seconds(prepare: Callable[[], Mapping]) -> float:
                return _seconds(lambda: _loss(trainer, prepare()).backward(), device)

            # The first call of each kind warms up caches and allocators. Scoring comes first: it names what lacks.
            pass_seconds = _offline_seconds(trainer, first, dataset, collator, rows) if offline else 0.0
            score = CheapScores(scorer, accelerators)
            forwards = [_seconds(lambda batch=batch: score(batch).losses.cpu(), device) for batch in scored][1:]
            trains = True
            steps: list[float] = []
            with_it: list[list[float | None]] = [[] for _ in accelerators]
            differing = [found for found in (accelerator.phases() for accelerator in accelerators) if found]
            phases = differing[0] if differing else [(1.0, contextlib.nullcontext)]
            for batch, inputs in zip(batches, ours, strict=True):  # in turn: what slows down one slows down the others
                with contextlib.ExitStack() as plain:
                    for accelerator in accelerators:
                        plain.enter_context(accelerator.plain())
                    steps.append(seconds(lambda batch=batch: batch))
                timed = [(share, _one_by_one(accelerators, seconds, inputs, phase, device)) for share, phase in phases]
                for k, found in enumerate(with_it):
                    parts = [(share, of_phase[k]) for share, of_phase in timed]
                    unknown = any(part is None for _, part in parts)
                    found.append(None if unknown else sum(share * part for share, part in parts))
            del inputs
            trainer.model.zero_grad(set_to_none=True)  # the copies of weights need no more room than training does
            optimizer_step = _optimizer_step(trainer)
            updates = [_seconds(optimizer_step, device) for _ in batches][1:]
    except Exception as error:  # out of memory, or a loss of the user's that needs a run in progress
        if not trains and not should_reduce_batch_size(error):
            raise
        logger.warning("what a training step costs could not be measured (%s); assuming it", first_line(error))
        return None
    del steps[0]
    # Texts differ in length; batches of images do not, and what makes one take longer is the machine. What the
    # loop adds to the fastest step is found out on the way, see `pacing`.
    typical = statistics.mean if "input_ids" in batches[0] else min
    step = typical(steps) + min(updates) / accumulation
    # Workers load while the loop computes, which waits for what they do not manage; without them it always waits.
    loading = max(loading / workers - step, 0.0) if workers else loading
    step += loading
    return Costs(
        step_seconds=step,
        forward_share=typical(forwards) / candidates * rows / step if candidates else 0.0,
        offline_share=(pass_seconds * rows + loading) / step if offline else 0.0,
        data_share=loading / step,
        factors=_factors(accelerators, [found[1:] for found in with_it], statistics.mean(steps), step - loading),
    )


def _one_by_one(
    accelerators: Sequence[Accelerator],
    seconds: Callable[[Callable[[], Mapping]], float],
    inputs: Mapping[str, Any],
    phase: Callable[[], contextlib.AbstractContextManager],
    device: torch.device,
) -> list[float | None]:
    """Return the seconds of a step with each accelerator and those before it, see [`Accelerator.measure`]."""
    found, made = [], 0.0  # seconds that those before it take to transform a batch
    with phase(), contextlib.ExitStack() as before:
        for accelerator in accelerators:
            measured = accelerator.measure(seconds, inputs)
            found.append(None if measured is None else made + measured)
            before.enter_context(accelerator.acting())
            started = clock(device)
            inputs = accelerator.transform(inputs)
            made += clock(device) - started
    return found


def _factors(
    accelerators: Sequence[Accelerator], with_it: Sequence[list], plain: float, step: float
) -> dict[str, float]:
    """Return the factor of each accelerator that changes steps, see [`Costs`]; `step`: a plain one and its update."""
    factors, before = {}, 1.0
    for accelerator, found in zip(accelerators, with_it, strict=True):
        if None not in found:
            share = 1 - (plain - statistics.mean(found)) / step  # the update takes as long with all of them
            factors[accelerator.facts.name], before = share / before, share
    return factors


def measure_slowdown(
    trainer: Any,
    dataset: Any,
    collator: Callable,
    full: int,
    rows: int,
    most: float,
    plain: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> float:
    """
    Return the time of a row in batches of `rows`, relative to a row in batches of `full` in the context of `plain`.

    The median over pairs of steps, one right after the other: a busy machine slows down both. There are at most `most`
    pairs, but at least two.
    """
    count = min(max(int(most), 2), PAIRS)
    batches = (_collated(trainer, dataset, collator, typical_batches(dataset, size, count)) for size in (full, rows))
    pairs = zip(*batches, strict=True)
    ratios = []
    with untouched(trainer.model):
        for pair in pairs:
            times = []
            for batch, context in zip(pair, (plain, contextlib.nullcontext), strict=True):
                with context():
                    step = partial(_step, trainer, batch)
                    times.append(_seconds(step, trainer.args.device))
            whole, small = times
            ratios.append(small / rows / (whole / full))
    return statistics.median(ratios[1:])


def _offline_seconds(trainer: Any, scorer: BatchScorer, dataset: Any, collator: Callable, batch_size: int) -> float:
    """
    Return the seconds per sample of the offline pass.

    From one batch of samples of similar length, or, where samples share prompts, from all samples of some prompts.
    """
    generator = np.random.default_rng(1)
    tokens = "input_ids" in dataset[0]
    rows = 8 * batch_size if tokens else rows_without_tokens(trainer.args.device, batch_size)
    limit = default_max_tokens(trainer.args.device)

    if tokens and not scorer.sharded:
        window = read_window(dataset, range(len(dataset)), seconds=1.0)  # what the pass reads at a time
        shared = share_rows(scorer, window, lambda some: _batch_of(trainer, collator, [window[i] for i in some]))
        if shared is not None:
            part, n = shared.some(rows, generator)

            def read() -> None:
                for _, samples in part.batches(limit, rows):
                    samples.losses.cpu()

            return min(_seconds(read, trainer.args.device) for _ in range(2)) / n
    size = 8 * rows if tokens else rows  # lengths differ among the former
    positions = generator.choice(len(dataset), size=min(size, len(dataset)), replace=False)
    items = [dataset[int(i)] for i in positions]
    batches = list(token_batches(np.array([feature_length(item) for item in items]), limit, rows))
    chosen = batches[len(batches) // 2]
    batch = _batch_of(trainer, collator, [items[i] for i in chosen])
    timed = [_seconds(lambda: scorer(batch).losses.cpu(), trainer.args.device) for _ in range(3)]
    return min(timed[1:]) / len(chosen)


class _Living(TorchDispatchMode):
    """
    Count the bytes of the tensors that are made while it is on, as long as they live: `now`, and at most `peak`.

    Args:
        there (`Iterable[torch.Tensor]`): what is there already; views of it are made, too.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, made)
        return made

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._known:  # else a view of what is known
            self._known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, place, size)
        return tensor

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def measure_memory(trainer: Any, dataset: Any, collator: Callable, rows: int) -> float:
    """
    Measure the peak memory of a training step on `rows` samples, in bytes.

    Weights, optimizer states, and what the step takes besides at its peak; on CUDA the allocator tells.
    """
    device = trainer.args.device
    positions = np.linspace(0, len(dataset) - 1, 256).astype(int).tolist()
    longest = max(positions, key=lambda i: feature_length(dataset[i]))
    batch = _batch_of(trainer, collator, [dataset[longest]] * rows)
    trainable = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    with untouched(trainer.model):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            _loss(trainer, batch).backward()
            return float(torch.cuda.max_memory_allocated(device) + 2 * trainable)
        there = (*trainer.model.parameters(), *trainer.model.buffers(), *filter(torch.is_tensor, batch.values()))
        with _Living(there) as living:
            _loss(trainer, batch).backward()
        everything = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        return float(everything + 2 * trainable + living.peak)
