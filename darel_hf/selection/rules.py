"""The selection rules: pure functions over numpy arrays that say which samples are kept, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np

from ..config import RULE_FACTS, RuleFacts
from ..files import require
from .ledger import check_finite

TRIM = 0.03  # fraction of the hardest samples that `trimmed` takes for noise
POWER = 1.0  # exponent of the loss percentile in `percentile` (beta of Selective-Backprop)
BINS = (0.33, 0.66)  # quantiles between the three bins of `loss_bins_*`
FOCUS = 5.0  # how much more likely a sample of the bin in focus is drawn
STRATA = 10  # quantile strata of `stratified`
CLUSTERS = 10  # prototypes a class of `ids`


@dataclass(frozen=True)
class Samples:
    """
    What a rule may look at, one entry a sample.

    Attributes:
        ids (`np.ndarray`): int64 `[n]`, unique.
        losses (`np.ndarray`): float `[n]`, finite.
        lengths (`np.ndarray`, *optional*): int `[n]`, label positions.
        groups (`np.ndarray`, *optional*): int `[n]`, group number of each sample.
        correct (`np.ndarray`, *optional*): float `[n]` in [0, 1], fraction of label positions predicted right.
        embeddings (`np.ndarray`, *optional*): float `[n, D]`, what enters the classification head.
        reference (`np.ndarray`, *optional*): float `[n]`, losses of a reference model.
    """

    ids: np.ndarray
    losses: np.ndarray
    lengths: np.ndarray | None = None
    groups: np.ndarray | None = None
    correct: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def teaching(self) -> np.ndarray:
        """Which samples have a label, bool `[n]`; all, where lengths are not known."""
        known = self.lengths is not None and np.any(self.lengths)
        return np.asarray(self.lengths) > 0 if known else np.ones(len(self), bool)

    def part(self, positions: np.ndarray) -> Samples:
        """Return the samples at some positions."""
        return Samples(**{name: None if values is None else values[positions] for name, values in vars(self).items()})


Priority = Callable[[Samples, float, np.random.Generator], np.ndarray]
Weigh = Callable[[Samples, float, np.ndarray], np.ndarray]


def candidate_rows(batch_size: int, online_keep: float) -> int:
    """Return how many candidates a batch of `batch_size` trained rows is chosen from: c = round(b / A), at least b."""
    return max(batch_size, round(batch_size / online_keep))


def kept_count(keep: float, n: int) -> int:
    """Return how many of n samples are kept: `max(1, round(keep * n))`."""
    return max(1, round(keep * n))


@dataclass(frozen=True, kw_only=True)
class Rule(RuleFacts):
    """
    A selection rule: call it with `(samples, keep, generator)`, get `(positions, weights)`.

    A rule is defined by a *priority*, a float for each sample; the samples of highest priority are kept, ties go to
    the smaller id, and with groups each group keeps its share, at least one. So every rule keeps exactly
    `max(1, round(keep * n))` samples and works with groups.

    Attributes:
        name, needs, reads_losses, weighs: see [`darel_hf.config.RuleFacts`].
        priority (`Callable`): `(samples, keep, generator) -> float [n]`.
        weigh (`Callable`, *optional*): `(samples, keep, positions) -> float [k]`, weights of the kept samples.
    """

    priority: Priority
    weigh: Weigh | None = None

    def __call__(
        self, samples: Samples, keep: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Select samples.

        Args:
            samples ([`Samples`]): the n candidates.
            keep (`float`): fraction to keep, in (0, 1].
            generator (`np.random.Generator`): source of randomness, for rules that draw.

        Returns:
            `positions` (int64 `[k]`, ascending, k = `max(1, round(keep * n))`) and `weights` (float `[k]`, or `None`
            where all are 1).

        Raises:
            ValueError: for NaN or infinite losses (names the ids), a missing field, or more groups than kept samples.
        """
        require(0 < keep <= 1, "keep", keep, "give a fraction in (0, 1]")
        if (teaching := samples.teaching).all():
            return self._select(samples, keep, generator)
        # What has no label cannot teach: it is kept only where there are not enough others.
        count, others = kept_count(keep, len(samples)), np.flatnonzero(teaching)
        if count >= len(others):
            blank = np.flatnonzero(~teaching)
            blank = blank[np.argsort(samples.ids[blank], kind="stable")][: count - len(others)]
            return np.sort(np.concatenate([others, blank])), None
        positions, weights = self._select(samples.part(others), count / len(others), generator)
        return others[positions], weights

    def _select(
        self, samples: Samples, keep: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if self.reads_losses:
            check_finite(samples.ids, samples.losses)
        for name in self.needs:
            present = getattr(samples, name) is not None and not np.isnan(getattr(samples, name)).any()
            require(present, name, None, f"the rule {self.name!r} needs it and it is not known for every sample")
        count = kept_count(keep, len(samples))
        order = np.lexsort((samples.ids, -self.priority(samples, keep, generator)))
        if samples.groups is None:
            chosen = order[:count]
        else:
            require(self.weigh is None, "group_column", self.name, "this rule's weights do not work with groups")
            by_group = order[np.argsort(samples.groups[order], kind="stable")]
            quota = _quotas(samples.groups, count)[samples.groups]
            chosen = np.flatnonzero(_rank_within(samples.groups, by_group) < quota)
        positions = np.sort(chosen)
        return positions, self.weigh(samples, keep, positions) if self.weigh is not None else None


def _quotas(groups: np.ndarray, count: int) -> np.ndarray:
    """Share out `count` places over groups in proportion to their sizes, at least one each (largest remainder)."""
    sizes = np.bincount(groups)
    present = np.count_nonzero(sizes)
    smallest = present / len(groups)
    remedy = f"{present} groups cannot all be represented; keep at least {smallest:.4f}"
    require(count >= present, "keep", count / len(groups), remedy)
    exact = sizes * (count / len(groups))
    quota = np.maximum(np.floor(exact).astype(np.int64), (sizes > 0).astype(np.int64))
    while quota.sum() != count:
        if quota.sum() < count:  # hand out what rounding left over, largest remainder first
            order = np.argsort(-(exact - quota), kind="stable")
            order = order[quota[order] < sizes[order]]
            quota[order[: count - quota.sum()]] += 1
        else:  # the guaranteed places exceed the total: take back from where most was given beyond the share
            order = np.argsort(exact - quota, kind="stable")
            order = order[quota[order] > 1]
            quota[order[: quota.sum() - count]] -= 1
    return quota


RULES: dict[str, Rule] = {}


def register_rule(
    name: str, weigh: Weigh | None = None, needs: tuple[str, ...] = (), reads_losses: bool = True
) -> Callable[[Priority], Priority]:
    """
    Make a priority function a rule that can be named in `offline_rule` and `online_rule`.

    Args:
        name, weigh, needs, reads_losses: see [`Rule`]. What a rule needs is found by scoring, lengths too, so only one
            that needs nothing can do without losses.

    Raises:
        ValueError: for a name that is taken, and for needs without losses.

    Example:

    ```python
    >>> from darel_hf.selection import RULES, register_rule
    >>> @register_rule("longest", needs=("lengths",))
    ... def longest(samples, keep, generator):
    ...     return samples.lengths.astype(float)
    >>> "longest" in RULES
    True
    ```
    """

    def add(priority: Priority) -> Priority:
        require(name not in RULES, "rule", name, "there is a rule of this name; choose another")
        remedy = "what a rule needs is found by scoring; leave it out, or give reads_losses=True"
        require(reads_losses or not needs, "needs", needs, remedy)
        RULE_FACTS[name] = RuleFacts(name, needs, reads_losses, weigh is not None)
        return _ours(name, weigh)(priority)

    return add


def _ours(name: str, weigh: Weigh | None = None) -> Callable[[Priority], Priority]:
    """Make a priority function the rule of which the settings know `name`; else as [`register_rule`]."""

    def add(priority: Priority) -> Priority:
        RULES[name] = Rule(**vars(RULE_FACTS[name]), priority=priority, weigh=weigh)
        return priority

    return add


def _ranks(samples: Samples) -> np.ndarray:
    """Return each sample's rank by loss, 0 for the smallest, ties by id: int64 `[n]`."""
    return _rank_within(np.zeros(len(samples), np.int64), np.lexsort((samples.ids, samples.losses)))


def _rank_within(parts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return each sample's rank in its part, int64 `[n]` from 0; `order` sorts by part, then by what ranks."""
    starts = np.cumsum(np.bincount(parts)) - np.bincount(parts)
    ranks = np.empty(len(parts), dtype=np.int64)
    ranks[order] = np.arange(len(parts)) - starts[parts[order]]
    return ranks


def _place_within(parts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return each sample's place in its part, float `[n]` in (0, 1); `order` as in [`_rank_within`]."""
    return (_rank_within(parts, order) + 0.5) / np.bincount(parts)[parts]


@_ours("hardest")
def hardest(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep the highest losses."""
    return samples.losses


@_ours("easiest")
def easiest(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep the lowest losses."""
    return -samples.losses


@_ours("middle")
def middle(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep the losses nearest to the median, by rank."""
    return -np.abs(_ranks(samples) - (len(samples) - 1) / 2)


@_ours("random")
def random(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep samples drawn at random: the control that every other rule has to beat."""
    return generator.random(len(samples))


@_ours("trimmed")
def trimmed(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep the highest losses after the top 3 per cent, mostly noise; of those the lowest come back first."""
    ranks = _ranks(samples).astype(float)
    cut = ranks >= len(samples) - round(TRIM * len(samples))
    return np.where(cut, -1 - ranks, ranks)


@_ours("stratified")
def stratified(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """Keep the same share, drawn at random, of each tenth of the loss distribution."""
    stratum = _ranks(samples) * STRATA // len(samples)
    return -_place_within(stratum, np.lexsort((generator.random(len(samples)), stratum)))


@_ours("percentile")
def percentile(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """
    Draw without replacement with probability of the loss percentile (Selective-Backprop, Jiang et al. 2019).

    The percentile to the power `POWER` is the weight of Efraimidis and Spirakis' exponential keys (2006), so that the
    count is exact where the original's varies.
    """
    return _draw(((_ranks(samples) + 1) / len(samples)) ** POWER, generator)


def _draw(weight: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return keys whose largest are a draw without replacement with probability in proportion to the weights."""
    return np.log(generator.random(len(weight))) / weight


def _loss_bins(focus: int) -> Priority:
    def priority(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
        """Draw without replacement, from one of three bins of the loss five times as likely (DataFlex's selector)."""
        bins = np.searchsorted(np.quantile(samples.losses, BINS), samples.losses, side="left")
        return _draw(np.where(bins == focus, FOCUS, 1.0), generator)

    return priority


for _number, _bin in enumerate(("low", "medium", "high")):
    _ours(f"loss_bins_{_bin}")(_loss_bins(_number))


@_ours("rho_loss")
def rho_loss(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """
    Keep what can be learnt and is not learnt yet: the highest loss minus the loss of a reference model.

    RHO-LOSS (Mindermann et al. 2022). The reference model was trained on other data of the kind, so that its losses
    are those that training cannot remove; they are computed once (`reference_scores`).
    """
    return samples.losses - samples.reference


def _infobatch_pool(samples: Samples, keep: float) -> np.ndarray:
    """Mask of the samples that may be pruned: below-mean losses, extended upward until a tenth of them is kept."""
    dropped = len(samples) - kept_count(keep, len(samples))
    below = np.count_nonzero(samples.losses < samples.losses.mean())
    return _ranks(samples) < min(len(samples), max(below, int(np.ceil(dropped / 0.9))))


def _infobatch_weights(samples: Samples, keep: float, positions: np.ndarray) -> np.ndarray:
    """Weigh kept pool samples by 1 / (probability of being kept), all others by 1."""
    pool = _infobatch_pool(samples, keep)
    kept_of_pool = pool[positions]
    weights = np.ones(len(positions))
    weights[kept_of_pool] = np.count_nonzero(pool) / max(np.count_nonzero(kept_of_pool), 1)
    return weights


@_ours("infobatch", weigh=_infobatch_weights)
def infobatch(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """
    Keep above-mean losses and a random part of the rest, weighted so that the sum stays unbiased (Qin et al. 2024).

    The original prunes a fixed ratio of the below-mean samples; here `keep` fixes the count. Where there are too few
    below-mean samples for it, the pool from which samples are pruned is extended upward.
    """
    return np.where(_infobatch_pool(samples, keep), generator.random(len(samples)), 2.0)


@_ours("kakurenbo")
def kakurenbo(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """
    Hide the lowest losses among the samples that are predicted right (KAKURENBO, Thao Nguyen et al. 2023).

    The original moves wrongly predicted samples back and so hides fewer than asked for; here the count is exact: when
    the right ones do not suffice, the easiest wrong ones are hidden too. For text, "right" means at least 70 per cent
    of the label positions.
    """
    return _ranks(samples) + len(samples) * (samples.correct < 0.7)


@_ours("ids")
def ids(samples: Samples, keep: float, generator: np.random.Generator) -> np.ndarray:
    """
    Keep the samples around the prototypes of each class: K-Means on embeddings, the nearest of each cluster (IDS).

    With groups (the classes), each group is clustered by itself. The share of each cluster that is kept is the same.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ValueError("offline_rule='ids': needs scikit-learn; pip install 'darel_hf[vision]'") from None
    groups = np.zeros(len(samples), np.int64) if samples.groups is None else samples.groups
    priority = np.empty(len(samples))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        members = members[np.argsort(samples.ids[members])]  # K-Means begins with rows drawn by their position
        points = samples.embeddings[members]
        clusters = min(CLUSTERS, len(np.unique(points, axis=0)))
        means = KMeans(clusters, n_init=1, random_state=int(generator.integers(2**31)))
        distances = means.fit_transform(points)
        nearest = distances.argmin(1)
        order = np.lexsort((samples.ids[members], distances.min(1), nearest))
        priority[members] = -_place_within(nearest, order)
    return priority


RULES["adonis"] = replace(RULES["hardest"], name="adonis")  # top-loss samples gathered into new batches


def length_strata(lengths: np.ndarray) -> np.ndarray:
    """Group samples of similar length: int64 `[n]`; strata of at least 8 samples, at most 32 strata."""
    n = len(lengths)
    count = min(max(n // max(8, isqrt(n)), 1), 32)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1])) if count > 1 else []
    return np.searchsorted(edges, lengths, side="right")


def length_corrected(samples: Samples) -> Samples:
    """
    Replace each loss by its percentile, in (0, 1), among the samples of similar length.

    The mean token loss depends on length: short targets look hard because a mean over few tokens is noisy and the
    first tokens are the least predictable. Ranks within a length stratum compare like with like, and the kept samples
    have the length distribution of all.
    """
    if samples.lengths is None or len(samples) < 2:
        return samples
    strata, losses, reference = length_strata(samples.lengths), samples.losses, samples.reference
    if reference is not None:  # what is compared is the difference
        losses, reference = losses - reference, np.zeros(len(samples))
    order = np.lexsort((samples.ids, losses, strata))
    return replace(samples, losses=_place_within(strata, order), reference=reference)
