"""An evaluation as one HTML page that needs nothing but itself: the scores, and where two systems differ most."""

from __future__ import annotations

import os
from html import escape
from typing import Any

import numpy as np

from ...files import write_text
from .formats import number
from .ptb import ptb_words
from .suite import LOWER_IS_BETTER, NAMES, Evaluation

SHOWN = 50  # instances a pair of systems
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #212529 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin: 0 }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0 }
thead th { border-bottom: 2px solid #adb5bd } tbody tr { border-bottom: 1px solid #dee2e6 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
article { border: 1px solid #dee2e6; border-radius: .4rem; padding: .8rem 1rem; margin: 1rem 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem } .pair > div { overflow-wrap: anywhere }
.small { color: #495057; font-size: .87rem; overflow-wrap: anywhere } .better { font-weight: 600; color: #2b7a4b }
mark { background: #ffe8a3; padding: 0 .1em; border-radius: .15em } ul { margin: .3rem 0; padding-left: 1.2rem }
.error { color: #a61e4d } code { font-size: .85rem }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr } }
"""


def write_page(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """
    Write the page, atomically.

    It has the scores of all systems and, for the first against each other one, the instances where their scores differ
    most, side by side with the references; of a single system those that score lowest. Of several runs the first one
    stands for the system. Words that no reference has are marked.

    Args:
        evaluation ([`Evaluation`]): of any number of systems.
        path: the file.
    """
    result = evaluation.result
    names = list(evaluation.systems)
    title = " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"
    parts = [
        f"<h1>{escape(title)}: {result['n']} instances, protocol {escape(result['protocol'])}</h1>",
        _scores(result),
        f"<p class=small>{_legend(result)}</p>",
    ]
    parts += [f"<p class=small>{escape(note)}</p>" for note in result["notes"]]
    rows = list(evaluation.instances())
    for name in names[1:] or [None]:
        parts += _differences(evaluation, rows, names[0], name)
    signatures = (f"<li>{NAMES[m]}: <code>{escape(text)}</code></li>" for m, text in result["signatures"].items())
    parts += ["<h2>How the scores were made</h2>", f"<ul class=small>{''.join(signatures)}</ul>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_text(path, page, errors="replace")


def _scores(result: dict[str, Any]) -> str:
    """Return the table: a row a metric, a column a system."""
    systems = result["systems"]
    heads = ["", *(f"{name} ({one['runs']} runs)" if one["runs"] > 1 else name for name, one in systems.items())]
    rows = []
    for metric in result["signatures"]:
        cells = []
        for one in systems.values():
            cell = f"<b>{number(metric, one['scores'][metric])}</b>"
            if "spread" in one:
                cell += f" <span class=small>± {number(metric, one['spread'][metric])}</span>"
            if metric in one["intervals"]:
                cell += "<br><span class=small>{} to {}</span>".format(
                    *(number(metric, bound) for bound in one["intervals"][metric])
                )
            if metric in one.get("differences", {}):
                difference = one["differences"][metric]
                tests = {"bootstrap": difference["p_bootstrap"], "randomization": difference["p_randomization"]}
                texts = [f"p {name} {p:.3f}" for name, p in tests.items() if p is not None]
                gap = number(metric, difference["value"])
                texts = [gap if gap.startswith("-") else f"+{gap}", *texts]
                cell += f"<br><span class=small>{', '.join(texts)}</span>"
            cells.append(cell)
        down = " (lower is better)" if metric in LOWER_IS_BETTER else ""
        rows.append(
            f"<tr><th>{NAMES[metric]}{down}</th>"
            + "".join(f"<td class=number>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    described = {"words": "words a text", "distinct_1": "distinct words", "distinct_2": "distinct pairs of words"}
    for key, name in described.items():
        cells = (f"<td class=number>{one['texts'][key]:.3g}</td>" for one in systems.values())
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th{' class=number' if i else ''}>{escape(name)}</th>" for i, name in enumerate(heads))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _legend(result: dict[str, Any]) -> str:
    """Return what the numbers below a score are."""
    systems = result["systems"].values()
    texts = []
    if result["bootstrap"]:
        below = f"Below a score: its 95 % interval over instances ({result['bootstrap']} resamples)"
        if len(systems) > 1:
            below += f", the difference to {escape(result['first'])}, and p of no difference by two tests"
        texts.append(below + (", corrected (Holm) for how many systems there are" if len(systems) > 2 else ""))
    if any("spread" in one for one in systems):
        texts.append("After ±: the standard deviation over runs")
    texts.append("Distinct words and pairs: as a share of all")
    return ". ".join(texts) + "."


def _differences(evaluation: Evaluation, rows: list[dict[str, Any]], first: str, second: str | None) -> list[str]:
    """Return the heading and the instances of one pair of systems, or of the first alone."""
    names = [first] if second is None else [first, second]
    values = np.array([[list(row["systems"][name][0]["scores"].values()) for name in names] for row in rows])
    signs = np.array([-1.0 if metric in LOWER_IS_BETTER else 1.0 for metric in evaluation.metrics])
    better = values[:, -1] * signs if second is None else (values[:, 1] - values[:, 0]) * signs
    spread = better.std(axis=0)
    # Scores of all scales count alike: each in units of its own spread over the instances.
    better = (better / np.where(spread > 0, spread, 1.0)).mean(axis=1)
    order = np.argsort(better if second is None else -np.abs(better), kind="stable")[:SHOWN].tolist()
    if second is None:
        title = f"Where {first} scores lowest"
    else:
        order = [i for i in order if better[i] != 0]
        title = f"Where {first} and {second} differ most"
    several = any(len(evaluation.systems[name]) > 1 for name in names)
    runs = " Of several runs the first is shown." if several else ""
    parts = [
        f"<h2>{escape(title)}</h2>",
        f"<p class=small>{len(order)} of {len(rows)} instances, by all scores together, each in units of its spread."
        f"{runs} Words that no reference has are <mark>marked</mark>.</p>",
    ]
    for i in order:
        winner = None if second is None else names[int(better[i] > 0)]
        parts.append(_article(rows[i], names, winner))
    return parts


def _article(row: dict[str, Any], names: list[str], winner: str | None) -> str:
    known = {word for reference in row["references"] for word in ptb_words(reference)}
    sides = []
    for name in names:
        one = row["systems"][name][0]
        head = f"<h3>{escape(name)}</h3>"
        if name == winner:
            head = f"<h3 class=better>{escape(name)} (better)</h3>"
        scores = ", ".join(f"{NAMES[metric]} {number(metric, value)}" for metric, value in one["scores"].items())
        errors = "".join(f"<li class=error>{escape(error)}</li>" for error in one.get("errors", ()))
        side = f"<div>{head}<p>{_marked(one['prediction'], known)}</p><p class=small>{scores}</p>"
        sides.append(side + (f"<ul class=small>{errors}</ul>" if errors else "") + "</div>")
    references = "".join(f"<li>{escape(reference)}</li>" for reference in row["references"])
    mr = f"<p class=small>{escape(row['mr'])}</p>" if row.get("mr") else ""
    return (
        f"<article><p class=small>instance {row['instance']}</p>{mr}<div class=pair>{''.join(sides)}</div>"
        f"<p class=small>References</p><ul class=small>{references}</ul></article>"
    )


def _marked(text: str, known: set[str]) -> str:
    """Return a text with the words marked that no reference has."""
    words = []
    for word in text.split():
        new = any(part not in known for part in ptb_words(word))
        words.append(f"<mark>{escape(word)}</mark>" if new else escape(word))
    return " ".join(words) or "<i>(empty)</i>"
