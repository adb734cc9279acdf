"""`DarelConfig`: every setting, validated when it is made; and what it must know of rules and accelerators."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .files import require


@dataclass(frozen=True)
class RuleFacts:
    """
    What settings must know of a selection rule without importing it.

    Attributes:
        name (`str`): what users type.
        needs (`tuple[str, ...]`): fields of [`darel_hf.selection.Samples`] beyond ids and losses that it cannot do
            without.
        reads_losses (`bool`): whether it looks at losses at all; where not, nothing is scored for it.
        weighs (`bool`): whether it weighs what it keeps in the loss.
    """

    name: str
    needs: tuple[str, ...] = ()
    reads_losses: bool = True
    weighs: bool = False


#: Rules by name: ours, and those that [`darel_hf.selection.register_rule`] adds.
RULE_FACTS = {
    facts.name: facts
    for facts in (
        *map(RuleFacts, ("hardest", "easiest", "middle", "trimmed", "stratified", "percentile", "adonis")),
        *map(RuleFacts, ("loss_bins_low", "loss_bins_medium", "loss_bins_high")),
        RuleFacts("random", reads_losses=False),
        RuleFacts("rho_loss", needs=("reference",)),
        RuleFacts("infobatch", weighs=True),
        RuleFacts("kakurenbo", needs=("correct",)),
        RuleFacts("ids", needs=("embeddings",)),
    )
}


@dataclass(frozen=True)
class AcceleratorFacts:
    """
    What settings and plans must know of an accelerator without importing it; see `darel_hf/accelerators/base.py`.

    Attributes:
        name (`str`): what plans and reports call it.
        setting (`str`): field of [`DarelConfig`]; the accelerator is on where that is not at its default.
        exactness (`str`): `"exact"` (loss and gradients of the slow way on the same rows, but for rounding),
            `"unbiased"` (right in expectation) or `"approximate"` (a choice that can cost quality).
        phrase (`str`): how a plan says it.
        fast (*optional*): the value of its setting that `fast=True` tries out; `None`: it does not.
        mildest_first (`tuple`): of one that is not exact, the values of its setting that a time budget may use where
            `budget_allows` names it, the one that costs least quality first.
        beside (`tuple[str, ...]`): settings of which it needs one, or what `fast` finds in place of that.
        online_only (`bool`): whether there is nothing for it to do where the online stage drops nothing.
        not_with (`Mapping[str, str]`): settings that must be at their defaults beside it, each with the remedy.
        gives_way_to (`Mapping[str, str]`): likewise, where the error is to name the accelerator's own setting.
        without_losses (`str`, *optional*): the remedy where the online rule reads no losses; `None`: no matter.
        with_weights (`str`, *optional*): likewise, where a rule that is used weighs what it keeps.
    """

    name: str
    setting: str
    exactness: str
    phrase: str
    fast: Any = None
    mildest_first: tuple[Any, ...] = ()
    beside: tuple[str, ...] = ()
    online_only: bool = False
    not_with: Mapping[str, str] = field(default_factory=dict)
    gives_way_to: Mapping[str, str] = field(default_factory=dict)
    without_losses: str | None = None
    with_weights: str | None = None


#: Accelerators by name: ours, and those that [`darel_hf.accelerators.register_accelerator`] adds.
ACCELERATOR_FACTS = {
    facts.name: facts
    for facts in (
        AcceleratorFacts(
            "base_precision",  # first: the others compute with what it leaves
            setting="base_precision",
            exactness="approximate",
            phrase="with frozen weights in bfloat16",
            mildest_first=("bf16",),
        ),
        AcceleratorFacts(
            "unpad",
            setting="unpad",
            exactness="exact",
            phrase="without padding",
            fast=True,
            not_with={
                "batch_by_length": "without padding there is nothing for it to save; leave it out",
                "track": "losses of rows cannot be read off a batch without padding; leave it out",
                "online_backward": "it slices the rows of a padded batch; give 'subset'",
            },
            with_weights="its weights need losses of rows, which unpad=True has not; leave out unpad",
        ),
        AcceleratorFacts(
            "share_prompts",
            setting="share_prompts",
            exactness="exact",
            phrase="with what samples begin with in common computed once",
            fast=1,
            not_with={
                "unpad": "what is shared is computed without padding anyway; leave it out",
                "prompt_cache": "it computes prompts once already; leave out one of both",
                "batch_by_length": "without padding there is nothing for it to save; leave it out",
                "track": "losses of rows cannot be read off a batch without padding; leave it out",
                "online_backward": "it slices the rows of a padded batch; give 'subset'",
            },
            with_weights="its weights need losses of rows, which share_prompts has not; leave out share_prompts",
        ),
        AcceleratorFacts(
            "prompt_cache",
            setting="prompt_cache",
            exactness="exact",
            phrase="without computing prompts again",
            fast="auto",
            not_with={
                "unpad": "completions are computed without padding anyway; leave it out",
                "batch_by_length": "without padding there is nothing for it to save; leave it out",
                "track": "losses of rows cannot be read off a batch without padding; leave it out",
                "online_backward": "it slices the rows of a padded batch; give 'subset'",
            },
            with_weights="its weights need losses of rows, which prompt_cache has not; leave out prompt_cache",
        ),
        AcceleratorFacts(
            "last_block",
            setting="last_block",
            exactness="exact",
            phrase="with the last block for labels only",
            fast=True,
            beside=("unpad", "share_prompts"),
            not_with={"prompt_cache": "what it computes has labels nearly everywhere; leave out last_block"},
        ),
        AcceleratorFacts(
            "fused_activation",
            setting="fused_activation",
            exactness="exact",
            phrase="with activation functions in one pass",
            fast=True,
        ),
        AcceleratorFacts(
            "fast_lora",
            setting="fast_lora",
            exactness="exact",
            phrase="with fewer passes in LoRA layers",
            fast=True,
        ),
        AcceleratorFacts(
            "sliced",
            setting="online_backward",
            exactness="exact",
            phrase="scored and trained by one forward pass",
            online_only=True,
            gives_way_to={
                "budget_memory": "memory is that of a forward pass over all candidates, more than of a step on the "
                "kept; give 'subset'",
            },
            without_losses="the rule {rule!r} reads no losses, so no forward pass is saved; choose another "
            "online_rule",
        ),
    )
}

#: What may be typed where a setting is one of a few words; of the backwards, the second takes one forward pass.
BACKWARDS = ("subset", "sliced")
CHOICES = {
    "base_precision": (None, "bf16"),
    "budget_method": ("measured", "paper"),
    "budget_spend": ("time", "quality"),
    "online_backward": BACKWARDS,
    "prompt_cache": (None, "device", "ram", "disk", "recompute", "auto"),
}


@dataclass
class DarelConfig:
    """
    Settings of DAREL (DAta REduction with Losses), passed to [`DarelTrainer`] as `darel=`.

    Every default is off: with `DarelConfig()` the trainer trains exactly as `Trainer` does.

    Parameters that control the **offline stage**, before training:

    Args:
        offline_keep (`float`, defaults to 1.0):
            Fraction of the training set that is kept, in (0, 1] (the paper's alpha).
        offline_rule (`str`, defaults to `"random"`):
            Which samples are kept, by name (see [`darel_hf.selection.RULES`]). The default scores nothing: no rule
            that does has beaten it so far. With `"middle"`, say, every sample is scored before training.
        scores (`str`, *optional*):
            Path of a parquet file with columns `sample_id`, `loss`, `n_tokens` (as `darel score` writes it). It is
            used instead of an offline pass.
        reference_scores (`str`, *optional*):
            Path of such a file with the losses of a reference model, for the rule `"rho_loss"` in either stage.
        group_column (`str`, *optional*):
            Column of the training set whose values are kept in proportion, at least one sample each (a label, a
            meaning representation). Offline stage only: a candidate batch is too small for groups.

    Parameters that control the **online stage**, in every step:

        online_keep (`float`, defaults to 1.0):
            Fraction of each candidate batch that gets a backward pass, in (0, 1] (the paper's A). The loader hands
            out `round(batch_size / online_keep)` candidates; `batch_size` of them are trained on.
        online_rule (`str`, defaults to `"random"`):
            Which candidates are trained on, by name. The default scores nothing: no rule that does has beaten it so
            far (docs/fewer_samples.md). The paper's is `"hardest"`.
        rescore_every (`int`, defaults to 1):
            Epochs from one fresh scoring to the next (the paper's eta, as we read it: the source does not say more
            than "scheduler"). In between, the same rule picks by the losses in the ledger, without a forward pass.
        online_backward (`str`, defaults to `"subset"`):
            How candidates that are scored afresh are trained on. `"subset"`: a forward pass in eval mode scores them,
            then the kept rows get a training step. `"sliced"`: one forward pass in train mode does both, the backward
            pass is for the kept rows only (see [`darel_hf.accelerators.SlicedStep`]); the model is compiled ahead of
            time, with Inductor where `torch_compile=True`. Where a model cannot be, a warning says why, and it is
            `"subset"`.

    Parameters that control the **budget**, which derives the three fractions above and the batch size:

        budget_time (`float`, *optional*):
            Fraction of the full training time that may be used, in (0, 1] (the paper's t). It is spent in this order:
            exact accelerators that pay (see `fast`), which cost nothing; those of `budget_allows`; fewer samples.
            Where it is met before that, nothing is dropped.
        budget_allows (`list[str]`, *optional*):
            Accelerators that are not exact and that a time budget may use, by name, before it drops samples: one after
            the other in this order, each at the mildest setting that is enough.
        budget_memory (`float`, *optional*):
            Fraction of the full peak memory that may be used, in (0, 1] (the paper's m). Where the model takes it,
            activations are computed again in the backward pass: the same gradients in more time; then batches are
            smaller.
        budget_spend (`str`, defaults to `"time"`):
            What becomes of time that is left of a time budget where nothing is dropped. `"time"`: the run is shorter.
            `"quality"`: more epochs of the same data, planned before training, with learning rates for as many: with
            `budget_time=1` a run takes as long as plain training and trains more.
        budget_method (`str`, defaults to `"measured"`):
            `"measured"` solves our cost model for what was measured on this machine, `"paper"` uses the poster's
            equations 1 to 4.

    Parameters that say **what is compared**:

        length_correction (`bool`, defaults to `True`):
            Compare losses among samples of similar length only: the mean loss of a short text is noisier and often
            higher, so that plain ranking would mostly rank lengths.
        batch_by_length (`bool`, defaults to `False`):
            Make batches (of candidates, where there are any) of samples of similar length, in random order: fewer
            padded positions, so that steps are cheaper. See [`darel_hf.data.ShuffledByLength`].
        fast (`bool`, *optional*):
            Use every exact accelerator below that this model passes and that pays, chosen on a few batches before
            training. It is never an error: what the model does not take is left out, and the plan says why. Settings
            that are given stay as they are. By default, with a time budget that is measured, and not otherwise.
        unpad (`bool`, defaults to `False`):
            Train on batches without padding, and let only the positions that predict a label pass the head: the same
            losses and gradients (but for rounding and dropout) in less time. For causal language models with
            `attn_implementation="sdpa"`, shown on a few samples before training. See
            [`darel_hf.accelerators.PaddingFree`].
        share_prompts (`int`, defaults to 0):
            From 1 on: whatever samples of a batch begin with in common is computed once, forward and backward, and
            without padding as with `unpad`: the same losses and gradients (but for rounding and dropout). 1: batches
            stay as they are; more: batches are made of up to so many samples of a prompt, in random order, which is
            cheaper but no longer draws samples independently. See [`darel_hf.accelerators.SharePrompts`].
        prompt_cache (`str`, *optional*):
            Compute completions only: what the frozen base makes of a prompt is computed once, for adapters that leave
            prompts alone ([`darel_hf.ReaderLoraConfig`]). The same losses and gradients (but for rounding and
            dropout). `"ram"`, `"device"` (a GPU's memory, while a quarter of what is free there lasts, then the
            machine's), `"disk"` (a file in the output folder, which later runs on the same base use again),
            `"recompute"` (nothing is kept: prompts are run in every step, without gradient) or `"auto"`, which says
            what it takes and why. See [`darel_hf.accelerators.PromptCache`].
        fast_lora (`bool`, defaults to `False`):
            Let PEFT's LoRA layers compute in fewer passes: the same losses and gradients (but for rounding) in less
            time. Layers with dropout in LoRA, variants such as DoRA, several active adapters or a quantised base stay
            as they are; where a step gets no cheaper, all do. See [`darel_hf.accelerators.FastLora`].
        fused_activation (`bool`, defaults to `False`):
            Let torch's fused functions compute activations that the model's code writes out in many passes (GPT-2's
            `gelu_new`): the same losses and gradients (but for rounding) in less time, and less is saved for the
            backward pass. Left out where there are none. See [`darel_hf.accelerators.FusedActivation`].
        last_block (`bool`, defaults to `False`):
            Beside `unpad` or `share_prompts`: compute what follows attention in the last block only at positions that
            predict a label: the same losses and gradients (but for rounding and dropout) in less time. Left out where
            it cannot be had or does not pay. See [`darel_hf.accelerators.LastBlock`].
        base_precision (`str`, *optional*):
            `"bf16"`: keep the frozen weights of linear layers in bfloat16 while training lasts, and compute under
            autocast; what is trained stays in float32. What `bf16=True` computes, without rounding these weights in
            every step. Approximate, so `fast` never takes it. See [`darel_hf.accelerators.BasePrecision`].
        finish_epochs (`float`, defaults to 0.0):
            The last epochs, in which the adapters of a reader act everywhere: what is saved then is stock LoRA.
        id_column (`str`, *optional*):
            Column with a unique integer id of each sample. Without it, a sample's id is its row number. Of data that
            are no table, ids are read while they are scored before training: two that are the same are an error then.
        track (`bool`, defaults to `False`):
            Record the loss of every trained row from the forward pass that trains it.

    Rules that draw at random use `data_seed`, or else `seed`, of the training arguments.

    Raises:
        ValueError: for a value out of its range; the message names the field, the value and the remedy.
        TypeError: for a value of the wrong type.

    Example:

    ```python
    >>> from darel_hf import DarelConfig
    >>> DarelConfig(offline_keep=0.8, online_keep=0.3, rescore_every=3).active
    True
    ```
    """

    offline_keep: float = field(default=1.0, metadata={"help": "fraction of the training set kept offline, in (0, 1]"})
    online_keep: float = field(
        default=1.0, metadata={"help": "fraction of each candidate batch that gets a backward pass, in (0, 1]"}
    )
    rescore_every: int = field(default=1, metadata={"help": "epochs from one fresh scoring to the next"})
    online_backward: str = field(default="subset", metadata={"help": "'subset' or 'sliced' (one forward pass)"})
    budget_time: float | None = field(default=None, metadata={"help": "fraction of the full training time, in (0, 1]"})
    budget_memory: float | None = field(default=None, metadata={"help": "fraction of the full memory, in (0, 1]"})
    budget_allows: list[str] | None = field(
        default=None, metadata={"help": "accelerators, by name, that are not exact and that a time budget may use"}
    )
    budget_spend: str = field(default="time", metadata={"help": "'time' or 'quality': more epochs in what is left"})
    budget_method: str = field(default="measured", metadata={"help": "'measured' or 'paper'"})
    offline_rule: str = field(default="random", metadata={"help": "rule of the offline stage"})
    online_rule: str = field(default="random", metadata={"help": "rule of the online stage"})
    scores: str | None = field(default=None, metadata={"help": "parquet file of saved scores"})
    reference_scores: str | None = field(default=None, metadata={"help": "scores of a reference model, for rho_loss"})
    id_column: str | None = field(default=None, metadata={"help": "column with unique integer ids"})
    group_column: str | None = field(default=None, metadata={"help": "column whose values all stay represented"})
    batch_by_length: bool = field(default=False, metadata={"help": "batches of similar length, in random order"})
    finish_epochs: float = field(default=0.0, metadata={"help": "last epochs in which a reader acts everywhere"})
    prompt_cache: str | None = field(
        default=None, metadata={"help": "'ram', 'disk', 'recompute' or 'auto': compute completions only (a reader's)"}
    )
    base_precision: str | None = field(
        default=None, metadata={"help": "'bf16': frozen weights in bfloat16 while training; approximate"}
    )
    share_prompts: int = field(
        default=0, metadata={"help": "compute once what samples of a batch begin with; above 1: so many a prompt"}
    )
    fast: bool | None = field(
        default=None,
        metadata={
            "help": "every exact accelerator that the model takes and that pays; by default, where a time budget is",
            "nargs": "?",  # of the command line: the word alone means True
            "const": True,
        },
    )
    last_block: bool = field(default=False, metadata={"help": "last block for labels only, beside unpad: less time"})
    fast_lora: bool = field(default=False, metadata={"help": "LoRA layers in fewer passes: same gradients, less time"})
    fused_activation: bool = field(
        default=False, metadata={"help": "activation functions in one pass: same gradients, less time"}
    )
    unpad: bool = field(default=False, metadata={"help": "train without padding: same gradients, less time"})
    length_correction: bool = field(default=True, metadata={"help": "compare losses among similar lengths"})
    track: bool = field(default=False, metadata={"help": "record the losses of trained rows"})

    def __post_init__(self) -> None:
        for name in ("offline_keep", "online_keep", "budget_time", "budget_memory"):
            value = getattr(self, name)
            if value is None and name.startswith("budget"):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number, name, value, "give a number, a fraction in (0, 1]", TypeError)
            remedy = "give a fraction in (0, 1]"
            if 5 <= value <= 100:  # nobody who writes 1.5 means per cent
                remedy += f" ({value:g} per cent is {value / 100:g})"
            require(0 < value <= 1, name, value, remedy)
        number = isinstance(self.finish_epochs, (int, float)) and not isinstance(self.finish_epochs, bool)
        remedy = "give a number of epochs, 0 or more"
        require(number, "finish_epochs", self.finish_epochs, remedy, TypeError)
        require(0 <= self.finish_epochs < math.inf, "finish_epochs", self.finish_epochs, remedy)
        remedy = "a run that may end early has no last epochs; leave it out"
        require(not self.finish_epochs or self.budget_time is None, "finish_epochs", self.finish_epochs, remedy)
        whole = isinstance(self.rescore_every, int) and not isinstance(self.rescore_every, bool)
        require(whole, "rescore_every", self.rescore_every, "give a whole number of epochs, at least 1", TypeError)
        require(self.rescore_every >= 1, "rescore_every", self.rescore_every, "give a number of epochs, at least 1")
        remedy = "give True or False, or leave it out"
        require(self.fast is None or isinstance(self.fast, bool), "fast", self.fast, remedy, TypeError)
        for name in (each.name for each in dataclasses.fields(self) if each.type in (bool, "bool")):
            value = getattr(self, name)  # a word that says no would be taken for yes
            require(isinstance(value, bool), name, value, "give True or False", TypeError)
        for name in ("scores", "reference_scores"):
            value = getattr(self, name)
            require(isinstance(value, (str, os.PathLike, type(None))), name, value, "give a path of a file", TypeError)
            setattr(self, name, None if value is None else os.fspath(value))  # it is saved as JSON
        for name in ("id_column", "group_column"):
            value = getattr(self, name)
            require(isinstance(value, (str, type(None))), name, value, "give the name of a column", TypeError)
        whole = isinstance(self.share_prompts, int) and not isinstance(self.share_prompts, bool)
        remedy = "give 1 to share what is in common by chance, more for batches with so many samples of a prompt, or 0"
        require(whole, "share_prompts", self.share_prompts, remedy, TypeError)
        require(self.share_prompts >= 0, "share_prompts", self.share_prompts, remedy)
        for name, choices in CHOICES.items():
            require(getattr(self, name) in choices, name, getattr(self, name), f"choose one of {choices}")
        for stage in ("offline", "online"):
            name, value = f"{stage}_rule", getattr(self, f"{stage}_rule")
            require(
                isinstance(value, str) and value in RULE_FACTS,
                name,
                value,
                f"unknown rule; choose one of {', '.join(sorted(RULE_FACTS))}",
            )
            needed = "reference" in self.rule(stage).needs
            remedy = "it compares with a reference model: give reference_scores, a file made by `darel score` with it"
            require(not needed or self.reference_scores is not None, name, value, remedy)
        read = any(self.rule(stage).reads_losses for stage in ("offline", "online"))
        remedy = "no rule reads them; give one that does, such as offline_rule='middle', or leave them out"
        require(self.scores is None or read, "scores", self.scores, remedy)
        remedy = f"the weights of the rule {self.offline_rule!r} do not work with groups; choose another rule"
        grouped = self.group_column is not None
        require(not (grouped and self.rule("offline").weighs), "group_column", self.group_column, remedy)
        for facts in ACCELERATOR_FACTS.values():
            if not self._is_default(facts.setting):
                self._check_beside(facts)
        remedy = "only a time budget that is measured leaves any; give budget_time, or leave it out"
        require(self._is_default("budget_spend") or self.solves_time, "budget_spend", self.budget_spend, remedy)
        if self.budget_allows is not None:
            self._check_allowed()
        if self.has_budget:
            for name in ("offline_keep", "online_keep", "rescore_every"):
                remedy = "a budget derives this; leave it out"
                require(self._is_default(name), name, getattr(self, name), remedy)

    def _is_default(self, name: str) -> bool:
        """Whether a setting is at its default; so is one that this class does not have."""
        return not hasattr(self, name) or getattr(self, name) == getattr(type(self), name)

    def _check_beside(self, facts: AcceleratorFacts) -> None:
        """Raise `ValueError` where an accelerator that is asked for does not go with the other settings."""
        own = getattr(self, facts.setting)
        for name, remedy in facts.not_with.items():
            require(self._is_default(name), name, getattr(self, name), remedy)
        for name, remedy in facts.gives_way_to.items():
            require(self._is_default(name), facts.setting, own, remedy)
        if facts.without_losses is not None:
            remedy = facts.without_losses.format(rule=self.online_rule)
            require(self.rule("online").reads_losses, facts.setting, own, remedy)
        if facts.with_weights is not None:
            for stage in filter(self.may_select, ("offline", "online")):
                require(not self.rule(stage).weighs, f"{stage}_rule", self.rule(stage).name, facts.with_weights)

    def _check_allowed(self) -> None:
        """Raise for names of accelerators that a budget cannot be allowed to use."""
        names = self.budget_allows
        listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        require(listed, "budget_allows", names, "give a list of names of accelerators", TypeError)
        self.budget_allows = list(names)
        remedy = "only a time budget that is measured has a use for it; give budget_time, or leave it out"
        require(self.solves_time, "budget_allows", names, remedy)
        there = [name for name, facts in ACCELERATOR_FACTS.items() if facts.mildest_first]
        remedy = f"choose of {', '.join(there)}" if there else "there is none that is not exact; leave it out"
        for name in names:
            facts = ACCELERATOR_FACTS.get(name)
            exact = facts is not None and facts.fast is not None
            why = f"{name} is exact, and a time budget uses it anyway; leave it out" if exact else remedy
            require(name in there, "budget_allows", names, why)
            why = f"{facts.setting}={getattr(self, facts.setting, None)!r} is given already; leave out one of both"
            require(self._is_default(facts.setting), "budget_allows", names, why)
        require(len(set(names)) == len(names), "budget_allows", names, "give each name once")

    @property
    def solves_time(self) -> bool:
        """Whether a time budget is solved by what is measured."""
        return self.budget_time is not None and self.budget_method == "measured"

    @property
    def finds_exact(self) -> bool:
        """Whether exact accelerators are looked for that nobody has named."""
        return self.solves_time if self.fast is None else self.fast

    @property
    def has_budget(self) -> bool:
        """Whether a time or memory budget decides the fractions."""
        return self.budget_time is not None or self.budget_memory is not None

    def rule(self, stage: str) -> RuleFacts:
        """Return what is known of the rule of the `"offline"` or `"online"` stage."""
        return RULE_FACTS[getattr(self, f"{stage}_rule")]

    def may_select(self, stage: str) -> bool:
        """Whether the `"offline"` or `"online"` stage drops anything, as far as is known before a budget is solved."""
        return getattr(self, f"{stage}_keep") < 1 or self.has_budget

    @property
    def of_a_prompt(self) -> int:
        """How many samples of the same prompt batches are to have; 1: as they are drawn."""
        return max(self.share_prompts, 1)

    @property
    def accelerators(self) -> list[str]:
        """Names of the accelerators that are asked for, in the order in which they act on a batch."""
        return [
            name
            for name, facts in ACCELERATOR_FACTS.items()
            if not self._is_default(facts.setting) and (self.may_select("online") or not facts.online_only)
        ]

    def candidates(self) -> list[tuple[str, Any, str | None]]:
        """
        Return what `fast` tries out, what does more before what does less.

        Returns:
            of each the accelerator's name, the value of its setting, and why it does not go with these settings, or
            `None`.
        """
        found = []
        most_first = list(reversed(ACCELERATOR_FACTS.values()))
        most_first.sort(key=lambda facts: bool(facts.beside))  # what goes beside others after these
        for facts in most_first if self.finds_exact else ():
            if facts.fast is None or facts.exactness != "exact" or not self._is_default(facts.setting):
                continue
            reason = None
            try:
                dataclasses.replace(self, **{facts.setting: facts.fast})
            except ValueError as error:
                reason = str(error)
            found.append((facts.name, facts.fast, reason))
        return found

    @property
    def active(self) -> bool:
        """Whether anything differs from plain training."""
        selects = self.may_select("offline") or self.may_select("online")
        others = (self.track, self.batch_by_length, self.finish_epochs, self.fast, self.accelerators)
        return selects or any(map(bool, others))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict, for JSON."""
        return dataclasses.asdict(self)
