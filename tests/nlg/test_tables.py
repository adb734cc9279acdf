"""Any file in: the cells as they stand, or one error that names file and line."""

import csv
import gzip
import io
import json
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darel_hf.nlg.tables import read

LOUD = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def cells(table):
    return [list(row.values()) for row in table.rows]


def test_no_cell_changes(tmp_path):
    text = 'text,code\nNone,007\nnull,1\n"a ""quoted"", one",NA\nnan,1.0\n,true\n'
    table = read(write(tmp_path, "a.csv", text), "data")
    expected = [["None", "007"], ["null", "1"], ['a "quoted", one', "NA"], ["nan", "1.0"], ["", "true"]]
    assert table.columns == ["text", "code"] and cells(table) == expected
    assert [table.place(i) for i in range(5)] == [f"line {i}" for i in range(2, 7)]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_delimiters_and_ends_of_lines(tmp_path, ends, delimiter):
    rows = [["id", "ref"], ["1", "one"], ["2", f"a {delimiter} b"]]
    text = ends.join(delimiter.join(f'"{c}"' if delimiter in c else c for c in row) for row in rows) + ends
    table = read(write(tmp_path, "a.csv", "\ufeff" + text), "data")
    assert [table.columns, *cells(table)] == rows


def test_a_cell_may_have_lines(tmp_path):
    table = read(write(tmp_path, "a.csv", 'id,ref\n1,"one\r\ntwo"\n2,three\n'), "data")
    assert cells(table) == [["1", "one\r\ntwo"], ["2", "three"]]
    assert [table.place(0), table.place(1)] == ["line 2", "line 4"]


def test_quotation_marks_are_read_as_the_official_script_reads_them(tmp_path):
    """Its reader is Python's, line by line: marks at the beginning of a cell go, others are letters."""
    lines = ['"Hello" he said', 'the "Plough" inn', '""', '"quoted"']
    for suffix, delimiter in (("tsv", "\t"), ("csv", ",")):
        rows = [f"x{delimiter}{text}" for text in lines]
        table = read(write(tmp_path, f"a.{suffix}", "\n".join([f"mr{delimiter}out", *rows])), "data")
        expected = list(csv.reader(rows, delimiter=delimiter))
        assert cells(table) == expected


@pytest.mark.parametrize(("name", "text"), [
    ("a.json", '[{"a": "None"}, {"a": "007"}]'),
    ("a.json", '{"a": "None"}\n{"a": "007"}\n'),
    ("a.jsonl", '{"a": "None"}\r\n\n{"a": "007"}'),
    ("a.ndjson", '{"a": "None"}\n{"a": "007"}'),
    ("a.dump", '{"a": "None"}\n{"a": "007"}'),
    ("a", '[{"a": "None"},\n {"a": "007"}]'),
])  # fmt: skip
def test_json_of_any_form_and_name(tmp_path, name, text):
    table = read(write(tmp_path, name, text), "data")
    assert table.kind == "json" and cells(table) == [["None"], ["007"]]


def test_gzip_and_standard_input(tmp_path, monkeypatch):
    data = gzip.compress(b"a,b\n1,2\n")
    assert cells(read(write(tmp_path, "a.csv.gz", data), "data")) == [["1", "2"]]
    for given_ in (data, b"mr,ref\n1,2\n", b'{"mr": "1", "ref": "2"}'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given_)))
        table = read("-", "data", None)
        assert table.kind in ("csv", "json", "text")
        if given_ != data:
            assert cells(table) == [["1", "2"]]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", 'mr,ref\nb,"second\nc,third\n', "the row that begins in line 2 is broken"),
    ("a.csv", 'mr,ref\na,"one"\nb,"second\nc,"third"\n', "the row that begins in line 3 is broken"),
    ("a.csv", "mr,ref\nx,cheap, and nice\n", "line 2 has 3 columns, the header 2; a text with the delimiter"),
    ("a.csv", "mr,ref\nx,y\nx\n", "line 3 has 1 columns, the header 2"),
    ("a.csv", "mr,ref\nx," + "y" * 140_000 + "\n", "line 2 is broken (field larger than field limit"),
    ("a.csv", "", "the file is empty"),
    ("a.csv", "mr,ref\n", "there are no rows"),
    ("a.csv", "a,a\n1,2\n", "line 1 names the column 'a' twice"),
    ("a.csv", "ref\na\n\nb\n", "line 3 is empty"),
    ("a.csv", b"a,b\n1,\xe9\n", "line 2 is not UTF-8 text"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16"), "UTF-16"),
    ("a.csv", b"a,b\n1,\0\n", "line 2 has a NUL character"),
    ("a.csv", b"PK\x03\x04.....", "a zip archive"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is no JSON object"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is no JSON object"),
    ("a.jsonl", '{"a": 1, "a": 2}\n{"a": 1}\n', "line 1: the key 'a' comes twice"),
    ("a.jsonl", '{"a": "\\ud83d"}\n{"a": 1}\n', "line 1 has half a character"),
    ("a.json", '[\n{"a": 1},\n{"a": }\n]', "line 3 is no JSON object"),
    ("a.json", "3", "line 1 is no JSON object"),
    ("a.json", "[]", "line 1 is no JSON object"),
    ("a.json", "a plain text\n", "line 1 is no JSON object"),
    ("a.parquet", "PAR1 and no more", "not a readable parquet file"),
    ("a.csv.gz", b"\x1f\x8b broken", "the compressed file is broken"),
    ("a.txt", '{"prediction": "a"}\n{"prediction": "b"}\n', "line 1 is JSON, but the name says plain text"),
    ("a.txt", '["a", "b"]\n', "line 1 is JSON"),
    ("a.txt", "mr,ref\na,b\n", "line 1 is the header of a table"),
    ("a.txt", "MR\toutput\na\tb\n", "line 1 is the header of a table"),
])  # fmt: skip
def test_errors_name_the_line(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(path, "data")
    assert str(raised.value).startswith(f"data={str(path)!r}: ") and "\n" not in str(raised.value)


def test_places_that_are_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        read(tmp_path, "data")
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "none.csv", "data")
    with pytest.raises(ValueError, match="unknown kind of file"):
        read(write(tmp_path, "a.doc", "x"), "data", (".csv",))


