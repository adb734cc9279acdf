"""Runs of comparisons: processes, folders, what is kept, what starts anew; and the function for one's own trainers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import comparing
import pytest
import yaml
from typer.testing import CliRunner

from darel_hf import compare
from darel_hf.cli import app
from darel_hf.comparison import compare_recipe

SCRIPT = """
import json, pathlib, sys, time, yaml

s = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(s["output_dir"])
with open(s["journal"], "a") as journal:
    journal.write(f"{folder.parent.name}{' resumes' if s.get('resume') else ''}\\n")
if s.get("once") and not pathlib.Path(s["once"]).exists():
    pathlib.Path(s["once"]).touch()
    s["breaks"] = True
if folder.exists() and not s.get("resume"):
    sys.exit("error: the folder is in use")
folder.mkdir(parents=True, exist_ok=True)
if s.get("breaks"):
    print("Traceback (most recent call last):\\n[rank0]: KeyError: 'no such luck'\\nwarning: something else")
    print("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:", flush=True)
    sys.exit(1)
if s.get("finishes_training"):
    (folder / "trained.json").write_text("{}")
(folder / "begun").touch()
time.sleep(s.get("sleep", 0))
results = {"accuracy": 0.8 + 0.01 * s["seed"] - 0.1 / s.get("num_train_epochs", 3.0) ** (1 + s["seed"] / 9)}
if not s.get("silent"):
    (folder / "results.json").write_text(json.dumps({**results, "seconds": s.get("num_train_epochs", 3.0)}))
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose script takes no time, and the file in which its runs are counted."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "train.py").write_text(SCRIPT)
    path, journal = tmp_path / "recipe" / "tiny.yaml", tmp_path / "journal"
    path.write_text(f"journal: {journal}\nnum_train_epochs: 4\nseed: 5\nonline_keep: 0.5\n")
    return path


def began(recipe):
    return recipe.parent.with_name("journal").read_text().splitlines()


def run(recipe, arms=("plain", "fewer_epochs"), seeds=2, folder="out", **settings):
    out = recipe.parent.with_name(folder)
    return compare_recipe(
        recipe, arms, seeds, output_dir=out, **{"metric": "accuracy", "tell": lambda _: None, **settings}
    )


def test_arms_are_interleaved_by_seed_each_with_its_settings(recipe):
    made = run(recipe, ["plain", "fewer_epochs", "recipe"])
    assert began(recipe) == [f"{arm}-{seed}" for seed in (5, 6) for arm in ("plain", "fewer_epochs", "recipe")]
    assert made.rows[1].scores == {seed: 0.8 + 0.01 * seed - 0.1 / 2 ** (1 + seed / 9) for seed in (5, 6)}
    assert made.rows[1].time == pytest.approx(0.5) and made.rows[1].faster
    out = recipe.parent.with_name("out")
    settings = yaml.safe_load((out / "runs" / "plain-6" / "settings.yaml").read_text())
    assert settings["seed"] == 6 and "online_keep" not in settings
    assert json.loads((out / "comparison.json").read_text())["arms"][0]["mean"] == made.rows[0].mean


def test_more_seeds_and_arms_run_only_what_is_new(recipe):
    run(recipe)
    before = len(began(recipe))
    made = run(recipe, ["plain", "fewer_epochs", "recipe"], 3)
    assert began(recipe)[before:] == ["recipe-5", "recipe-6", "plain-7", "fewer_epochs-7", "recipe-7"]
    assert all(len(row.scores) == 3 for row in made.rows)


def test_a_failing_arm_keeps_its_row_and_stops_nothing(recipe):
    arms = {"plain": None, "bad": {"breaks": True}, "mute": {"silent": True}, "fewer_epochs": None}
    made = run(recipe, arms, jobs=2)
    assert [len(row.scores) for row in made.rows] == [2, 0, 0, 2]
    assert made.rows[1].errors == dict.fromkeys((5, 6), "KeyError: 'no such luck'")
    assert set(made.rows[2].errors.values()) == {"it ended without results.json"}
    before = len(began(recipe))
    run(recipe, arms)
    assert len(began(recipe)) == before  # failed is an outcome too
    again = run(recipe, arms, retry=True)
    assert sorted(began(recipe)[before:]) == ["bad-5", "bad-6", "mute-5", "mute-6"] and again.rows[1].errors
    mended = {"plain": None, "shaky": {"once": str(recipe.with_name("once"))}}
    assert run(recipe, mended, folder="other").rows[1].errors.keys() == {5}
    assert not run(recipe, mended, folder="other", retry=True).rows[1].errors


