"""
The table and the picture of README's first screen, made from the stored rows of `prompts` and `preferences`.

    python eval/benchmarks/first_screen.py

It writes the lines between `<!-- times -->` and `<!-- end of times -->` of README.md, and docs/times.png. Nothing is
measured here: after a benchmark has stored new rows, run it again; a test compares README with the rows.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
PICTURE = README.parent / "docs" / "times.png"
BEGIN, END = "<!-- times -->\n", "<!-- end of times -->\n"


class Way(NamedTuple):
    """
    A line of the table: what stands in it, and which stored row the time is of.

    Attributes:
        change, gradients, on (`str`): the cells: what the user changes, whose gradients a step has, on what data.
        benchmark, arm (`str`): whose row; the latest that was run with these settings.
        settings (`dict`): likewise.
    """

    change: str
    gradients: str
    on: str
    benchmark: str
    arm: str
    settings: dict[str, Any]


E2E = {"data": "e2e_nlg", "samples": 400, "epochs": 5}
LONG = {"lengths": "512,32", "samples": 96, "epochs": 3, "same": 1}
DPO = {"lengths": "256,64", "samples": 48, "epochs": 3}
#: Of the ways that were measured, those that say what is to be gained.
WAYS = (
    Way("`fast=True`", "plain training's", "LoRA on E2E", "prompts", "plain+fast", E2E),
    Way("`shared_prefixes(model)`", "plain training's", "trl's DPO", "preferences", "shared", DPO),
    Way("`ReaderLoraConfig`, `fast=True`", "a reader's", "E2E", "prompts", "reader+fast", E2E),
    Way("the same, long prompts", "a reader's", "512 tokens before 32", "prompts", "reader+fast", LONG),
    Way("the same, saved as stock LoRA", "a reader's, then LoRA's", "E2E", "prompts", "finish_1+fast", E2E),
    Way("a reader, `base_precision`", "a reader's, rounded", "E2E", "prompts", "reader+fast+base_precision", E2E),
)


def row_of(way: Way) -> dict[str, Any]:
    """Return the row, the latest of these settings; raises `LookupError` if there is none."""
    lines = (RESULTS / f"{way.benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["arm"] == way.arm and not row["hardware"]["gpu"]]
    rows = [row for row in rows if way.settings.items() <= {"same": 1, **row["settings"]}.items()]
    if not rows:
        raise LookupError(f"no row of {way.benchmark}.jsonl is of {way.arm} with {way.settings}")
    return rows[-1]


def table() -> str:
    """Return README's table, in Markdown."""
    lines = ["| what changes | on | time, of plain Trainer's (rounds) | gradients |", "| --- | --- | --- | --- |"]
    for way in WAYS:
        times = row_of(way)["times"]
        span = f"{statistics.median(times):.2f}** ({min(times):.2f} to {max(times):.2f})"
        lines.append(f"| {way.change} | {way.on} | **{span} | {way.gradients} |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Draw the medians as bars, and each round as a dot."""
    from darel_hf.report import DROPPED, KEPT, chart

    names = ["plain Trainer", *(f"{way.change.replace('`', '')} ({way.on})" for way in WAYS)]
    with chart(path, (8, 2.4), xlabel="time of the whole run, plain Trainer's = 1; dots: single rounds") as axes:
        axes.barh(0, 1, color="#9a9a9a")
        for place, way in enumerate(WAYS, 1):
            times = row_of(way)["times"]
            axes.barh(place, statistics.median(times), color=KEPT)
            axes.plot(times, [place] * len(times), "o", color=DROPPED, markersize=4)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
    draw(PICTURE)


if __name__ == "__main__":
    main()
