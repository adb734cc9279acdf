"""`darel eval` as people use it: odd inputs give their right number or one error; many systems; every format."""

import csv
import gzip
import io
import json
import random
import re
import statistics
import string
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, TER
from texts import bleu_oracle, columns, grams, words_of
from typer.testing import CliRunner

from darel_hf import NLGMetrics
from darel_hf.cli import app
from darel_hf.nlg.metrics import NAMES, check_texts

RIGHT = "the inn is cheap and near the river\n"
OTHER = "the pub is quiet but families like it\n"


def darel(*arguments, columns_=200, **more):
    env = {"COLUMNS": str(columns_), "TERM": "dumb"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env, **more)


@pytest.fixture
def files(tmp_path):
    """Return what writes a file and names it, in a folder with good references (`r.csv`, `r.txt`)."""

    def write(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    write("r.csv", f"mr,ref\nx[1],{RIGHT}y[2],{OTHER}")
    write("r.txt", RIGHT + OTHER)
    write("p.txt", RIGHT + OTHER)
    return write


def bleu(predictions, references, *more):
    """Return BLEU and the exit code's output of the command."""
    options = ("--only", "bleu", "--bootstrap", 0, "--format", "json")
    done = darel("eval", "--predictions", predictions, "--references", references, *options, *more)
    assert "Traceback" not in done.output
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["bleu"]


def refused(message, *arguments):
    done = darel("eval", *arguments)
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert done.output.count("error:") == 1 and message in " ".join(done.output.split()), done.output


# ---- E1, E15: what a list may hold ----


def test_blank_references_are_none():
    texts, short = ["a b c d e"], [["a b c d e f g h i j k l"]]
    expected = NLGMetrics(wordnet="none")(texts, short)
    assert expected["bleu"] == pytest.approx(24.6597, abs=1e-4) and expected["ter"] == pytest.approx(58.3333, abs=1e-4)
    for padding in ([""], ["", " ", "\t\n"]):
        padded = NLGMetrics(wordnet="none")(texts, [short[0] + padding])
        assert padded == expected
    with pytest.raises(ValueError, match="instance 2 has no reference"):
        NLGMetrics(wordnet="none")(["a", "b"], [["a"], ["", " "]])


@pytest.mark.parametrize(("predictions", "references"), [
    (["a", "b"], {"a": ["a"], "b": ["b"]}),
    (["a", "b"], "ab"),
    (["a", "b"], b"ab"),
    (["a", "b"], [{"a"}, {"b"}]),
    (["a", "b"], [["a"], {"b": 1}]),
    (["a"], [b"a"]),
    ({"a": 1}, [["a"]]),
    (iter(["a"]), [["a"]]),
])  # fmt: skip
def test_forms_that_are_no_lists_of_texts(predictions, references):
    with pytest.raises(ValueError, match=r"give a list|needs a list"):
        check_texts(predictions, references)


# ---- E2, E10, E11, E19, E20: files of any form ----


@pytest.mark.parametrize("name", ["p.json", "p.ndjson", "p.jsonl", "p.predictions", "p"])
def test_json_under_any_name(files, name):
    lines = "".join(json.dumps({"prediction": text}) + "\n" for text in (RIGHT.strip(), OTHER.strip()))
    assert bleu(files(name, lines), files("r.txt", RIGHT + OTHER)) == pytest.approx(100)
    document = json.dumps([RIGHT.strip(), OTHER.strip()])
    assert bleu(files(name.replace("p", "q"), document), files("r.txt", RIGHT + OTHER)) == pytest.approx(100)


def test_json_that_is_called_text_is_refused(files):
    lines = "".join(json.dumps({"prediction": text}) + "\n" for text in (RIGHT, OTHER))
    refused(
        "line 1 is JSON, but the name says plain text",
        "--predictions",
        files("p.txt", lines),
        "--references",
        files("r.txt", RIGHT),
    )


def test_a_cell_that_begins_with_a_quotation_mark(files):
    tsv = f'MR\toutput\nx[1]\t"The" {RIGHT}y[2]\t"{OTHER.strip()}"\n'
    references = files("r.csv", f'mr,ref\nx[1],"The {RIGHT.strip()}"\ny[2],{OTHER}')
    assert bleu(files("p.tsv", tsv), references) == pytest.approx(100)


def test_blanks_tell_no_representations_apart(files):
    lines = [{"mr": "y[2],  z[a   b]", "prediction": OTHER}, {"mr": " x[1]", "prediction": RIGHT}]
    references = files("r.csv", f'mr,ref\nx[1],{RIGHT}"y[2], z[a b]",{OTHER}')
    predictions = files("p.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert bleu(predictions, references) == pytest.approx(100)


def test_standard_input_and_gzip(files, monkeypatch):
    references = files("r.csv.gz", gzip.compress(f"mr,ref\nx[1],{RIGHT}y[2],{OTHER}".encode()))
    assert bleu(files("p.txt.gz", gzip.compress((RIGHT + OTHER).encode())), references) == pytest.approx(100)
    options = ("--only", "bleu", "--bootstrap", 0, "--format", "json")
    done = darel("eval", "--predictions", "-", "--references", references, *options, input=RIGHT + OTHER)
    assert json.loads(done.stdout)["bleu"] == pytest.approx(100)
    refused("standard input can be read once", "--predictions", "-", "--references", "-")


def test_places_that_are_no_files(files, tmp_path):
    refused("is a folder; name a file in it", "--predictions", tmp_path, "--references", tmp_path / "r.csv")
    refused("no such file", "--predictions", tmp_path / "none", "--references", tmp_path / "r.csv")
    refused("no such files", "--systems", tmp_path / "none-*.txt", "--references", tmp_path / "r.csv")


@pytest.mark.parametrize("text", [
    f"mr;hypothesis\nx[1];{RIGHT}y[2];{OTHER}",
    f"mr,generated_text\nx[1],{RIGHT}y[2],{OTHER}",
    f"hypothesis\n{RIGHT}{OTHER}",
    f"mr,prediction,reference\nx[1],{RIGHT.strip()},wrong\ny[2],{OTHER.strip()},wrong\n",
    f"\ufeffMR\tOutput\r\nx[1]\t{RIGHT.strip()}\r\ny[2]\t{OTHER.strip()}\r\n",
])  # fmt: skip
def test_columns_of_predictions(files, tmp_path, text):
    assert bleu(files("p.csv", text), tmp_path / "r.csv") == pytest.approx(100)


@pytest.mark.parametrize("text", [
    f"input,target\nx[1],{RIGHT}y[2],{OTHER}",
    f"id,ref\n1,{RIGHT}2,{OTHER}",
    f"ref\n{RIGHT}{OTHER}",
    f"MR;REF\nx[1];{RIGHT}y[2];{OTHER}",
    f"meaning_representation,human_reference\nx[1],{RIGHT}y[2],{OTHER}",
])  # fmt: skip
def test_columns_of_references(files, tmp_path, text):
    assert bleu(tmp_path / "p.txt", files("s.csv", text)) == pytest.approx(100)


def test_columns_that_must_be_named(files, tmp_path):
    odd = files("p.csv", f"key,answer\nx[1],{RIGHT}y[2],{OTHER}")
    refused("name them with --text-column and --mr-column", "--predictions", odd, "--references", tmp_path / "r.csv")
    assert bleu(odd, tmp_path / "p.txt", "--text-column", "answer", "--mr-column", "key") == pytest.approx(100)
    refused(
        "text_column='reply': ", "--predictions", odd, "--references", tmp_path / "r.csv", "--text-column", "reply"
    )
    lines = files("q.jsonl", "".join(json.dumps({"answer": text}) + "\n" for text in (RIGHT, OTHER)))
    refused("name it with --text-column", "--predictions", lines, "--references", tmp_path / "r.csv")
    assert bleu(lines, tmp_path / "r.csv", "--text-column", "answer") == pytest.approx(100)


def test_blank_lines(files, tmp_path):
    assert bleu(files("p.txt", "\n\n"), tmp_path / "r.csv") == 0.0  # two empty texts
    refused("there is no reference in it", "--predictions", tmp_path / "p.txt", "--references", files("b.txt", "\n\n"))
    refused("the file is empty", "--predictions", files("e.txt", ""), "--references", tmp_path / "r.csv")


def test_one_instance_with_several_references(files):
    one = files("p.txt", RIGHT)
    assert bleu(one, files("r.txt", f"{OTHER}{RIGHT}\n")) == pytest.approx(100)
    refused("end their file with an empty line", "--predictions", one, "--references", files("s.txt", OTHER + RIGHT))


def test_webnlg_and_dart_as_they_come(files):
    triple = {"subject": "Inn", "property": "is", "object": "cheap"}
    good, bad = {"comment": "good", "lex": RIGHT.strip()}, {"comment": "bad", "lex": "nothing"}
    webnlg = {"entries": [{"1": {"modifiedtripleset": [triple], "lexicalisations": [bad, good]}}]}
    one = files("p.txt", RIGHT)
    assert bleu(one, files("w.json", json.dumps(webnlg))) == pytest.approx(100)
    xml = (
        "<?xml version='1.0'?><benchmark><entries><entry category='A' eid='1'><modifiedtripleset><mtriple>Inn | is | "
        f"cheap</mtriple></modifiedtripleset><lex comment='bad'>nothing</lex><lex comment='good'>{RIGHT}</lex></entry>"
        "</entries></benchmark>"
    )
    assert bleu(one, files("w.xml", xml)) == pytest.approx(100)
    dart = [
        {"tripleset": [["Inn", "IS", "cheap"]], "annotations": [{"source": "x", "text": t} for t in (OTHER, RIGHT)]}
    ]
    assert bleu(one, files("d.json", json.dumps(dart))) == pytest.approx(100)
    for name, text in (("v.json", '{"entries": [{"1": {}}]}'), ("v.xml", "<benchmark></benchmark>"), ("u.xml", "<a>")):
        done = darel("eval", "--predictions", one, "--references", files(name, text))
        assert done.exit_code == 1 and done.output.count("error:") == 1


def chrf_oracle(corpus):
    """chrF++ of pairs of a text and its references: 6 orders of characters and 2 of words, recall counts fourfold."""

    def counts(text):
        words = []
        for word in text.split():
            if len(word) > 1 and word[-1] in string.punctuation:
                words += [word[:-1], word[-1]]
            elif len(word) > 1 and word[0] in string.punctuation:
                words += [word[0], word[1:]]
            else:
                words.append(word)
        return [grams("".join(text.split()), n) for n in range(1, 7)] + [grams(words, n) for n in (1, 2)]

    def f_of(sums):  # of (right, of the text, of the reference) by order
        precision, recall = (statistics.mean(right / of[i] for right, *of in sums) for i in (0, 1))
        return 100 * 5 * precision * recall / (4 * precision + recall)

    total = np.zeros((8, 3))
    for text, references in corpus:
        ours = counts(text)
        pairs = [zip(ours, counts(ref), strict=True) for ref in references]
        total += np.array(
            max(([((a & b).total(), a.total(), b.total()) for a, b in pair] for pair in pairs), key=f_of)
        )
    return f_of(total.tolist())


@pytest.mark.parametrize("form", ["json", "xml", "dart"])
def test_scores_of_webnlg_and_dart(files, form):
    """One to six references each: BLEU and chrF++ by their definitions; a reference that comes twice changes none."""
    draw, things = random.Random(0), ["Alan Bean", "the U.S.", "Apollo 12", "Bangalore, India", "1,000 m"]
    told = ["was born in", "is near", "(also) served", "hasn't seen", "leads", "comes from"]
    corpus = []
    for _ in range(12):
        facts = [(draw.choice(things), draw.choice(told), draw.choice(things)) for _ in range(draw.randint(1, 6))]
        group = [" ".join(fact) + "." for fact in facts]
        text = draw.choice(group).replace(" ", draw.choice([" ", " then "]), 1)
        corpus.append((text, [*group, group[0]]))
    groups = [group for _, group in corpus]
    if form == "json":
        triple = {"subject": "A", "property": "b", "object": "C"}
        lexes = [[{"comment": "good", "lex": text} for text in group] for group in groups]
        entries = [{"modifiedtripleset": [triple], "lexicalisations": one} for one in lexes]
        named = {"entries": [{str(number): entry} for number, entry in enumerate(entries, 1)]}
        references = files("w.json", json.dumps(named))
    elif form == "xml":
        triples = "<modifiedtripleset><mtriple>A | b | C</mtriple></modifiedtripleset>"
        lexes = ["".join(f"<lex comment='good'>{text}</lex>" for text in group) for group in groups]
        entries = "".join(f"<entry category='A' eid='Id{i}'>{triples}{one}</entry>" for i, one in enumerate(lexes, 1))
        references = files("w.xml", f"<benchmark><entries>{entries}</entries></benchmark>")
    else:
        texts = [[{"source": "x", "text": text} for text in group] for group in groups]
        entries = [{"tripleset": [["A", "B", "C"]], "annotations": one} for one in texts]
        references = files("d.json", json.dumps(entries))
    predictions = files("p.txt", "".join(f"{text}\n" for text, _ in corpus))
    options = ("--only", "bleu,chrf++", "--bootstrap", 0, "--format", "json")
    done = darel("eval", "--predictions", predictions, "--references", references, *options)
    assert done.exit_code == 0, done.output
    once = [(text, group[:-1]) for text, group in corpus]
    words = [(words_of(text), [words_of(ref) for ref in group]) for text, group in once]
    scores = json.loads(done.stdout)
    assert scores["bleu"] == pytest.approx(bleu_oracle(words), rel=1e-9) and 10 < scores["bleu"] < 95
    assert scores["chrf++"] == pytest.approx(chrf_oracle(once), rel=1e-9) and scores["chrf++"] < 95


# ---- E14: outputs ----


def bleu_of(folder):
    """Options that score the files of `files` quickly."""
    common = ("--predictions", folder / "p.txt", "--references", folder / "r.csv")
    return (*common, "--only", "bleu", "--bootstrap", 0)


def test_a_link_is_written_through(files, tmp_path):
    target = files("target.json", "old")
    (tmp_path / "link.json").symlink_to(target)
    common = bleu_of(tmp_path)
    refused("exists", *common, "--output", tmp_path / "link.json")
    done = darel("eval", *common, "--output", tmp_path / "link.json", "--force")
    assert done.exit_code == 0 and (tmp_path / "link.json").is_symlink()
    assert json.loads(target.read_text())["bleu"] == pytest.approx(100)


def test_a_pipe_is_written_into(files, tmp_path):
    import os
    import threading

    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    common = bleu_of(tmp_path)
    done = darel("eval", *common, "--output", pipe)
    reader.join(10)
    assert done.exit_code == 0 and json.loads(found[0])["bleu"] == pytest.approx(100)
    assert pipe.is_fifo()


def test_nothing_is_half_written(files, tmp_path):
    common = ("--references", tmp_path / "r.csv", "--wordnet", "none")
    outputs = ("--output", tmp_path / "o.json", "--html", tmp_path / "o.html", "--per-instance", tmp_path / "o.jsonl")
    before = sorted(tmp_path.iterdir())
    refused("1 texts", "--predictions", files("p1.txt", "one\n"), *common, *outputs)
    (tmp_path / "p1.txt").unlink()
    refused(
        "is a file to be read", "--predictions", tmp_path / "p.txt", *common, "--force", "--output", tmp_path / "p.txt"
    )
    refused("format=", "--predictions", tmp_path / "p.txt", *common, *outputs, "--format", "pdf")
    assert sorted(tmp_path.iterdir()) == before


# ---- E13: in Trainer ----


class Words:
    pad_token_id = 0
    words = ("<pad>", "the", "inn", "is", "cheap")

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(self.words[i] for i in row if i > 0) for row in ids]


class Evaluated:
    def __init__(self, predictions, label_ids):
        self.predictions, self.label_ids = predictions, label_ids


def test_compute_metrics_names_the_setting():
    compute = NLGMetrics(only=["bleu"]).compute_metrics(Words())
    with pytest.raises(ValueError, match="predict_with_generate=True"):
        compute(Evaluated(np.zeros((2, 3, 5), np.float32), np.ones((2, 3), int)))
    with pytest.raises(ValueError, match="label_ids=None"):
        compute(Evaluated(np.ones((2, 3), int), None))


def test_compute_metrics_batch_by_batch():
    ids = np.array([[1, 2, 3, 4], [1, 2, 3, -100], [2, 3, 4, 0]])
    metrics = NLGMetrics(only=["bleu", "ter"])
    whole = metrics.compute_metrics(Words())(Evaluated(ids, ids[::-1]))
    compute = metrics.compute_metrics(Words())
    for _ in range(2):  # two evaluations, one after the other
        assert compute(Evaluated(ids[:2], ids[::-1][:2]), compute_result=False) == {}
        assert compute(Evaluated(ids[2:], ids[::-1][2:]), compute_result=True) == whole


# ---- Several systems ----


@pytest.fixture
def systems(files, tmp_path):
    """Write references and systems of 40 instances: `good`, `same` as it, `bad`, and three runs of `seed`."""
    draw = np.random.default_rng(0)
    words = ["the", "inn", "pub", "is", "cheap", "quiet", "near", "a", "river", "and", "good", "food"]

    def text():
        return " ".join(draw.choice(words, draw.integers(6, 12)))

    def spoiled(reference, share):
        return " ".join(draw.choice(words) if draw.random() < share else word for word in reference.split())

    references = [text() for _ in range(40)]
    files("refs.csv", "mr,ref\n" + "".join(f"name[{i}],{one}\n" for i, one in enumerate(references)))
    for name, share in (("good", 0.1), ("bad", 0.6), ("seed-1", 0.2), ("seed-2", 0.3), ("seed-3", 0.25)):
        files(f"{name}.txt", "".join(spoiled(one, share) + "\n" for one in references))
    files("same.txt", (tmp_path / "good.txt").read_text())
    return tmp_path


def test_systems(systems):
    arguments = [systems / f"{name}.txt" for name in ("good", "same", "bad")]
    common = ("--references", systems / "refs.csv", "--only", "bleu,ter,ser", "--bootstrap", 300)
    done = darel("eval", "--systems", *arguments, systems / "seed-*.txt", *common, "--format", "json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert list(result["systems"]) == ["good", "same", "bad", "seed-*"] and result["first"] == "good"
    good, same, bad, seeds = result["systems"].values()
    assert same["scores"] == good["scores"] and same["differences"]["bleu"]["p_bootstrap"] == 1.0
    assert bad["differences"]["ter"]["p_bootstrap"] < 0.05 and bad["differences"]["ter"]["p_randomization"] < 0.05
    assert bad["differences"]["ter"]["p_bootstrap"] >= 3 / 301 * 0.99  # corrected for three comparisons
    assert good["ranks"]["bleu"] == same["ranks"]["bleu"] == 1 and bad["ranks"] == {"bleu": 4, "ter": 4, "ser": 1}
    assert seeds["runs"] == 3 and len(seeds["each"]["bleu"]) == 3
    assert seeds["scores"]["bleu"] == pytest.approx(np.mean(seeds["each"]["bleu"]))
    assert seeds["spread"]["bleu"] == pytest.approx(np.std(seeds["each"]["bleu"], ddof=1))
    assert seeds["differences"]["bleu"]["p_randomization"] is None and "run for run" in result["notes"][0]
    alone = json.loads(
        darel("eval", "--predictions", arguments[2], "--baseline", arguments[0], *common, "--format", "json").stdout
    )
    pair = json.loads(darel("eval", "--systems", arguments[0], arguments[2], *common, "--format", "json").stdout)
    assert alone["bleu"] == pair["systems"]["bad"]["scores"]["bleu"] == bad["scores"]["bleu"]
    assert alone["p_values"]["bleu"] == pair["systems"]["bad"]["differences"]["bleu"]["p_bootstrap"]
    assert alone["intervals"] == pair["systems"]["bad"]["intervals"]


def test_names_of_systems(systems):
    (systems / "other").mkdir()
    (systems / "other" / "good.txt").write_text((systems / "bad.txt").read_text())
    common = ("--references", systems / "refs.csv", "--only", "bleu", "--bootstrap", 0, "--format", "csv")
    done = darel("eval", f"ours={systems / 'good.txt'}", "--systems", systems / "bad.txt", *common)
    assert {row["system"] for row in csv.DictReader(io.StringIO(done.stdout))} == {"ours", "bad"}
    done = darel("eval", "--systems", systems / "good.txt", systems / "other" / "good.txt", *common)
    assert str(systems / "other" / "good.txt") in done.stdout
    refused("name each system once", "--systems", systems / "good.txt", systems / "good.txt", *common)
    refused(
        "leave out --predictions", "--systems", systems / "good.txt", "--predictions", systems / "bad.txt", *common
    )


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 1, 2)])
def test_systems_in_another_order(files, tmp_path, order):
    names = [f"name[{i}]" for i in range(3)]
    files("refs.csv", "mr,ref\n" + "".join(f"{name},the inn number {i}\n" for i, name in enumerate(names)))
    files("a.csv", "mr,out\n" + "".join(f"{name},the inn number {i}\n" for i, name in enumerate(names)))
    files("b.csv", "mr,out\n" + "".join(f"{names[i]},the inn number {i}\n" for i in order))
    done = darel("eval", "--systems", tmp_path / "a.csv", tmp_path / "b.csv", "--references", tmp_path / "refs.csv",
                 "--only", "ter", "--bootstrap", 20, "--format", "json")  # fmt: skip
    assert [one["scores"]["ter"] for one in json.loads(done.stdout)["systems"].values()] == [0.0, 0.0]


