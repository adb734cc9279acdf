"""`Report`: what was planned, kept, dropped and measured in a run; as text, JSON, a table and a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..budget import Plan
from ..config import ACCELERATOR_FACTS, DarelConfig
from ..files import atomic_path
from ..selection import RULES, LossLedger, Samples, length_corrected
from .charts import chart

BLANK = "no label: nothing to learn from it"
KEPT, DROPPED = "#2a6f97", "#e07a5f"  # colours, in every picture


def scoring_seconds(seconds: dict[str, float]) -> float:
    """Return what went into scores and into measuring what they cost, of the seconds of a run."""
    return sum(seconds[part] for part in ("probe", "offline", "scoring"))


@dataclass(frozen=True)
class Report:
    """
    The account of one `train()`.

    Attributes:
        plan ([`Plan`]): what was decided before training.
        config ([`DarelConfig`]): the settings that the user gave.
        seconds (`dict`): `total` of the run, and of it `probe` (measuring costs), `offline`, `scoring` (online forward
            passes), `selection` and `evaluation`; seconds of this process.
        full_seconds (`float`): estimate of plain training from the measured step; NaN if nothing was measured.
        steps (`int`): optimizer steps done.
        rows_backpropagated (`int`): rows that got a backward pass, over all processes.
        times_trained (`np.ndarray`): float `[n]`, in the order of `ledger.ids`: backward passes of each sample.
        ledger ([`LossLedger`]): losses and counts of every sample.
        kept (`np.ndarray`): bool `[n]`, in the order of `ledger.ids`: kept by the offline stage.
        offline_losses (`np.ndarray`): float `[n]`, likewise: what the offline stage went by (the ledger has the latest
            losses); NaN without an offline pass.
        scores_reused (`bool`): whether the offline losses came from the cache.
        decisions (`list`): where a time budget ended training earlier than planned: `[step, position, end]`, see
            [`darel_hf.budget.pace.Progress`].
        in_use (`dict`): by accelerator that was in use at the end, the value of its setting.
        left_out (`dict[str, str]`): why others were not.
        step_time (`float`): what a step took in the loop, loading counted and scoring left out, relative to a plain
            one as it was timed before training; of this process since it was started; NaN if not known.
    """

    plan: Plan
    config: DarelConfig
    seconds: dict[str, float]
    full_seconds: float
    steps: int
    rows_backpropagated: int
    times_trained: np.ndarray
    ledger: LossLedger
    kept: np.ndarray
    offline_losses: np.ndarray
    scores_reused: bool
    decisions: list[list[float]]
    in_use: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    step_time: float = math.nan

    @property
    def accelerators(self) -> list[dict[str, Any]]:
        """
        List the accelerators that were in use.

        Returns:
            One dict each: `name`, `setting` and its `value`, `exactness`, and `factor`: a step with it relative to one
            with those before it alone, as timed before training; `None` where it was not. What all save in the run is
            [`Report.step_time`], for which the plan had predicted [`Plan.step_time`].
        """
        found = []
        for name, value in self.in_use.items():
            facts = ACCELERATOR_FACTS[name]
            what = {"name": name, "setting": facts.setting, "value": value, "exactness": facts.exactness}
            found.append({**what, "factor": self.plan.costs.factors.get(name)})
        return found

    @property
    def measured_time(self) -> float:
        """Time without evaluation, scoring counted, relative to the estimated plain one; NaN if not measured."""
        spent = self.seconds["total"] - self.seconds["evaluation"]
        return spent / self.full_seconds if self.full_seconds > 0 else math.nan

    @property
    def tokens_backpropagated(self) -> int:
        """Label positions of the rows that got a backward pass, as far as their number is known from scoring."""
        return round(float((self.times_trained * self.ledger.n_tokens).sum()))

    @property
    def without_labels(self) -> np.ndarray:
        """Which samples have been scored and have no label to learn from, bool `[n]`; rules drop them first."""
        tokens = self.ledger.n_tokens
        return (tokens == 0) & ~np.isnan(self._ranked_losses) & np.any(tokens)

    @property
    def _ranked_losses(self) -> np.ndarray:
        """What the offline stage went by, or the latest losses where there was none."""
        return self.ledger.loss if np.isnan(self.offline_losses).all() else self.offline_losses

    @property
    def percentiles(self) -> np.ndarray:
        """Loss percentile of each sample among those of similar length, in (0, 1): what the rules look at."""
        losses = self._ranked_losses
        known = ~np.isnan(losses)
        values = np.full(len(self.ledger), np.nan)
        samples = Samples(self.ledger.ids[known], losses[known], self.ledger.n_tokens[known])
        if not self.config.length_correction:
            samples = Samples(samples.ids, samples.losses, np.zeros(len(samples)))
        values[known] = length_corrected(samples).losses if known.sum() > 1 else 0.5
        return values

    def dropped(self, limit: int | None = None) -> list[dict[str, Any]]:
        """List what the offline stage dropped, most extreme first, see [`Report.extremes`]."""
        return self.extremes(False, limit)

    def extremes(self, kept: bool, limit: int | None = None) -> list[dict[str, Any]]:
        """
        List what the offline stage kept, or dropped, most extreme losses first.

        Args:
            kept (`bool`): which of the two.
            limit (`int`, *optional*): at most so many.

        Returns:
            One dict a sample: `sample_id`, `loss`, `n_tokens`, `percentile` (of the loss, among similar lengths) and,
            for dropped ones, `why`.
        """
        percentiles = self.percentiles
        losses, blank = self._ranked_losses, self.without_labels
        rows = np.flatnonzero(self.kept == kept)
        extremeness = np.nan_to_num(np.abs(percentiles[rows] - 0.5))  # a rule that reads no losses knows none
        rows = rows[np.argsort(-extremeness, kind="stable")][:limit]
        return [
            {
                "sample_id": int(self.ledger.ids[row]),
                "loss": float(losses[row]),
                "n_tokens": int(self.ledger.n_tokens[row]),
                "percentile": float(percentiles[row]),
                **({} if kept else {"why": BLANK if blank[row] else self._why(percentiles[row])}),
            }
            for row in rows
        ]

    def _why(self, percentile: float) -> str:
        rule = self.config.offline_rule
        if not RULES[rule].reads_losses:
            return f"{rule}: not drawn"
        if "embeddings" in RULES[rule].needs:
            return f"{rule}: others of its class are nearer to the prototypes"
        side = "harder" if percentile > 0.5 else "easier"
        share = percentile if percentile > 0.5 else 1 - percentile
        of = "samples of similar length" if self.config.length_correction else "all samples"
        return f"{rule}: {side} than {share:.1%} of {of}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples as a plain dict, for JSON."""
        return {
            "plan": self.plan.to_dict(),
            "config": self.config.to_dict(),
            "seconds": self.seconds,
            "estimated_full_seconds": None if math.isnan(self.full_seconds) else self.full_seconds,
            "predicted_time": self.plan.predicted_time,
            "measured_time": None if math.isnan(self.measured_time) else self.measured_time,
            "steps": self.steps,
            "samples": len(self.ledger),
            "kept": int(self.kept.sum()),
            "dropped": int((~self.kept).sum()),
            "without_labels": int(self.without_labels.sum()),
            "rows_backpropagated": self.rows_backpropagated,
            "tokens_backpropagated": self.tokens_backpropagated,
            "coverage": float(np.count_nonzero(self.times_trained)) / max(len(self.ledger), 1),
            "scores_reused": self.scores_reused,
            "decisions": self.decisions,
            "accelerators": self.accelerators,
            "left_out": self.left_out,
            "predicted_step": self.plan.step_time,
            "measured_step": None if math.isnan(self.step_time) else self.step_time,
        }

    def card(self) -> str:
        """Return a section for a model card, in Markdown."""
        numbers = self.to_dict()
        default = type(self.config)()  # settings may be more than ours
        settings = {k: v for k, v in self.config.to_dict().items() if v != getattr(default, k)}
        measured = numbers["measured_time"]
        rows = {
            "settings": ", ".join(f"`{name}={value!r}`" for name, value in settings.items()),
            "samples kept offline": f"{numbers['kept']:,} of {numbers['samples']:,}",
            "rows that got a backward pass": f"{self.rows_backpropagated:,} in {self.steps:,} steps",
            "time": f"{self.seconds['total']:.1f} s, of it scoring {scoring_seconds(self.seconds):.1f} s",
            "relative to plain training": f"predicted {self.plan.predicted_time:.2f}"
            + (f", measured {measured:.2f} (of an estimate from single steps)" if measured is not None else ""),
        }
        if self.in_use:
            timed = {a["name"]: "" if a["factor"] is None else f", {a['factor']:.2f}" for a in self.accelerators}
            said = (f"{a['name']} ({a['exactness']}{timed[a['name']]})" for a in self.accelerators)
            rows["what made steps cheaper"] = ", ".join(said)
        of = " on the samples that it picked" if self.plan.selects else ""
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return f"## Training data selection (DAREL)\n\nTrained with `darel_hf`{of}.\n\n| | |\n| --- | --- |\n{table}\n"

    def write_samples(self, path: str | os.PathLike) -> None:
        """Write one row a sample as parquet: id, kept or not, percentile, and all columns of the ledger."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"sample_id": self.ledger.ids, "kept": self.kept, "percentile": self.percentiles}
        columns["offline_loss"] = self.offline_losses
        columns |= {name: values for name, values in self.ledger.state_dict().items() if name != "ids"}
        with atomic_path(path) as temporary:
            pq.write_table(pa.table(columns), temporary)

    def plot_losses(self, path: str | os.PathLike) -> None:
        """Draw the distribution of the offline losses with the kept part marked, as PNG (or by the suffix)."""
        losses = self.offline_losses
        known = ~np.isnan(losses)
        bins = np.linspace(*np.quantile(losses[known], (0, 0.999)), 60)
        shown = np.clip(losses, None, bins[-1])
        parts = [shown[known & self.kept], shown[known & ~self.kept]]
        labels = [f"kept ({len(parts[0]):,})", f"dropped ({len(parts[1]):,})"]
        title = f"offline selection: {self.config.offline_rule}, keep {self.plan.offline_keep:.2f}"
        with chart(path, title=title, xlabel="loss before training (nats per token)", ylabel="samples") as axes:
            axes.hist(parts, bins=bins, stacked=True, color=[KEPT, DROPPED], label=labels)

    def __str__(self) -> str:
        seconds, numbers = self.seconds, self.to_dict()
        parts = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("probe", "offline", "scoring") if seconds[name])
        measured, blank = numbers["measured_time"], ""
        tokens = (
            f" ({self.tokens_backpropagated:,} label tokens)" if self.tokens_backpropagated else ""
        )  # else unknown
        if numbers["without_labels"]:
            blank = f" ({numbers['without_labels']:,} have no label and are dropped first)"
        lines = [
            str(self.plan),
            f"  kept      {numbers['kept']:,} of {numbers['samples']:,} samples offline" + blank,
            f"  trained   {self.rows_backpropagated:,} rows{tokens} in {self.steps:,} steps",
            f"  time      {seconds['total']:.1f} s" + (f" (of it {parts})" if parts else ""),
        ]
        if self.decisions:
            step, _, end = self.decisions[-1]
            lines.append(f"  budget    training was shortened to {end:.0f} steps, as decided last at step {step:.0f}")
        if numbers["measured_step"] is not None:
            predicted = f"predicted {self.plan.step_time:.2f}"
            lines.append(f"  steps     {self.step_time:.2f} of a plain one in the run, scoring left out ({predicted})")
        if measured is not None:
            lines.append(
                f"  measured  {measured:.2f} of the plain training time estimated from the probe "
                f"(predicted {self.plan.predicted_time:.2f})"
            )
        return "\n".join(lines)
