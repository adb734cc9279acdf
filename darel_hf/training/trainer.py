"""`DarelMixin` and the trainers made with it: thin, they join the model, the `Selector` and Trainer's hooks."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from ..accelerators import CannotAccelerate
from ..adapters import find_reader, with_prompt_lengths
from ..config import DarelConfig
from ..data import ID_KEY, CarryIds
from ..files import require, write_text
from ..report import Report
from ..scoring import PerSampleLoss, Reading
from . import checkpoints
from .checks import check_arguments
from .run import Run

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
        self.ready_made_scheduler = self.lr_scheduler is not None  # for as many steps as its maker thought of
        if self.darel.active:
            check_arguments(self)

    # ---- Offline stage ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the offline stage (skipped on resume), then train as the class below does, on what was kept."""
        nothing = self.train_dataset is None or max(self.args.num_train_epochs, self.args.max_steps) <= 0
        if not self.darel.active or nothing:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        trial = args[0] if args else kwargs.get("trial")
        if resume_from_checkpoint:
            wanted = resume_from_checkpoint
            resume_from_checkpoint = self.on_main(checkpoints.resolve, wanted, self.args.output_dir)
        self._reading = None
        dataset, batch_size = self.train_dataset, self._train_batch_size
        self._hp_search_setup(trial)  # as the class below does first: the plan is one for the trial's arguments
        self._run, callbacks = Run(self, resume_from_checkpoint or None, trial), []
        try:
            self._prepare_run()
            callbacks = self._run.callbacks()
            for callback in callbacks:
                self.add_callback(callback)
            result = super().train(resume_from_checkpoint or None, *args, **kwargs)
            self.report = self._run.end()
            return result
        except Exception as error:  # torch and safetensors name neither file nor way out when a disk is full
            full = checkpoints.explain_full_disk(error, self.args.output_dir)
            if full is None:
                raise
            raise full from error
        finally:
            self._run.close()
            self._run = None
            self.train_dataset, self._train_batch_size = dataset, batch_size
            for callback in callbacks:
                self.remove_callback(callback)

    def _prepare_run(self) -> None:
        self._run.prepare()

    def _hp_search_setup(self, trial: Any) -> None:
        """Set a trial's arguments as the class below does, but for the batch size, where one is planned."""
        super()._hp_search_setup(trial)
        if self._run is not None:
            self._train_batch_size = self._run.plan.batch_size

    def on_main(self, function: Any, *args: Any) -> Any:
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
        collator, batch_size, online = self.data_collator, self._train_batch_size, self._run.online
        self._run.planner.follow_batch_size(batch_size)
        self._run.clock.begin_loop()
        if online.in_loop:
            self.data_collator = CarryIds(collator)
            self._train_batch_size = online.selector.candidate_rows(batch_size)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator, self._train_batch_size = collator, batch_size
        online.begin(loader)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the sampler of the class below, or ours, where batches are to be of similar samples."""
        online = None if self._run is None else self._run.online
        ours = None if online is None else online.sampler_for(self._train_batch_size)
        return super()._get_train_sampler(*args, **kwargs) if ours is None else ours

    def plain_train_dataloader(self) -> Any:
        """Return the loader of the class below, over whatever `train_dataset` is now."""
        return super().get_train_dataloader()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.darel.active and ID_KEY not in self._signature_columns:
            self._signature_columns.append(ID_KEY)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Take the candidates of one optimizer step, hand on the rows to train on; Trainer counts their tokens."""
        if self._run is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        online, pace = self._run.online, self._run.planner.pace
        if pace is not None and pace.over:  # a budget had ended this run: there is no further step
            return [], None
        self._run.clock.begin_step()
        if self._run.finish is not None:
            self._run.finish.start_step(self.state.global_step)
        online.start_step()
        if online.in_loop:
            epoch_iterator = map(online.select, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Do the training step of the class below, on inputs without ids and weights, as accelerators want them."""
        if self._run is None:
            return super().training_step(model, inputs, *args, **kwargs)
        online = self._run.online
        try:
            loss = super().training_step(model, online.begin_row(inputs), *args, **kwargs)
        except CannotAccelerate as error:  # found later than when it was tried out
            raise online.explain(error) from error
        finally:
            settle = online.end_row()
        return settle(loss)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return what the class below does; the parameters that `Trainer` counts in every step are counted once."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        whose = next(cls for cls in type(self).__mro__ if cls is not DarelMixin and "floating_point_ops" in vars(cls))
        if whose is not Trainer or not torch.is_tensor(tokens) or not tokens.numel():
            return super().floating_point_ops(inputs)
        if self._counted is not self.model:
            self._counted, self._flops = self.model, super().floating_point_ops(inputs) // tokens.numel()
        return self._flops * tokens.numel()

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the class below does; where a rule gives weights or rows are chosen here, that loss."""
        online = None if self._run is None else self._run.online
        loss = None
        if online is not None:
            model, inputs, loss = online.own_loss(model, inputs)
        if self._looked_at is not self.model:  # to look costs more than all else of ours in a step
            self._looked_at, self._reads = self.model, find_reader(self.model) is not None
        if self._reads:
            inputs = with_prompt_lengths(self.model, inputs)
        if loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.compute_loss_func = loss  # the class below counts, scales and logs it
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = None

    def own_loss(self, inputs: Mapping[str, Any], items: Any = None, smoothed: bool = False) -> torch.Tensor:
        """
        Compute the loss that a plain step of this trainer would have; trials compare with it.

        Args:
            inputs (`Mapping`): a micro-batch as the model gets it.
            items (`torch.Tensor`, *optional*): Trainer's `num_items_in_batch`.
            smoothed (`bool`): with label smoothing, if the arguments ask for it; what ranks is never smoothed.
        """
        smoother, self.label_smoother = self.label_smoother, self.label_smoother if smoothed else None
        try:
            return self.compute_loss(self.model, dict(inputs), num_items_in_batch=items)
        finally:
            self.label_smoother = smoother

    def count_items(self, inputs: Mapping[str, Any]) -> Any:
        """Return Trainer's count of a micro-batch's items, of this process alone: trials may be its own affair."""
        across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            return self._get_num_items_in_batch([inputs], self.args.device)
        finally:
            self.args.average_tokens_across_devices = across

    def examples(self) -> tuple[dict, list[dict]] | None:
        """Return a few rows for trials, together and alone; `None` where they can be cut out of any batch."""
        return None if self._run is None else self._run.data.examples()

    def reading(self) -> Reading:
        """Return what has been found out of how losses are read off the model, in this `train()`."""
        if self._reading is None or self._reading.model is not self.model:
            self._reading = Reading(self.model)
        return self._reading

    _reading: Reading | None = None
    _looked_at: nn.Module | None = None  # the model of which is known
    _counted: nn.Module | None = None  # the model of whose operations a token is known
    _reads: bool = False  # whether it is a reader

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes: Trainer's own, or what an accelerator has put there."""
        return (self.computing or self.accelerator.autocast)()

    #: What an accelerator that is attached makes the model compute in; `None`: the precision of the arguments.
    computing: Callable[[], contextlib.AbstractContextManager] | None = None

    def losses_of_outputs(self, outputs: Any) -> torch.Tensor | None:
        """Return the losses of samples (float `[B]`) that a model's outputs hold already; `None`: they hold none."""
        return None

    # ---- The time budget ----

    def set_initial_training_values(self, args: Any, *others: Any, **named: Any) -> Any:
        """Find epochs and steps as the class below does; of more or fewer epochs, where a budget says so."""
        if self._run is not None and self._run.plan.more != 1:
            args = copy.copy(args)
            args.num_train_epochs = self._run.plan.trained_epochs
        return super().set_initial_training_values(args, *others, **named)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the scheduler of the class below; with a time budget it goes by progress, not by steps."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        pace = None if self._run is None else self._run.planner.pace
        if pace is not None:
            pace.schedule(scheduler, num_training_steps)
        return scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the class below does; during training, its time counts for no budget."""
        if self._run is None:
            return super().evaluate(*args, **kwargs)
        with self._run.clock.count("evaluation", wait=False):
            return super().evaluate(*args, **kwargs)

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


class DarelTrainer(DarelMixin, Trainer):
    """`transformers.Trainer` with DAREL, see [`DarelMixin`]."""


class DarelSeq2SeqTrainer(DarelMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with DAREL, see [`DarelMixin`]."""
