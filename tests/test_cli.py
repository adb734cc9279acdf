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


@pytest.mark.parametrize("verb", ["demo", "score", "select", "plan", "compare", "eval"])
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


# ---- Cells as they stand, and scores of the rows they were made of ----


def score(folder, data, *more):
    out = data.with_suffix(".scores")
    done = darel("score", data, "--model", folder / "model", "--output", out, "--force", *more)
    assert "Traceback" not in done.output
    return done, out


def test_score_and_select_change_no_cell(folder, tmp_path):
    data = tmp_path / "d.csv"
    data.write_bytes(b'text,code\nNone,007\nnull,1\n"fine, and good",2\n')
    done, scores = score(folder, data)
    assert done.exit_code == 0 and "3 samples scored" in done.output, done.output
    kept = ("select", "--scores", scores, "--data", data, "--keep", 1.0, "--output")
    assert darel(*kept, tmp_path / "k.csv").exit_code == 0
    assert (tmp_path / "k.csv").read_bytes() == data.read_bytes()
    assert darel(*kept, tmp_path / "k.jsonl").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == ["007", "1", "2"] and rows[0]["text"] == "None"


def test_scores_belong_to_their_rows(folder, tmp_path):
    rows = [f"text {i},{i}" for i in range(6)]
    (tmp_path / "d.csv").write_text("\n".join(["text,key", *rows]) + "\n")
    _, scores = score(folder, tmp_path / "d.csv")
    select = ("select", "--scores", scores, "--keep", 0.5, "--output", tmp_path / "k.csv", "--force", "--data")
    assert darel(*select, tmp_path / "d.csv").exit_code == 0
    (tmp_path / "shuffled.csv").write_text("\n".join(["text,key", *rows[::-1]]) + "\n")
    (tmp_path / "other.csv").write_text("\n".join(["text,key", *rows[:5], "another,5"]) + "\n")
    for name, message in (("shuffled", "6 of 6 rows have other texts"), ("other", "1 of 6 rows have other texts")):
        done = darel(*select, tmp_path / f"{name}.csv")
        assert done.exit_code == 1 and message in done.output and "score these data" in done.output
    # With ids the order does not matter.
    _, scores = score(folder, tmp_path / "d.csv", "--id-column", "key")
    done = darel(*select[:2], scores, *select[3:], tmp_path / "shuffled.csv", "--id-column", "key")
    assert done.exit_code == 0, done.output


def test_scores_belong_to_their_rows_in_training(folder, tmp_path):
    from helpers import PadCollator, arguments, tiny_gpt2
    from transformers import AutoTokenizer

    from darel_hf import DarelConfig, DarelTrainer
    from darel_hf.nlg.task import tokenize_pairs

    texts = ["The inn", "is", "The name is inn", "name inn is The", "inn inn", "The is", "is name", "name name inn"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, scores = score(folder, tmp_path / "d.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def train(order, columns=("mr", "ref"), name="run"):
        pairs = [{"mr": "", "ref": texts[i]} for i in order]
        data = tokenize_pairs(pairs, tokenizer, 60).remove_columns(list(columns))
        if "ref" not in columns:
            data = data.rename_column("ref", "text")
        trainer = DarelTrainer(
            model=tiny_gpt2(), args=arguments(tmp_path / name), train_dataset=data, data_collator=PadCollator(),
            darel=DarelConfig(offline_keep=0.5, offline_rule="middle", scores=str(scores)),
        )  # fmt: skip
        trainer.train()

    train(range(8))
    train(range(8), ("mr",), "run2")
    for i, columns in enumerate((("mr", "ref"), ("mr",))):  # by their labels, and by their texts
        with pytest.raises(ValueError, match=r"scores='.*: made from other data: \d of 8 rows"):
            train([1, 0, 2, 3, 4, 5, 7, 6], columns, f"other{i}")


def test_a_prompt_that_fills_all(folder, tmp_path):
    rows = [{"p": "The inn " * 30, "text": "is"}, {"p": "The", "text": "inn is"}, {"p": "is", "text": "The name inn"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, scores = score(folder, tmp_path / "d.jsonl", "--prompt-column", "p", "--max-length", 10)
    assert done.exit_code == 0 and "1 samples have no token of 'text' within 10 tokens (ids [0])" in done.output
    for rule in ("easiest", "hardest", "middle"):
        out = tmp_path / f"{rule}.jsonl"
        done = darel("select", "--scores", scores, "--keep", 0.6, "--rule", rule, "--output", out)
        assert done.exit_code == 0 and [json.loads(line)["sample_id"] for line in out.open()] == [1, 2]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("d.csv", "text\ncaf\xe9\n".encode("latin-1"), "line 2 is not UTF-8"),
    ("d.csv", "text\na\n".encode("utf-16"), "UTF-16"),
    ("d.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON object"),
    ("d.csv", b"", "the file is empty"),
    ("d.csv", b"text\n", "there are no rows"),
    ("d.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2 has no text in 'text', but nothing"),
    ("d.jsonl", b'{"text": 3}\n{"text": "a"}\n', "line 1 has no text in 'text', but 3"),
    ("d.csv", b"a,b\n1,2\n", "target_column='text'"),
])  # fmt: skip
def test_score_names_the_line(folder, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    done, out = score(folder, tmp_path / name)
    assert done.exit_code == 1 and message in done.output and done.output.count("\n") == 1, done.output
    assert not out.exists()


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
        (("--offline-keep", 0.5, "--offline-rule", "middle"), "0.56"),  # 0.5 + 0.3 / 5
        (("--offline-keep", 0.5), "0.50"),
        (("--online-keep", 0.5), "0.50"),
        (("--online-keep", 0.5, "--online-rule", "rho_loss"), "1.00"),  # 0.5 + 0.5
        (("--offline-keep", 0.5, "--offline-rule", "trimmed", "--unpad-share", 0.7), "0.41"),  # 0.5 * 0.7 + 0.3 / 5
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