def test_tables_fit_80_columns(systems):
    common = ("--references", systems / "refs.csv", "--wordnet", "none", "--bootstrap", 50)
    long = systems / ("a-system-with-a-very-long-name-" * 3 + ".txt")
    long.write_text((systems / "bad.txt").read_text())
    for arguments in (("--systems", systems / "good.txt", systems / "seed-*.txt", long), ("--predictions", long)):
        done = darel("eval", *arguments, *common, columns_=80)
        assert done.exit_code == 0
        table = done.output[: done.output.index("words a text")].splitlines()[:-1]
        assert max(map(len, table)) <= 80 and "…" not in done.output
        shown = "\n".join(table)
        assert all(name in shown for name in NAMES.values()) and "↓" in shown
        if arguments[0] == "--systems":  # names are folded, numbers stand as a whole
            assert all(column in table[2] for column in ("score", "spread", "95 % interval", "p rand", "rank"))
            assert re.search(r" \d\.\d{4} +0\.\d{4} +\d\.\d{4} to \d\.\d{4} ", shown) and "(3 runs)" in shown


def test_formats(systems):
    odd = systems / "a_b & c|d%.txt"
    odd.write_text((systems / "bad.txt").read_text())
    common = ("--systems", systems / "good.txt", odd, "--references", systems / "refs.csv", "--only", "bleu,ter")
    common = (*common, "--bootstrap", 100)
    latex = darel("eval", *common, "--format", "latex").stdout
    assert r"a\_b \& c|d\% & " in latex and r"\end{tabular}" in latex and r"$^{*}$" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3 and {row.count(" & ") for row in rows} == {2}
    markdown = darel("eval", *common, "--format", "markdown").stdout
    assert r"a_b & c\|d%" in markdown and markdown.splitlines()[1] == "| --- | ---: | ---: |"
    rows = list(csv.DictReader(io.StringIO(darel("eval", *common, "--format", "csv").stdout)))
    assert [(row["metric"], row["system"]) for row in rows[:2]] == [("bleu", "good"), ("bleu", "a_b & c|d%")]
    assert float(rows[1]["low"]) < float(rows[1]["score"]) < float(rows[1]["high"])
    assert "tok:13a" in rows[0]["signature"]
    refused("format='pdf'", *common, "--format", "pdf")


