"""`Planner`: measure what training costs, solve the budget, say what will be done, and keep to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..accelerators import Accelerator, find_exact, in_order, make_accelerators, make_allowed
from ..adapters import adapts_prompts
from ..budget import (
    SHARE,
    Costs,
    KeepBudget,
    Plan,
    assumed_costs,
    batch_size_within,
    budget_plan,
    measure_costs,
    measure_memory,
    measure_slowdown,
    online_term,
    time_of_epochs,
)
from ..config import ACCELERATOR_FACTS
from ..files import require
from ..scoring import is_causal_lm, preserve_rng_state
from .clock import Clock
from .dataset import TrainingSet
from .recompute import Recomputation

logger = logging.getLogger(__name__)

PAYS = 0.98  # what `fast` finds must make a step take at most so much of what it took before
MUCH_PROMPT = 0.2  # of the positions: where prompts are less, the plan does not speak of readers
SMALLEST_SLOWDOWN = 0.9  # rows in smaller batches are not faster than this says; what was measured faster was noise


class Planner:
    """
    Decide the plan of one `train()`, once, before the loop.

    Args:
        trainer (`DarelMixin`): the trainer.
        data ([`TrainingSet`]): the whole training set.
        clock ([`Clock`]): of the run.

    Attributes:
        plan ([`Plan`]): what will be done; from [`Planner.draft`] on, or from a checkpoint.
        accelerators (`list[Accelerator]`): those that the settings ask for and the model takes.
        left_out (`dict[str, str]`): accelerators that do not pay or cannot be had: the reasons.
        pace ([`KeepBudget`], *optional*): what keeps a time budget during training.
        recompute ([`Recomputation`]): what saves memory with the same gradients.
    """

    def __init__(self, trainer: Any, data: TrainingSet, clock: Clock):
        self.trainer, self.args, self.config = trainer, trainer.args, trainer.darel
        self.data, self.clock = data, clock
        self.accelerators: list[Accelerator] = []
        self.left_out: dict[str, str] = {}
        self.pace: KeepBudget | None = None
        self._decisions: list[list[float]] | None = None  # of a run that goes on
        self._granted = 1.0
        self._no_pass = False
        self.recompute = Recomputation(trainer)
        self._full_memory: float | None = None  # bytes of a plain step, where that was measured

    def draft(self, scores_free: bool) -> None:
        """Begin with the plan of the settings; raise `ValueError` for fractions that whole rows cannot make."""
        self.plan = Plan.of(
            self.config,
            batch_size=self.trainer._train_batch_size,
            epochs=self._epochs(),
            samples=len(self.data),
            costs=assumed_costs(lora=hasattr(self.trainer.model, "peft_config")),
            scores_free=scores_free,
            fixed_steps=self.args.max_steps > 0,
        )
        self.plan.check()

    def _epochs(self) -> float:
        if self.args.max_steps <= 0:
            return self.args.num_train_epochs
        if self.data.streams:
            return 1.0
        rows = self.trainer._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return max(1.0, self.args.max_steps * rows / len(self.data))

    def save_memory(self) -> None:
        """Compute activations again, where a memory budget asks for less than a step takes and that makes it less."""
        if self.config.budget_memory in (None, 1) or self.config.budget_method != "measured":
            return
        if not self.recompute.possible():
            return
        dataset, collator = self.data.batching
        size = self.trainer._train_batch_size

        memory = partial(self._on_all, measure_memory, self.trainer, dataset, collator, size)
        with self.clock.count("probe"), preserve_rng_state():
            self._full_memory = memory()
            self.recompute.set(True)
            less = memory() < self._full_memory
        self.recompute.set(less)

    def try_accelerators(self) -> None:
        """Find out which accelerators this model takes, of those that are asked for or that `fast` looks for."""
        if self.config.accelerators or self.config.finds_exact:
            with self.clock.count("probe"):
                found = make_accelerators(self.trainer, self._few_rows, self._first_found)
                self.accelerators, self.left_out = found

    @property
    def _few_rows(self) -> Callable[[], Mapping[str, Any]] | None:
        """What makes a batch to try something out on; `None`: the data are a stream."""
        return None if self.data.streams else self.data.few_rows

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """Go on without some accelerators; say so aloud of those that were asked for by name."""
        for accelerator in [a for a in self.accelerators if a.facts.name in reasons]:
            accelerator.detach()
            self.accelerators.remove(accelerator)
            if accelerator.asked:
                logger.warning("%s", accelerator.told(reasons[accelerator.facts.name], "going on with"))
        self.left_out |= reasons

    def close(self) -> None:
        """Let accelerators leave the model as a plain trainer would."""
        for accelerator in self.accelerators:
            accelerator.detach()
        self.recompute.set(False)

    def _first_found(self, found: Any) -> Any:
        """Return the first of what the processes found that is not `None`, the same on all."""
        everyone = gather_object([found]) if self.args.world_size > 1 else [found]
        return next((one for one in everyone if one is not None), None)

    def measure(self, scorer: Any, scorer_seconds: float) -> None:
        """
        Choose the batch size that the memory budget allows, and measure what a step costs at that size.

        Args:
            scorer (`nn.Module`, *optional*): what scores in the offline pass in place of the model.
            scorer_seconds (`float`): what making it has cost.
        """
        trainer, config, full_size = self.trainer, self.config, self.plan.batch_size
        # Where nothing is decided by it, what the offline pass costs is known when it is over.
        offline = config.has_budget and not self.plan.scores_free
        dataset, collator = self.data.batching
        scores_online = config.rule("online").reads_losses
        candidates = 0.0  # relative to the rows that are trained on; none are scored
        if config.may_select("online") and scores_online:
            candidates = 3 if self.plan.online_keep == 1 else self.plan.candidate_rows / full_size
        with self.clock.count("probe"):
            if config.budget_memory is not None:
                memory = partial(self._on_all, measure_memory, trainer, dataset, collator)
                size = batch_size_within(memory, full_size, config.budget_memory, self._full_memory)
                self.plan = replace(self.plan, batch_size=size, recomputes=self.recompute.on)
            self.count_padding()
            size, total = self.plan.batch_size, self._micro_batches()
            rows, share = round(candidates * size), SHARE if config.has_budget else SHARE / 2
            visited = self._visited()
            again = partial(measure_costs, trainer, dataset, collator, size, 0, share * total, offline=False)
            again = partial(again, visited=visited)
            costs = measure_costs(
                trainer,
                dataset,
                collator,
                size,
                rows,
                share * total,
                offline=offline,
                offline_scorer=scorer,
                accelerators=self.accelerators,
                visited=visited,
            )
            costs = self._from_main(costs)  # it may fail on some processes only
            if costs is not None:
                costs = self._keep_what_pays(costs, again)
                costs = replace(costs, padding=self.plan.costs.padding, first_epoch=self._first_epoch())
                self.plan = replace(self.plan, costs=costs)
                if size != full_size or self.recompute.on:
                    plain, most = self.recompute.plain, SHARE * total
                    slowdown = measure_slowdown(trainer, dataset, collator, full_size, size, most, plain)
                    self.plan = replace(self.plan, slowdown=max(self._from_main(slowdown), SMALLEST_SLOWDOWN))
            if not scores_online:
                self._set_costs(forward_share=0.0)
            self._set_costs(one_forward=any(accelerator.chooses for accelerator in self.accelerators))
        self._count_overhead(scorer_seconds)
        if config.budget_allows:
            self._allow(again, scorer_seconds)

    def _visited(self) -> np.ndarray | None:
        """Return samples in such an order as the run trains on them, int64 `[k]`; `None`: drawn at random."""
        prompts = None if self.data.waits else self.data.prompts  # the pass will read all items
        if prompts is None:
            return None
        rows, size = self.plan.candidate_rows, self.plan.batch_size
        order = np.array(list(self.data.by_prompt(prompts, rows)), np.int64)
        candidates = order[: len(order) // rows * rows].reshape(-1, rows)
        if rows == size or not len(candidates):
            return order
        return np.random.default_rng(0).permuted(candidates, axis=1)[:, :size].ravel()  # as rules that draw choose

    def _keep_what_pays(self, costs: Costs, measure: Callable[..., Costs | None]) -> Costs:
        """
        Leave out accelerators with which steps are no cheaper; those that these had excluded are tried in their place.

        Args:
            costs ([`Costs`]): as measured with the accelerators that are there.
            measure (`Callable`): measures what a step costs with `accelerators`.

        Returns:
            the costs with those that stay.
        """
        while True:
            most = {a.facts.name: a.most if a.asked else PAYS for a in self.accelerators}
            slow = {name: factor for name, factor in costs.factors.items() if factor > most.get(name, math.inf)}
            for accelerator in [a for a in self.accelerators if a.own_plain and a.facts.name in slow]:
                name, others = accelerator.facts.name, [a for a in self.accelerators if a is not accelerator]
                without = self._from_main(measure(accelerators=others))
                if without is not None:
                    slow[name] = costs.accelerated_seconds / without.accelerated_seconds
                if without is None or slow[name] <= most[name]:  # more than plain training, less than without it
                    del slow[name]
                else:
                    costs = costs.beside(without)
            self._leave_out({name: f"a step takes {factor:.2f} of one without it" for name, factor in slow.items()})
            more = bool(slow) and self._find_more()
            there = {accelerator.facts.setting for accelerator in self.accelerators}
            beside = {a.facts.name: a.facts.beside for a in self.accelerators if a.facts.beside}
            alone = {name: others for name, others in beside.items() if not there & set(others)}
            self._leave_out({name: f"it goes beside {' or '.join(others)}" for name, others in alone.items()})
            if not more:
                there = [accelerator.facts.name for accelerator in self.accelerators]
                stay = {name: factor for name, factor in costs.factors.items() if name in there}
                return replace(costs, factors=stay)
            found = self._from_main(measure(accelerators=self.accelerators))
            if found is None:
                new = [a.facts.name for a in self.accelerators if not a.asked and a.facts.name not in costs.factors]
                self._leave_out(dict.fromkeys(new, "what a step with it takes could not be measured"))
            else:
                costs = replace(costs, factors=found.factors)

    def _find_more(self) -> bool:
        """Return whether there is more that is exact, now that something was left out; take it."""
        if not self.config.finds_exact:
            return False
        before, found = len(self.accelerators), self._first_found
        self.left_out |= find_exact(self.trainer, self.accelerators, self.left_out, self._few_rows, found)
        self.accelerators = in_order(self.accelerators)
        return len(self.accelerators) > before

    def _count_overhead(self, scorer_seconds: float) -> None:
        if self.plan.costs.measured:
            spent = self.clock.seconds["probe"] + scorer_seconds
            self.plan = replace(self.plan, overhead=self._from_main(spent / self.full_seconds))

    def _allow(self, measure: Callable[..., Costs | None], scorer_seconds: float) -> None:
        """
        Take accelerators that are not exact, as far as the budget allows and needs them, the mildest settings first.

        Args:
            measure (`Callable`): measures what a step costs with `accelerators`.
            scorer_seconds (`float`): what making a scorer has cost.
        """
        for name in self.config.budget_allows:
            without = list(self.accelerators)
            for value in ACCELERATOR_FACTS[name].mildest_first:
                met = self.plan.everything.predicted_time <= self.config.budget_time
                if met or self.plan.too_short(self.config.budget_time):  # then nothing is done for it
                    return
                with self.clock.count("probe"):
                    reason = self._try_allowed(name, value, without, measure)
                if reason is not None:
                    self.left_out[f"{ACCELERATOR_FACTS[name].setting}={value!r}"] = reason
                self._count_overhead(scorer_seconds)

    def _try_allowed(self, name: str, value: Any, without: list[Accelerator], measure: Any) -> str | None:
        """Take an accelerator beside others, if it makes steps cheaper than they are; else return why not."""
        if not self.plan.costs.measured:
            return "what a step costs is not known"
        accelerator, reason = make_allowed(self.trainer, name, value, without, self.data.few_rows, self._first_found)
        if accelerator is None:
            return reason
        together = in_order([*without, accelerator])
        costs = self._from_main(measure(accelerators=together))
        before = self.plan.costs.accelerated
        if costs is None or costs.accelerated > PAYS * before:
            accelerator.detach()
            timed = costs and f"steps take {costs.accelerated:.2f} of plain ones, {before:.2f} without it"
            return timed or "what steps with it take could not be measured"
        for milder in [a for a in self.accelerators if a not in together]:
            milder.detach()
        self.accelerators = together
        self._set_costs(factors=costs.factors, first_epoch=self._first_epoch())
        return None

    def _first_epoch(self) -> float:
        """Return what a step of the first epoch takes relative to later ones, the same on all processes."""
        return self._from_main(math.prod(accelerator.first_epoch for accelerator in self.accelerators))

    def _set_costs(self, **costs: Any) -> None:
        self.plan = replace(self.plan, costs=replace(self.plan.costs, **costs))

    def count_padding(self) -> None:
        """Count what batches of similar length, if they are asked for, save of the positions of plain batches."""
        known = self.data.known_lengths()
        if known is None:
            return
        positions, lengths = known
        dataset, collator = self.data.batching
        shortest = collator([dataset[int(positions[lengths.argmin()])]])["input_ids"]
        widths = np.maximum(lengths, np.shape(shortest)[-1])  # where the collator always pads to as many
        widths = np.resize(widths, len(self.data))  # those of some stand for all
        candidates = self.plan.candidate_rows
        padding = self.data.by_length(widths, candidates).positions(candidates, self.plan.batch_size)
        self._set_costs(padding=min(padding, 1.0))

    def _on_all(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what may wait for other processes on all of them; return or raise what the main one finds."""
        error, value = None, None
        try:
            value = function(*args)
        except Exception as found:  # whatever it is, the other processes wait
            error = found

        def tell() -> Any:
            if error is not None:
                raise error
            return value

        return self.trainer.on_main(tell)

    def _from_main(self, value: Any) -> Any:
        return self.trainer.on_main(lambda: value)

    def wants_offline(self) -> bool:
        """Whether there is to be an offline pass."""
        if not self.config.rule("offline").reads_losses:
            return False
        return (self._within_budget() if self.config.has_budget else self.plan).offline_keep < 1

    def rule_out_pass(self) -> None:
        """Do without an offline pass, if that can be: all items have been read for nothing but their facts."""
        self._no_pass = True

    def count_offline(self, seconds: float, reused: bool) -> None:
        """Replace the estimated cost of the offline pass by what it has cost; `reused`: nothing."""
        if reused:
            self.plan = replace(self.plan, scores_free=True)
        elif self.plan.costs.measured:
            steps = len(self.data) / (self.plan.batch_size * self.args.world_size)
            share = self._from_main(seconds / (steps * self.plan.costs.step_seconds))
            self._set_costs(offline_share=share, first_epoch=self._first_epoch())
            self.plan = replace(self.plan, passed=True)

    def solve(self) -> None:
        """Choose the fractions that meet the budget, if there is one."""
        if self.config.has_budget:
            self.plan = self._within_budget()

    def _within_budget(self) -> Plan:
        groups, offline = self.data.count_groups(), not self._no_pass
        return self.trainer.on_main(budget_plan, self.plan, self.config, groups, offline)

    def announce(self) -> None:
        """Print the plan; warn where it saves nothing."""
        used = {a.facts.name: a.value for a in self.accelerators if not a.asked}
        found = {"left_out": dict(self.left_out), "used": used, "prompt_share": self._prompt_share()}
        self.plan = replace(self.plan, **found)
        plan, asked = self.plan, self.config.budget_time
        # A memory budget is not about time, and that max_steps fixes it is said when the trainer is made.
        about_time = not plan.fixed_steps and (asked is not None or self.config.budget_memory is None)
        about_time &= plan.more <= 1
        self.trainer.accelerator.print(plan)
        if asked is not None and plan.kept == 1 and plan.predicted_time > asked and plan.too_short(asked):
            logger.warning(
                "budget_time=%g: measuring has taken %.2f of plain training already, so short is this run; it trains "
                "on everything",
                asked,
                plan.overhead,
            )
        elif plan.predicted_saving <= 0 and about_time and (plan.kept < 1 or self.accelerators):
            scored = plan.offline_keep < 1 and not plan.scores_free
            scored |= plan.online_keep < 1 and plan.costs.forward_share > 0
            if replace(plan, overhead=0.0).predicted_saving > 0:
                why = f"trying out and measuring take {plan.overhead:.2f} of it in a run this short; train plainly"
            elif scored:
                again = plan.online_keep < 1 and plan.costs.forward_share > 0 and plan.epochs > plan.rescore_every
                why = "scoring costs more than the dropped rows save; "
                why += "raise rescore_every" if again else "keep fewer"
            elif plan.kept == 1:
                why = f"steps are no cheaper with {self.accelerators[0].facts.setting}; leave it out"
            else:
                why = "loading all candidates costs more than the dropped rows save; select offline instead"
            logger.warning(
                "no saving is predicted: the run is expected to take %.2f of the plain training time, because %s",
                plan.predicted_time,
                why,
            )

    def _prompt_share(self) -> float | None:
        """Return which part of the positions is prompt, where a reader would save much; else `None`."""
        model = self.trainer.model
        if self.plan.budget_time is None or not adapts_prompts(model) or not is_causal_lm(model):
            return None
        share = self.trainer.on_main(self.data.prompt_share)
        return None if share is None or share < MUCH_PROMPT else share

    def warn_about_steps(self) -> None:
        """Warn of numbers of steps in the arguments that were made for the full run."""
        if self.data.streams:
            return
        rows = self.plan.candidate_rows * self.args.gradient_accumulation_steps * self.args.world_size
        steps = math.ceil(math.ceil(self.plan.kept_samples / rows) * self.args.num_train_epochs * self.plan.more)
        if self.args.max_steps > 0:
            steps = self.args.max_steps
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        full_steps = math.ceil(math.ceil(len(self.data) / rows) * self.args.num_train_epochs)
        if self.trainer.ready_made_scheduler and (steps < full_steps or self.plan.more > 1):
            logger.warning(
                "the scheduler in optimizers= was made before it was known that this run has about %d steps, not %d, "
                "and may not end with it; give the optimizer alone, and lr_scheduler_type",
                steps,
                full_steps,
            )
        for name in ("warmup_steps", "eval_steps", "save_steps"):
            value = getattr(self.args, name, None)
            used = name == "warmup_steps" or getattr(self.args, name.replace("_steps", "_strategy")) == "steps"
            # What the full run would not have reached either is no matter of the selection (500 is a default).
            limit, reached = (0.1 * steps, True) if name == "warmup_steps" else (steps, (value or 0) <= full_steps)
            if used and value is not None and value >= 1 and value > limit and reached and steps < full_steps:
                logger.warning(
                    "%s=%g was made for the full run; this one has about %d steps. Give a fraction below 1 instead, "
                    "of all steps",
                    name,
                    value,
                    steps,
                )

    # -- keeping to it --

    def keep_budget(self, is_fresh: Callable[[int], bool]) -> None:
        """
        Watch the time budget during training, where it was solved for costs that were measured.

        Args:
            is_fresh (`Callable`): whether candidates are scored in a step.
        """
        plan, config = self.plan, self.config
        if config.budget_time is None or plan.method != "measured" or not plan.costs.measured or plan.fixed_steps:
            return
        if plan.kept == 1 and plan.too_short(config.budget_time):  # it has been said that all is trained on
            return
        # Of a step relative to a plain one: what it takes without scoring, and what scoring adds to that.
        base = plan.step_time * plan.effective_online_keep
        scoring = online_term(plan.effective_online_keep, 1, 1, plan.costs) / base - 1
        step = plan.costs.step_seconds * self.args.gradient_accumulation_steps * plan.step_time
        # The first epoch may cost more than others, which a clock that looks at its steps must know.
        first, epochs = plan.costs.first_epoch, max(plan.trained_epochs, 1.0)
        mean = (first + epochs - 1) / epochs
        step *= time_of_epochs(plan.more, plan.epochs, first) / plan.more  # a mean of the steps that are trained

        def step_cost(step: int) -> float:
            training = (first if step < self.pace.progress.planned / epochs else 1.0) / mean
            return training + (scoring and scoring * is_fresh(step))

        self._row_seconds = step / plan.batch_size
        seconds = self.clock.seconds
        self.pace = KeepBudget(
            seconds=max(config.budget_time, plan.predicted_time) * self.full_seconds,
            elapsed=lambda: self.clock.elapsed - seconds["evaluation"],
            step_cost=step_cost,
            step_seconds=step,
            scoring=None if plan.costs.one_forward else lambda: seconds["scoring"],
            decide=self.trainer.on_main,
            decisions=self._decisions,
            granted=self._granted,
            share=config.budget_time,
        )

    def follow_batch_size(self, batch_size: int) -> None:
        """Learn that Trainer tries again with smaller batches, whose steps are shorter, or has made the model anew."""
        plan = self.plan
        self.recompute.set(self.recompute.on)
        if self.pace is not None:
            self.pace.step_seconds = self._row_seconds * batch_size
        if self.args.auto_find_batch_size and batch_size != plan.batch_size:
            step = plan.costs.step_seconds * batch_size / plan.batch_size
            self.plan = replace(plan, batch_size=batch_size, costs=replace(plan.costs, step_seconds=step))

    @property
    def decisions(self) -> list[list[float]] | None:
        """What keeping the budget has decided, the plan itself first; `None` where nothing is watched."""
        return self.pace.progress.decisions if self.pace and self.pace.progress else None

    @property
    def full_seconds(self) -> float:
        """Estimate of plain training's seconds from the measured step; NaN if nothing was measured."""
        if self.data.streams:
            return math.nan
        return self.plan.costs.step_seconds / self.plan.slowdown * self._micro_batches()

    @property
    def step_time(self) -> float:
        """What steps have taken in the loop, relative to a plain one as it was measured; NaN if not known."""
        if self.plan.costs.one_forward:  # scoring is part of the step
            return math.nan
        step = self.plan.costs.step_seconds * self.args.gradient_accumulation_steps
        return self.clock.usual_step / step

    def _micro_batches(self) -> float:
        """Micro-batches of plain training at the planned batch size, per process."""
        return len(self.data) / (self.plan.batch_size * self.args.world_size) * self.plan.epochs

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must remember."""
        granted = self.pace.granted if self.pace else 1.0
        return {"plan": self.plan.to_dict(), "decisions": self.decisions, "granted": granted}

    def _take_over(self) -> None:
        """Have those accelerators, of what no setting asks for, that the plan of a checkpoint has."""
        used = self.plan.used
        if used is None:  # of before a budget looked for any
            used = {a.facts.name: a.value for a in self.accelerators if self.config.fast}
        with self.clock.count("probe"):
            self._find_more()  # it may have come in the place of something that is left out
        for accelerator in [a for a in self.accelerators if not a.asked and a.facts.name not in used]:
            accelerator.detach()
            self.accelerators.remove(accelerator)
        for name in self.config.budget_allows or ():
            if name not in used:
                continue
            value, few_rows = used[name], self.data.few_rows
            with self.clock.count("probe"):
                found, reason = make_allowed(self.trainer, name, value, self.accelerators, few_rows, self._first_found)
            remedy = f"the checkpoint was made with {name}, which cannot be had here: {reason}"
            require(found is not None, ACCELERATOR_FACTS[name].setting, value, remedy)
            self.accelerators = in_order([*self.accelerators, found])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what [`Planner.state_dict`] returned: nothing is measured again."""
        self.plan = Plan.from_dict(state["plan"])
        self._leave_out(self.plan.left_out)
        self._take_over()
        epochs = self._epochs()
        if epochs != self.plan.epochs:
            logger.warning(
                "the checkpoint was planned for %g epochs, this run is for %g: what was chosen stays, a time budget "
                "is that fraction of the new length",
                self.plan.epochs,
                epochs,
            )
            self.plan = replace(self.plan, epochs=epochs)
        self._decisions, self._granted = state.get("decisions"), state.get("granted", 1.0)
