"""`DarelMixin` and the trainers made with it: thin, they join the model, the `Selector` and Trainer's hooks."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from . import checkpoints
from .config import DarelConfig, require
from .data import ID_KEY, WEIGHT_KEY, CarryIds, is_stream, sample_ids
from .files import write_text
from .losses import SampleLosses, per_sample_losses, weighted_loss
from .report import Report
from .run import Run
from .scoring import PerSampleLoss, with_decoder_inputs
from .sliced import CannotSlice

logger = logging.getLogger(__name__)


class DarelMixin:
    """
    Add DAREL to a `Trainer` subclass: `class Mine(DarelMixin, AnyTrainerSubclass)`.

    Args:
        darel ([`DarelConfig`], *optional*): the settings; by default all off, and training is exactly that of the
            class below.
        scorer (`nn.Module` or `Callable`, *optional*): a model that scores in the offline stage in place of the one
            being trained, and takes the same batches; or a function without arguments that makes one, whose time is
            counted: it is called only if there is an offline pass, by all processes.
        per_sample_loss (`Callable`, *optional*): `(outputs, inputs) -> float [B]`, the loss of each sample in nats,
            for models whose loss cannot be read off logits and labels.
        *args, **kwargs: as for the trainer below.

    Attributes:
        report ([`darel_hf.report.Report`]): after `train()`, what was planned, kept, dropped and measured.

    Raises:
        ValueError, TypeError: at construction for settings that cannot work, in `train()` for data that cannot.

    Example:

    ```python
    trainer = DarelTrainer(model=model, args=args, train_dataset=data, darel=DarelConfig(offline_keep=0.7))
    trainer.train()
    print(trainer.report)
    ```
    """

    def __init__(
        self,
        *args: Any,
        darel: DarelConfig | None = None,
        scorer: nn.Module | Callable[[], nn.Module] | None = None,
        per_sample_loss: PerSampleLoss | None = None,
        **kwargs: Any,
    ):
        require(darel is None or isinstance(darel, DarelConfig), "darel", darel, "give a DarelConfig", TypeError)
        self.darel = darel or DarelConfig()
        self.scorer = scorer
        self.per_sample_loss = per_sample_loss
        self.report: Report | None = None
        self._run: Run | None = None  # the stages of the `train()` in progress; None: plain Trainer
        super().__init__(*args, **kwargs)
        if self.darel.active:
            _check_arguments(self)

    # ---- Offline stage ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the offline stage (skipped on resume), then train as the class below does, on what was kept."""
        if not self.darel.active or self.train_dataset is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        trial = args[0] if args else kwargs.get("trial")
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoints.resolve(resume_from_checkpoint, self.args.output_dir)
        elif self._run_count == 0 and trial is None:
            self._on_main(checkpoints.refuse_other_run, self.args.output_dir)
        self._run_count += 1
        dataset, batch_size = self.train_dataset, self._train_batch_size
        self._hp_search_setup(trial)  # as the class below does first: the plan is one for the trial's arguments
        self._run = Run(self, resume_from_checkpoint or None, trial)
        try:
            self._prepare_run()
            if self._run.pace is not None:
                self.add_callback(self._run.pace)
            result = super().train(resume_from_checkpoint or None, *args, **kwargs)
            self.report = self._run.finish()
            return result
        except Exception as error:  # torch and safetensors name neither file nor way out when a disk is full
            full = checkpoints.explain_full_disk(error, self.args.output_dir)
            if full is None:
                raise
            raise full from error
        finally:
            self._run.close()
            pace, self._run = self._run.pace, None
            self.train_dataset, self._train_batch_size = dataset, batch_size
            if pace in self.callback_handler.callbacks:
                self.remove_callback(pace)

    _run_count = 0

    def _prepare_run(self) -> None:
        self._run.prepare()

    def _hp_search_setup(self, trial: Any) -> None:
        """Set a trial's arguments as the class below does, but for the batch size, where one is planned."""
        super()._hp_search_setup(trial)
        if self._run is not None:
            self._train_batch_size = self._run.plan.batch_size

    def _on_main(self, function: Any, *args: Any) -> Any:
        """Call a function on the main process; all processes get its result or raise its error."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = function(*args)
            except Exception as error:  # whatever it is, the other processes wait for it
                outcome[1] = error
        if self.args.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # ---- Online stage ----

    def get_train_dataloader(self) -> Any:
        """Return Trainer's own loader, with a larger batch where candidates are chosen from, and with sample ids."""
        if self._run is None:
            return super().get_train_dataloader()
        collator, batch_size = self.data_collator, self._train_batch_size
        self._run.follow_batch_size(batch_size)
        if self._run.in_loop:
            self.data_collator = CarryIds(collator)
            self._train_batch_size = self._run.selector.candidate_rows(batch_size)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator, self._train_batch_size = collator, batch_size
        self._run.check_sampler()
        if self._run.in_loop:
            self._run.start_loop(loader)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the sampler of the class below, or with `batch_by_length` ours."""
        ours = self._run.make_sampler(self._train_batch_size) if self._run is not None and self._run.ready else None
        return super()._get_train_sampler(*args, **kwargs) if ours is None else ours

    def plain_train_dataloader(self) -> Any:
        """Return the loader of the class below, over whatever `train_dataset` is now."""
        return super().get_train_dataloader()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._run is not None and ID_KEY not in self._signature_columns:
            self._signature_columns.append(ID_KEY)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Take the candidates of one optimizer step, hand on the rows to train on; Trainer counts their tokens."""
        if self._run is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._run.follow_epoch()
        if not self._run.in_loop:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._run.start_step()
        return super().get_batch_samples(map(self._run.select, epoch_iterator), num_batches, device)

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Do the training step of the class below, on inputs without ids and weights."""
        if self._run is not None and self._run.padding_free is not None:
            inputs = self._run.padding_free(inputs)
        if self._run is None or ID_KEY not in inputs:
            return super().training_step(model, inputs, *args, **kwargs)
        self._run.begin_row(inputs)
        sliced = self._run.sliced if self._run.number is not None else None
        inputs = {key: value for key, value in inputs.items() if key not in (ID_KEY, WEIGHT_KEY)}
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except CannotSlice as error:  # a graph compiled later than the one that was tried out
            raise CannotSlice(f"online_backward='sliced': {error}; resume with 'subset'") from error
        finally:
            ignored = self._run.end_row()
        remedy = "it never called super().compute_loss, so the rule's weights were not honoured; choose another rule"
        require(not ignored, "compute_loss", type(self).__name__, remedy)
        return loss if sliced is None else sliced.settle(loss)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the class below does; where a rule gives weights, the weighted loss."""
        if self._run is not None and self._run.number is not None:
            samples, rows, weights = self._run.choose(inputs)
            chosen = {"inputs": dict(inputs), "samples": samples, "rows": rows, "weights": weights}
            with self._own_loss(partial(self._sliced_loss, **chosen)):
                return super().compute_loss(lambda **_: samples, inputs, *args, **kwargs)
        weights = None if self._run is None else self._run.weights
        if weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inputs = with_decoder_inputs(self.model, dict(inputs))  # the labels will not reach the model
        with self._own_loss(partial(self._weighted_loss, inputs=dict(inputs), weights=weights)):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextlib.contextmanager
    def _own_loss(self, function: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let the class below count, scale and log a loss of ours."""
        self.compute_loss_func = function
        try:
            yield
        finally:
            self.compute_loss_func = None

    def _sliced_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None, **chosen: Any) -> torch.Tensor:
        return self._run.sliced.loss(counted=num_items_in_batch, **chosen)

    def _weighted_loss(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        *,
        inputs: Mapping[str, Any],
        weights: torch.Tensor,
    ) -> torch.Tensor:
        self._run.weights_honoured = True
        if self.per_sample_loss is None:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            smoothing = self.label_smoother.epsilon if self.label_smoother is not None else 0.0
            samples = per_sample_losses(logits, labels, self._run.online_scorer.shift, smoothing)
            if not labels.is_floating_point():
                return weighted_loss(samples, weights, num_items_in_batch)
        else:
            losses = self.per_sample_loss(outputs, inputs)
            samples = SampleLosses(losses, torch.ones_like(losses), torch.zeros_like(losses))
        # A mean over rows, not over counted labels: undo what Trainer takes for already done where it has counted.
        loss = weighted_loss(samples, weights, None)
        if num_items_in_batch is not None:
            loss = loss / self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                loss = loss / self.accelerator.num_processes
        return loss

    def losses_of_outputs(self, outputs: Any) -> torch.Tensor | None:
        """Return the losses of samples (float `[B]`) that a model's outputs hold already; `None`: they hold none."""
        return None

    # ---- The time budget ----

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the scheduler of the class below; with a time budget it goes by progress, not by steps."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self._run is not None and self._run.pace is not None:
            self._run.pace.schedule(scheduler, num_training_steps)
        return scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the class below does; during training, its time counts for no budget."""
        if self._run is None or self._run.evaluating:  # several sets are evaluated by calls within this one
            return super().evaluate(*args, **kwargs)
        started, self._run.evaluating = time.perf_counter(), True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._run.seconds["evaluation"] += time.perf_counter() - started
            self._run.evaluating = False

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add `darel/` values, global over all processes, to the logs of training steps."""
        if self._run is not None and "loss" in logs and "learning_rate" in logs:
            logs = {**logs, **self._run.logs()}
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card of the class below; after training with DAREL, with a section on it."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.report is not None and self.is_world_process_zero() and card.exists():
            text = card.read_text(encoding="utf-8").rstrip()
            write_text(card, f"{text}\n\n{self.report.card()}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint, ledger and plan too, before Trainer's own state makes it complete."""
        super().save_model(output_dir, _internal_call)
        if self._run is not None and _internal_call and output_dir is not None:
            self._run.save(output_dir)


def _check_arguments(trainer: Any) -> None:
    """Refuse, before any compute, what cannot work with DAREL; warn of what will disappoint."""
    config, args = trainer.darel, trainer.args
    require(
        args.n_gpu <= 1,
        "n_gpu",
        args.n_gpu,
        "one process drives several GPUs (DataParallel); start one process a GPU with `accelerate launch`",
    )
    if is_stream(trainer.train_dataset):
        _check_stream(config, args)
    elif trainer.train_dataset is not None:
        sample_ids(trainer.train_dataset)  # raises for a data set without length, or an empty one
    if config.batch_by_length:
        strategy = getattr(args, "train_sampling_strategy", "random")
        remedy = "batch_by_length decides the order, too; leave out one of them"
        require(strategy == "random", "train_sampling_strategy", strategy, remedy)
    if config.may_select("online"):
        strategy = getattr(args, "train_sampling_strategy", None)
        remedy = "its loader has batches of its own size, so candidates cannot be chosen from; use another strategy"
        require(strategy != "batch_rebalance", "train_sampling_strategy", strategy, remedy)
        remedy = "a batch of candidates is made per process; set it to False"
        require(not args.accelerator_config.split_batches, "split_batches", True, remedy)
    for stage in filter(config.may_select, ("offline", "online")):
        rule = config.rule(stage)
        remedy = "the rule needs to know which predictions are right, which per_sample_loss does not say"
        known = "correct" not in rule.needs or trainer.per_sample_loss is None
        require(known, f"{stage}_rule", rule.name, remedy)
        remedy = "the rule looks at the embeddings of the whole training set; choose another for the online stage"
        require(stage == "offline" or "embeddings" not in rule.needs, f"{stage}_rule", rule.name, remedy)
        remedy = "the rule's weights cannot be honoured in a loss of your own; choose a rule without weights"
        honoured = rule.weigh is None or trainer.compute_loss_func is None
        require(honoured, "compute_loss_func", trainer.compute_loss_func, remedy)
    empty = trainer.is_fsdp_enabled and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true"
    scores = config.may_select("offline") and config.rule("offline").reads_losses
    scores = scores and config.scores is None and trainer.scorer is None
    remedy = "only the first process then has weights to score with; set it to false, or give scores= or scorer="
    require(not (empty and scores and args.world_size > 1), "fsdp_cpu_ram_efficient_loading", True, remedy)
    remedy = "weights are spread over processes before the offline stage could score; give scores= or scorer="
    require(not (scores and is_deepspeed_zero3_enabled()), "deepspeed zero_stage", 3, remedy)
    remedy = "trying out unpad=True needs whole weights in every process before training; leave out one of them"
    tries = config.unpad and not is_stream(trainer.train_dataset)
    require(not (empty and tries and args.world_size > 1), "fsdp_cpu_ram_efficient_loading", True, remedy)
    require(not (tries and is_deepspeed_zero3_enabled()), "deepspeed zero_stage", 3, remedy)
    remedy = f"max_steps={args.max_steps} fixes the number of steps, and dropping samples then saves no time: give "
    remedy += "num_train_epochs in its place, or leave out the budget"
    require(config.budget_time is None or args.max_steps <= 0, "budget_time", config.budget_time, remedy)
    selects = config.online_keep < 1 or config.offline_keep < 1
    if args.max_steps > 0 and selects and not is_stream(trainer.train_dataset):
        logger.warning(
            "max_steps=%d fixes the number of steps: selecting samples then saves no time, and scoring costs some; "
            "use num_train_epochs to save time",
            args.max_steps,
        )


def _check_stream(config: DarelConfig, args: Any) -> None:
    """Refuse what needs to know a stream before it is read."""
    remedy = "train_dataset is a stream, of which no fraction can be kept before it is read; "
    online = remedy + "select online: online_keep, with id_column, rescore_every=1 and max_steps"
    require(config.offline_keep == 1, "offline_keep", config.offline_keep, online)
    for name in ("budget_time", "budget_memory", "group_column", "scores", "reference_scores"):
        require(getattr(config, name) is None, name, getattr(config, name), online)
    require(config.rescore_every == 1, "rescore_every", config.rescore_every, "a stream has no second epoch; give 1")
    remedy = "train_dataset is a stream, whose lengths are not known before it is read; leave it out"
    require(not config.batch_by_length, "batch_by_length", True, remedy)
    remedy = "the rows of a stream have no numbers; name a column with integer ids"
    require(config.id_column is not None, "id_column", None, remedy)
    several = args.world_size > 1 and args.accelerator_config.dispatch_batches is not False
    remedy = "each process reads its own part of a stream; give accelerator_config={'dispatch_batches': False}"
    require(not several, "dispatch_batches", args.accelerator_config.dispatch_batches, remedy)


class DarelTrainer(DarelMixin, Trainer):
    """`transformers.Trainer` with DAREL, see [`DarelMixin`]."""


class DarelSeq2SeqTrainer(DarelMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with DAREL, see [`DarelMixin`]."""
