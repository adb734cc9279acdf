"""What cannot work with DAREL, found when a trainer is made: one clear error each, before any compute."""

from __future__ import annotations

import logging
from typing import Any

from ..accelerators import ACCELERATORS
from ..adapters import find_reader
from ..config import ACCELERATOR_FACTS, DarelConfig
from ..data import is_stream, sample_ids
from ..files import require
from ..scoring import spread_before_training

logger = logging.getLogger(__name__)


def check_arguments(trainer: Any) -> None:
    """Refuse, before any compute, what cannot work with DAREL; warn of what will disappoint."""
    config, args = trainer.darel, trainer.args
    require(
        args.n_gpu <= 1,
        "n_gpu",
        args.n_gpu,
        "one process drives several GPUs (DataParallel); start one process a GPU with `accelerate launch`",
    )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = max(getattr(parallel, name, None) or 1, trainer.get_tp_size() if name == "tp_size" else 1)
        remedy = "its processes share rows, and samples are chosen by each process from its own; use data parallelism"
        require(size == 1, name, size, remedy)
    if is_stream(trainer.train_dataset):
        _check_stream(config, args)
    elif trainer.train_dataset is not None:
        sample_ids(trainer.train_dataset)  # raises for a data set without length, or an empty one
    if config.batch_by_length or config.of_a_prompt > 1:
        strategy = getattr(args, "train_sampling_strategy", "random")
        name = "batch_by_length" if config.batch_by_length else "share_prompts"
        remedy = f"{name} decides the order; leave it at 'random'"
        require(strategy == "random", "train_sampling_strategy", strategy, remedy)
    size, shared = args.train_batch_size, config.of_a_prompt
    require(shared <= max(size, 1), "share_prompts", shared, f"a batch has {size} rows; give at most so many, or 1")
    if config.may_select("online"):
        strategy = getattr(args, "train_sampling_strategy", None)
        remedy = "its loader has batches of its own size, so candidates cannot be chosen from; use another strategy"
        require(strategy != "batch_rebalance", "train_sampling_strategy", strategy, remedy)
        remedy = "a batch of candidates is made per process; set it to False"
        require(not args.accelerator_config.split_batches, "split_batches", True, remedy)
    for stage in filter(config.may_select, ("offline", "online")):
        rule = config.rule(stage)
        remedy = (
            "it needs to know which predictions are right, which per_sample_loss does not say; choose another rule"
        )
        known = "correct" not in rule.needs or trainer.per_sample_loss is None
        require(known, f"{stage}_rule", rule.name, remedy)
        remedy = "the rule looks at the embeddings of the whole training set; choose another for the online stage"
        require(stage == "offline" or "embeddings" not in rule.needs, f"{stage}_rule", rule.name, remedy)
        remedy = "the rule's weights cannot be honoured in a loss of your own; choose a rule without weights"
        honoured = not rule.weighs or trainer.compute_loss_func is None
        require(honoured, "compute_loss_func", trainer.compute_loss_func, remedy)
    if config.finish_epochs:
        _check_finish(trainer)
    spread = spread_before_training(args, trainer.is_fsdp_enabled)
    if spread is not None:
        scores = config.may_select("offline") and config.rule("offline").reads_losses
        scores = scores and config.scores is None and trainer.scorer is None
        remedy = (
            "before training not every process has whole weights to score with; give scores=, made by `darel score`"
        )
        require(not scores, *spread, remedy)
        for accelerator in () if is_stream(trainer.train_dataset) else config.accelerators:
            setting = ACCELERATOR_FACTS[accelerator].setting
            remedy = f"trying out {setting}={getattr(config, setting)!r} needs whole weights in every process before "
            remedy += f"training; leave out {setting}"
            require(ACCELERATORS[accelerator].falls_back, *spread, remedy)
    remedy = f"max_steps={args.max_steps} fixes the number of steps, and none can be added: give num_train_epochs"
    require(config.budget_spend == "time" or args.max_steps <= 0, "budget_spend", config.budget_spend, remedy)
    remedy = f"max_steps={args.max_steps} fixes the number of steps, and dropping samples then saves no time: give "
    remedy += "num_train_epochs in its place"
    require(config.budget_time is None or args.max_steps <= 0, "budget_time", config.budget_time, remedy)
    selects = config.online_keep < 1 or config.offline_keep < 1
    if args.max_steps > 0 and selects and not is_stream(trainer.train_dataset):
        logger.warning(
            "max_steps=%d fixes the number of steps, so selecting samples saves no time; num_train_epochs would",
            args.max_steps,
        )


def _check_finish(trainer: Any) -> None:
    """Refuse last epochs that there are not, or that would not be what is saved."""
    args, value = trainer.args, trainer.darel.finish_epochs
    remedy = "only a reader has something to finish; give the model a ReaderLoraConfig, or leave it out"
    require(find_reader(trainer.model) is not None, "finish_epochs", value, remedy)
    remedy = f"the run has {args.num_train_epochs:g} epochs; give fewer, or train a LoraConfig"
    require(args.max_steps > 0 or value < args.num_train_epochs, "finish_epochs", value, remedy)
    require(not is_stream(trainer.train_dataset), "finish_epochs", value, "a stream has no epochs; leave it out")
    remedy = "the best checkpoint may be of before, when adapters left prompts alone; set it to False"
    require(not args.load_best_model_at_end, "load_best_model_at_end", True, remedy)


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
    remedy = "train_dataset is a stream, whose prompts are not known before it is read; give 1"
    require(config.of_a_prompt == 1, "share_prompts", config.of_a_prompt, remedy)
    remedy = "the rows of a stream have no numbers; name a column with integer ids"
    named = config.id_column is not None
    require(named or (config.online_keep == 1 and not config.track), "id_column", None, remedy)
    several = named and args.world_size > 1 and args.accelerator_config.dispatch_batches is not False
    remedy = "each process reads its own part of a stream; give accelerator_config={'dispatch_batches': False}"
    require(not several, "dispatch_batches", args.accelerator_config.dispatch_batches, remedy)
