"""The `darel` command: each verb does its one thing, explains itself, and never overwrites silently."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import VOCABULARY, tiny_gpt2
from typer.testing import CliRunner

from darel_hf.cli import app
from darel_hf.nlg.corpus import make_corpus

runner = CliRunner()


def darel(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model, and scores made with the command."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("cli")
    make_corpus(path, representations=28)
    words = Tokenizer(models.WordLevel({"<end>": 0, "The": 1, "inn": 2, "name": 3, "is": 4}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    assert len(tokenizer) <= VOCABULARY
    model = tiny_gpt2()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    done = darel(
        "score", path / "trainset.csv", "--model", path / "model", "--prompt-column", "mr", "--target-column", "ref",
        "--max-length", 60, "--output", path / "scores.parquet",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("verb", ["demo", "score", "select", "plan", "eval"])
def test_help(verb):
    done = darel(verb, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


def test_score(folder):
    table = pq.read_table(folder / "scores.parquet")
    assert table.column_names[:3] == ["sample_id", "loss", "n_tokens"]
    assert table["sample_id"].to_pylist() == list(range(table.num_rows))
    again = darel("score", folder / "trainset.csv", "--output", folder / "scores.parquet")
    assert again.exit_code == 1 and "say --force" in again.output


def test_score_shows_brackets_as_they_are(folder, tmp_path):
    output = tmp_path / "of[/b]all[run].parquet"
    output.parent.mkdir(exist_ok=True)
    done = darel(
        "score", folder / "trainset.csv", "--model", folder / "model", "--target-column", "ref", "--output", output
    )
    assert done.exit_code == 0, done.output
    assert "all[run].parquet" in done.output.replace("\n", "")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_select_rows(folder, tmp_path, suffix):
    out = tmp_path / f"kept.{suffix}"
    done = darel(
        "select", "--scores", folder / "scores.parquet", "--data", folder / "trainset.csv", "--keep", 0.5,
        "--rule", "hardest", "--no-length-correction", "--output", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    kind = {"jsonl": "json"}.get(suffix, suffix)
    kept = datasets.load_dataset(kind, data_files=str(out), split="train")
    rows = datasets.load_dataset("csv", data_files=str(folder / "trainset.csv"), split="train")
    losses = pq.read_table(folder / "scores.parquet")["loss"].to_numpy()
    count = round(0.5 * len(rows))
    order = np.lexsort((np.arange(len(rows)), -losses))[:count]
    assert kept["ref"][:] == rows.select(np.sort(order))["ref"][:]
    again = darel("select", "--scores", folder / "scores.parquet", "--output", out)
    assert again.exit_code == 1 and "exists" in again.output


def test_select_ids_and_groups(folder, tmp_path):
    done = darel("select", "--scores", folder / "scores.parquet", "--keep", 0.3, "--output", tmp_path / "ids.csv")
    assert done.exit_code == 0
    assert (tmp_path / "ids.csv").read_text().splitlines()[0] == "sample_id"
    rows = datasets.load_dataset("csv", data_files=str(folder / "trainset.csv"), split="train")
    done = darel(
        "select", "--scores", folder / "scores.parquet", "--data", folder / "trainset.csv", "--keep", 0.4,
        "--group-column", "mr", "--output", tmp_path / "kept.csv",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    kept = datasets.load_dataset("csv", data_files=str(tmp_path / "kept.csv"), split="train")
    assert set(kept["mr"]) == set(rows["mr"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--keep", "5"], "fraction in (0, 1]"),
        (["--rule", "best"], "unknown rule"),
        (["--group-column", "mr"], "give --data"),
        (["--data", "none.csv"], "no such file"),
        (["--output", "kept.txt"], "unknown kind of file"),
    ],
)
def test_select_errors_are_one_line(folder, tmp_path, arguments, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = darel("select", "--scores", folder / "scores.parquet", "--output", "kept.csv", *arguments)
    assert done.exit_code == 1 and match in done.output
    assert "Traceback" not in done.output and not list(tmp_path.iterdir())


def test_scores_of_other_data(folder, tmp_path):
    done = darel(
        "select",
        "--scores",
        folder / "scores.parquet",
        "--data",
        folder / "devset.csv",
        "--output",
        tmp_path / "k.csv",
    )
    assert done.exit_code == 1 and "scores; score these data" in done.output


def test_plan():
    done = darel("plan", "--budget-time", 0.5)
    assert done.exit_code == 0 and "predicted 0.50" in done.output
    assert "scored every" not in done.output  # the default draws candidates
    scored = ("--online-rule", "hardest")
    done = darel("plan", "--budget-time", 0.5, "--budget-method", "paper", *scored)
    assert "keep 0.800" in done.output and "scored every 2" in done.output  # A = 0.5 / 0.8 = 0.625
    done = darel("plan", "--online-keep", 0.9, *scored)
    assert "no saving is predicted" in done.output
    done = darel("plan", "--online-keep", 0.5, "--one-forward", *scored)
    assert "predicted 0.75 of the plain training time" in done.output  # 0.5 + 0.5 * (1 - 0.5)
    done = darel("plan", "--budget-time", 0.001)
    assert done.exit_code == 1 and "smallest possible" in done.output


@pytest.mark.parametrize(
    ("options", "predicted"),
    [
        (("--offline-keep", 0.5), "0.56"),  # 0.5 + 0.3 / 5
        (("--offline-keep", 0.5, "--offline-rule", "random"), "0.50"),
        (("--online-keep", 0.5), "0.50"),
        (("--online-keep", 0.5, "--online-rule", "rho_loss"), "1.00"),  # 0.5 + 0.5
        (("--offline-keep", 0.5, "--unpad-share", 0.7), "0.41"),  # 0.5 * 0.7 + 0.3 / 5
    ],
)
def test_plan_costs_what_is_done(options, predicted):
    done = darel("plan", *options)
    assert f"predicted {predicted} of the plain training time" in done.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--unpad-share", 0), "unpad_share=0"),
        (("--online-rule", "hardst"), "online_rule='hardst'"),
        (("--one-forward",), "reads no losses"),
    ],
)
def test_plan_refuses(options, named):
    done = darel("plan", *options)
    assert done.exit_code == 1 and named in done.output


def test_demo_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    done = darel("demo", "--output-dir", tmp_path)
    assert done.exit_code == 1 and "holds something" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_eval(tmp_path):
    (tmp_path / "r.csv").write_text("mr,ref\nx,the inn is cheap\nx,a cheap inn\ny,the pub is quiet\n")
    (tmp_path / "p.txt").write_text("the inn is cheap\nthe pub is near\n")
    (tmp_path / "b.txt").write_text("an inn\na pub\n")
    files = ("--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.csv", "--wordnet", "none")
    output = ("--output", tmp_path / "scores.json")
    done = darel("eval", *files, "--baseline", tmp_path / "b.txt", "--bootstrap", 50, *output)
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores)[:7] == ["protocol", "n", "bleu", "ter", "meteor", "nist", "rouge_l"]
    assert (scores["protocol"], scores["n"]) == ("e2e", 2)
    assert set(scores["signatures"]) == set(scores["intervals"]) == set(scores["p_values"]) == set(scores["baseline"])
    for shown in ("BLEU", "TER", "METEOR", "NIST", "ROUGE-L", "protocol e2e", "95 % interval", "tok:13a", "baseline"):
        assert shown in done.output
    again = darel("eval", *files, *output)
    assert again.exit_code == 1 and "say --force" in again.output
    paper = darel("eval", *files, *output, "--force", "--protocol", "paper", "--bootstrap", 0)
    assert paper.exit_code == 0 and "protocol paper" in paper.output and "interval" not in paper.output


def test_eval_names_what_is_wrong(tmp_path):
    (tmp_path / "r.txt").write_text("the inn\n\nthe pub\n")
    (tmp_path / "p.txt").write_text("the inn\n")
    done = darel("eval", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "r.txt")
    assert done.exit_code == 1 and "1 texts" in done.output and "line 3 of the references" in done.output
    done = darel("eval", "--predictions", tmp_path / "none.txt", "--references", tmp_path / "r.txt")
    assert done.exit_code == 1 and "no such file" in done.output
    done = darel("eval", "--predictions", tmp_path / "p.txt", "--references", tmp_path / "p.txt", "--protocol", "mt")
    assert done.exit_code == 1 and "protocol='mt'" in done.output


def test_eval_shows_brackets_as_they_are(tmp_path):
    (tmp_path / "p.csv").write_text('mr,out\n"name[/x], area[riverside]",a\n')
    (tmp_path / "r.csv").write_text("mr,ref\nx,the inn\n")
    done = darel("eval", "--predictions", tmp_path / "p.csv", "--references", tmp_path / "r.csv", "--wordnet", "none")
    assert done.exit_code == 1 and "name[/x], area[riverside]" in done.output
    output = ("--output", tmp_path, "--force")
    done = darel("eval", "--predictions", tmp_path / "p.csv", "--references", tmp_path / "r.csv", *output)
    assert done.exit_code == 1 and "is a folder" in done.output
    output = ("--output", tmp_path / "p.csv" / "scores.json")
    done = darel("eval", "--predictions", tmp_path / "p.csv", "--references", tmp_path / "r.csv", *output)
    assert done.exit_code == 1 and "is a file, no folder" in done.output