def test_only(systems):
    common = ("--predictions", systems / "good.txt", "--references", systems / "refs.csv", "--bootstrap", 0)
    done = darel("eval", *common, "--only", "BLEU, rouge-l")
    assert "BLEU" in done.output and "ROUGE-L" in done.output and "TER" not in done.output
    refused("only=['blue']", *common, "--only", "blue")
    (systems / "plain.txt").write_text((systems / "good.txt").read_text())
    refused("needs a meaning representation", "--predictions", systems / "good.txt", "--references",
            systems / "plain.txt", "--only", "ser")  # fmt: skip


# ---- Instance by instance ----

EVIL = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"


class Check(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], set(), []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_and_instances(files, tmp_path):
    evil = EVIL.replace('"', "")
    files("refs.csv", f'mr,ref\n"name[The Inn], food[French]",The Inn serves French food\n"name[Pub {evil}]",x\n')
    files("a.txt", "The Inn serves French food\n" + EVIL + "\n")
    files("b.txt", "The Inn is a pub\n\n")
    arguments = ("--systems", tmp_path / "a.txt", tmp_path / "b.txt", "--references", tmp_path / "refs.csv")
    outputs = ("--html", tmp_path / "p.html", "--per-instance", tmp_path / "i.jsonl", "--output", tmp_path / "s.json")
    done = darel("eval", *arguments, "--wordnet", "none", "--bootstrap", 50, *outputs)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "p.html").read_text()
    found = Check(page)
    assert not found.tags & {"script", "img", "link", "iframe"} and "http" not in page
    assert EVIL.split()[0] in " ".join(found.text) and "food[French] is missing" in " ".join(found.text)
    assert "95 % interval over instances (50 resamples), the difference to a, and p" in " ".join(found.text)
    rows = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    assert [row["instance"] for row in rows] == [1, 2] and rows[0]["mr"] == "name[The Inn], food[French]"
    first, second = rows[0]["systems"]["a"][0], rows[0]["systems"]["b"][0]
    assert first["scores"]["bleu"] == pytest.approx(100) and first["scores"]["ser"] == 0 and not first["errors"]
    assert second["errors"] == ["food[French] is missing", "eatType[pub] is added"]
    assert second["scores"]["ter"] == TER().sentence_score("The Inn is a pub", rows[0]["references"]).score
    assert set(second["scores"]) == set(NAMES)
    done = darel("eval", "--predictions", tmp_path / "a.txt", "--references", tmp_path / "refs.csv", "--html",
                 tmp_path / "one.html", "--only", "bleu")  # fmt: skip
    assert done.exit_code == 0 and "scores lowest" in (tmp_path / "one.html").read_text()


