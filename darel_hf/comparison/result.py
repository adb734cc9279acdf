"""`Comparison`: what the runs of all arms say together; as text, JSON, Markdown, a chart and a page, with advice."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json, write_text
from ..report import DROPPED, STYLE, chart
from .statistics import LEVEL, POWER, Interval, interval, seeds_needed

WIDTH = 80  # columns of text
FASTER = 0.95  # of the first arm's time, or less: what is worth a word
GREY = "#6c757d"


@dataclass
class Row:
    """
    What the runs of one arm say.

    Attributes:
        arm (`str`): its name.
        scores (`dict[int, float]`), seconds (`dict[int, float]`): by seed; of runs that finished.
        errors (`dict[int, str]`): by seed; the last lines of runs that failed.
        times (`dict[int, float]`): relative to the first arm with that seed, where both finished.
        difference ([`Interval`], *optional*): of the score minus that of the first arm, paired by seed; `None` for the
            first arm and where no seed has both.
        apart (`str`): `"better"` or `"worse"` than the first arm where the interval is beyond 0, else `""`.
        no_worse (`bool`, *optional*): whether the interval ends before the margin; `None` without one.
        total_seeds (`int`, *optional*): with how many it is likely to; `None` where it does, or where none are enough.
    """

    arm: str
    scores: dict[int, float]
    seconds: dict[int, float]
    errors: dict[int, str]
    times: dict[int, float] = field(default_factory=dict)
    difference: Interval | None = None
    apart: str = ""
    no_worse: bool | None = None
    total_seeds: int | None = None

    @property
    def time(self) -> float:
        """Median of the times, or NaN: other work on the machine slows single runs, by any factor."""
        return float(np.median(list(self.times.values()))) if self.times else math.nan

    @property
    def faster(self) -> bool:
        """Whether it saves what is worth a word, see `FASTER`."""
        return self.time <= FASTER

    @property
    def mean(self) -> float:
        """Mean score over the seeds that finished, or NaN."""
        return float(np.mean(list(self.scores.values()))) if self.scores else math.nan

    @property
    def further_seeds(self) -> int | None:
        """How many more seeds are likely to show that the arm is no worse, see [`seeds_needed`]."""
        return None if self.total_seeds is None else self.total_seeds - self.difference.seeds


@dataclass
class Comparison:
    """
    Quality against time of arms, each compared with the first one, paired by seed.

    Attributes:
        title (`str`): of what.
        metric (`str`), lower_is_better (`bool`): the quality.
        margin (`float`, *optional*): how much of it an arm may lose and still count as no worse.
        jobs (`int`): how many runs there were at a time.
        settings (`dict`): all settings, by arm.
        rows (`list[Row]`): one an arm, the first being what others are compared with.
    """

    title: str
    metric: str
    lower_is_better: bool
    margin: float | None
    jobs: int
    settings: Mapping[str, Mapping[str, Any]]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        title: str,
        metric: str,
        lower_is_better: bool,
        margin: float | None,
        jobs: int,
        settings: Mapping[str, Mapping[str, Any]],
        outcomes: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> Comparison:
        """
        Compare.

        Args:
            outcomes (`dict`): (arm, seed) -> results with the metric and `seconds`, or `{"error": text}`. Others as
                the attributes.
        """
        made = cls(title, metric, lower_is_better, margin, jobs, settings)
        for arm in settings:
            own = {seed: found for (name, seed), found in outcomes.items() if name == arm}
            errors = {seed: found["error"] for seed, found in own.items() if "error" in found}
            good = {seed: found for seed, found in own.items() if seed not in errors}
            for seed in [seed for seed, found in good.items() if not math.isfinite(found[metric])]:
                errors[seed] = f"its {metric} is {good.pop(seed)[metric]}"
            scores = {seed: float(found[metric]) for seed, found in good.items()}
            made.rows.append(Row(arm, scores, {s: float(found["seconds"]) for s, found in good.items()}, errors))
        for row in made.rows:
            made._compare(row)
        return made

    def _compare(self, row: Row) -> None:
        first = self.rows[0]
        seeds = sorted(row.scores.keys() & first.scores.keys())
        if not seeds:
            return
        row.times = {seed: row.seconds[seed] / first.seconds[seed] for seed in seeds}
        if row is first:
            return
        comparisons = len(self.rows) - 1
        row.difference = found = interval([row.scores[s] - first.scores[s] for s in seeds], comparisons)
        up, down = ("worse", "better") if self.lower_is_better else ("better", "worse")
        row.apart = up if found.low > 0 else down if found.high < 0 else ""
        if self.margin is None:
            return
        worst, mean = (-found.high, -found.mean) if self.lower_is_better else (found.low, found.mean)
        row.no_worse = worst > -self.margin  # not with NaN
        if not row.no_worse and not math.isnan(worst):
            # As if the difference stayed what it is; a lucky one is not counted on.
            row.total_seeds = seeds_needed(found.deviation, self.margin + min(mean, 0.0), comparisons)
            if row.total_seeds is not None:  # as many would show it, with other luck than there was
                row.total_seeds = max(row.total_seeds, found.seeds + 1)

    # ---- What follows ----

    @property
    def advice(self) -> str:
        """One sentence that follows from the numbers, by the rules of docs/compare.md, the first that holds."""
        first, others = self.rows[0].arm, self.rows[1:]
        known = [row for row in others if row.difference is not None and not math.isnan(row.difference.low)]
        if not known:
            return (
                f"Nothing can be said yet: it takes two or more seeds that {first} and another arm both finish, with "
                "scores whose differences are not all the same."
            )
        faster = [row for row in known if row.faster]
        fit = [row for row in faster if row.no_worse or row.apart == "better"]
        if fit:
            best = min(fit, key=lambda row: row.time)
            what = "better" if best.apart == "better" else f"no worse by more than {self.margin:g} {self.metric}"
            return f"Use {best.arm}: it is shown to be {what}, in {best.time:.2f} of the time of {first}."
        better = [row for row in known if row.apart == "better"]
        if better:
            best = max(better, key=lambda row: abs(row.difference.mean))
            return (
                f"Use {best.arm} if quality is what counts: it is shown to be better, at {best.time:.2f} of the time "
                f"of {first}; nothing that takes less time is shown to be as good."
            )
        if not faster:
            return f"Stay with {first}: no arm that can be judged saves {1 - FASTER:.0%} of the time or more."
        open_ones = [row for row in faster if row.apart == ""]
        if not open_ones:
            return f"Stay with {first}: what takes less time is shown to be worse ({_list(faster)})."
        if self.margin is None:
            return (
                f"Stay with {first} for now: what takes less time ({_list(open_ones)}) cannot be told apart from it, "
                "which does not show that it is as good; say with a margin how much you would give for the time."
            )
        likely = [row for row in open_ones if row.total_seeds is not None]
        if not likely:
            return (
                f"Stay with {first}: what takes less time ({_list(open_ones)}) is not shown to be no worse by more "
                f"than {self.margin:g} {self.metric}, and more seeds are not likely to show it."
            )
        next_one = min(likely, key=lambda row: (row.total_seeds, row.time))
        return (
            f"Stay with {first} for now, and run {next_one.total_seeds} seeds if {next_one.time:.2f} of the time is "
            f"worth it: then {next_one.arm} is likely to be shown no worse by more than {self.margin:g} {self.metric}."
        )

    @property
    def notes(self) -> list[str]:
        """What the table means, what can be told apart and what cannot, and what failed; one sentence or more each."""
        first, others = self.rows[0], self.rows[1:]
        seconds = f" ({first.arm}: {np.mean(list(first.seconds.values())):.1f} s in the mean)" if first.seconds else ""
        together = f"; {self.jobs} runs at a time, which slow each other down." if self.jobs > 1 else "."
        made = [
            f"Time: of training, everything counted, relative to {first.arm}, median{seconds}{together}",
            f"Difference: to {first.arm}, paired by seed. With {LEVEL:.0%} all {len(others)} intervals hold at once."
            if len(others) > 1
            else f"Difference: to {first.arm}, paired by seed, with its {LEVEL:.0%} interval.",
        ]
        spans = [
            f"{row.arm} {min(row.times.values()):.2f} to {max(row.times.values()):.2f}"
            for row in others
            if len(row.times) > 1
        ]
        if spans:
            made.insert(1, f"Time by seed: {', '.join(spans)}.")
        judged = [row for row in others if row.difference is not None and not math.isnan(row.difference.low)]
        apart = [f"{row.arm} ({row.apart})" for row in judged if row.apart]
        alike = [row.arm for row in judged if not row.apart]
        if judged:
            made.append(
                (f"Told apart from {first.arm}: {', '.join(apart)}. " if apart else "")
                + (f"Not told apart from {first.arm}: {', '.join(alike)}." if alike else "")
            )
            if not apart:
                made[-1] = f"Nothing can be told apart: {', '.join(alike)} may be better or worse than {first.arm}."
        for row in others:
            if row.difference is not None and row.difference.seeds == 1:
                made.append(f"{row.arm}: one seed says nothing about another one.")
            elif row.difference is not None and math.isnan(row.difference.low):
                made.append(
                    f"{row.arm}: the same difference in every seed, so that its spread is not known; take more seeds, "
                    "or a finer metric."
                )
        if self.margin is not None:
            made += [self._margin_note(row) for row in judged]
        for row in self.rows:
            by_error: dict[str, list[str]] = {}
            for seed, error in sorted(row.errors.items()):
                by_error.setdefault(error, []).append(str(seed))
            made += [
                f"{row.arm}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: failed: {error}"
                for error, seeds in by_error.items()
            ]
        return [note.strip() for note in made]

    def _margin_note(self, row: Row) -> str:
        said = f"{row.arm}: no worse by at most {self.margin:g} {self.metric}: "
        if row.no_worse:
            return said + "shown."
        if row.total_seeds is not None:
            n = row.further_seeds
            return said + f"not shown; {n} more seed{'s' * (n > 1)} would do ({POWER:.0%} likely)."
        loss = row.difference.mean if self.lower_is_better else -row.difference.mean
        if loss >= self.margin:
            return said + "not shown, and the mean difference is beyond it."
        return said + "not shown, and no feasible number of seeds would do."

    # ---- Forms ----

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads and the cells of the one table."""
        scale = max((abs(v) for row in self.rows for v in row.scores.values()), default=1.0)
        digits = 4 if scale <= 2 else 2 if scale <= 1000 else 0
        heads = ["arm", "time", "mean", "difference", f"{LEVEL:.0%} interval", "no worse", "seeds"]
        lines = []
        for row in self.rows:
            cells = [row.arm, _number(row.time, ".2f"), _number(row.mean, f".{digits}f"), "", "", ""]
            if row.difference is not None:
                mean, low, high, _, _ = row.difference
                cells[3] = f"{mean:+.{digits}f}"
                cells[4] = "not known" if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
                cells[5] = {None: "", True: "shown", False: "not shown"}[row.no_worse]
            count = len(row.scores)
            lines.append([*cells, f"{count} of {count + len(row.errors)}" if row.errors else str(count)])
        if self.margin is None:
            return [h for h in heads if h != "no worse"], [line[:5] + line[6:] for line in lines]
        return heads, lines

    @property
    def _head(self) -> str:
        seeds = sorted({seed for row in self.rows for seed in (*row.scores, *row.errors)})
        which = "lower" if self.lower_is_better else "higher"
        margin = "" if self.margin is None else f", margin {self.margin:g}"
        return f"{self.title}: {self.metric} ({which} is better{margin}), seeds {', '.join(map(str, seeds))}"

    def __str__(self) -> str:
        heads, lines = self._cells()
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        widths[0] = max(8, min(widths[0], WIDTH - sum(width + 2 for width in widths[1:])))  # names are folded
        text = [*textwrap.wrap(self._head, WIDTH), ""]
        for line in [heads, *lines]:
            name, *folded = textwrap.wrap(line[0], widths[0]) or [""]
            cells = [name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            text += ["  ".join(cells).rstrip(), *folded]
        text.append("")
        for note in self.notes:
            text += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
        return "\n".join([*text, "", *textwrap.wrap(self.advice, WIDTH)])

    def markdown(self) -> str:
        """Return table, chart (a link to `comparison.png`), notes and advice as Markdown."""
        heads, lines = self._cells()
        rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        notes = "\n".join(f"- {note}" for note in self.notes)
        picture = f"![{self.metric} against time](comparison.png)"
        return f"# {self._head}\n\n**{self.advice}**\n\n{table}\n\n{picture}\n\n{notes}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a plain dict, for JSON; what is not known is `None`."""
        rows = []
        for row in self.rows:
            found = row.difference
            rows.append(
                {
                    "arm": row.arm,
                    "settings": dict(self.settings[row.arm]),
                    "scores": {str(seed): value for seed, value in sorted(row.scores.items())},
                    "seconds": {str(seed): value for seed, value in sorted(row.seconds.items())},
                    "errors": {str(seed): text for seed, text in sorted(row.errors.items())},
                    "mean": _known(row.mean),
                    "time": _known(row.time),
                    "times": {str(seed): value for seed, value in row.times.items()},
                    "faster": row.faster,
                    "difference": None if found is None else {k: _known(v) for k, v in found._asdict().items()},
                    "apart": row.apart,
                    "no_worse": row.no_worse,
                    "further_seeds": row.further_seeds,
                }
            )
        return {
            "title": self.title,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "margin": self.margin,
            "level": LEVEL,
            "power": POWER,
            "jobs": self.jobs,
            "arms": rows,
            "notes": self.notes,
            "advice": self.advice,
        }

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the metric against time, as PNG or by the suffix: small dots are runs, bars the table's intervals."""
        first = self.rows[0]
        texts = {"xlabel": f"time of training relative to {first.arm}", "ylabel": self.metric}
        with chart(path, (7, 4.5), **{name: text.replace("$", r"\$") for name, text in texts.items()}) as axes:
            shown = [row for row in self.rows if not math.isnan(row.time)]
            if shown:
                level, worse = first.mean, 1 if self.lower_is_better else -1
                axes.axhline(level, color=GREY, linewidth=0.8, zorder=0)
                if self.margin is not None:
                    limit = level + worse * self.margin
                    axes.axhline(limit, color=DROPPED, linewidth=1, linestyle="--", label=f"margin of {self.margin:g}")
            for number, row in enumerate(shown):
                colour = f"C{number % 10}" if row is not first else "#212529"
                for seed, time in row.times.items():
                    axes.scatter(time, row.scores[seed], s=9, color=colour, alpha=0.4)
                # At the first arm's mean plus the paired difference: what bars and lines say are differences.
                height = level + (row.difference.mean if row.difference is not None else 0.0)
                if row.difference is not None and not math.isnan(row.difference.low):
                    reach = row.difference.high - row.difference.mean
                    axes.errorbar(row.time, height, yerr=reach, color=colour, capsize=3, linewidth=1, zorder=2)
                axes.scatter(row.time, height, s=45, color=colour, label=row.arm, zorder=3)
            axes.set_xlim(left=0)

    def write(self, folder: Path) -> None:
        """Write `comparison.txt`, `.json`, `.md`, `.png`, and `.html`, which needs nothing but itself."""
        write_text(folder / "comparison.txt", f"{self}\n")
        write_json(folder / "comparison.json", self.to_dict())
        write_text(folder / "comparison.md", self.markdown())
        self.plot(folder / "comparison.png")
        drawing = folder / "comparison.svg"
        self.plot(drawing)
        svg = drawing.read_text(encoding="utf-8")
        drawing.unlink()
        write_text(folder / "comparison.html", self._page(svg[svg.index("<svg") :]))

    def _page(self, svg: str) -> str:
        heads, lines = self._cells()
        cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        names = sorted({key for settings in self.settings.values() for key in settings})
        arms = list(self.settings)
        differing = [n for n in names if len({repr(self.settings[arm].get(n)) for arm in arms}) > 1]
        shared = [n for n in names if n not in differing]
        rows = "".join(
            f"<tr><th>{escape(n)}</th>"
            + "".join(f"<td class=text>{escape(str(self.settings[arm].get(n, '')))}</td>" for arm in arms)
            + "</tr>"
            for n in differing
        )
        same = ", ".join(f"{n}: {self.settings[arms[0]].get(n)}" for n in shared)
        style = STYLE + "td { font-variant-numeric: tabular-nums } svg text { font-size: inherit; fill: inherit }"
        parts = [
            f"<h1>{escape(self.advice)}</h1>",
            f"<p>{escape(self._head)}</p>",
            f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{cells}</table>",
            svg,
            "<p>Small dots: runs. Points and bars: the mean difference to the first arm and its interval, on top of "
            "the first arm's mean.</p>",
            f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in self.notes)}</ul>",
            "<h2>Settings in which the arms differ</h2>",
            f"<table><tr><th></th>{''.join(f'<th>{escape(arm)}</th>' for arm in arms)}</tr>{rows}</table>",
            f"<h2>All others</h2><p>{escape(same)}</p>",
        ]
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{style}</style>'
        body = "\n".join(parts)
        return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _list(rows: Sequence[Row]) -> str:
    return ", ".join(row.arm for row in rows)