def test_two_at_a_time_say_the_same(recipe):
    one, two = run(recipe), run(recipe, folder="two", jobs=2)
    assert [row.scores for row in one.rows] == [row.scores for row in two.rows]
    assert "2 runs at a time" in str(two)


def test_settings_of_what_failed_or_was_cut_off_may_change(recipe):
    assert run(recipe, {"plain": None, "mine": {"breaks": True}}, 1).rows[1].errors
    half = recipe.parent.with_name("out") / "runs" / "mine-5" / "output"
    half.mkdir(parents=True, exist_ok=True)
    (half / "trained.json").write_text("{}")  # by the settings of before
    assert run(recipe, {"plain": None, "mine": {"breaks": False}}, 1).rows[1].scores
    assert began(recipe) == ["plain-5", "mine-5", "mine-5"]


def test_settings_that_changed_are_refused(recipe):
    run(recipe)
    before = began(recipe)
    with pytest.raises(ValueError, match=r"output_dir=.*fewer_epochs, seed 5 was run with num_train_epochs=2.0, now"):
        run(recipe, budget=0.25)
    with pytest.raises(ValueError, match=r"plain, seed 5 was run with width=None, now 3"):
        run(recipe, settings={"width": 3})
    recipe.with_name("other.py").write_text(SCRIPT)
    with pytest.raises(ValueError, match=r"script=.*train.py', now .*other.py"):
        run(recipe, script=recipe.with_name("other.py"))
    assert began(recipe) == before
    recipe.parent.with_name("used").mkdir()
    recipe.parent.with_name("used").joinpath("thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        run(recipe, folder="used")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": [1, 1]}, "different"),
        ({"jobs": 0}, "jobs=0"),
        ({"margin": 0}, "margin=0"),
        ({"script": "none.py"}, "no such file"),
        ({"launch": "acelerate launch"}, "launch='acelerate launch': no such command"),
        ({"settings": {"seed": 3}}, "the comparison sets this"),
        ({"arms": ["plain", "best"]}, "unknown"),
    ],
)
def test_errors_before_any_run(recipe, settings, match):
    with pytest.raises(ValueError, match=match):
        run(recipe, **settings)
    assert not recipe.parent.with_name("out").exists() and not recipe.parent.with_name("journal").exists()


def test_a_metric_that_is_not_there_ends_it_at_once(recipe):
    with pytest.raises(ValueError, match="metric='bleu': the results have no such number, only accuracy, seconds"):
        run(recipe, metric="bleu")
    assert began(recipe) == ["plain-5"]
    assert len(run(recipe).rows[0].scores) == 2 and began(recipe).count("plain-5") == 1


# ---- Interrupted ----


