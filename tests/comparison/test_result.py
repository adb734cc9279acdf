"""What a comparison says of given numbers: the table, what can be told apart, advice by its rules, all forms."""

import json
import math
import re

import numpy as np
import pytest

from darel_hf.comparison import Comparison
from darel_hf.comparison.statistics import critical, seeds_needed

TIMES = {"plain": 100.0, "fewer_epochs": 50.0, "fast": 70.0, "darel": 49.0}


def made(scores, margin=1.0, lower=False, times=TIMES, jobs=1, errors=None):
    """A comparison of `{arm: [score by seed]}`."""
    outcomes = {
        (arm, seed): {"bleu": value, "seconds": times[arm] + seed}
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    }
    outcomes |= {place: {"error": text} for place, text in (errors or {}).items()}
    return Comparison.of("e2e.yaml", "bleu", lower, margin, jobs, {arm: {} for arm in scores}, outcomes)


def row(comparison, arm):
    return next(row for row in comparison.rows if row.arm == arm)


PLAIN = [60.0, 61.0, 59.5, 60.3]


def moved(by, spread=0.1):
    return [value + by + spread * (-1) ** i for i, value in enumerate(PLAIN)]


def test_differences_are_paired_and_corrected():
    found = made({"plain": PLAIN, "fewer_epochs": moved(-3), "fast": moved(0), "darel": moved(-0.5, 2)})
    differences = np.array([0.1, -0.1, 0.1, -0.1])
    reach = critical(4, 3) * differences.std(ddof=1) / 2
    fast = row(found, "fast")
    assert fast.difference[:3] == pytest.approx((0, -reach, reach), abs=1e-9)
    assert [r.apart for r in found.rows] == ["", "worse", "", ""]
    assert [r.no_worse for r in found.rows] == [None, False, True, False]
    darel = row(found, "darel")
    needed = seeds_needed(np.std([2, -2, 2, -2], ddof=1), 0.5, 3)
    assert darel.further_seeds == needed - 4 and row(found, "fewer_epochs").further_seeds is None
    assert fast.time == pytest.approx(np.median([(70 + s) / (100 + s) for s in range(4)])) and fast.faster
    said = " ".join(str(found).split())
    assert "Told apart from plain: fewer_epochs (worse). Not told apart from plain: fast, darel." in said
    assert f"not shown; {needed - 4} more seeds would do (80% likely)" in said
    assert "and the mean difference is beyond it" in said


@pytest.mark.parametrize("lower", [False, True])
def test_the_side_that_is_better(lower):
    sign = -1 if lower else 1
    found = made({"plain": PLAIN, "fast": moved(sign * 4), "darel": moved(sign * -0.3)}, lower=lower)
    assert row(found, "fast").apart == "better" and row(found, "fast").no_worse
    assert row(found, "darel").no_worse
    worse = made({"plain": PLAIN, "darel": moved(sign * -4)}, lower=lower)
    assert row(worse, "darel").apart == "worse" and not row(worse, "darel").no_worse


@pytest.mark.parametrize(
    ("scores", "margin", "advice"),
    [
        ({"plain": [60], "darel": [60.2]}, 1, r"Nothing can be said yet"),
        ({"plain": PLAIN, "darel": PLAIN}, 1, r"Nothing can be said yet"),
        ({"plain": PLAIN, "fast": moved(0), "darel": moved(-0.1)}, 1, r"Use darel: .*no worse by more than 1 .* 0.50"),
        ({"plain": PLAIN, "fast": moved(0), "darel": moved(-4)}, 1, r"Use fast: "),
        ({"plain": PLAIN, "darel": moved(4)}, None, r"Use darel: it is shown to be better, in 0"),
        ({"darel": PLAIN, "plain": moved(4)}, None, r"Use plain if quality is what counts: .* 2.0"),
        ({"darel": PLAIN, "plain": moved(0)}, 1, r"Stay with darel: no arm .* saves 5%"),
        ({"plain": PLAIN, "darel": moved(-4)}, 1, r"Stay with plain: .* shown to be worse \(darel\)"),
        ({"plain": PLAIN, "darel": moved(-0.1, 2)}, None, r"Stay with plain for now: .* say with a margin"),
        ({"plain": PLAIN, "darel": moved(-0.1, 2)}, 1, r"Stay with plain for now, and run \d+ seeds"),
        ({"plain": PLAIN, "darel": moved(-1.5, 2)}, 1, r"Stay with plain: .*more seeds are not likely"),
    ],
)
def test_advice(scores, margin, advice):
    found = made(scores, margin)
    assert re.match(advice, found.advice), found.advice
    assert found.advice.count(". ") == 0  # one sentence


def test_where_nothing_can_be_told_apart_it_says_so():
    generator = np.random.default_rng(0)
    scores = {arm: (60 + generator.normal(0, 1, 3)).tolist() for arm in TIMES}
    found = made(scores)
    assert not any(r.apart or r.no_worse for r in found.rows)
    said = " ".join(str(found).split())
    assert "Nothing can be told apart: fewer_epochs, fast, darel may be better or worse than plain." in said
    assert found.advice.startswith("Stay with plain for now")


def test_failed_runs_keep_their_row():
    errors = {("fast", seed): "ValueError: unpad=True: <b>no</b>" for seed in range(4)}
    errors[("darel", 4)] = "killed by signal 9"
    found = made({"plain": PLAIN, "fast": [], "darel": moved(0)}, errors=errors)
    assert [len(r.scores) for r in found.rows] == [4, 0, 4] and math.isnan(row(found, "fast").time)
    said = str(found)
    assert re.search(r"^fast +- +- +0 of 4$", said, re.M)
    assert "darel, seed 4: failed: killed by signal 9" in said
    assert found.to_dict()["arms"][1]["errors"]["0"].startswith("ValueError")
    bad = made({"plain": PLAIN, "darel": [60.0, math.nan, 61.0, 60.0]})
    assert row(bad, "darel").errors == {1: "its bleu is nan"} and row(bad, "darel").difference.seeds == 3
    none = made({"plain": [], "darel": moved(0)}, errors={("plain", 0): "x"})
    assert none.advice.startswith("Nothing can be said yet") and "plain" in str(none)


def test_forms(tmp_path):
    scores = {"plain": PLAIN, "fewer_epochs": moved(-3), "fast": [], "darel": moved(-0.5, 2)}
    found = made(scores, errors={("fast", 0): "ValueError: <script>alert(1)</script> " + "x" * 200}, jobs=2)
    found.settings = {arm: {"unpad": arm == "fast", "name": "<i>"} for arm in scores}
    found.write(tmp_path)
    text = (tmp_path / "comparison.txt").read_text()
    assert text == f"{found}\n" and max(len(line) for line in text.splitlines() if "xxx" not in line) <= 80
    assert "2 runs at a time" in text
    long = "a-name-that-people-give-an-arm-" * 3
    folded = str(made({"plain": PLAIN, long: moved(-0.5, 2)}, times={"plain": 100.0, long: 50.0}))
    table = folded[: folded.index("\n- ")].splitlines()
    assert max(map(len, table)) <= 80
    assert long.rstrip("-") in "".join(line.split()[0] for line in table[4:] if line)
    data = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(found.to_dict()))
    assert data["arms"][1]["difference"]["mean"] == pytest.approx(-3) and data["advice"] == found.advice
    page = (tmp_path / "comparison.html").read_text()
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;" in page and "<svg" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)  # it needs nothing but itself
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    table = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"comparison.{e}" for e in ("html", "json", "md", "png", "txt")
    ]
