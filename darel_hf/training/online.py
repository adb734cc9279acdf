"""`OnlineStage`: candidates in, rows out; what happens to each micro-batch between the loader and the gradient."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Sampler

from ..accelerators import Accelerator, CannotAccelerate, CheapScores
from ..data import ID_KEY, WEIGHT_KEY, take_rows
from ..files import require
from ..scoring import (
    SampleLosses,
    Trial,
    counts_items,
    preserve_rng_state,
    rows_of,
    scorer_for,
    weighted_loss,
    with_decoder_inputs,
)
from ..selection import Selector
from .clock import Clock

logger = logging.getLogger(__name__)


class OnlineStage:
    """
    Choose the rows of each micro-batch, carry their weights to the loss, and remember what was trained on.

    It owns whatever lives from one micro-batch to the next. Where nothing is chosen, weighed or tracked
    ([`OnlineStage.in_loop`] is false) it only lets accelerators do their work.

    Args:
        trainer (`DarelMixin`): the trainer.
        selector ([`Selector`]): rules and ledger, with the settings that the plan has decided.
        clock ([`Clock`]): of the run.
        batch_size (`int`): rows of a micro-batch that are trained on, as planned.
        streams (`bool`): whether the data are a stream: what it holds is known once it has gone by.
        offline_weights (`np.ndarray`, *optional*): float32 `[n]`, of the offline stage, in the order of the ledger.
        accelerators (`Sequence[Accelerator]`): what makes steps cheaper, in the order in which they act.
        shared_keys (`frozenset[str]`, *optional*): what of a batch belongs to no single row; `None`: not known.
        make_sampler (`Callable`, *optional*): `rows of a micro-batch -> sampler`, where the order is ours.
    """

    def __init__(
        self,
        trainer: Any,
        selector: Selector,
        clock: Clock,
        batch_size: int,
        streams: bool = False,
        offline_weights: np.ndarray | None = None,
        accelerators: Sequence[Accelerator] = (),
        shared_keys: frozenset[str] | None = None,
        make_sampler: Callable[[int], Sampler] | None = None,
    ):
        self.trainer, self.args, self.selector, self.clock = trainer, trainer.args, selector, clock
        self.batch_size, self.streams, self.offline_weights = batch_size, streams, offline_weights
        self.accelerators, self.shared_keys = accelerators, shared_keys
        self.given_up: dict[str, str] = {}  # accelerators that a batch did not take, and why
        self.choosing = next((a for a in accelerators if a.chooses), None)  # chooses in the forward pass that trains
        config = self.config = selector.config
        numbered = streams and config.id_column is not None
        self.in_loop = config.online_keep < 1 or config.track or offline_weights is not None or numbered
        self.trained_rows = self.candidate_rows = 0  # of this process, since the start of the run
        self.total_trained = self.total_candidates = 0  # of all processes, as of the last merge
        self._make_sampler, self.sampler = make_sampler, None
        self._merged_epoch = 0
        self._interval: list[np.ndarray] = []  # losses since the last merge
        self._unlogged: list[np.ndarray] = []
        self._weights: torch.Tensor | None = None  # of the rows in the training step in progress
        self._weights_honoured = False
        self._counts: bool | None = None  # whether the model's loss is divided by Trainer's count; None: not tried yet
        self._tracked: tuple[np.ndarray, dict[str, Any]] | None = None
        self._number: int | None = None  # of the micro-batch in progress, where it is one of candidates to choose from
        self._numbers: deque[int] = deque()  # likewise, of those of the optimizer step in progress
        self._hook: Any = None
        self._start: dict[str, Any] | None = None

    # -- the loader --

    def sampler_for(self, batch_size: int) -> Sampler | None:
        """Make what visits the samples, if the order is ours, for micro-batches of so many candidates."""
        if self._make_sampler is not None:
            self.sampler = self._make_sampler(batch_size)
        return self.sampler

    def begin(self, loader: Any) -> None:
        """Get ready for the loop: check the loader, learn the length of an epoch, attach what acts on the model."""
        name = "batch_by_length" if self.config.batch_by_length else "share_prompts"
        remedy = "get_train_dataloader of this trainer has an order of its own; leave it out"
        ours = self._make_sampler is None or self.sampler is not None
        require(ours, name, getattr(self.config, name), remedy)
        for accelerator in self.accelerators:
            accelerator.attach()
        if self.in_loop:
            self._begin(loader)

    def _begin(self, loader: Any) -> None:
        accumulation, size = self.args.gradient_accumulation_steps, self.trainer._train_batch_size
        candidates = self.selector.candidate_rows(size)
        found = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        remedy = f"batches of {candidates} candidates were asked for; let it take its batch size from Trainer"
        require(found in (None, candidates), "get_train_dataloader", f"batches of {found}", remedy)
        remedy = f"there are fewer samples than the {candidates} candidates of a batch; set it to False"
        require(self.streams or len(loader) > 0, "dataloader_drop_last", self.args.dataloader_drop_last, remedy)
        if self._start is not None and size != self.batch_size:
            self.load_state_dict(self._start)
            self._interval, self._unlogged = [], []
        self.batch_size = size
        # To go back to, where Trainer tries again with smaller batches.
        if self.args.auto_find_batch_size and self._start is None:
            self._start = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in self.state_dict().items()}
        steps = self.args.max_steps if self.streams else math.ceil(len(loader) / accumulation)
        self.steps_per_epoch = max(steps, 1)
        self.scorer = scorer_for(self.trainer, stage="online")
        self._score = CheapScores(self.scorer, self.accelerators)
        # Batch normalization cannot do a single row, which is all that may be left of a last batch.
        self._least = 2 if any(isinstance(m, _BatchNorm) for m in self.trainer.model.modules()) else 1
        if self.config.track and self._hook is None:
            self._hook = self.trainer.model.register_forward_hook(self._track, with_kwargs=True)

    def close(self) -> None:
        """Take the tracking hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    # -- one optimizer step: from candidates to rows --

    def is_fresh(self, step: int) -> bool:
        """Whether candidates are scored afresh in an optimizer step."""
        return self.selector.is_fresh(step // self.steps_per_epoch)

    def start_step(self) -> None:
        """Begin an optimizer step; at the first one of an epoch all ranks learn what the others have seen."""
        if self.sampler is not None:  # on resume in several processes the loaders in between do not hand it on
            self.sampler.set_epoch(int((self.trainer.state.epoch or 0) + 1e-6))
        if not self.in_loop:
            return
        self._micro_batch = 0
        self._numbers.clear()
        if self.choosing is not None:
            self.choosing.start_step()
        epoch = self.trainer.state.global_step // self.steps_per_epoch
        if epoch > self._merged_epoch:
            self._merged_epoch = epoch
            self.merge()

    def select(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace a candidate batch by the rows of it that are trained on."""
        args, step = self.args, self.trainer.state.global_step
        number = step * args.gradient_accumulation_steps + self._micro_batch
        number = number * args.world_size + args.process_index
        self._micro_batch += 1
        ids = batch[ID_KEY].cpu().numpy()
        self.candidate_rows += len(ids)
        if self.config.online_keep == 1:
            batch, rows, weights = dict(batch), np.arange(len(ids)), None
            self.selector.ledger.record_training(ids)
        elif self.choosing is not None and self.is_fresh(step):
            self._numbers.append(number)  # chosen from by what the forward pass finds, see `_choose`
            return batch
        else:
            losses = lengths = correct = None
            if self.config.rule("online").reads_losses:
                losses, lengths, correct = self._candidate_losses(batch, ids)
                self._interval.append(losses)
            with self.clock.count("selection", wait=False):
                rows, weights = self.selector.select(
                    ids, losses, self.trainer._train_batch_size, number, lengths, correct, self._least
                )
                multiple = getattr(self.trainer.data_collator, "pad_to_multiple_of", None)
                batch = take_rows(batch, rows, len(ids), multiple, self.shared_keys)
        self.trained_rows += len(rows)
        weights = self._loss_weights(ids[rows], weights, batch[ID_KEY].device)
        if weights is not None:
            batch[WEIGHT_KEY] = weights
        if weights is None and not self.config.track:
            del batch[ID_KEY]
        elif weights is not None and self._counts is None:
            with self.clock.count("probe"):
                self._try_weights(self.scorer.few_rows(self.trainer._prepare_inputs(batch))[0])
        elif not self.scorer.reading.checked and self.trainer.per_sample_loss is None:
            self.scorer(self.scorer.few_rows(self.trainer._prepare_inputs(batch))[0])
        return batch

    def _try_weights(self, inputs: Mapping[str, Any]) -> None:
        """Show, the first time that there are weights, that with weights of 1 ours is the trainer's own step."""
        trainer, scorer = self.trainer, self.scorer
        if trainer.per_sample_loss is None:
            scorer(inputs)
        self._counts, problem = True, None
        if scorer.sharded:  # no backward pass by itself
            problem = "its loss is more than cross-entropy" if scorer.reading.matches_own_loss is False else None
        else:
            items = trainer.count_items(inputs)
            own = partial(trainer.own_loss, inputs, smoothed=True)
            if items is not None:
                with scorer.scoring(), preserve_rng_state():
                    self._counts = counts_items(own, int(items))

            def ours() -> torch.Tensor:
                self._weights = torch.ones(rows_of(inputs), device=self.args.device)
                try:
                    return own(items)
                finally:
                    self._weights = None

            if trainer.per_sample_loss is None:  # else it is the user who says what each row's loss is
                problem = Trial(trainer, partial(own, items)).difference(ours)
        self._weights_honoured = False
        remedy = f"{problem}, so the rule's weights cannot be honoured; choose a rule without weights"
        require(problem is None, "model", type(trainer.model).__name__, remedy)

    def _loss_weights(self, ids: np.ndarray, weights: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
        """Return the weights of kept rows from both stages, or `None` where all are 1."""
        if self.offline_weights is not None:
            offline = self.offline_weights[self.selector.ledger.rows(ids)]
            weights = offline if weights is None else offline * weights
        return None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device)

    def _candidate_losses(self, batch: Mapping, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return losses, lengths and (where a rule needs it) correctness of the candidates, scored or remembered."""
        ledger, wanted, step = self.selector.ledger, self.scorer.want_correct, self.trainer.state.global_step
        rows = ledger.rows(ids)
        unknown = np.isnan(ledger.loss[rows]) | (wanted & np.isnan(ledger.correct[rows])) | self.is_fresh(step)
        if self.scorer.sharded and self.args.world_size > 1:
            asked = torch.tensor(float(unknown.any()), device=self.args.device)
            if self.trainer.accelerator.reduce(asked, "sum") > 0 and not unknown.any():
                unknown[:1] = True  # the others need this process in their forward pass
        if unknown.any():
            with self.clock.count("scoring"):
                part = batch
                if not unknown.all():
                    part = take_rows(batch, np.flatnonzero(unknown), len(ids), shared=self.shared_keys)
                scored = self._score(self.trainer._prepare_inputs(part))
                ledger.record_scores(
                    ids[unknown],
                    scored.losses.cpu().numpy(),
                    scored.n_tokens.cpu().numpy(),
                    step=step,
                    correct=scored.correct.cpu().numpy() if wanted else None,
                )
        return ledger.loss[rows], ledger.n_tokens[rows], ledger.correct[rows] if wanted else None

    # -- one micro-batch: from rows to the loss --

    def begin_row(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Begin the training step of a micro-batch: return what the model gets, remember the rest."""
        if not self.in_loop and not self.accelerators:
            return inputs
        ids = inputs.get(ID_KEY)
        self._weights, self._weights_honoured = inputs.get(WEIGHT_KEY), False
        if ids is not None:
            inputs = {key: value for key, value in inputs.items() if key not in (ID_KEY, WEIGHT_KEY)}
        self._number = self._numbers.popleft() if self._numbers else None
        if self._number is not None:
            self._candidates = ids.cpu().numpy()
        elif self.config.track:
            self._tracked = (ids.cpu().numpy(), dict(inputs))
        for accelerator in list(self.accelerators):
            try:
                inputs = accelerator.transform(inputs)
            except CannotAccelerate as error:
                if accelerator.asked:
                    raise
                accelerator.detach()
                self.accelerators.remove(accelerator)
                self.given_up[accelerator.facts.name] = str(error)
                logger.warning("going on without %s: %s", accelerator.facts.name, error)
        return inputs

    def end_row(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """End it, however it ended; return what makes of its loss the one to log."""
        ignored = self._weights is not None and not self._weights_honoured
        chosen = self._number is not None
        self._weights = self._number = None

        def settle(loss: torch.Tensor) -> torch.Tensor:
            remedy = (
                "it never called super().compute_loss, so the rule's weights were not honoured; choose another rule"
            )
            require(not ignored, "compute_loss", type(self.trainer).__name__, remedy)
            return self.choosing.settle(loss) if chosen else loss

        return settle

    def explain(self, error: CannotAccelerate) -> CannotAccelerate:
        """Name the setting and the way out, where an accelerator fails later than it was tried out."""
        accelerator = self.choosing or self.accelerators[-1]
        return type(error)(accelerator.told(error, "resume with"))

    def own_loss(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any], Callable | None]:
        """
        Say how the loss of the micro-batch in progress is computed.

        Returns:
            What to call, its inputs, and the function `(outputs, labels, num_items_in_batch) -> loss`, or `None`: then
            the loss is that of a plain step.
        """
        if self._number is not None:
            samples, rows, weights = self._choose(inputs)
            loss = partial(self._chosen_loss, inputs=dict(inputs), samples=samples, rows=rows, weights=weights)
            return lambda **_: samples, inputs, loss
        if self._weights is None:
            return model, inputs, None
        inputs = with_decoder_inputs(self.trainer.model, dict(inputs))  # the labels will not reach the model
        return model, inputs, partial(self._weighted_loss, inputs=dict(inputs), weights=self._weights)

    def _choose(self, inputs: Mapping[str, Any]) -> tuple[SampleLosses, np.ndarray, torch.Tensor | None]:
        """Compute the losses of the candidates in progress with the forward pass that trains, and choose from them."""
        samples, ranking = self.choosing.score(inputs)
        ids, ledger = self._candidates, self.selector.ledger
        losses, lengths = ranking.cpu().numpy(), samples.n_tokens.cpu().numpy()
        correct = samples.correct.cpu().numpy() if "correct" in self.config.rule("online").needs else None
        ledger.record_scores(ids, losses, lengths, step=self.trainer.state.global_step, correct=correct)
        self._interval.append(losses)
        rows, weights = self.selector.select(
            ids, losses, self.trainer._train_batch_size, self._number, lengths=lengths, correct=correct
        )
        self.trained_rows += len(rows)
        if self.config.track:
            ledger.record_train_losses(ids[rows], losses[rows])
        return samples, rows, self._loss_weights(ids[rows], weights, samples.losses.device)

    def _chosen_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None, **chosen: Any) -> torch.Tensor:
        return self.choosing.loss(counted=num_items_in_batch, **chosen)

    def _weighted_loss(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        *,
        inputs: Mapping[str, Any],
        weights: torch.Tensor,
    ) -> torch.Tensor:
        trainer, self._weights_honoured = self.trainer, True
        # Some heads ignore the count that they are told: the mean over the micro-batch then, as in Trainer's own step.
        count = num_items_in_batch if self._counts else None
        if trainer.per_sample_loss is None:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            smoothing = trainer.label_smoother.epsilon if trainer.label_smoother is not None else 0.0
            return weighted_loss(self.scorer.read(logits, labels, label_smoothing=smoothing), weights, count)
        losses = trainer.per_sample_loss(outputs, inputs)
        loss = (losses * weights.to(losses)).mean()
        if count is not None:  # a mean over rows: undo what Trainer takes for already done where labels are counted
            loss = loss / trainer.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                loss = loss / trainer.accelerator.num_processes
        return loss

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
                losses = self.scorer.read(logits.detach(), inputs["labels"]).losses
        self.selector.ledger.record_train_losses(ids, losses.cpu().numpy())

    # -- what is known of it all --

    def merge(self) -> None:
        """Bring the ledgers of all ranks to the same state, and the interval's losses together."""
        if not self.in_loop:
            return
        ledger = self.selector.ledger
        own = (ledger.take_pending(), self._interval, (self.trained_rows, self.candidate_rows))
        everyone = gather_object([own]) if self.args.world_size > 1 else [own]
        ledger.merge([records for records, _, _ in everyone], self.args.process_index)
        self.total_trained = sum(counts[0] for _, _, counts in everyone)
        self.total_candidates = sum(counts[1] for _, _, counts in everyone)
        self._unlogged += [losses for _, interval, _ in everyone for losses in interval]
        self._interval = []

    def logs(self, offline_keep: float) -> dict[str, float]:
        """Return the values to log, global over ranks; `offline_keep`: fraction that the offline stage has kept."""
        if not self.in_loop:
            return {"darel/kept_fraction": offline_keep}
        self.merge()
        values = {
            "darel/kept_fraction": offline_keep * self.total_trained / max(self.total_candidates, 1),
            "darel/rows_backpropagated": self.total_trained,
            "darel/coverage": self.selector.ledger.coverage,
        }
        if self._unlogged:
            quantiles = np.quantile(np.concatenate(self._unlogged), (0.1, 0.5, 0.9))
            for name, value in zip(("p10", "p50", "p90"), quantiles, strict=True):
                values[f"darel/loss_{name}"] = float(value)
        self._unlogged = []
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember, the ledger too; merge first."""
        counts = {"trained_rows": self.total_trained, "candidate_rows": self.total_candidates}
        return {**self.selector.state_dict(), **counts, "merged_epoch": self._merged_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what [`OnlineStage.state_dict`] returned."""
        self.selector.load_state_dict(state)
        self.total_trained, self.total_candidates = state["trained_rows"], state["candidate_rows"]
        first = self.args.process_index == 0  # the totals of all processes are counted once
        self.trained_rows, self.candidate_rows = (self.total_trained, self.total_candidates) if first else (0, 0)
        self._merged_epoch = state["merged_epoch"]