def start(recipe, *more):
    command = [sys.executable, "-m", "darel_hf.cli", "compare", recipe, "--metric", "accuracy", "--seeds", 2]
    command += ["--arms", "plain,slow:sleep=6,fewer_epochs", "--output-dir", recipe.parent.with_name("out"), *more]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def wait_for(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
def test_a_killed_comparison_goes_on(recipe):
    runs = recipe.parent.with_name("out") / "runs"
    first = start(recipe)
    wait_for(runs / "slow-5" / "output" / "begun")
    first.kill()  # its run lives on, and counts
    first.wait()
    second = start(recipe)
    wait_for(runs / "slow-6" / "output" / "begun")
    group = int(subprocess.check_output(["pgrep", "-P", str(second.pid)], text=True).split()[0])
    second.kill()
    os.killpg(group, signal.SIGKILL)  # half a run
    second.wait()
    third = start(recipe)
    output = third.communicate()[0]
    assert third.returncode == 0 and "plain, seed 5: 4.0 s of training (done before)" in output, output
    assert "still runs, started by another comparison" in second.stdout.read()
    assert sorted(began(recipe)) == sorted(
        ["plain-5", "slow-5", "fewer_epochs-5", "plain-6", "slow-6", "slow-6", "fewer_epochs-6"]
    )
    killed = json.loads((recipe.parent.with_name("out") / "comparison.json").read_text())
    arms = {"plain": None, "slow": {"sleep": 6}, "fewer_epochs": None}
    assert killed == json.loads(json.dumps(run(recipe, arms, folder="whole").to_dict()))


def test_ctrl_c_ends_what_runs_and_counts_it_as_nothing(recipe):
    process = start(recipe)
    half = recipe.parent.with_name("out") / "runs" / "slow-5"
    wait_for(half / "output" / "begun")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0 and not (half / "output" / "results.json").exists()
    assert not (half / "failed.json").exists() and (half.parent / "plain-5" / "output" / "results.json").exists()


def test_a_run_that_has_trained_goes_on_from_there(recipe):
    arms = {"plain": None, "late": {"finishes_training": True, "once": str(recipe.with_name("once"))}}
    half = recipe.parent.with_name("out") / "runs" / "late-5" / "output"
    half.mkdir(parents=True)
    (half / "trained.json").write_text("{}")
    (half / "adapter").touch()
    recipe.with_name("once").touch()
    run(recipe, arms, 1)
    assert began(recipe) == ["plain-5", "late-5 resumes"] and (half / "adapter").exists()


def test_results_that_were_cut_off_count_as_none(recipe):
    half = recipe.parent.with_name("out") / "runs" / "plain-5" / "output"
    half.mkdir(parents=True)
    (half / "results.json").write_text('{"accuracy": 0.')
    assert len(run(recipe).rows[0].scores) == 2 and "plain-5" in began(recipe)


# ---- The command ----


def darel(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def test_the_command(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = darel(
        "compare", recipe, "--metric", "accuracy", "--margin", 0.1, "--arms", "plain,fewer_epochs",
        "--arms", "half:online_keep=0.5", "--seeds", 3, "--set", "save_strategy=no", "--jobs", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tiny.yaml: accuracy (higher is better, margin 0.1), seeds 5, 6, 7" in done.output
    assert "Told apart" in done.output or "told apart" in done.output
    saved = tmp_path / "outputs" / "compare_tiny"
    assert yaml.safe_load((saved / "runs" / "half-7" / "settings.yaml").read_text())["save_strategy"] == "no"
    assert {f"comparison.{e}" for e in ("html", "json", "md", "png", "txt")} < {p.name for p in saved.iterdir()}
    assert (saved / "comparison.txt").read_text() in done.output
    wrong = darel("compare", recipe, "--metric", "accuracy", "--arms", "plain,best")
    assert wrong.exit_code == 1 and wrong.output.startswith("error: arms='best': unknown")
    broken = darel("compare", recipe, "--metric", "accuracy", "--set", "breaks=true", "--output-dir", "broken")
    assert broken.exit_code == 1 and "KeyError" in broken.output


# ---- One's own trainers ----


@pytest.mark.slow
def test_trainers_of_ones_own(tmp_path):
    told = []
    arms = {"plain": None, "half": {"online_keep": 0.5, "online_rule": "random"}, "bad": {"breaks": True}}
    out = tmp_path / "out"
    made = compare(
        comparing.make_trainer, arms, [3], comparing.evaluate, output_dir=out, metric="test_loss",
        settings={"num_train_epochs": 1}, tell=told.append, jobs=2,
    )  # fmt: skip
    assert made.lower_is_better and [list(row.scores) for row in made.rows] == [[3], [3], []]
    assert made.rows[2].errors == {3: "RuntimeError: the arm that breaks"} and len(told) == 4
    results = json.loads((out / "runs" / "half-3" / "output" / "results.json").read_text())
    assert results["rows_backpropagated"] == 8 and results["epochs"] == 1 and results["steps"] == 2
    plain = json.loads((out / "runs" / "plain-3" / "output" / "results.json").read_text())
    assert plain["steps"] == 4 and plain["test_loss"] == made.rows[0].scores[3]


def test_functions_that_no_other_process_finds(tmp_path):
    for wrong in (lambda run: None, test_trainers_of_ones_own.__get__(1)):
        with pytest.raises(ValueError, match=r"make_trainer=.*from the top level of a module"):
            compare(wrong, ["plain", "fast"], 1, comparing.evaluate, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_script_and_one_without_its_guard(tmp_path):
    text = (
        "import sys, types\nfrom darel_hf import compare\n"
        "class Quick:\n"
        "    state = types.SimpleNamespace(global_step=1)\n"
        "    def __init__(self, run): self.run = run\n"
        "    def train(self): pass\n"
        "    def is_world_process_zero(self): return True\n"
        "def make(run): return Quick(run)\n"
        "def score(trainer): return trainer.run.settings['num_train_epochs'] + trainer.run.seed\n"
        "def main():\n"
        "    made = compare(make, ['plain', 'fewer_epochs'], 1, score, output_dir=(sys.argv[1:] or ['x'])[0],\n"
        "                   settings={'num_train_epochs': 3})\n"
        "    print([row.scores for row in made.rows], [row.errors for row in made.rows])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def started(name, ending):
        (tmp_path / f"{name}.py").write_text(text + ending)
        command = [sys.executable, str(tmp_path / f"{name}.py"), str(tmp_path / name)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path
        ).stdout

    assert "[{0: 3.0}, {0: 1.5}] [{}, {}]" in started("guarded", 'if __name__ == "__main__":\n    main()\n')
    assert "put the call of compare below" in started("bare", "main()\n")
