"""Files of predictions and references, as they come."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darel_hf.nlg.texts import match, read_predictions, read_references


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder, predictions, references, kinds=("txt", "txt")):
    return match(
        read_predictions(write(folder, f"p.{kinds[0]}", predictions)),
        read_references(write(folder, f"r.{kinds[1]}", references)),
    )


# ---- Formats ----


def test_plain_text_with_several_references(tmp_path):
    assert read(tmp_path, "a\nb\n", "r1\nr2\n\ns1\n") == (["a", "b"], [["r1", "r2"], ["s1"]])


def test_plain_text_with_one_reference_a_line(tmp_path):
    assert read(tmp_path, "a\nb", "r\ns\n") == (["a", "b"], [["r"], ["s"]])


def test_an_empty_line_is_an_empty_prediction(tmp_path):
    assert read(tmp_path, "a\n\n", "r\ns\n") == (["a", ""], [["r"], ["s"]])


@pytest.mark.parametrize(
    "header", ["mr,ref", "MR,Reference", "source,target", "meaning_representation,human_reference", "da,trg"]
)
def test_table_of_references(tmp_path, header):
    table = f'{header}\n"n[A], k[inn]",first\n"n[A], k[inn]","second, with comma"\n"n[B]",third\n'
    expected = [["first", "second, with comma"], ["third"]]
    assert read(tmp_path, "a\nb\n", table, ("txt", "csv")) == (["a", "b"], expected)
    tabs = header.replace(",", "\t") + "\nn[A], k[inn]\tfirst\nn[A], k[inn]\tsecond, with comma\nn[B]\tthird\n"
    assert read(tmp_path, "a\nb\n", "\ufeff" + tabs, ("txt", "tsv")) == (["a", "b"], expected)


def test_tables_are_mended_as_the_official_script_does(tmp_path):
    _, references = read(tmp_path, "a\n", "mr,ref\nx,CafÃ© for Â£20 or Ł30\n", ("txt", "csv"))
    assert references == [["Café for £20 or £30"]]


def test_rows_of_one_representation_that_stand_apart(tmp_path):
    table = "mr,ref\nx,1\ny,2\nx,3\n"
    assert read(tmp_path, "a\nb\nc\n", table, ("txt", "csv"))[1] == [["1"], ["2"], ["3"]]  # no names: by neighbours
    predictions = '{"mr": "y", "prediction": "b"}\n{"mr": "x", "prediction": "a"}\n'
    assert read(tmp_path, predictions, table, ("jsonl", "csv")) == (["b", "a"], [["2"], ["1", "3"]])
    assert read(tmp_path, "mr,output\nx,a\ny,b\n", table, ("csv", "csv")) == (["a", "b"], [["1", "3"], ["2"]])


def test_jsonl(tmp_path):
    predictions = '{"id": 2, "prediction": "b"}\n{"id": 1, "prediction": "a"}\n'
    references = '{"id": 1, "references": ["r", "s"]}\n{"id": 2, "ref": "t"}\n'
    assert read(tmp_path, predictions, references, ("jsonl", "jsonl")) == (["a", "b"], [["r", "s"], ["t"]])
    plain = '{"prediction": "a"}\n{"prediction": "b"}\n'
    assert read(tmp_path, plain, references, ("jsonl", "jsonl"))[0] == ["a", "b"]


def test_line_ends_and_empty_lines_at_the_end(tmp_path):
    assert read(tmp_path, "a\r\nb\r\n", "r\rs\r") == (["a", "b"], [["r"], ["s"]])
    assert read(tmp_path, "a\nb\n", "r\ns\n\n\n") == (["a", "b"], [["r"], ["s"]])
    assert read(tmp_path, "mr\tout\nx\t\ny\tb\n", "mr,ref\nx,r\ny,s\n", ("tsv", "csv"))[0] == ["", "b"]


def test_one_prediction_a_representation(tmp_path):
    """The recipe joins what stands apart; so does the evaluation, if there are as many predictions."""
    assert read(tmp_path, "a\nb\n", "mr,ref\nx,1\ny,2\nx,3\n", ("txt", "csv"))[1] == [["1", "3"], ["2"]]


def test_ids_of_tables(tmp_path):
    predictions = "id,mr,output\n2,x,b\n1,x,a\n"
    references = '{"id": 1.0, "ref": "r"}\n{"id": 2, "ref": "s"}\n'
    assert read(tmp_path, predictions, references, ("csv", "jsonl")) == (["a", "b"], [["r"], ["s"]])


# ---- Bad input ----


@pytest.mark.parametrize(
    ("predictions", "references", "kinds", "message"),
    [
        ("a\n", "r\n\ns\n", ("txt", "txt"), "1 texts, but there are references for 2 instances; line 3 of the refer"),
        (
            "a\nb\nc\n",
            "r\ns\n",
            ("txt", "txt"),
            "3 texts, but there are references for 2 instances; line 3 of the pred",
        ),
        ("", "r\n", ("txt", "txt"), "the file is empty"),
        ("a\n", " \n", ("txt", "txt"), "the file is empty"),
        ("a\n", "r\n\n\ns\n", ("txt", "txt"), "line 3 is empty where a reference should stand"),
        (b"fine\nb\xe9d\n", "r\ns\n", ("txt", "txt"), "line 2 is not UTF-8"),
        ("a\n", b"mr,ref\nx,\xff\n", ("txt", "csv"), "line 2 is not UTF-8"),
        ("a\n", "x,y\n1,2\n", ("txt", "csv"), "needs one column for the meaning representation"),
        ("a\n", "mr,ref\n", ("txt", "csv"), "no rows below the header"),
        ("a\n", "mr,ref\nx\n", ("txt", "csv"), "line 2 has 1 columns, the header 2"),
        ('{"id": 1, "prediction": "a"}\n{"id": 1, "prediction": "b"}\n', "r\ns\n", ("jsonl", "txt"), "lines 1 and 2"),
        ("id,mr,out\n1,x,a\n1,y,b\n", "r\ns\n", ("csv", "txt"), "id='1'"),
        (
            "mr,out\nx,a\nx,b\n",
            "mr,ref\nx,1\nx,2\n",
            ("csv", "csv"),
            "line 3 of the predictions predicts it once more",
        ),
        (
            '{"id": 1, "prediction": "a"}\n{"prediction": "b"}\n',
            "r\ns\n",
            ("jsonl", "txt"),
            "line 2 of the predictions",
        ),
        ("a\n", 'mr,ref\nx,"first\ny,second\n', ("txt", "csv"), "begins in line 2 is broken"),
        ("a\n", "mr,ref\nx,\n", ("txt", "csv"), "line 2 has an empty reference"),
        ("[" * 100_000, "r\n", ("jsonl", "txt"), "line 1 is no JSON object"),
        ('{"text": "a"}\n', "r\n", ("jsonl", "txt"), "line 1 has no text 'prediction', only 'text'"),
        ("a\n", "r\n", ("jsonl", "txt"), "line 1 is no JSON object"),
        ("a\n", '{"id": 1}\n', ("txt", "jsonl"), "line 1 has no 'references'"),
        (
            '{"id": 1, "prediction": "a"}\n{"id": 3, "prediction": "b"}\n',
            '{"id": 1, "ref": "r"}\n{"id": 2, "ref": "s"}\n',
            ("jsonl", "jsonl"),
            "id='3': line 2 of the predictions has no counterpart",
        ),
        (
            '{"id": 1, "prediction": "a"}\n',
            '{"id": 1, "ref": "r"}\n{"id": 2, "ref": "s"}\n',
            ("jsonl", "jsonl"),
            "id='2'",
        ),
    ],
)
def test_bad_files(tmp_path, predictions, references, kinds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, predictions, references, kinds)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"predictions=.*no such file"):
        read_predictions(tmp_path / "none.txt")


def test_the_files_of_loras_repository(tmp_path):
    mr = "name : The Oak | Type : inn||"
    text = f"{mr}The Oak is an inn . \n{mr}An inn . \nname : Elm||Elm . \n"
    assert read(tmp_path, "a\nb\n", text) == (["a", "b"], [["The Oak is an inn .", "An inn ."], ["Elm ."]])
    pairs = [("name : The Oak", "The Oak ."), ("name : Elm", "Elm .")]
    lines = "".join(f'{{"context": "{mr}", "completion": "{text}"}}\n' for mr, text in pairs)
    assert read(tmp_path, "a\nb\n", lines, ("txt", "jsonl")) == (["a", "b"], [["The Oak ."], ["Elm ."]])


PIECES = st.sampled_from(
    [
        *'{}[]",\t\n\0\ufeffa1',
        "mr",
        "ref",
        "id",
        "prediction",
        "references",
        "\r\n",
        "\n\n",
        "the inn",
        "name[a]",
        "||",
        "null",
        ": ",
        "<benchmark>",
        "<entry>",
        "</entry>",
        "entries",
        "annotations",
    ]
)
FILES = st.tuples(st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "xml", "out"]), st.lists(PIECES, max_size=20))


@given(FILES, FILES)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_two_files_fit_together_or_are_refused(tmp_path, predictions, references):
    paths = [write(tmp_path, f"{n}.{kind}", "".join(text)) for n, (kind, text) in enumerate((predictions, references))]
    try:
        texts, groups = match(read_predictions(paths[0]), read_references(paths[1]))
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(("predictions", "references", "id=", "mr="))
        return
    assert len(texts) == len(groups) > 0 and all(group and all(text.strip() for text in group) for group in groups)
