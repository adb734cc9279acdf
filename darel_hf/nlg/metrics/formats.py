"""Scores as tables: for a terminal of 80 columns, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

from .significance import LEVEL
from .suite import LOWER_IS_BETTER, NAMES

FORMATS = ("text", "markdown", "latex", "json", "csv")
_DIGITS = {"meteor": 4, "nist": 4, "rouge_l": 4, "cider": 4}


def number(metric: str, value: float) -> str:
    """Return a score as it is printed: two digits on scales of 0 to 100, else four."""
    return f"{value:.{_DIGITS.get(metric, 2)}f}"


def score_table(scores: dict[str, Any]) -> Any:
    """Return a `rich.table.Table` of what [`NLGMetrics`] returned, or of an [`Evaluation`]'s `result`."""
    result = scores if "systems" in scores else _of_one(scores)
    return _systems_table(result) if len(result["systems"]) > 1 else _one_table(result)


def shown(result: dict[str, Any], form: str) -> str:
    """
    Return an [`Evaluation`]'s `result` as a text.

    Args:
        result (`dict`): as in [`Evaluation`].
        form (`str`): `"markdown"`, `"latex"`, `"json"` or `"csv"`.
    """
    forms: dict[str, Callable[[dict[str, Any]], str]] = {
        "markdown": _markdown,
        "latex": _latex,
        "csv": _csv,
        "json": lambda result: json.dumps(result, indent=2, ensure_ascii=False) + "\n",
    }
    return forms[form](result)


def _of_one(scores: dict[str, Any]) -> dict[str, Any]:
    """Put what `NLGMetrics.__call__` returns into the form of many systems."""
    own = {
        "runs": 1,
        "scores": {name: scores[name] for name in NAMES if scores.get(name) is not None},
        "intervals": scores["intervals"],
    }
    systems = {"predictions": own}
    if "baseline" in scores:
        base = {"runs": 1, "scores": scores["baseline"], "intervals": {}}
        own["differences"] = {
            name: {
                "value": own["scores"][name] - base["scores"][name],
                "interval": scores["differences"][name],
                "p_bootstrap": p,
                "p_randomization": scores.get("p_randomization", {}).get(name),
            }
            for name, p in scores["p_values"].items()
        }
        systems = {"baseline": base, **systems}
    return {"protocol": scores["protocol"], "n": scores["n"], "systems": systems, "first": next(iter(systems))}


# ---- For a terminal ----


