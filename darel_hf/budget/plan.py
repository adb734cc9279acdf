"""The cost model, the budget equations, and the plan that is shown before training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import ACCELERATOR_FACTS, AcceleratorFacts, DarelConfig
from ..files import require
from ..selection import candidate_rows

#: The paper's floor for both fractions (equation 2), and its usual offline fraction (equation 3).
SMALLEST_KEEP = 0.1
USUAL_OFFLINE_KEEP = 0.8
#: Scoring is made less frequent until it takes no more than this of the online stage, in `budget_method="measured"`.
LARGEST_SCORING_SHARE = 0.25
#: Of the budget, at most so much of what measuring and making a scorer have cost is made up for.
LARGEST_OVERHEAD = 0.25
#: Plans that keep less by this fraction of the rows count as keeping as much: costs are known no better.
NO_LESS = 0.01
#: Training ends before its last epoch where whole rows would leave more than this of what a budget pays for.
LEFT_BY_WHOLE_ROWS = 0.05


@dataclass(frozen=True)
class Costs:
    """
    What the parts of training cost.

    Attributes:
        step_seconds (`float`): one plain training step on a batch, loading and optimizer included (the paper's t_b);
            seconds.
        forward_share (`float`): scoring a row without gradients, relative to a training step on it (f).
        offline_share (`float`): scoring a row in the offline pass, relative to a training step on it (c * f).
        measured (`bool`): whether these were measured here, or are textbook values.
        data_share (`float`): loading a row, relative to a training step on it (d), where the loop waits for it: all
            candidates are loaded, also those that are not trained on.
        one_forward (`bool`): whether the forward pass that scores is also the one that trains
            (`online_backward="sliced"`): then only that of the dropped rows is extra.
        padding (`float`): positions of a row in batches of similar length, relative to those of plain batches (p;
            `batch_by_length`): what training on a row and scoring it costs is taken to go with them, loading not.
        factors (`dict`): by accelerator, in the order in which they act: a training step with it and those before it,
            relative to one with those before it alone, loading left out of both. Candidates are scored without any.
        first_epoch (`float`): a training step of the first epoch relative to those of later ones: what accelerators
            store they make there. `factors` are of the mean step of all epochs.
    """

    step_seconds: float
    forward_share: float
    offline_share: float
    measured: bool = True
    data_share: float = 0.0
    one_forward: bool = False
    padding: float = 1.0
    factors: dict[str, float] = field(default_factory=dict)
    first_epoch: float = 1.0

    @property
    def accelerated(self) -> float:
        """A training step with all accelerators relative to a plain one, loading left out of both (q; 1: none)."""
        return math.prod(self.factors.values())

    @property
    def accelerated_seconds(self) -> float:
        """Such a step, loading left out, in seconds."""
        return self.step_seconds * (1 - self.data_share) * self.accelerated

    def beside(self, other: Costs) -> Costs:
        """Return the steps of other costs, with which shares of a step that only these know are the same seconds."""
        factor = self.step_seconds / other.step_seconds
        shares = {"forward_share": self.forward_share * factor, "offline_share": self.offline_share * factor}
        return replace(other, **shares, one_forward=self.one_forward, padding=self.padding)

    @property
    def padding_free(self) -> float:
        """q again, by the name that it had while there was one accelerator."""
        return self.accelerated


def assumed_costs(lora: bool) -> Costs:
    """Return textbook shares: a forward is half of a LoRA step, and a third of a full fine-tuning step."""
    share = 0.5 if lora else 1 / 3
    return Costs(step_seconds=math.nan, forward_share=share, offline_share=share, measured=False)


@dataclass(frozen=True)
class Plan:
    """
    What will be done, decided once, before training.

    Attributes:
        offline_keep (`float`): fraction of the training set that is kept (alpha).
        online_keep (`float`): fraction of each candidate batch that is trained on (A).
        rescore_every (`int`): epochs from one fresh scoring to the next (eta).
        batch_size (`int`): rows of a micro-batch that is trained on, per process (b).
        epochs (`float`): passes over the kept samples.
        samples (`int`): training samples before selection.
        scores_free (`bool`): whether the offline scores cost nothing (saved ones, or no offline stage).
        fixed_steps (`bool`): whether `max_steps` fixes the number of steps.
        slowdown (`float`): time of all rows in batches of `batch_size`, relative to the batch size that the user gave
            (T_new / T; above 1 where a memory budget made batches smaller, or has activations computed again).
        overhead (`float`): time already spent on measuring, relative to plain training.
        method (`str`): `"settings"` (the user's fractions), `"measured"` or `"paper"` (a budget).
        costs ([`Costs`]): what the prediction rests on.
        left_out (`dict[str, str]`): accelerators that do not pay or cannot be had: the reasons.
        of_a_prompt (`int`): samples of the same prompt in a batch, at most, where the order sees to that; else 1.
        used (`dict`, *optional*): accelerators in use that no setting asks for, and the values of their settings;
            `None`: of a checkpoint that does not say.
        budget_time (`float`, *optional*): the time budget that was solved for what was measured.
        more (`float`): epochs that are trained, relative to `epochs` (above 1 where a budget is spent on more, below 1
            where it pays for a part of the last one).
        passed (`bool`): whether the offline pass has been made: what it has cost is spent, whatever is kept.
        prompt_share (`float`, *optional*): the part of the positions that is prompt, in some samples, where adapters
            train on prompts, too; `None`: not counted.
        recomputes (`bool`): whether a memory budget has activations computed again in the backward pass.
    """

    offline_keep: float
    online_keep: float
    rescore_every: int
    batch_size: int
    epochs: float
    samples: int
    costs: Costs
    scores_free: bool = False
    fixed_steps: bool = False
    slowdown: float = 1.0
    overhead: float = 0.0
    method: str = "settings"
    of_a_prompt: int = 1
    left_out: dict[str, str] = field(default_factory=dict)
    used: dict[str, Any] | None = None
    budget_time: float | None = None
    more: float = 1.0
    prompt_share: float | None = None
    recomputes: bool = False
    passed: bool = False

    @classmethod
    def of(cls, config: DarelConfig, **others: Any) -> Plan:
        """Return the plan of the fractions that settings give; `others`: its other attributes."""
        settings = config.offline_keep, config.online_keep, config.rescore_every
        budget = config.budget_time if config.solves_time else None
        return cls(*settings, of_a_prompt=config.of_a_prompt, budget_time=budget, **others)

    @property
    def candidate_rows(self) -> int:
        """Rows that the loader hands out for one micro-batch (c = round(b / A))."""
        return candidate_rows(self.batch_size, self.online_keep)

    @property
    def effective_online_keep(self) -> float:
        """A as whole rows make it: b / c."""
        return self.batch_size / self.candidate_rows

    @property
    def kept_samples(self) -> int:
        """Samples that the offline stage keeps."""
        return max(1, round(self.offline_keep * self.samples))

    @property
    def predicted_time(self) -> float:
        """Time of the run, scoring counted, relative to plain training (for `max_steps`, to as many plain steps)."""
        online = online_term(self.effective_online_keep, self.rescore_every, self.epochs, self.costs)
        offline = self._offline_time
        if self.fixed_steps:
            return self.overhead + self.slowdown * (offline + online / self.effective_online_keep)
        scoring = scoring_of(self.effective_online_keep, self.rescore_every, self.epochs, self.costs)
        training = (online - scoring) * time_of_epochs(self.more, self.epochs, self.costs.first_epoch)
        return self.overhead + self.slowdown * (offline + self.offline_keep * (scoring + training))

    @property
    def _offline_time(self) -> float:
        """Time of the offline pass, if there is one, relative to plain training."""
        there = (self.passed or self.offline_keep < 1) and not self.scores_free
        return self.costs.offline_share / self.epochs if there else 0.0

    @property
    def spent(self) -> float:
        """What is spent whatever is planned, on measuring and on an offline pass that has been made, likewise."""
        return self.overhead + (self.slowdown * self._offline_time if self.passed else 0.0)

    @property
    def step_time(self) -> float:
        """Time of a step in the loop, scoring left out, relative to a plain one."""
        online = self.effective_online_keep
        return online_term(online, 1, 1, replace(self.costs, forward_share=0.0)) / online

    @property
    def predicted_saving(self) -> float:
        """1 - `predicted_time`."""
        return 1 - self.predicted_time

    @property
    def everything(self) -> Plan:
        """The plan with the same costs that drops nothing and adds nothing."""
        return replace(self, offline_keep=1.0, online_keep=1.0, rescore_every=1, more=1.0)

    @property
    def trained_epochs(self) -> float:
        """Epochs that are trained."""
        return self.epochs * self.more

    @property
    def plain_epochs(self) -> float:
        """Epochs of plain training, without accelerators and measuring, that take as long."""
        return self.epochs * self.predicted_time

    @property
    def fewer_epochs(self) -> float:
        """Epochs of everything, with the same accelerators and as much measuring, that take as long."""
        return self.epochs * (self.predicted_time - self.spent) / (self.everything.predicted_time - self.spent)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a plain dict, for JSON (which has no NaN)."""
        values = asdict(self)
        if math.isnan(values["costs"]["step_seconds"]):
            values["costs"]["step_seconds"] = None
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Restore what [`Plan.to_dict`] returned."""
        costs = {name: math.nan if value is None else value for name, value in values["costs"].items()}
        factor = costs.pop("padding_free", 1.0)  # of a checkpoint from before each accelerator had its own
        costs.setdefault("factors", {} if factor == 1.0 else {"padding_free": factor})
        return cls(**{**values, "costs": Costs(**costs)})

    @property
    def kept(self) -> float:
        """Fraction of the rows of plain training that get a backward pass: alpha A, or less if it ends earlier."""
        return self.offline_keep * self.effective_online_keep * min(self.more, 1.0)

    @property
    def selects(self) -> bool:
        """Whether samples are dropped; not by ending earlier alone."""
        return self.offline_keep * self.effective_online_keep < 1

    def too_short(self, budget_time: float) -> bool:
        """Whether measuring alone has taken so much that no plan keeps the budget: then nothing is dropped for it."""
        smallest = min(smallest_budget(self.costs, self.epochs, self.scores_free))
        return self.costs.measured and budget_time - self.overhead < self.slowdown * smallest

    def settings(self, config: DarelConfig) -> DarelConfig:
        """Return settings with the fractions that were decided, and no budget."""
        return replace(
            config,
            budget_time=None,
            budget_memory=None,
            budget_allows=None,
            budget_spend="time",
            offline_keep=self.offline_keep,
            online_keep=self.online_keep,
            rescore_every=self.rescore_every,
        )

    def check(self) -> None:
        """Raise `ValueError` if the fraction of a batch cannot be had with whole rows."""
        size = self.batch_size
        remedy = f"of a batch of {size} it keeps {size} of {self.candidate_rows} candidates, all of them; "
        remedy += f"give at most {size / (size + 0.5):.3f}"
        require(self.online_keep == 1 or self.candidate_rows > size, "online_keep", self.online_keep, remedy)

    def __str__(self) -> str:
        kept = f": {self.kept_samples:,} of {self.samples:,} samples" if self.samples else ""
        costs, every = [], ""
        if self.online_keep < 1 and self.costs.forward_share:
            costs.append(f"forward {self.costs.forward_share:.2f} of a step")
            every = f", scored every {self.rescore_every} epoch(s)"
        if self._offline_time:
            costs.append(f"offline pass {self.costs.offline_share:.2f} of an epoch")
        batches = []
        if self.costs.padding != 1:
            batches.append(f"  batches   of similar length: {self.costs.padding:.2f} of the positions")
        if self.of_a_prompt > 1:
            batches.append(f"  batches   up to {self.of_a_prompt} samples of a prompt: no longer drawn independently")
        of = "a plain one"
        for name, factor in self.costs.factors.items():
            facts = ACCELERATOR_FACTS.get(name)
            said = name if facts is None else f"{facts.phrase} ({facts.exactness}{self._value_of(facts)})"
            batches.append(f"  batches   {said}: a step takes {factor:.2f} of {of}")
            of = "that"
        if len(self.costs.factors) > 1:
            each = ", ".join(f"{name} {factor:.2f}" for name, factor in self.costs.factors.items())
            batches.append(f"  together  {each}: a step takes {math.prod(self.costs.factors.values()):.2f}")
        if self.recomputes:
            batches.append("  memory    activations are computed again in the backward pass (exact)")
        alike: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            alike.setdefault(reason, []).append(name)
        batches += [f"  left out  {', '.join(names)}: {reason}" for reason, names in alike.items()]
        source = "measured" if self.costs.measured else "assumed"
        lines = [
            f"DAREL plan ({self.method})",
            *batches,
            f"  offline   keep {self.offline_keep:.3f}{kept}",
            f"  online    keep {self.online_keep:.3f}: {self.batch_size} of {self.candidate_rows} candidates a batch"
            + every,
            *([f"  epochs    {self.trained_epochs:.2f} of {self.epochs:g}, planned so"] if self.more < 1 else ()),
            f"  costs     {', '.join(costs) or 'nothing is scored'} ({source})",
            f"  predicted {self.predicted_time:.2f} of the plain training time, scoring included",
            *(self._of_the_budget() if self.budget_time is not None else ()),
        ]
        return "\n".join(lines)

    def _value_of(self, facts: AcceleratorFacts) -> str:
        """Return what of a choice that can cost quality was chosen by us."""
        chosen = facts.exactness != "exact" and facts.name in (self.used or {})
        return f", {facts.setting}={self.used[facts.name]!r}" if chosen else ""

    def _of_the_budget(self) -> list[str]:
        """Return what the budget is spent on, and the controls of the same cost."""
        whole, budget = self.everything.predicted_time, f"{self.budget_time:g}"
        exact = [name for name, facts in ACCELERATOR_FACTS.items() if facts.exactness == "exact"]
        others = [name for name in self.costs.factors if name not in exact]
        using = "exact accelerators alone" if self.costs.factors else "the whole training set"
        using = f"exact accelerators and {', '.join(others)}" if others else using
        same, of = "  control   the same cost:", f", of {self.epochs:g}"
        if self.kept < 1:
            much = f"{whole:.2f} with {using}" if self.costs.factors else f"{whole:.2f}"
            lines = [f"  budget    {budget}: everything takes {much}; "]
            lines[0] += "some is dropped" if self.selects else "training ends earlier, nothing is dropped"
            if self.selects:
                lines.append(f"{same} {self.fewer_epochs:.2f} epochs of everything{of}")
        elif whole <= self.budget_time:
            lines = [f"  budget    {budget} is met by {using}: nothing is dropped"]
        else:
            said = f"everything takes {whole:.2f}, measuring {self.overhead:.2f} of it"
            lines = [f"  budget    {budget}: {said}; nothing is dropped"]
        if self.more > 1:
            lines.append(
                f"  epochs    {self.trained_epochs:.2f} in place of {self.epochs:g}, in the time that is left"
            )
        if self.costs.factors:
            lines.append(f"{same} {self.plain_epochs:.2f} epochs of plain training{of}")
        if self.prompt_share is not None:
            share = f"{self.prompt_share:.2f} of the positions are prompt, of samples that were looked at"
            lines.append(f"  reader    {share}; a ReaderLoraConfig, another adapter, computes them once")
        return lines


def fresh_epochs(rescore_every: int, epochs: float) -> int:
    """Return in how many of the epochs candidates are scored by a forward pass: ceil(E / eta)."""
    return math.ceil(math.ceil(epochs) / rescore_every)


def scoring_term(rescore_every: int, epochs: float, forward_share: float) -> float:
    """Return the time of scoring candidates, a mean over epochs, relative to a plain epoch: f * ceil(E / eta) / E."""
    return forward_share * fresh_epochs(rescore_every, epochs) / math.ceil(epochs)


def online_term(online_keep: float, rescore_every: int, epochs: float, costs: Costs) -> float:
    """
    Return the time of an epoch relative to a plain one: p (f * ceil(E / eta) / E + (1 - d) q A) + d.

    If A is 1, f is 0. With one forward pass for both, scoring costs (1 - A) f in place of f.
    """
    scoring = 0.0 if online_keep == 1 else scoring_term(rescore_every, epochs, costs.forward_share)
    if costs.one_forward:
        scoring *= 1 - online_keep
    training = (1 - costs.data_share) * costs.accelerated * online_keep
    return costs.padding * (scoring + training) + costs.data_share


def scoring_of(online_keep: float, rescore_every: int, epochs: float, costs: Costs) -> float:
    """Return what of [`online_term`] is scoring candidates; all of it, once the last epoch has begun."""
    plan = online_keep, rescore_every, epochs
    return online_term(*plan, costs) - online_term(*plan, replace(costs, forward_share=0.0))


def time_of_epochs(more: float, epochs: float, first_epoch: float) -> float:
    """Return the time of training for `more * epochs` epochs, at least one, relative to `epochs`."""
    extra = first_epoch - 1
    return (extra + more * epochs) / (extra + epochs)


def epochs_in_time(time: float, epochs: float, first_epoch: float) -> float:
    """Return how many epochs, relative to `epochs`, take as long: the inverse of [`time_of_epochs`]."""
    extra = first_epoch - 1
    return (time * (extra + epochs) - extra) / epochs


def _keep_for(online_time: float, rescore_every: int, epochs: float, costs: Costs) -> float:
    """Return the A with which an epoch takes `online_time`: the inverse of [`online_term`]; it may be negative."""
    scoring = scoring_term(rescore_every, epochs, costs.forward_share)
    training = (1 - costs.data_share) * costs.accelerated
    reused = min(scoring, 0.9 * training) if costs.one_forward else 0.0
    return ((online_time - costs.data_share) / costs.padding - scoring) / (training - reused)


def paper_budget(full_time: float, budget_time: float, new_time: float) -> tuple[float, float, int]:
    """
    Solve the poster's budget equations. They leave out the cost of scoring.

    Args:
        full_time (`float`): T, time of the full training.
        budget_time (`float`): t, the fraction of it that may be used.
        new_time (`float`): T_new = t_b * N_b * E (equation 1), time of the full number of steps at batch size b.

    Returns:
        `(alpha, A, eta)`.

    Equations, as reconstructed (the source cuts the second one off):

        (2) A     = T t / (T_new alpha)  if T t > 0.1 T_new alpha, else 0.1       with alpha = 0.8
        (3) alpha = 0.8;  T t / (T_new A)  if T t < 0.8 T_new A
        (4) eta   = 1;  2 if 0.5 < A < 0.8;  3 if A <= 0.5                        A before clipping
            A is then clipped to [0.1, 0.5].

    Example:

    ```python
    >>> paper_budget(full_time=100.0, budget_time=0.32, new_time=100.0)
    (0.8, 0.4, 3)
    ```
    """
    allowed = full_time * budget_time
    alpha = USUAL_OFFLINE_KEEP
    online = allowed / (new_time * alpha) if allowed > SMALLEST_KEEP * new_time * alpha else SMALLEST_KEEP
    eta = 3 if online <= 0.5 else 2 if online < 0.8 else 1
    online = min(max(online, SMALLEST_KEEP), 0.5)
    if allowed < alpha * new_time * online:
        alpha = allowed / (new_time * online)
    return alpha, online, eta


def smallest_budget(costs: Costs, epochs: float, scores_free: bool) -> tuple[float, float]:
    """
    Return the smallest fractions of the full time that plans can reach with fractions of at least 0.1.

    Returns:
        `(both, online)`: with an offline stage, and with the online stage alone.
    """
    scoring = 0.0 if scores_free else costs.offline_share / epochs
    online = online_term(SMALLEST_KEEP, math.ceil(epochs), epochs, costs)
    return scoring + SMALLEST_KEEP * min(online_term(1.0, 1, epochs, costs), online), online


def solve_budget(plan: Plan, budget_time: float | None, offline: bool = True) -> Plan:
    """
    Choose alpha, A and eta so that the cost model meets the time budget: the plan that keeps most of the rows.

    Plans that are looked at: samples dropped offline only; online only, with each eta; and both, with alpha = 0.8 (the
    paper's) or what is left of it. Of plans that keep as much, the first of these is taken, and the smallest eta with
    which scoring takes at most a quarter of the online stage. A batch has whole rows: where all of these leave more
    than a twentieth of what the budget pays for, one candidate less is taken, or none, and training ends within its
    last epoch, if there are several.

    Args:
        plan ([`Plan`]): batch size, epochs, samples and costs.
        budget_time (`float`, *optional*): t, fraction of the full time. `None`: no time was asked for, only memory; it
            is the full time then, or, where the smaller batches are so slow that this cannot be had, or activations
            are computed again, nothing is dropped.
        offline (`bool`): whether samples may be dropped offline.

    Returns:
        [`Plan`]; one that drops nothing where measuring has eaten so much of the budget that none can be met any more.

    Raises:
        ValueError: if the budget cannot be met; says what the smallest possible one is.
    """
    memory_only = budget_time is None
    budget_time = 1.0 if memory_only else budget_time
    everything = replace(plan.everything, method="measured")
    whole = online_term(1.0, 1, plan.epochs, plan.costs)  # of an epoch in which nothing is dropped
    if plan.fixed_steps or (memory_only and plan.recomputes):  # dropping saves no steps; or memory is paid for in time
        return everything
    # All of the time is plain training; or less padding is enough.
    if (budget_time == 1 and plan.slowdown <= 1) or (whole < 1 and everything.predicted_time <= budget_time):
        return everything
    with_offline, online_alone = (
        plan.slowdown * smallest for smallest in smallest_budget(plan.costs, plan.epochs, plan.scores_free)
    )
    online_alone += plan.slowdown * everything._offline_time  # a pass that has been made: it is in the former
    smallest = min(with_offline, online_alone) if offline else online_alone
    if memory_only and smallest > budget_time:
        return everything
    remedy = f"cannot be met: the smallest possible here is {smallest:.3f}"
    if not offline:
        remedy += " where each value of group_column keeps a place offline; allow more"
    elif not plan.scores_free:
        remedy += " (saved scores, scores=, make it smaller)"
    require(budget_time >= smallest, "budget_time", budget_time, remedy)
    if plan.too_short(budget_time):
        return everything
    # What measuring has cost is made up for, but in a run so short that it weighs more than that, not at any price.
    overhead = min(plan.overhead, LARGEST_OVERHEAD * budget_time, budget_time - smallest)
    left = (budget_time - overhead) / plan.slowdown
    plans = _with_offline(everything, left) if offline else []
    left -= everything._offline_time
    plans += _online_alone(everything, left)
    if not plans:
        rows, eta = math.floor(plan.batch_size / SMALLEST_KEEP + 1e-9), math.ceil(plan.epochs)
        plans = [replace(everything, online_keep=plan.batch_size / rows, rescore_every=eta)]
    earlier = [] if memory_only else _ending_earlier(everything, left)
    most = max(made.kept for made in plans)
    if max((made.kept for made in earlier), default=0.0) * (1 - LEFT_BY_WHOLE_ROWS) > most:
        plans, most = earlier, max(made.kept for made in earlier)
    return next(made for made in plans if made.kept >= most - NO_LESS)


def _with_offline(plan: Plan, left: float) -> list[Plan]:
    """Return the plans with an offline stage that fit into `left`: offline alone, or both stages and each eta."""
    left -= 0.0 if plan.scores_free else plan.costs.offline_share / plan.epochs
    alpha = left / online_term(1.0, 1, plan.epochs, plan.costs)
    plans = [replace(plan, offline_keep=min(alpha, 1.0))] if alpha >= SMALLEST_KEEP else []
    if alpha >= USUAL_OFFLINE_KEEP:
        return plans
    possible = []
    for eta in range(1, math.ceil(plan.epochs) + 1):
        online = _keep_for(left / USUAL_OFFLINE_KEEP, eta, plan.epochs, plan.costs)
        if online < SMALLEST_KEEP:
            continue
        # A batch has whole rows: take the A that they make, and alpha for what is then left.
        online = plan.batch_size / candidate_rows(plan.batch_size, online)
        needed = online_term(online, eta, plan.epochs, plan.costs)
        if online < 1 and left / needed <= 1:
            made = replace(plan, offline_keep=left / needed, online_keep=online, rescore_every=eta)
            free = replace(plan.costs, forward_share=0.0)
            scoring = needed - online_term(online, eta, plan.epochs, free)
            possible.append((scoring > LARGEST_SCORING_SHARE * needed, made))
    if possible:  # first those in which scoring is cheap
        return [*plans, *(made for _, made in sorted(possible, key=lambda pair: pair[0]))]
    if not plans and left > 0:
        eta = math.ceil(plan.epochs)
        fraction = left / online_term(SMALLEST_KEEP, eta, plan.epochs, plan.costs)
        plans = [replace(plan, offline_keep=min(fraction, 1.0), online_keep=SMALLEST_KEEP, rescore_every=eta)]
    return plans


def _online_alone(plan: Plan, left: float) -> list[Plan]:
    """Return the plans without an offline stage that fit into `left`, by eta."""
    plans = []
    for eta in range(1, math.ceil(plan.epochs) + 1):
        online = _keep_for(left, eta, plan.epochs, plan.costs)
        candidates = math.ceil(plan.batch_size / online - 1e-9) if online > 0 else math.inf  # rather too many
        if plan.batch_size < candidates <= plan.batch_size / SMALLEST_KEEP:
            plans.append(replace(plan, online_keep=plan.batch_size / candidates, rescore_every=eta))
        elif candidates <= plan.batch_size:
            plans.append(plan)
    return plans


def _ending_earlier(plan: Plan, left: float) -> list[Plan]:
    """Return the plans of one candidate less than fits into `left`, or none, which end when it is used, by eta."""
    plans = []
    for eta in range(1, math.ceil(plan.epochs) + 1):
        online = _keep_for(left, eta, plan.epochs, plan.costs)
        if not SMALLEST_KEEP <= online < 1:
            continue
        few = max(math.ceil(plan.batch_size / online - 1e-9) - 1, plan.batch_size)
        online = plan.batch_size / few
        scoring = scoring_of(online, eta, plan.epochs, plan.costs)
        training = online_term(online, eta, plan.epochs, plan.costs) - scoring
        more = epochs_in_time((left - scoring) / training, plan.epochs, plan.costs.first_epoch)
        if more * plan.epochs > max(math.ceil(plan.epochs) - 1, 1):
            plans.append(replace(plan, online_keep=online, rescore_every=eta, more=1.0 if more > 0.999 else more))
    return plans


def budget_plan(plan: Plan, config: DarelConfig, groups: int = 0, offline: bool = True) -> Plan:
    """
    Return the plan that the budget of the settings leads to; raises `ValueError` if it cannot be met.

    Each of the `groups` of samples keeps a place offline; where there would be too few, nothing is dropped offline. If
    not `offline`, something is only where the measured costs leave no other way.
    """
    if config.budget_method == "measured":
        made = _solve_for_groups(plan, config.budget_time, groups, offline)
        return spend_on_epochs(made, config.budget_time) if config.budget_spend == "quality" else made
    budget = 1.0 if config.budget_time is None else config.budget_time
    alpha, online, eta = paper_budget(full_time=1.0, budget_time=budget, new_time=plan.slowdown)
    made = replace(plan, offline_keep=alpha, online_keep=online, rescore_every=eta, method="paper")
    remedy = f"has {groups} values, but the budget leaves {made.kept_samples} places; allow more time"
    require(made.kept_samples >= groups, "group_column", config.group_column, remedy)
    return made


def _solve_for_groups(plan: Plan, budget_time: float | None, groups: int, offline: bool) -> Plan:
    if not offline:
        with contextlib.suppress(ValueError):
            return solve_budget(plan, budget_time, offline=False)
    made = solve_budget(plan, budget_time)
    return made if made.kept_samples >= groups else solve_budget(plan, budget_time, offline=False)


def spend_on_epochs(plan: Plan, budget_time: float) -> Plan:
    """
    Spend what a plan leaves of a time budget on more epochs; where something is dropped, nothing is left.

    Example:

    ```python
    >>> costs = Costs(step_seconds=0.1, forward_share=0.0, offline_share=0.0, factors={"unpad": 0.5})
    >>> spend_on_epochs(Plan(1.0, 1.0, 1, batch_size=8, epochs=5, samples=1000, costs=costs), 1.0).trained_epochs
    10.0
    ```
    """
    if plan.kept < 1:
        return plan
    share = (budget_time - plan.spent) / (plan.everything.predicted_time - plan.spent)
    return replace(plan, more=max(epochs_in_time(share, plan.epochs, plan.costs.first_epoch), 1.0))


def batch_size_within(
    memory: Callable[[int], float], batch_size: int, budget_memory: float, full: float | None = None
) -> int:
    """
    Return the largest batch size whose peak memory is within a fraction of the full one.

    Args:
        memory (`Callable`): `batch size -> bytes`, measured; called a few times. Memory grows linearly in between.
        batch_size (`int`): the full batch size.
        budget_memory (`float`): m, a fraction of
        full (`float`, *optional*): the memory that counts as the full one; default: `memory(batch_size)`.

    Raises:
        ValueError: if even one row does not fit; says what the smallest possible budget is.
    """
    largest, one = memory(batch_size), memory(1)
    full = largest if full is None else full
    remedy = f"cannot be met: one row needs {one / full:.3f} of the memory of {batch_size}; give as much"
    require(one <= budget_memory * full, "budget_memory", budget_memory, remedy)
    if batch_size == 1 or largest <= max(one, budget_memory * full):
        return batch_size
    slope = (largest - one) / (batch_size - 1)
    return min(batch_size, int(1 + (budget_memory * full - one) / slope + 1e-9))