# ---- Written again ----


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", 'text,code\nNone,007\nnull,1\n"fine, and ""good""",2\n"two\nlines",3\n'),
    ("a.csv", "text,code\r\nNone,007\r\nnull,1\r\nfine,2\r\nx,3\r\n"),
    ("a.jsonl", '{"text": "None",   "code": 7.0}\n{"text":null}\n{"code": "\\u00e9"}\n{"text": "x"}\n'),
])  # fmt: skip
def test_kept_rows_are_the_same_bytes(tmp_path, name, text):
    table = read(write(tmp_path, name, text), "data")
    out = tmp_path / f"kept{(tmp_path / name).suffix}"
    table.write(range(len(table)), out)
    assert out.read_bytes() == text.encode()


def test_other_kinds_keep_cells(tmp_path):
    table = read(write(tmp_path, "a.csv", "text,code\nNone,007\nnull,1\nfine,2\n"), "data")
    table.write([0, 2], tmp_path / "kept.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == [{"text": "None", "code": "007"}, {"text": "fine", "code": "2"}]
    table.write([1], tmp_path / "kept.parquet", {"weight": [0.5]})
    again = read(tmp_path / "kept.parquet", "data")
    assert again.rows == [{"text": "null", "code": "1", "weight": 0.5}]
    again.write([0], tmp_path / "again.parquet")
    assert read(tmp_path / "again.parquet", "data").rows == again.rows
    tabs = read(write(tmp_path, "b.csv", "text\tcode\na, b\t1\n"), "data")
    tabs.write([0], tmp_path / "tabs.csv")
    assert (tmp_path / "tabs.csv").read_text() == 'text,code\n"a, b",1\n'


# ---- Anything in ----

LETTER = st.sampled_from("ab ,;\t\"'\n\r{}[]:\\é\u2028\ufeff\0|<&1N")
BYTES = st.one_of(st.binary(max_size=60), st.text(LETTER, max_size=60).map(str.encode))
NAMES = st.sampled_from(
    ["f.csv", "f.tsv", "f.json", "f.jsonl", "f.txt", "f.xml", "f.parquet", "f", "f.csv.gz", "f.out"]
)


@given(NAMES, st.sampled_from([b"", b"mr,ref\n", b"mr\tout\n", b'{"mr": "x", "ref": "', b"[", b"<benchmark>"]), BYTES)
@LOUD
def test_any_bytes_are_read_or_refused(tmp_path, name, head, data):
    path = write(tmp_path, name, head + data)
    try:
        table = read(path, "data")
    except ValueError as error:
        assert str(error).startswith(f"data={str(path)!r}: ") and "\n" not in str(error)
        return
    assert len(table) > 0 or table.document is not None


TEXTS = st.text(st.sampled_from("abé \"',;\t\n|{}[]"), max_size=8)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
@LOUD
def test_what_csv_writes_is_read_back(tmp_path, rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("mr", "ref"), *rows])
    table = read(write(tmp_path, "a.csv", text.getvalue()), "data")
    assert [tuple(row) for row in cells(table)] == rows
    table.write(range(len(table)), tmp_path / "kept.csv")
    assert cells(read(tmp_path / "kept.csv", "data")) == cells(table)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12), min_size=1, max_size=6))
@LOUD
def test_what_json_writes_is_read_back(tmp_path, texts):
    lines = "".join(json.dumps({"ref": text}, ensure_ascii=False) + "\n" for text in texts)
    for name, text in (("a.jsonl", lines), ("a.json", json.dumps([{"ref": text} for text in texts]))):
        table = read(write(tmp_path, name, text), "data")
        assert [row["ref"] for row in table.rows] == texts