def _one_table(result: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    (system,) = result["systems"].values()
    table = Table(title=f"{result['n']} instances, protocol {result['protocol']}", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    intervals, spread = system["intervals"], system.get("spread")
    runs = system["runs"]
    extra = [f"spread of {runs}"] if spread else []
    for column in ["score", *extra, *(["95 % interval"] if intervals else [])]:
        table.add_column(column, justify="right")
    for name, value in system["scores"].items():
        row = [_heading(name), number(name, value)]
        if spread:
            row.append(number(name, spread[name]))
        if intervals:
            row.append(_interval(name, intervals[name]))
        table.add_row(*row)
    return table


def _systems_table(result: dict[str, Any]) -> Any:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    systems = result["systems"]
    title = f"{result['n']} instances, protocol {result['protocol']}"
    if len(systems) > 2:
        title += "; p corrected (Holm)"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False
    )
    table.add_column("", min_width=8, overflow="fold")  # the one column that gives way: no digit is cut off
    ranked = any("ranks" in system for system in systems.values())
    spread = any("spread" in system for system in systems.values())
    tested = any(system["intervals"] for system in systems.values())
    columns = ["score", *(["spread"] if spread else [])]
    columns += ["95 % interval", "- first", "p boot", "p rand"] if tested else []
    for column in [*columns, *(["rank"] if ranked else [])]:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    metrics = next(iter(systems.values()))["scores"]
    for metric in [name for name in metrics if metrics[name] is not None]:
        table.add_row(Text(_heading(metric), style="bold"))
        for name, system in systems.items():
            runs = f"\n({system['runs']} runs)" if system["runs"] > 1 else ""
            row: list[Any] = [Padding(Text(name + runs), (0, 0, 0, 1)), number(metric, system["scores"][metric])]
            if spread:
                row.append(number(metric, system["spread"][metric]) if "spread" in system else "")
            if tested:
                row.append(_interval(metric, system["intervals"].get(metric)))
                difference = system.get("differences", {}).get(metric)
                row += ["", "", ""] if difference is None else _difference(metric, difference)
            if ranked:
                row.append(str(system.get("ranks", {}).get(metric, "")))
            table.add_row(*row)
        table.add_section()
    return table


def _heading(metric: str) -> str:
    return NAMES[metric] + (" ↓" if metric in LOWER_IS_BETTER else "")


def _difference(metric: str, difference: dict[str, Any]) -> list[str]:
    value = number(metric, difference["value"])
    return [
        value if value.startswith("-") else f"+{value}",
        *(_p(difference[test]) for test in ("p_bootstrap", "p_randomization")),
    ]


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(metric: str, interval: list[float] | None) -> str:
    return "" if interval is None else " to ".join(number(metric, bound) for bound in interval)


# ---- For papers and programs ----


def _significant(difference: dict[str, Any] | None) -> bool:
    """Whether both tests, corrected, tell a system from the first."""
    tests = [] if difference is None else [difference["p_bootstrap"], difference["p_randomization"]]
    known = [p for p in tests if p is not None]
    return bool(known) and all(p < LEVEL for p in known)


def _cells(result: dict[str, Any], metrics: list[str], plus_minus: str, star: str) -> list[list[str]]:
    rows = []
    for name, system in result["systems"].items():
        row = [name + (f" ({system['runs']} runs)" if system["runs"] > 1 else "")]
        for metric in metrics:
            cell = number(metric, system["scores"][metric])
            if "spread" in system:
                cell += f" {plus_minus} {number(metric, system['spread'][metric])}"
            interval = system["intervals"].get(metric)
            cell += f" ({_interval(metric, interval)})" if interval else ""
            cell += star if _significant(system.get("differences", {}).get(metric)) else ""
            rank = system.get("ranks", {}).get(metric)
            cell += f" [{rank}]" if rank is not None else ""
            row.append(cell)
        rows.append(row)
    return rows


def _legend(result: dict[str, Any]) -> list[str]:
    systems = result["systems"].values()
    lines = [f"{result['n']} instances, protocol {result['protocol']}."]
    if any("spread" in system for system in systems):
        lines.append("Mean and standard deviation of the runs.")
    if result["bootstrap"]:
        lines.append(
            f"In brackets 95 % intervals of {result['bootstrap']} bootstrap resamples (seed {result['seed']})."
        )
    if len(systems) > 1 and result["bootstrap"]:
        corrected = f"corrected for {len(systems) - 1} comparisons by Holm" if len(systems) > 2 else "two-sided"
        lines.append(
            f"*: differs from {result['first']} (paired bootstrap and approximate randomization, p < {LEVEL}, "
            f"{corrected}). [rank]: 1 + how many systems are shown to be better."
        )
    return lines


def _markdown(result: dict[str, Any]) -> str:
    metrics = list(result["signatures"])
    heads = ["system", *(f"{NAMES[m]} {'↓' if m in LOWER_IS_BETTER else '↑'}" for m in metrics)]
    rows = [heads, ["---"] + ["---:"] * len(metrics), *_cells(result, metrics, "±", "\\*")]
    lines = ["| " + " | ".join(_escaped_markdown(cell) for cell in row) + " |" for row in rows]
    lines += ["", " ".join(line.replace("*:", "\\*:") for line in _legend(result)), ""]
    lines += [f"- {NAMES[m]}: `{signature}`" for m, signature in result["signatures"].items()]
    return "\n".join(lines) + "\n"


def _escaped_markdown(text: str) -> str:
    return re.sub(r"([|`<>])", r"\\\1", text)


def _latex(result: dict[str, Any]) -> str:
    metrics = list(result["signatures"])
    heads = [r"$\downarrow$" if metric in LOWER_IS_BETTER else r"$\uparrow$" for metric in metrics]
    lines = [f"% {line}" for line in _legend(result)]
    lines += [f"% {NAMES[m]}: {signature}" for m, signature in result["signatures"].items()]
    lines += [r"\begin{tabular}{l" + "r" * len(metrics) + "}", r"\toprule"]
    lines.append(
        " & ".join(["system", *(f"{NAMES[m]} {head}" for m, head in zip(metrics, heads, strict=True))]) + r" \\"
    )
    lines.append(r"\midrule")
    for row in _cells(result, metrics, "\0", "\1"):
        lines.append(" & ".join(_escaped_latex(cell) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines).replace("\0", r"$\pm$").replace("\1", r"$^{*}$") + "\n"


def _escaped_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda found: special.get(found.group(), "\\" + found.group()), text)


def _csv(result: dict[str, Any]) -> str:
    rows = []
    for metric, signature in result["signatures"].items():
        for name, system in result["systems"].items():
            low, high = system["intervals"].get(metric, ("", ""))
            difference = system.get("differences", {}).get(metric, {})
            gap_low, gap_high = difference.get("interval", ("", ""))
            row = {"metric": metric, "system": name, "runs": system["runs"], "score": system["scores"][metric]}
            row |= {"spread": system.get("spread", {}).get(metric, ""), "low": low, "high": high}
            row |= {"difference": difference.get("value", ""), "difference_low": gap_low, "difference_high": gap_high}
            row |= {test: difference.get(test, "") for test in ("p_bootstrap", "p_randomization")}
            row |= {"rank": system.get("ranks", {}).get(metric, ""), "n": result["n"]}
            rows.append({**row, "protocol": result["protocol"], "signature": signature})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
