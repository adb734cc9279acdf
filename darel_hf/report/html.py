"""A report as one HTML page that needs nothing but itself: no script, no network, no server; all text escaped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import numpy as np

from ..files import write_text
from .report import DROPPED, KEPT, Report

GREY = "#adb5bd"
SHOWN = 10  # samples a list
LONGEST = 1000  # characters of a sample

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #212529 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
pre { white-space: pre-wrap }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #dee2e6 }
td.text { white-space: pre-wrap; overflow-wrap: anywhere } td.number { white-space: nowrap }
.bar { display: flex; height: 1.6rem } .key span { display: inline-block; margin-right: 1.2rem }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: #495057 }
"""


def write_html(
    report: Report,
    path: str | os.PathLike,
    history: list[dict[str, float]],
    environment: Mapping[str, Any],
    text_of: Callable[[int], str] | None = None,
) -> None:
    """
    Write the page.

    Args:
        report ([`Report`]): of the run.
        path: file to write, atomically.
        history (`list[dict]`): `trainer.state.log_history`, for what changes over time.
        environment (`dict`): what [`darel_hf.report.describe`] returned.
        text_of (`Callable`, *optional*): sample id -> its text, for the most extreme samples.
    """
    accelerators = _accelerators(report)
    known = report.offline_losses[~np.isnan(report.offline_losses)]
    parts = [
        f"<h1>DAREL: {report.plan.predicted_saving:.0%} of the training time saved as planned</h1>"
        if np.isnan(report.measured_time)
        else f"<h1>DAREL: {report.measured_time:.2f} of the plain training time</h1>",
        f"<pre>{escape(str(report))}</pre>",
        "<h2>Where the time went</h2>",
        _time_split(report.seconds),
        *(["<h2>What made steps cheaper</h2>", accelerators] if accelerators else []),
    ]
    if len(known) > 1:
        parts += ["<h2>Losses before training, kept and dropped</h2>", _histogram(report)]
    steps = [entry for entry in history if "darel/kept_fraction" in entry]
    if len(steps) > 1:
        parts += ["<h2>Selection over time</h2>", _over_time(steps)]
    for kept, what in ((False, "dropped"), (True, "kept")):
        listed = report.extremes(kept, SHOWN) if len(known) > 1 else []
        if listed:
            parts += [f"<h2>Most extreme samples that were {what}</h2>", _samples(listed, text_of, why=not kept)]
    parts += ["<h2>Settings</h2>", _table(report.config.to_dict()), "<h2>Environment</h2>", _table(environment)]
    head = f'<meta charset="utf-8"><title>DAREL report</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    write_text(
        path,
        f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n',
        errors="backslashreplace",
    )


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{escape(str(k))}</th><td class=text>{escape(_said(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def _accelerators(report: Report) -> str:
    """Show what each accelerator saved as planned, what all save in the run, and why others were not in use."""
    rows = []
    for found in report.accelerators:
        factor = "not timed" if found["factor"] is None else f"{found['factor']:.2f} of one without it"
        rows.append((found["name"], f"{found['setting']}={found['value']!r}", found["exactness"], factor))
    if rows and not np.isnan(report.step_time):
        said = f"{report.step_time:.2f} of a plain one in the run, {report.plan.step_time:.2f} as planned"
        rows.append(("all that was done", "", "", said))
    rows += [(name, "left out", "", reason) for name, reason in report.left_out.items()]
    if not rows:
        return ""
    cells = ("".join(f"<td class=text>{escape(cell)}</td>" for cell in row) for row in rows)
    head = "<tr><th>accelerator</th><th>setting</th><th>exactness</th><th>a step takes</th></tr>"
    return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _key(colours: Mapping[str, str]) -> str:
    items = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f"<p class=key>{''.join(items)}</p>"


def _time_split(seconds: Mapping[str, float]) -> str:
    names = {"probe": "measuring costs", "offline": "scoring offline", "scoring": "scoring online"}
    names |= {"selection": "selecting", "evaluation": "evaluating"}
    colours = dict(zip(names, ("#f2cc8f", DROPPED, "#c1440e", "#81b29a", GREY), strict=True))
    parts = {name: seconds[name] for name in names if seconds[name] > 0}
    parts["training"] = max(seconds["total"] - sum(parts.values()), 0.0)
    names["training"], colours["training"] = "training", KEPT
    bar = "".join(f'<div style="flex:{value:.6f};background:{colours[name]}"></div>' for name, value in parts.items())
    key = {f"{names[name]} {value:.1f} s": colours[name] for name, value in parts.items()}
    return f"<div class=bar>{bar}</div>{_key(key)}"


def _histogram(report: Report) -> str:
    known = ~np.isnan(report.offline_losses)
    losses = report.offline_losses[known]
    low, high = np.quantile(losses, (0, 0.999))
    edges = np.linspace(low, high if high > low else low + 1, 61)
    kept = np.histogram(np.clip(losses[report.kept[known]], None, edges[-1]), edges)[0]
    dropped = np.histogram(np.clip(losses[~report.kept[known]], None, edges[-1]), edges)[0]
    scale = 200 / max((kept + dropped).max(), 1)
    bars = []
    for i, (k, d) in enumerate(zip(kept, dropped, strict=True)):
        bars.append(f'<rect x="{10 * i}" y="{200 - k * scale:.1f}" width="9" height="{k * scale:.1f}" fill="{KEPT}"/>')
        top = 200 - (k + d) * scale
        bars.append(f'<rect x="{10 * i}" y="{top:.1f}" width="9" height="{d * scale:.1f}" fill="{DROPPED}"/>')
    labels = f'<text x="0" y="215">{low:.2f}</text><text x="600" y="215" text-anchor="end">{edges[-1]:.2f} nats</text>'
    key = {f"kept ({kept.sum():,})": KEPT, f"dropped ({dropped.sum():,})": DROPPED}
    return f'<svg viewBox="0 0 600 220">{"".join(bars)}{labels}</svg>{_key(key)}'


def _over_time(steps: list[dict[str, float]]) -> str:
    """Draw the losses of candidates (10th, 50th and 90th percentile) and the part of samples seen, over steps."""
    x = np.array([entry["step"] for entry in steps], float)
    x = 600 * (x - x[0]) / max(x[-1] - x[0], 1)
    drawn, key = [], {}
    quantiles = [f"darel/loss_p{p}" for p in (10, 50, 90)]
    scored = [i for i, entry in enumerate(steps) if quantiles[0] in entry]
    if len(scored) > 1:
        values = np.array([[steps[i][name] for name in quantiles] for i in scored])
        low, high = values.min(), max(values.max(), values.min() + 1e-9)
        y = 195 - 190 * (values - low) / (high - low)
        lowest, median, highest = (list(zip(x[scored], values, strict=True)) for values in y.T)
        drawn.append(f'<polygon points="{_points(highest + lowest[::-1])}" fill="{KEPT}" opacity=".2"/>')
        drawn.append(f'<polyline points="{_points(median)}" fill="none" stroke="{KEPT}"/>')
        key[f"losses of candidates, median and 10th to 90th percentile ({low:.2f} to {high:.2f} nats)"] = KEPT
    for name, text, colour in (
        ("darel/coverage", "samples trained on at least once", DROPPED),
        ("darel/kept_fraction", "fraction of samples that gets a backward pass", "#81b29a"),
        ("darel/scoring_share", "share of the time spent on scoring", "#c1440e"),
    ):
        found = [(x[i], 195 - 190 * entry[name]) for i, entry in enumerate(steps) if name in entry]
        if found:
            drawn.append(f'<polyline points="{_points(found)}" fill="none" stroke="{colour}"/>')
            last = next(entry[name] for entry in reversed(steps) if name in entry)
            key[f"{text} (0 to 1, last {last:.2f})"] = colour
    first, final = int(steps[0]["step"]), int(steps[-1]["step"])
    labels = f'<text x="0" y="212">step {first}</text><text x="600" y="212" text-anchor="end">step {final}</text>'
    return f'<svg viewBox="0 0 600 220">{"".join(drawn)}{labels}</svg>{_key(key)}'


def _points(pairs: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _samples(listed: list[dict[str, Any]], text_of: Callable[[int], str] | None, why: bool) -> str:
    rows = []
    for sample in listed:
        text = "" if text_of is None else text_of(sample["sample_id"])
        text = text[:LONGEST] + ("…" if len(text) > LONGEST else "")
        reason = f"<br><small>{escape(sample['why'])}</small>" if why else ""
        rows.append(
            f"<tr><td class=number>{sample['sample_id']}</td><td class=number>{sample['loss']:.3f}</td>"
            f"<td class=number>{sample['n_tokens']}</td><td class=text>{escape(text)}{reason}</td></tr>"
        )
    head = "<tr><th>id</th><th>loss</th><th>positions</th><th>sample</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"
