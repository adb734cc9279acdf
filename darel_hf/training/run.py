"""`Run`: one `train()` from plan to report; it makes the stages, in order, and does nothing that is theirs."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, set_seed

from ..budget import Plan
from ..data import select_rows
from ..files import require, write_json
from ..report import Report, describe, scoring_seconds, write_html
from ..scoring import is_sharded, preserve_rng_state
from ..selection import Scores, Selector
from . import checkpoints
from .clock import Clock
from .dataset import TrainingSet
from .finish import FinishEverywhere
from .offline import OfflineStage
from .online import OnlineStage
from .planner import Planner

logger = logging.getLogger(__name__)


class Run:
    """
    Conduct one `train()`: data set -> plan -> positions -> loader -> rows -> step -> report.

    Args:
        trainer (`DarelMixin`): the trainer.
        checkpoint (`str`, *optional*): folder of the checkpoint to go on from.
        trial: of a hyperparameter search, for `model_init`.

    Attributes:
        clock ([`Clock`]): owns the seconds.
        data ([`TrainingSet`]): the whole training set.
        planner ([`Planner`]): owns the plan, the accelerators and the time budget.
        offline ([`OfflineStage`]): owns what was kept of the data set.
        online ([`OnlineStage`], *optional*): owns whatever lives per micro-batch; from the end of `prepare` on.
    """

    def __init__(self, trainer: Any, checkpoint: str | None, trial: Any = None):
        self.trainer, self.args, self.config = trainer, trainer.args, trainer.darel
        self.checkpoint, self.trial = checkpoint, trial
        self.clock = Clock(self.args.device)
        self.stores = self.args.should_save and trainer.hp_search_backend is None  # report and the like, here
        self.environment = describe(self.args) if self.stores else {}
        self.folder = Path(self.args.output_dir) / checkpoints.FOLDER
        self.data = TrainingSet(trainer, resumes=checkpoint is not None)
        self.planner = Planner(trainer, self.data, self.clock)
        self.offline = OfflineStage(trainer, self.data, self.clock, self.folder)
        self.online: OnlineStage | None = None
        self.finish: FinishEverywhere | None = None
        if self.config.finish_epochs:
            begun = checkpoint is not None and checkpoints.is_lora(checkpoint, trainer.model)
            self.finish = FinishEverywhere(trainer, self.config.finish_epochs, begun)

    @property
    def plan(self) -> Plan:
        """What was decided."""
        return self.planner.plan

    @property
    def selector(self) -> Selector:
        """Rules and ledger."""
        return self.online.selector

    # -- before the loop --

    def prepare(self) -> None:
        """Check the data, decide the plan (or restore it), select offline, and hand Trainer what it trains on."""
        trainer, data = self.trainer, self.data
        self._ready_model()
        state = None if self.checkpoint is None else checkpoints.load(self.checkpoint)
        if state is None:
            self.planner.save_memory()
        else:
            self.planner.recompute.set(state["plan"].get("recomputes", False))
        self.planner.try_accelerators()
        with preserve_rng_state():
            set_seed(data.seed)  # data that are augmented at random have the same fingerprint again
            data.take_fingerprint()
            self.offline.load_reference()
            if state is None:
                self._decide()
            else:
                self._restore(state)
        trainer._train_batch_size = self.plan.batch_size
        visited = data.with_ids if self.online.in_loop else data.dataset
        if self.offline.positions is not None:
            visited = select_rows(visited, self.offline.positions)
        trainer.train_dataset = visited
        self.planner.warn_about_steps()
        self.planner.keep_budget(self.online.is_fresh)
        if self.stores:
            run = {"plan": self.plan.to_dict(), "config": self.config.to_dict(), "environment": self.environment}
            write_json(self.folder / f"run{self._suffix('run')}.json", run)

    def _ready_model(self) -> None:
        """Do to the model what Trainer does only when training starts: it is to be scored and measured as trained."""
        trainer, args = self.trainer, self.args
        if trainer.model_init is not None and self.checkpoint is None:
            set_seed(args.seed)  # as Trainer does before it makes the model anew
            trainer.model = trainer.call_model_init(self.trial)
        if self.finish is not None:
            self.finish.set(False)  # also after an earlier run
        # Under FSDP and DeepSpeed Trainer leaves the model where it is until it is sharded.
        waits = (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and not is_sharded(trainer.model)
        waits |= trainer.model_init is not None or args.fp16_full_eval or args.bf16_full_eval
        if waits and not trainer.is_model_parallel:  # else it is spread over devices already
            trainer.model.to(args.device)
        for name in ("activation", "gradient"):  # the second is the older name of the first
            enable = getattr(trainer.model, f"{name}_checkpointing_enable", None)
            if getattr(args, f"{name}_checkpointing", False) and enable is not None:
                given = dict(getattr(args, f"{name}_checkpointing_kwargs", None) or {})
                apart = {key: given.pop(key) for key in ("every_n_layers", "offload") if key in given}
                enable(**{f"{name}_checkpointing_kwargs": given or None}, **apart)
                break

    def _decide(self) -> None:
        """Go from the settings to a plan, and from scores to what is kept."""
        config, planner, offline, data = self.config, self.planner, self.offline, self.data
        if config.may_select("online"):
            _ = self.data.shared_keys  # raises for batches that rows cannot be cut out of
        scores = offline.load_scores()
        planner.draft(scores_free=scores is not None or not config.rule("offline").reads_losses)
        sorts = config.batch_by_length and not data.streams
        if config.has_budget and not data.waits:
            data.learn()
        measures = config.may_select("offline") or config.may_select("online") or bool(planner.accelerators)
        if measures and not data.streams:
            offline.make_scorer(needed=scores is None)
            planner.measure(offline.scorer, offline.scorer_seconds)
            looked_at = data.waits  # the plan rests on some items
            scores = self._scores(scores)
            if looked_at:
                data.learn()
                planner.count_padding()
                if scores is None:
                    planner.rule_out_pass()
                    scores = self._scores(scores)  # where the facts of all leave no other way
            planner.solve()
        if sorts and not config.has_budget:  # scoring has read every item already
            data.learn()
            planner.count_padding()
        if measures or sorts or data.streams or config.finds_exact:
            planner.announce()
        selector = self._selector()
        if self.plan.offline_keep < 1:
            offline.select(selector, scores)
        self._make_online(selector)

    def _scores(self, scores: Scores | None) -> Scores | None:
        """Return the scores that are there, or those of an offline pass, if the plan wants one."""
        if scores is not None or not self.planner.wants_offline():
            return scores
        scores = self.offline.score(self.planner.accelerators)
        spent = self.clock.seconds["offline"] - self.offline.scorer_seconds
        self.planner.count_offline(spent, self.offline.scores_reused)
        return scores

    def _restore(self, state: dict[str, Any]) -> None:
        """Take everything over from the checkpoint."""
        checkpoints.check_same(state, self.checkpoint, self.data.fingerprint, self.config)
        checkpoints.check_adapters(self.checkpoint, self.trainer.model, finishes=self.finish is not None)
        remedy = f"the checkpoint was made with {state['batch_size']}; resume with that"
        size = self.trainer._train_batch_size
        same = size == state["batch_size"] or self.args.auto_find_batch_size
        require(same, "per_device_train_batch_size", size, remedy)
        for part in (self.clock, self.data, self.planner, self.offline):
            part.load_state_dict(state)
        self._make_online(self._selector())
        self.online.load_state_dict(state)

    def _selector(self) -> Selector:
        return Selector(self.plan.settings(self.config), self.data.ids, self.data.seed, self.offline.reference)

    def _make_online(self, selector: Selector) -> None:
        data, positions = self.data, self.offline.positions
        make_sampler = None
        if data.lengths is not None:
            lengths = data.lengths if positions is None else data.lengths[positions]
            make_sampler = partial(data.by_length, lengths)
        elif data.prompts is not None:
            make_sampler = partial(data.by_prompt, data.prompts if positions is None else data.prompts[positions])
        self.online = OnlineStage(
            self.trainer,
            selector,
            self.clock,
            batch_size=self.plan.batch_size,
            streams=data.streams,
            offline_weights=self.offline.weights,
            accelerators=self.planner.accelerators,
            shared_keys=data.shared_keys if selector.config.online_keep < 1 else None,
            make_sampler=make_sampler,
        )

    # -- during the loop, and at its end --

    def callbacks(self) -> list[TrainerCallback]:
        """Return what takes part in Trainer's loop as its callbacks do."""
        return [callback for callback in (self.planner.pace, self.finish) if callback is not None]

    def logs(self) -> dict[str, float]:
        """Return the values to log, global over ranks."""
        share = scoring_seconds(self.clock.seconds) / max(self.clock.elapsed, 1e-9)
        return {"darel/scoring_share": share, **self.online.logs(self.plan.offline_keep)}

    def save(self, folder: str) -> None:
        """Write ledger and plan into a checkpoint; every rank returns only when the files are there."""
        self.online.merge()
        if self.args.should_save:
            sharded = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled
            state = {"config": self.config.to_dict(), "batch_size": self.args.train_batch_size}
            state["files"] = checkpoints.expected_files(self.args, sharded)
            for part in (self.clock, self.data, self.planner, self.offline, self.online):
                state |= part.state_dict()
            checkpoints.save(folder, state)
        self.trainer.accelerator.wait_for_everyone()

    def end(self) -> Report:
        """Make the report, and store it in the output folder."""
        online, offline, planner, state = self.online, self.offline, self.planner, self.trainer.state
        online.merge()
        ledger = online.selector.ledger
        kept = offline.kept(ledger)
        if online.in_loop:
            rows, times = online.total_trained, ledger.times_trained.astype(float)
        elif self.data.streams:  # of which nobody has counted the rows
            each = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            rows, times = state.global_step * each, ledger.times_trained.astype(float)
        else:  # nothing of ours is in the loop: every kept sample is trained on once an epoch, but for a dropped batch
            size, seen = (state.train_batch_size or 1) * self.args.world_size, state.epoch
            if self.args.dataloader_drop_last:
                seen *= kept.sum() // size * size / kept.sum()
            rows, times = round(kept.sum() * seen), kept * seen
        report = Report(
            plan=planner.plan,
            config=self.config,
            seconds={**self.clock.seconds, "total": self.clock.elapsed},
            full_seconds=planner.full_seconds,
            steps=state.global_step,
            rows_backpropagated=int(rows),
            times_trained=times,
            ledger=ledger,
            kept=kept,
            offline_losses=np.full(len(ledger), np.nan) if offline.losses is None else offline.losses,
            scores_reused=offline.scores_reused,
            decisions=(planner.decisions or [])[1:],
            in_use={a.facts.name: a.value for a in planner.accelerators},
            left_out={**planner.left_out, **online.given_up},
            step_time=planner.step_time,
        )
        if self.stores:
            suffix = self._suffix("report")
            report.write_samples(self.folder / f"samples{suffix}.parquet")
            write_json(self.folder / f"report{suffix}.json", {**report.to_dict(), "environment": self.environment})
            page = self.folder / f"report{suffix}.html"
            try:
                write_html(report, page, state.log_history, self.environment, self.data.text_of)
            except Exception as error:  # it shows samples as the user's data and tokenizer give them; training is done
                logger.warning("%s could not be written: %s", page, error)
        return report

    def _suffix(self, name: str) -> str:
        """Return what to add to a file's name: a second `train()` or a resumed run leaves the first file alone."""
        suffixes = ("", *(f"-{number}" for number in range(2, 10_000)))
        return next(suffix for suffix in suffixes if not (self.folder / f"{name}{suffix}.json").exists())

    def close(self) -> None:
        """Leave the model as a plain trainer would."""
        self.planner.close()
        if self.online is not None:
            self.online.close()
