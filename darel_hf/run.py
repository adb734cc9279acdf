"""`Run`: one `train()` with DAREL, from the plan over the offline stage and the loop to checkpoints and the report."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import set_seed

from . import checkpoints
from .batching import ShuffledByLength
from .config import DarelConfig, require
from .data import (
    ID_KEY,
    WEIGHT_KEY,
    CarryIds,
    add_ids,
    add_stream_ids,
    code_fingerprint,
    data_fingerprint,
    feature_length,
    is_stream,
    read_column,
    sample_ids,
    sample_lengths,
    select_rows,
    take_rows,
)
from .environment import describe
from .files import write_json
from .html import write_html
from .losses import SampleLosses, per_sample_losses
from .measure import SHARE, clock, measure_costs, measure_memory, measure_slowdown, untouched
from .pacing import KeepBudget
from .padding_free import PaddingFree
from .planning import Plan, assumed_costs, batch_size_within, budget_plan, online_term
from .report import Report, scoring_seconds
from .scoring import (
    BatchScorer,
    Scores,
    is_sharded,
    load_scores,
    match_scores,
    model_fingerprint,
    preserve_rng_state,
    rows_without_tokens,
    save_scores,
    score_dataset,
    skip_identity_adapters,
)
from .selection import kept_count
from .selector import Selector, group_numbers, with_fractions
from .sliced import CannotSlice, SlicedTraining, first_line, why_not

logger = logging.getLogger(__name__)

SMALLEST_SLOWDOWN = 0.9  # rows in smaller batches are not faster than this says; what was measured faster was noise


class Run:
    """One `train()` with DAREL: the plan, the `Selector`, and what has been measured so far."""

    def __init__(self, trainer: Any, checkpoint: str | None, trial: Any = None):
        self.trainer, self.args, self.config = trainer, trainer.args, trainer.darel
        self.checkpoint, self.trial = checkpoint, trial
        self.started = time.perf_counter()
        self.seconds = {"probe": 0.0, "offline": 0.0, "scoring": 0.0, "selection": 0.0, "evaluation": 0.0}
        self.evaluating = False
        self.pace: KeepBudget | None = None
        self._decisions: list[list[float]] | None = None
        self._granted = 1.0
        self.scorer = trainer.scorer  # a model, once it has been made
        self.scorer_seconds = 0.0
        self.stores = self.args.should_save and trainer.hp_search_backend is None  # report and the like, here
        self.environment = describe(trainer.args) if self.stores else {}
        self.full_dataset = trainer.train_dataset
        self.folder = Path(self.args.output_dir) / "darel"
        self.in_loop = False
        self.ready = False  # for the loop
        self.lengths: np.ndarray | None = None  # of all samples, where batches are to be of similar length
        self.sampler: ShuffledByLength | None = None
        self.offline_weights: np.ndarray | None = None
        self.offline_losses: np.ndarray | None = None
        self.reference: np.ndarray | None = None  # losses of a reference model
        self.scores_reused = False
        self.trained_rows = self.candidate_rows = 0  # of this process, since the start of the run
        self.total_trained = self.total_candidates = 0  # of all processes, as of the last merge
        self.weights: torch.Tensor | None = None  # of the rows in the training step in progress
        self.weights_honoured = False
        self._interval: list[np.ndarray] = []
        self._unlogged: list[np.ndarray] = []
        self._tracked: tuple[np.ndarray, dict[str, Any]] | None = None
        self.padding_free: PaddingFree | None = None
        self.sliced: SlicedTraining | None = None  # where one forward pass scores and trains
        self.number: int | None = None  # of the micro-batch in progress, where it is one of candidates to be sliced
        self._numbers: deque[int] = deque()  # likewise, of those of the optimizer step in progress
        self._hook: Any = None
        self._merged_epoch = 0
        self._start: dict[str, Any] | None = None  # to go back to, where Trainer tries again with smaller batches

    # -- before the loop --

    def prepare(self) -> None:
        """Check the data, decide the plan (or restore it), select offline, and hand Trainer what it trains on."""
        trainer = self.trainer
        self.streams = is_stream(self.full_dataset)
        self.ids = None if self.streams else sample_ids(self.full_dataset, self.config.id_column)
        self.groups = self._read_groups()
        self._ready_model()
        self._ready_slicing()
        self._ready_padding_free()
        with preserve_rng_state():
            set_seed(self._seed())  # data that are augmented at random have the same fingerprint again
            self.data = "a stream"
            if not self.streams:
                self.data = trainer._on_main(data_fingerprint, self.full_dataset, self.ids)
            if self.config.reference_scores is not None:
                self.reference = trainer._on_main(self._saved_scores, "reference_scores").losses
            if self.checkpoint is None:
                self._decide()
            else:
                self._restore()
        config = self._planned_config()
        if not hasattr(self, "selector"):
            self.selector = self._new_selector(config)
        self.selector.config = config
        self.in_loop = config.online_keep < 1 or config.track or self.offline_weights is not None
        self.in_loop |= self.streams  # what a stream holds is known once it has gone by
        trainer._train_batch_size = self.plan.batch_size
        visited = self._with_ids if self.in_loop else self.full_dataset
        if self.positions is not None:
            visited = select_rows(visited, self.positions)
        trainer.train_dataset = visited
        trainer._signature_columns = None  # to be made again, with or without the id
        if not self.streams:
            self._warn_about_steps()
        self._keep_budget()
        if self.stores:
            run = {"plan": self.plan.to_dict(), "config": self.config.to_dict(), "environment": self.environment}
            write_json(self.folder / f"run{self._suffix('run')}.json", run)
        if self.args.auto_find_batch_size and self.in_loop:
            arrays = {name: values.copy() for name, values in self.selector.state_dict().items()}
            counts = (self.trained_rows, self.candidate_rows, self._merged_epoch)
            self._start = {"arrays": arrays, "counts": counts}
        self.ready = True

    def _read_groups(self) -> np.ndarray | None:
        """Number the groups; raise before any compute if there is no such column, or not a place for each group."""
        config = self.config
        if config.group_column is None:
            return None
        groups = group_numbers(read_column(self.full_dataset, config.group_column, "group_column"))
        present, places = int(groups.max()) + 1, kept_count(config.offline_keep, len(self.ids))
        remedy = f"has {present} values, but offline_keep={config.offline_keep} leaves {places} places; keep more"
        require(config.offline_keep == 1 or places >= present, "group_column", config.group_column, remedy)
        return groups

    def _ready_model(self) -> None:
        """Do to the model what Trainer does only when training starts: it is to be scored and measured as trained."""
        trainer, args = self.trainer, self.args
        if trainer.model_init is not None and self.checkpoint is None:
            set_seed(args.seed)  # as Trainer does before it makes the model anew
            trainer.model = trainer.call_model_init(self.trial)
        # Under FSDP and DeepSpeed Trainer leaves the model where it is until it is sharded.
        waits = (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and not is_sharded(trainer.model)
        waits |= trainer.model_init is not None or args.fp16_full_eval or args.bf16_full_eval
        if waits and not trainer.is_model_parallel:  # else it is spread over devices already
            trainer.model.to(args.device)
        if getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False):
            for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
                if hasattr(trainer.model, name):
                    getattr(trainer.model, name)()
                    break

    def _ready_slicing(self) -> None:
        """Try out a sliced step, which compiles it; where it cannot be done, say why, and do without."""
        trainer = self.trainer
        if self.config.online_backward != "sliced" or not self.config.may_select("online"):
            return
        started, reason = time.perf_counter(), why_not(trainer)
        if reason is None:
            with preserve_rng_state(), untouched(trainer.model):
                reason = self._try_slicing()
        reason = self._first_found(reason)
        if reason is not None:  # of any process: they must all do the same
            self.sliced = None
            logger.warning("online_backward='sliced': %s; going on with 'subset'", reason)
        self._settle(started, "probe")

    def _try_slicing(self) -> str | None:
        if self.streams:
            return "train_dataset is a stream, of which no row can be tried before training"
        batch = self._few_rows()
        scorer = self._batch_scorer(self.trainer.model, "online")
        scorer(batch)
        if scorer.matches_own_loss is False:
            return "the model's loss is more than cross-entropy"
        if batch["labels"].is_floating_point():
            return "labels are floating-point numbers, which Trainer counts in another way than rows"
        try:
            self.sliced = SlicedTraining(self.trainer, scorer.want_correct, scorer.shift)
            self.sliced.try_out(batch)
        except Exception as error:  # whatever the compiler has to say, there is another way to train
            return str(error) if isinstance(error, CannotSlice) else f"{type(error).__name__}: {first_line(error)}"
        return None

    def _first_found(self, found: Any) -> Any:
        """Return the first of what the processes found that is not `None`, the same on all."""
        everyone = gather_object([found]) if self.args.world_size > 1 else [found]
        return next((one for one in everyone if one is not None), None)

    def _few_rows(self) -> dict[str, Any]:
        """Return a batch of four samples, without ids."""
        dataset, collator = self._dataset_and_collator
        rows = [int(i) for i in np.linspace(0, len(dataset) - 1, 4)]
        items = [dataset[i] for i in rows]
        if self.config.unpad:  # what differs may depend on lengths
            some = [dataset[int(i)] for i in np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))]
            some.sort(key=feature_length)
            items[:2] = some[0], some[-1]
        batch = self.trainer._prepare_inputs(collator(items))
        return {key: value for key, value in batch.items() if key != ID_KEY}

    def _ready_padding_free(self) -> None:
        """Show on a few samples that training without padding is the same; raise `ValueError` if it is not."""
        if not self.config.unpad:
            return
        self.padding_free = PaddingFree(self.trainer)
        if self.streams:  # tried out on the first batch
            return
        started, error = time.perf_counter(), None
        try:
            with preserve_rng_state():
                self.padding_free.try_out(self._few_rows())
        except Exception as found:  # of any kind: the other processes wait
            error = found
        error = self._first_found(error)
        if error is not None:
            raise error
        self._settle(started, "probe")

    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _new_selector(self, config: DarelConfig) -> Selector:
        return Selector(config, self.ids, self._seed(), self.reference)

    def _planned_config(self) -> DarelConfig:
        plan = self.plan
        return with_fractions(self.config, plan.offline_keep, plan.online_keep, plan.rescore_every)

    def _restore(self) -> None:
        state = checkpoints.load(self.checkpoint)
        checkpoints.check_same(state, self.checkpoint, self.data, self.config)
        self.plan = Plan.from_dict(state["plan"])
        self.seconds.update(state["seconds"])
        self.started -= state["elapsed"]
        if self.args.process_index == 0:  # the totals of all processes are counted once
            self.trained_rows, self.candidate_rows = state["trained_rows"], state["candidate_rows"]
        remedy = f"the checkpoint was made with {state['batch_size']}; resume with that, or start anew"
        size = self.trainer._train_batch_size
        same = size == state["batch_size"] or self.args.auto_find_batch_size
        require(same, "per_device_train_batch_size", size, remedy)
        arrays = state["arrays"]
        self.positions = arrays.pop("positions", None)
        self.offline_weights = arrays.pop("offline_weights", None)
        self.offline_losses = arrays.pop("offline_losses", None)
        self.lengths = arrays.pop("lengths", None)
        self.scores_reused = state["scores_reused"]
        self._merged_epoch = state["merged_epoch"]
        self._decisions, self._granted = state.get("decisions"), state.get("granted", 1.0)
        self.selector = self._new_selector(self._planned_config())
        self.selector.load_state_dict(arrays)

    def _decide(self) -> None:
        config, args = self.config, self.args
        saved = None
        if config.scores is not None:
            saved = self.trainer._on_main(self._saved_scores, "scores")
        plan = Plan(
            offline_keep=config.offline_keep,
            online_keep=config.online_keep,
            rescore_every=config.rescore_every,
            batch_size=self.trainer._train_batch_size,
            epochs=self._epochs(),
            samples=0 if self.streams else len(self.ids),
            costs=assumed_costs(lora=hasattr(self.trainer.model, "peft_config")),
            scores_free=saved is not None or not self.config.rule("offline").reads_losses,
            fixed_steps=args.max_steps > 0,
        )
        plan.check()
        if config.batch_by_length and not self.streams:
            column = getattr(args, "length_column_name", None)
            self.lengths = self.trainer._on_main(sample_lengths, self.full_dataset, column)
        selects = config.may_select("offline") or config.may_select("online")
        self.positions = None
        if self.streams:
            self._announce(plan)
            self.plan = plan
        elif selects or config.unpad:
            self._make_scorer(needed=saved is None)
            plan = self._with_costs(plan)
            scores = saved
            if scores is None and self._wants_offline(plan):
                started = time.perf_counter()
                scores = self._score_offline()
                self._settle(started, "offline")
                if self.scores_reused:
                    plan = replace(plan, scores_free=True)
                elif plan.costs.measured:
                    plan = self._with_offline_cost(plan)
            plan = self._within_budget(plan) if config.has_budget else plan
            self._announce(plan)
            self.plan = plan
            if plan.offline_keep < 1:
                self._select_offline(scores)
        else:
            if self.lengths is not None:
                plan = self._with_padding(plan)
                self._announce(plan)
            self.plan = plan

    def _epochs(self) -> float:
        if self.args.max_steps <= 0:
            return self.args.num_train_epochs
        if self.streams:
            return 1.0
        rows = self.trainer._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return max(1.0, self.args.max_steps * rows / len(self.ids))

    def _saved_scores(self, field: str) -> Scores:
        path = getattr(self.config, field)
        scores = load_scores(path, field)
        remedy = f"{len(scores.ids)} scores for {len(self.ids)} samples that are known by row number; score these data"
        require(self.config.id_column is not None or len(scores.ids) == len(self.ids), field, path, remedy)
        return match_scores(scores, self.ids, self.data, path, field)

    def _make_scorer(self, needed: bool) -> None:
        """Call the user's function for a scoring model, if there may be an offline pass."""
        needed = needed and self.config.may_select("offline") and self.config.rule("offline").reads_losses
        if isinstance(self.scorer, nn.Module) or self.scorer is None:
            return
        if not needed:
            self.scorer = None
            return
        started = time.perf_counter()
        self.scorer = self.scorer()
        remedy = "the function must return a model (torch.nn.Module)"
        require(isinstance(self.scorer, nn.Module), "scorer", type(self.scorer).__name__, remedy, TypeError)
        self._settle(started, "offline")
        self.scorer_seconds = self.seconds["offline"]

    def _with_costs(self, plan: Plan) -> Plan:
        """Choose the batch size that the memory budget allows, and measure what a step costs at that size."""
        started = time.perf_counter()
        trainer, config, full_size = self.trainer, self.config, plan.batch_size
        # Where nothing is decided by it, what the offline pass costs is known when it is over.
        offline = config.has_budget and not plan.scores_free
        dataset, collator = self._dataset_and_collator
        candidates = 0.0  # relative to the rows that are trained on; none are scored
        if config.may_select("online") and config.rule("online").reads_losses:
            candidates = 3 if plan.online_keep == 1 else plan.candidate_rows / full_size
        if config.budget_memory is not None:
            memory = partial(measure_memory, trainer, dataset, collator)
            size = trainer._on_main(batch_size_within, memory, full_size, config.budget_memory)
            plan = replace(plan, batch_size=size)
        if self.lengths is not None:
            plan = self._with_padding(plan)
        size, total = plan.batch_size, self._micro_batches(plan)
        rows, share = round(candidates * size), SHARE if config.has_budget else SHARE / 2
        costs = measure_costs(
            trainer, dataset, collator, size, rows, share * total, offline, self.scorer, self.padding_free
        )
        costs = self._from_main(costs)  # it may fail on some processes only
        if costs is not None and size != full_size:
            slowdown = self._from_main(measure_slowdown(trainer, dataset, collator, full_size, size, SHARE * total))
            plan = replace(plan, slowdown=max(slowdown, SMALLEST_SLOWDOWN))
        if costs is not None:
            plan = replace(plan, costs=replace(costs, padding=plan.costs.padding))
        if not config.rule("online").reads_losses:
            plan = replace(plan, costs=replace(plan.costs, forward_share=0.0))
        plan = replace(plan, costs=replace(plan.costs, one_forward=self.sliced is not None))
        self._settle(started, "probe")
        if plan.costs.measured:
            full = plan.costs.step_seconds / plan.slowdown * self._micro_batches(plan)
            spent = self.seconds["probe"] + self.scorer_seconds
            plan = replace(plan, overhead=self._from_main(spent / full))
        return plan

    def _with_padding(self, plan: Plan) -> Plan:
        """Count what batches of similar length save of the positions of plain batches."""
        dataset, collator = self._dataset_and_collator
        shortest = collator([dataset[int(self.lengths.argmin())]])["input_ids"]
        widths = np.maximum(self.lengths, np.shape(shortest)[-1])  # where the collator always pads to as many
        candidates = plan.candidate_rows
        padding = self._by_length(widths, candidates).positions(candidates, plan.batch_size)
        return replace(plan, costs=replace(plan.costs, padding=min(padding, 1.0)))

    def make_sampler(self, batch_size: int) -> ShuffledByLength | None:
        """Make what visits the samples by length, if that is wanted, for micro-batches of so many candidates."""
        if self.lengths is not None:
            lengths = self.lengths if self.positions is None else self.lengths[self.positions]
            self.sampler = self._by_length(lengths, batch_size)
        return self.sampler

    def _by_length(self, lengths: np.ndarray, batch_size: int) -> ShuffledByLength:
        # All rows of an optimizer step alike: several processes do what one does that accumulates.
        rows = batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ShuffledByLength(lengths, rows, self._seed())

    def check_sampler(self) -> None:
        """Raise where the loader was made without our sampler."""
        remedy = "get_train_dataloader of this trainer has an order of its own; leave it out"
        require(self.lengths is None or self.sampler is not None, "batch_by_length", True, remedy)

    def follow_epoch(self) -> None:
        """Tell the sampler the epoch: on resume in several processes the loaders in between do not hand it on."""
        if self.sampler is not None:
            self.sampler.set_epoch(int((self.trainer.state.epoch or 0) + 1e-6))

    def _from_main(self, value: Any) -> Any:
        return self.trainer._on_main(lambda: value)

    def _wants_offline(self, plan: Plan) -> bool:
        if not self.config.rule("offline").reads_losses:
            return False
        if not self.config.has_budget:
            return plan.offline_keep < 1
        return self._within_budget(plan).offline_keep < 1

    def _within_budget(self, plan: Plan) -> Plan:
        groups = 0 if self.groups is None else int(self.groups.max()) + 1
        return self.trainer._on_main(budget_plan, plan, self.config, groups)

    def _with_offline_cost(self, plan: Plan) -> Plan:
        """Replace the estimated cost of the offline pass by what it has cost."""
        steps = len(self.ids) / (plan.batch_size * self.args.world_size)
        share = (self.seconds["offline"] - self.scorer_seconds) / (steps * plan.costs.step_seconds)
        return replace(plan, costs=replace(plan.costs, offline_share=self._from_main(share)))

    def _announce(self, plan: Plan) -> None:
        self.trainer.accelerator.print(plan)
        if plan.predicted_saving <= 0 and (plan.offline_keep < 1 or plan.online_keep < 1):
            logger.warning(
                "no saving is predicted: the run is expected to take %.2f of the plain training time, because scoring "
                "costs more than the dropped rows save; raise rescore_every, keep fewer, or use saved scores",
                plan.predicted_time,
            )

    def _warn_about_steps(self) -> None:
        rows = self.plan.candidate_rows * self.args.gradient_accumulation_steps * self.args.world_size
        steps = math.ceil(self.plan.kept_samples / rows) * self.args.num_train_epochs
        if self.args.max_steps > 0:
            steps = self.args.max_steps
        for name in ("warmup_steps", "eval_steps", "save_steps"):
            value = getattr(self.args, name, None)
            used = name == "warmup_steps" or getattr(self.args, name.replace("_steps", "_strategy")) == "steps"
            limit = 0.1 * steps if name == "warmup_steps" else steps
            if used and value is not None and value >= 1 and value > limit and steps < self._full_steps():
                logger.warning(
                    "%s=%g was made for the full run; this one has about %d steps. Give a fraction below 1 instead, "
                    "of all steps",
                    name,
                    value,
                    steps,
                )

    def _keep_budget(self) -> None:
        """Watch the time budget during training, where it was solved for costs that were measured."""
        plan, config = self.plan, self.config
        if config.budget_time is None or plan.method != "measured" or not plan.costs.measured or plan.fixed_steps:
            return
        # Of a step relative to a plain one: what it takes without scoring, and what scoring adds to that.
        base = online_term(plan.effective_online_keep, 1, 1, replace(plan.costs, forward_share=0.0))
        scoring = online_term(plan.effective_online_keep, 1, 1, plan.costs) / base - 1
        step = plan.costs.step_seconds * self.args.gradient_accumulation_steps * base / plan.effective_online_keep
        self._row_seconds = step / plan.batch_size
        self.pace = KeepBudget(
            seconds=max(config.budget_time, plan.predicted_time) * self.full_seconds,
            elapsed=lambda: time.perf_counter() - self.started - self.seconds["evaluation"],
            step_cost=lambda step: 1 + (scoring and scoring * self.selector.is_fresh(step // self.steps_per_epoch)),
            step_seconds=step,
            scoring=None if plan.costs.one_forward else lambda: self.seconds["scoring"],
            decide=self.trainer._on_main,
            decisions=self._decisions,
            granted=self._granted,
        )

    def follow_batch_size(self, batch_size: int) -> None:
        """Tell what keeps the budget that Trainer tries again with smaller batches, whose steps are shorter."""
        if self.pace is not None:
            self.pace.step_seconds = self._row_seconds * batch_size

    @property
    def _decided(self) -> list[list[float]] | None:
        """What keeping the budget has decided, the plan itself first; `None` where nothing is watched."""
        return self.pace.progress.decisions if self.pace and self.pace.progress else None

    @property
    def full_seconds(self) -> float:
        """Estimate of plain training's seconds from the measured step; NaN if nothing was measured."""
        if self.streams:
            return math.nan
        return self.plan.costs.step_seconds / self.plan.slowdown * self._micro_batches(self.plan)

    def _micro_batches(self, plan: Plan) -> float:
        """Micro-batches of plain training at the planned batch size, per process."""
        return len(self.ids) / (plan.batch_size * self.args.world_size) * plan.epochs

    def _full_steps(self) -> float:
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(len(self.ids) / rows) * self.args.num_train_epochs

    @cached_property
    def _with_ids(self) -> Any:
        if self.streams:
            return add_stream_ids(self.full_dataset, self.config.id_column)
        return add_ids(self.full_dataset, self.ids)

    @cached_property
    def _dataset_and_collator(self) -> tuple[Any, CarryIds]:
        """The whole training set with ids, unused columns removed, and Trainer's own collator around ids."""
        trainer = self.trainer
        dataset, collator, signature = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
        trainer.train_dataset, trainer.data_collator = self._with_ids, CarryIds(collator)
        trainer._signature_columns = None
        try:
            loader = trainer.plain_train_dataloader()
        finally:
            trainer.train_dataset, trainer.data_collator = dataset, collator
            trainer._signature_columns = signature
        return loader.dataset, loader.collate_fn

    def _score_offline(self) -> Scores:
        trainer = self.trainer
        dataset, collator = self._dataset_and_collator
        model = self.scorer if self.scorer is not None else trainer.model
        if self.scorer is not None:
            model.to(self.args.device)
        scorer = self._batch_scorer(model, "offline")
        items, size = [dataset[i] for i in range(min(8, len(dataset)))], trainer._train_batch_size
        probe = trainer._prepare_inputs(collator(items))
        with skip_identity_adapters(scorer, probe) as skipped:
            origin = {
                "data": self.data,
                "model": model_fingerprint(model, without_adapters=skipped),
                "loss": code_fingerprint(
                    ["mean over label positions", trainer.accelerator.mixed_precision, trainer.per_sample_loss],
                    model_fingerprint(trainer.per_sample_loss)
                    if isinstance(trainer.per_sample_loss, nn.Module)
                    else "",
                    trainer.data_collator,
                ),
            }
            name = checkpoints.short_hash(origin, scorer.want_correct, scorer.want_embeddings)
            path = self.folder / f"scores-{name}.parquet"
            cached = trainer._on_main(self._cached_scores, path)
            if cached is not None:
                self.scores_reused = True
                logger.info("using the scores in %s: same model, data and loss definition", path)
                return cached
            scores = score_dataset(
                scorer,
                dataset,
                collator,
                trainer._prepare_inputs,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                progress_bar=not self.args.disable_tqdm,
                max_rows=256 if "input_ids" in items[0] else rows_without_tokens(self.args.device, size),
                parts=self.folder / f"parts-{name}",
                origin=origin,
            )
        scores = match_scores(scores, self.ids, self.data, "offline pass")
        if self.args.should_save:
            save_scores(scores, path)
            shutil.rmtree(self.folder / f"parts-{name}", ignore_errors=True)
        return scores

    def _cached_scores(self, path: Path) -> Scores | None:
        if not path.exists():
            return None
        try:
            return match_scores(load_scores(path), self.ids, self.data, str(path))
        except ValueError as error:
            logger.warning("%s; scoring again", error)
            return None

    def _batch_scorer(self, model: nn.Module, stage: str) -> BatchScorer:
        trainer, needs = self.trainer, self.config.rule(stage).needs
        return BatchScorer(
            model, trainer.per_sample_loss, "correct" in needs, trainer.accelerator.autocast, "embeddings" in needs
        )

    def _select_offline(self, scores: Scores) -> None:
        self.selector = self._new_selector(self._planned_config())
        selection = self.selector.select_offline(scores, self.groups)
        self.positions = selection.positions
        if scores is not None:
            self.offline_losses = self.selector.ledger.loss.copy()
        if selection.weights is not None:
            self.offline_weights = np.ones(len(self.ids), np.float32)
            self.offline_weights[self.selector.ledger.rows(self.ids[self.positions])] = selection.weights

    # -- in the loop --

    def start_loop(self, loader: Any) -> None:
        """Get ready for the loop: learn the length of an epoch, attach the tracking hook."""
        accumulation, size = self.args.gradient_accumulation_steps, self.trainer._train_batch_size
        candidates = self.selector.candidate_rows(size)
        found = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        remedy = f"batches of {candidates} candidates were asked for; let it take its batch size from Trainer"
        require(found in (None, candidates), "get_train_dataloader", f"batches of {found}", remedy)
        remedy = f"there are fewer samples than the {candidates} candidates of a batch; set it to False"
        require(self.streams or len(loader) > 0, "dataloader_drop_last", self.args.dataloader_drop_last, remedy)
        if self._start is not None and size != self.plan.batch_size:
            self.selector.load_state_dict({name: values.copy() for name, values in self._start["arrays"].items()})
            self.trained_rows, self.candidate_rows, self._merged_epoch = self._start["counts"]
            step = self.plan.costs.step_seconds * size / self.plan.batch_size
            self.plan = replace(self.plan, batch_size=size, costs=replace(self.plan.costs, step_seconds=step))
            self._interval, self._unlogged = [], []
        steps = self.args.max_steps if self.streams else math.ceil(len(loader) / accumulation)
        self.steps_per_epoch = max(steps, 1)
        self.online_scorer = self._batch_scorer(self.trainer.model, "online")
        if self.sliced is not None and self.sliced.step.model is not self.trainer.model:  # Trainer made it anew
            step = self.sliced.step
            self.sliced = SlicedTraining(self.trainer, step.want_correct, step.shift)
        if self.config.track and self._hook is None:
            self._hook = self.trainer.model.register_forward_hook(self._track, with_kwargs=True)

    def start_step(self) -> None:
        """Begin an optimizer step; at the first one of an epoch all ranks learn what the others have seen."""
        self._micro_batch = 0
        self._numbers.clear()
        if self.sliced is not None:
            self.sliced.start_step()
        self.epoch = self.trainer.state.global_step // self.steps_per_epoch
        if self.epoch > self._merged_epoch:
            self._merged_epoch = self.epoch
            self.merge()

    def select(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace a candidate batch by the rows of it that are trained on."""
        args, state = self.args, self.trainer.state
        number = state.global_step * args.gradient_accumulation_steps + self._micro_batch
        number = number * args.world_size + args.process_index
        self._micro_batch += 1
        ids = batch[ID_KEY].cpu().numpy()
        to_slice = self.sliced is not None and self.selector.is_fresh(self.epoch)
        to_slice = to_slice and self.selector.config.online_keep < 1
        if to_slice:  # chosen from in `choose`, by what the forward pass finds
            self._numbers.append(number)
            self.candidate_rows += len(ids)
            return batch
        weights = None
        if self.selector.config.online_keep < 1:
            losses = lengths = correct = None
            if self.config.rule("online").reads_losses:
                losses, lengths, correct = self._candidate_losses(batch, ids)
                self._interval.append(losses)
            started = time.perf_counter()
            rows, weights = self.selector.select(
                ids, losses, self.trainer._train_batch_size, number, lengths=lengths, correct=correct
            )
            collator = self.trainer.data_collator
            batch = take_rows(batch, rows, len(ids), getattr(collator, "pad_to_multiple_of", None))
            self.seconds["selection"] += time.perf_counter() - started
        else:
            batch = dict(batch)
            self.selector.ledger.record_training(ids)
            rows = np.arange(len(ids))
        self.candidate_rows += len(ids)
        self.trained_rows += len(rows)
        weights = self._loss_weights(ids[rows], weights, batch[ID_KEY].device)
        if weights is not None:
            batch[WEIGHT_KEY] = weights
        if weights is None and not self.config.track:
            del batch[ID_KEY]
        elif not self.online_scorer.checked and self.trainer.per_sample_loss is None:
            self.online_scorer(take_rows(self.trainer._prepare_inputs(batch), np.arange(min(len(rows), 4)), len(rows)))
            remedy = (
                "its loss is more than cross-entropy, so the rule's weights cannot be honoured; choose another rule"
            )
            honoured = weights is None or self.online_scorer.matches_own_loss is not False
            require(honoured, "model", type(self.trainer.model).__name__, remedy)
        return batch

    def choose(self, inputs: Mapping[str, Any]) -> tuple[SampleLosses, np.ndarray, torch.Tensor | None]:
        """Compute the losses of the candidates in progress with the forward pass that trains, and choose from them."""
        samples = self.sliced(inputs)
        ids, ledger = self._candidates, self.selector.ledger
        losses, lengths = self.sliced.step.ranking.cpu().numpy(), samples.n_tokens.cpu().numpy()
        correct = samples.correct.cpu().numpy() if "correct" in self.config.rule("online").needs else None
        ledger.record_scores(ids, losses, lengths, step=self.trainer.state.global_step, correct=correct)
        self._interval.append(losses)
        rows, weights = self.selector.select(
            ids, losses, self.trainer._train_batch_size, self.number, lengths=lengths, correct=correct
        )
        self.trained_rows += len(rows)
        if self.config.track:
            ledger.record_train_losses(ids[rows], losses[rows])
        return samples, rows, self._loss_weights(ids[rows], weights, samples.losses.device)

    def _loss_weights(self, ids: np.ndarray, weights: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
        """Return the weights of kept rows from both stages, or `None` where all are 1."""
        if self.offline_weights is not None:
            offline = self.offline_weights[self.selector.ledger.rows(ids)]
            weights = offline if weights is None else offline * weights
        return None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device)

    def _candidate_losses(self, batch: Mapping, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return losses, lengths and (where a rule needs it) correctness of the candidates, scored or remembered."""
        ledger, wanted = self.selector.ledger, self.online_scorer.want_correct
        rows = ledger.rows(ids)
        unknown = np.isnan(ledger.loss[rows]) | (wanted & np.isnan(ledger.correct[rows]))
        unknown |= self.selector.is_fresh(self.epoch)
        if self.online_scorer.sharded and self.args.world_size > 1:
            asked = torch.tensor(float(unknown.any()), device=self.args.device)
            if self.trainer.accelerator.reduce(asked, "sum") > 0 and not unknown.any():
                unknown[:1] = True  # the others need this process in their forward pass
        if unknown.any():
            started = clock(self.args.device)
            part = batch if unknown.all() else take_rows(batch, np.flatnonzero(unknown), len(ids))
            scored = self.online_scorer(self.trainer._prepare_inputs(part))
            ledger.record_scores(
                ids[unknown],
                scored.losses.cpu().numpy(),
                scored.n_tokens.cpu().numpy(),
                step=self.trainer.state.global_step,
                correct=scored.correct.cpu().numpy() if wanted else None,
            )
            self._settle(started, "scoring")
        return ledger.loss[rows], ledger.n_tokens[rows], ledger.correct[rows] if wanted else None

    def _settle(self, started: float, part: str) -> None:
        self.seconds[part] += clock(self.args.device) - started

    def begin_row(self, inputs: Mapping[str, Any]) -> None:
        """Begin the training step of a micro-batch: remember its ids and labels for the tracking hook, and weights."""
        self.weights, self.weights_honoured = inputs.get(WEIGHT_KEY), False
        self.number = self._numbers.popleft() if self._numbers else None
        if self.number is not None:
            self._candidates = inputs[ID_KEY].cpu().numpy()
        elif self.config.track:
            self._tracked = (inputs[ID_KEY].cpu().numpy(), dict(inputs))

    def end_row(self) -> bool:
        """End it; return whether there were weights that nobody honoured."""
        ignored = self.weights is not None and not self.weights_honoured
        self.weights = self.number = None
        return ignored

    def _track(self, model: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> None:
        """Read the losses of trained rows off the very forward pass that trains them."""
        if self._tracked is None or not model.training:
            return
        (ids, inputs), self._tracked = self._tracked, None
        with torch.no_grad():
            losses = self.trainer.losses_of_outputs(outputs)
            if losses is None and self.trainer.per_sample_loss is not None:
                losses = self.trainer.per_sample_loss(outputs, inputs)
            elif losses is None:
                after_loss = int(kwargs.get("labels") is not None)  # a tuple begins with the loss, if there is one
                logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[after_loss]
                if not torch.is_tensor(logits):
                    raise ValueError("track=True: the model returns no logits (a fused loss?); set track=False")
                losses = per_sample_losses(logits.detach(), inputs["labels"], self.online_scorer.shift).losses
        self.selector.ledger.record_train_losses(ids, losses.cpu().numpy())

    def merge(self) -> None:
        """Bring the ledgers of all ranks to the same state, and the interval's losses together."""
        ledger = self.selector.ledger
        own = (ledger.take_pending(), self._interval, (self.trained_rows, self.candidate_rows))
        everyone = gather_object([own]) if self.args.world_size > 1 else [own]
        ledger.merge([records for records, _, _ in everyone], self.args.process_index)
        self.total_trained = sum(counts[0] for _, _, counts in everyone)
        self.total_candidates = sum(counts[1] for _, _, counts in everyone)
        self._unlogged += [losses for _, interval, _ in everyone for losses in interval]
        self._interval = []

    def logs(self) -> dict[str, float]:
        """Return the values to log, global over ranks."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        values = {"darel/scoring_share": scoring_seconds(self.seconds) / elapsed}
        alpha = self.plan.offline_keep
        if not self.in_loop:
            return {"darel/kept_fraction": alpha, **values}
        self.merge()
        values["darel/kept_fraction"] = alpha * self.total_trained / max(self.total_candidates, 1)
        values["darel/rows_backpropagated"] = self.total_trained
        values["darel/coverage"] = self.selector.ledger.coverage
        if self._unlogged:
            quantiles = np.quantile(np.concatenate(self._unlogged), (0.1, 0.5, 0.9))
            for name, value in zip(("p10", "p50", "p90"), quantiles, strict=True):
                values[f"darel/loss_{name}"] = float(value)
        self._unlogged = []
        return values

    # -- checkpoints and the end --

    def save(self, folder: str) -> None:
        """Write ledger and plan into a checkpoint; every rank returns only when the files are there."""
        if self.in_loop:
            self.merge()
        if self.args.should_save:
            arrays = self.selector.state_dict()
            if self.positions is not None:
                arrays["positions"] = self.positions
            if self.offline_weights is not None:
                arrays["offline_weights"] = self.offline_weights
            if self.offline_losses is not None:
                arrays["offline_losses"] = self.offline_losses
            if self.lengths is not None:
                arrays["lengths"] = self.lengths
            state = {
                "plan": self.plan.to_dict(),
                "config": self.config.to_dict(),
                "data": self.data,
                "seconds": self.seconds,
                "elapsed": time.perf_counter() - self.started,
                "trained_rows": self.total_trained,
                "candidate_rows": self.total_candidates,
                "batch_size": self.args.train_batch_size,
                "merged_epoch": self._merged_epoch,
                "scores_reused": self.scores_reused,
                "decisions": self._decided,
                "granted": self.pace.granted if self.pace else 1.0,
            }
            checkpoints.save(folder, state, arrays)
        self.trainer.accelerator.wait_for_everyone()

    def finish(self) -> Report:
        """Make the report, and store it in the output folder."""
        if self.in_loop:
            self.merge()
        seconds = {**self.seconds, "total": time.perf_counter() - self.started}
        ledger, plan = self.selector.ledger, self.plan
        kept = np.ones(len(ledger), bool)
        if self.positions is not None:
            kept[:] = False
            kept[ledger.rows(self.ids[self.positions])] = True
        steps = self.trainer.state.global_step
        if self.in_loop:
            rows, times = self.total_trained, ledger.times_trained.astype(float)
        else:  # nothing of ours is in the loop: every kept sample is trained on once an epoch
            rows = round(kept.sum() * self.trainer.state.epoch)
            times = kept * self.trainer.state.epoch
        report = Report(
            plan=plan,
            config=self.config,
            seconds=seconds,
            full_seconds=self.full_seconds,
            steps=steps,
            rows_backpropagated=int(rows),
            times_trained=times,
            ledger=ledger,
            kept=kept,
            offline_losses=np.full(len(ledger), np.nan) if self.offline_losses is None else self.offline_losses,
            scores_reused=self.scores_reused,
            decisions=(self._decided or [])[1:],
        )
        if self.stores:
            suffix = self._suffix("report")
            report.write_samples(self.folder / f"samples{suffix}.parquet")
            write_json(self.folder / f"report{suffix}.json", {**report.to_dict(), "environment": self.environment})
            page, history = self.folder / f"report{suffix}.html", self.trainer.state.log_history
            try:
                write_html(report, page, history, self.environment, self._text_of)
            except Exception as error:  # it shows samples as the user's data and tokenizer give them; training is done
                logger.warning("%s could not be written: %s", page, error)
        return report

    def _suffix(self, name: str) -> str:
        """Return what to add to a file's name: a second `train()` or a resumed run leaves the first file alone."""
        suffixes = ("", *(f"-{number}" for number in range(2, 10_000)))
        return next(suffix for suffix in suffixes if not (self.folder / f"{name}{suffix}.json").exists())

    def _text_of(self, sample_id: int) -> str:
        """Return what a sample says: its columns of text, or else its tokens decoded."""
        if self.streams:
            return ""
        item = self.full_dataset[int(np.flatnonzero(self.ids == sample_id)[0])]
        texts = [f"{key}: {value}" for key, value in item.items() if isinstance(value, str)]
        decode = getattr(self.trainer.processing_class, "decode", None)
        if not texts and decode is not None and "input_ids" in item:
            texts = [decode(item["input_ids"])]
        if np.ndim(item.get("labels")) == 0 and "labels" in item:
            texts.append(f"label: {item['labels']}")
        return "\n".join(texts)

    def close(self) -> None:
        """Take the tracking hook off the model, and the id off the columns that Trainer keeps."""
        self.trainer._signature_columns = None
        if self.padding_free is not None:
            self.padding_free.close()
        if self._hook is not None:
            self._hook.remove()
