"""`DarelConfig`: every setting of the method, validated when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .selection import Rule


def require(ok: bool, name: str, value: Any, remedy: str, error: type[Exception] = ValueError) -> None:
    """Raise the one form of error that this package gives for bad input: the field, its value, and the remedy."""
    if not ok:
        raise error(f"{name}={value!r}: {remedy}")


@dataclass
class DarelConfig:
    """
    Settings of DAREL (DAta REduction with Losses), passed to [`DarelTrainer`] as `darel=`.

    Every default is off: with `DarelConfig()` the trainer trains exactly as `Trainer` does.

    Parameters that control the **offline stage**, before training:

    Args:
        offline_keep (`float`, defaults to 1.0):
            Fraction of the training set that is kept, in (0, 1] (the paper's alpha).
        offline_rule (`str`, defaults to `"middle"`):
            Which samples are kept, by name (see [`darel_hf.selection.RULES`]).
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
            far (docs/quality.md). The paper's is `"hardest"`.
        rescore_every (`int`, defaults to 1):
            Epochs from one fresh scoring to the next (the paper's eta, as we read it: the source does not say more
            than "scheduler"). In between, the same rule picks by the losses in the ledger, without a forward pass.
        online_backward (`str`, defaults to `"subset"`):
            How candidates that are scored afresh are trained on. `"subset"`: a forward pass in eval mode scores them,
            then the kept rows get a training step. `"sliced"`: one forward pass in train mode does both, the backward
            pass is for the kept rows only (see [`darel_hf.sliced.SlicedStep`]); the model is compiled ahead of time,
            with Inductor where `torch_compile=True`. Where a model cannot be, a warning says why, and it is
            `"subset"`.

    Parameters that control the **budget**, which derives the three fractions above and the batch size:

        budget_time (`float`, *optional*):
            Fraction of the full training time that may be used, in (0, 1] (the paper's t).
        budget_memory (`float`, *optional*):
            Fraction of the full peak memory that may be used, in (0, 1] (the paper's m); it lowers the batch size.
        budget_method (`str`, defaults to `"measured"`):
            `"measured"` solves our cost model for what was measured on this machine, `"paper"` uses the poster's
            equations 1 to 4.

    Parameters that say **what is compared**:

        length_correction (`bool`, defaults to `True`):
            Compare losses among samples of similar length only: the mean loss of a short text is noisier and often
            higher, so that plain ranking would mostly rank lengths.
        batch_by_length (`bool`, defaults to `False`):
            Make batches (of candidates, where there are any) of samples of similar length, in random order: fewer
            padded positions, so that steps are cheaper. See [`darel_hf.batching.ShuffledByLength`].
        unpad (`bool`, defaults to `False`):
            Train on batches without padding, and let only the positions that predict a label pass the head: the same
            losses and gradients (but for rounding and dropout) in less time. For causal language models with
            `attn_implementation="sdpa"`, shown on a few samples before training. See
            [`darel_hf.padding_free.PaddingFree`].
        id_column (`str`, *optional*):
            Column with a unique integer id of each sample. Without it, a sample's id is its row number.
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
    budget_method: str = field(default="measured", metadata={"help": "'measured' or 'paper'"})
    offline_rule: str = field(default="middle", metadata={"help": "rule of the offline stage"})
    online_rule: str = field(default="random", metadata={"help": "rule of the online stage"})
    scores: str | None = field(default=None, metadata={"help": "parquet file of saved scores"})
    reference_scores: str | None = field(default=None, metadata={"help": "scores of a reference model, for rho_loss"})
    id_column: str | None = field(default=None, metadata={"help": "column with unique integer ids"})
    group_column: str | None = field(default=None, metadata={"help": "column whose values all stay represented"})
    batch_by_length: bool = field(default=False, metadata={"help": "batches of similar length, in random order"})
    unpad: bool = field(default=False, metadata={"help": "train without padding: same gradients, less time"})
    length_correction: bool = field(default=True, metadata={"help": "compare losses among similar lengths"})
    track: bool = field(default=False, metadata={"help": "record the losses of trained rows"})

    def __post_init__(self) -> None:
        from .selection import RULES

        for name in ("offline_keep", "online_keep", "budget_time", "budget_memory"):
            value = getattr(self, name)
            if value is None and name.startswith("budget"):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number, name, value, "give a number, a fraction in (0, 1]", TypeError)
            remedy = "give a fraction in (0, 1]"
            if 1 < value <= 100:
                remedy += f" ({value:g} per cent is {value / 100:g})"
            require(0 < value <= 1, name, value, remedy)
        whole = isinstance(self.rescore_every, int) and not isinstance(self.rescore_every, bool)
        require(whole, "rescore_every", self.rescore_every, "give a whole number of epochs, at least 1", TypeError)
        require(self.rescore_every >= 1, "rescore_every", self.rescore_every, "give a number of epochs, at least 1")
        for name in ("offline_rule", "online_rule"):
            value = getattr(self, name)
            require(value in RULES, name, value, f"unknown rule; choose one of {', '.join(sorted(RULES))}")
        methods = ("measured", "paper")
        require(self.budget_method in methods, "budget_method", self.budget_method, f"choose one of {methods}")
        backwards = ("subset", "sliced")
        value = self.online_backward
        require(value in backwards, "online_backward", value, f"choose one of {backwards}")
        remedy = (
            f"the rule {self.online_rule!r} reads no losses, so no forward pass is saved; choose another online_rule"
        )
        require(value == "subset" or self.rule("online").reads_losses, "online_backward", value, remedy)
        remedy = "memory is that of a forward pass over all candidates, more than of a step on the kept; give 'subset'"
        require(value == "subset" or self.budget_memory is None, "online_backward", value, remedy)
        for name in ("offline_rule", "online_rule"):
            needed = "reference" in RULES[getattr(self, name)].needs
            remedy = "it compares with a reference model: give reference_scores, a file made by `darel score` with it"
            require(not needed or self.reference_scores is not None, name, getattr(self, name), remedy)
        weighs = self.rule("offline").weigh is not None
        remedy = f"the weights of the rule {self.offline_rule!r} do not work with groups; choose another rule"
        require(self.group_column is None or not weighs, "group_column", self.group_column, remedy)
        if self.unpad:
            remedy = "without padding there is nothing for it to save; leave out one of them"
            require(not self.batch_by_length, "batch_by_length", True, remedy)
            remedy = "losses of rows cannot be read off a batch without padding; leave out one of them"
            require(not self.track, "track", True, remedy)
            remedy = "it slices the rows of a padded batch; give 'subset', or unpad=False"
            require(self.online_backward == "subset", "online_backward", self.online_backward, remedy)
            for stage in filter(self.may_select, ("offline", "online")):
                name, rule = f"{stage}_rule", self.rule(stage)
                remedy = "its weights need losses of rows, which unpad=True has not; leave out one of them"
                require(rule.weigh is None, name, rule.name, remedy)
        if self.budget_time is not None or self.budget_memory is not None:
            for name, default in (("offline_keep", 1.0), ("online_keep", 1.0), ("rescore_every", 1)):
                value = getattr(self, name)
                require(value == default, name, value, "a budget derives this; leave it out, or leave out the budget")

    @property
    def has_budget(self) -> bool:
        """Whether a time or memory budget decides the fractions."""
        return self.budget_time is not None or self.budget_memory is not None

    def rule(self, stage: str) -> Rule:
        """Return the rule of the `"offline"` or `"online"` stage."""
        from .selection import RULES

        return RULES[getattr(self, f"{stage}_rule")]

    def may_select(self, stage: str) -> bool:
        """Whether the `"offline"` or `"online"` stage drops anything, as far as is known before a budget is solved."""
        return getattr(self, f"{stage}_keep") < 1 or self.has_budget

    @property
    def active(self) -> bool:
        """Whether anything differs from plain training."""
        selects = self.may_select("offline") or self.may_select("online")
        return selects or self.track or self.batch_by_length or self.unpad

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict, for JSON."""
        return dataclasses.asdict(self)