def test_extra_modules(files, tmp_path):
    pytest.importorskip("evaluate")
    from pathlib import Path

    module = Path(__file__).parents[2] / "eval" / "metrics" / "ter"
    common = bleu_of(tmp_path)
    done = darel("eval", *common, "--extra", module, "--format", "json")
    assert done.exit_code == 0, done.output
    (numbers,) = json.loads(done.stdout)["extra"].values()
    assert numbers["p"]["ter"] == 0.0
    refused("cannot be computed here", *common, "--extra", tmp_path / "no module")


# ---- Anything in ----

WORDS = st.lists(
    st.sampled_from(["the", "inn", "a", "£5", "1,000", "it's", "...", "\u2013", '"', "é.", "x-y", "&amp;"]), max_size=6
)
TEXTS = st.one_of(WORDS.map(" ".join), st.text(st.characters(codec="utf-8"), max_size=10))


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_give_the_oracles_value_or_an_error(tmp_path, pairs):
    """Written as JSON and read by the command, or refused with one line, and then nothing is written."""
    predictions = "".join(json.dumps({"prediction": text}) + "\n" for text, _ in pairs)
    references = "".join(json.dumps({"references": group}) + "\n" for _, group in pairs)
    (tmp_path / "p.jsonl").write_text(predictions)
    (tmp_path / "r.jsonl").write_text(references)
    (tmp_path / "o.json").unlink(missing_ok=True)
    options = ("--only", "bleu,ter", "--bootstrap", 0, "--output", tmp_path / "o.json")
    done = darel("eval", "--predictions", tmp_path / "p.jsonl", "--references", tmp_path / "r.jsonl", *options)
    if any(not text.strip() for _, group in pairs for text in group):
        assert done.exit_code == 1 and re.search(r"line \d+ has an empty reference", done.output)
        assert not (tmp_path / "o.json").exists()
        return
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "o.json").read_text())
    texts, groups = [text for text, _ in pairs], columns([group for _, group in pairs])
    assert scores["bleu"] == BLEU(lowercase=True).corpus_score(texts, groups).score
    assert scores["ter"] == TER().corpus_score(texts, groups).score


def test_the_standard_output_is_written_into(files, tmp_path):
    """A link to a pipe that no name leads to."""
    import subprocess

    options = ("--only", "bleu", "--bootstrap", "0", "--format", "csv", "--output", "/dev/stdout")
    command = [
        sys.executable,
        "-m",
        "darel_hf.cli",
        "eval",
        "--predictions",
        "p.txt",
        "--references",
        "r.csv",
        *options,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '"bleu": 100' in done.stdout, done.stderr
