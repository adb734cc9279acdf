"""Files of rows, read as they stand: CSV, TSV, JSON, JSON lines, parquet, plain text; every command reads with it."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path, require

KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".parquet": "parquet",
    ".xml": "xml",
    ".txt": "text",
}
STDIN = "-"
#: What files begin with that are none of ours, and what they are.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\xfd7zXZ": "xz-compressed",
    b"BZh": "bzip2-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"%PDF": "a PDF",
}
_MARK = "end of line"


class Table:
    """
    Rows of a file, each cell as it stands there: text in CSV and TSV ("None", "007"), any value in JSON.

    Attributes:
        path (`str`): the file.
        what (`str`): the setting that names it, for errors.
        kind (`str`): `"csv"` (any delimiter), `"json"` (lines, or one document), `"parquet"`, `"xml"` or `"text"`.
        columns (`list[str]`): the header, or the keys of all JSON objects.
        rows (`list[dict]`): the cells by column; a plain text has the one column `text`.
        document: what a JSON or XML file holds where it is no list of objects.
    """

    def __init__(
        self,
        path: str,
        what: str,
        kind: str,
        columns: list[str],
        rows: list[dict[str, Any]],
        places: Sequence[int],
        unit: str = "line",
        sources: list[str] | None = None,
        header: str = "",
        delimiter: str = ",",
        document: Any = None,
    ):
        self.path, self.what, self.kind, self.columns, self.rows = path, what, kind, columns, rows
        self.document = document
        self._places, self._unit = places, unit
        self._sources, self._header = (sources if delimiter == "," else None), header

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        """Return where a row stands: `line 3`, or `entry 3` of one JSON document."""
        return f"{self._unit} {self._places[row]}"

    def refuse(self, problem: str) -> None:
        """Raise the error that names this file."""
        require(False, self.what, self.path, problem)

    def column(self, name: str, purpose: str) -> list[Any]:
        """Return the cells of a column; raises `ValueError`, naming the setting `purpose`, if there is none."""
        require(name in self.columns, purpose, name, f"{self.path} has no such column, only {self.columns}")
        return [row.get(name) for row in self.rows]

    def texts(self, name: str, purpose: str) -> list[str]:
        """Return the cells of a column of texts; raises `ValueError` for the first that is none."""
        cells = self.column(name, purpose)
        for row, cell in enumerate(cells):
            if not isinstance(cell, str):
                self.refuse(f"{self.place(row)} has no text in {name!r}, but {_short(cell)}")
        return cells

    def numbers(self, name: str, purpose: str) -> list[int]:
        """Return the cells of a column of whole numbers; raises `ValueError` for the first that is none."""
        cells = self.column(name, purpose)
        for row, cell in enumerate(cells):
            whole = isinstance(cell, int) and not isinstance(cell, bool)
            whole = whole or (isinstance(cell, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", cell) is not None)
            if not whole:
                self.refuse(f"{self.place(row)} has no whole number in {name!r}, but {_short(cell)}; number the rows")
        return [int(cell) for cell in cells]

    def write(self, positions: Iterable[int], path: Path, added: dict[str, Sequence[Any]] | None = None) -> None:
        """
        Write some rows to a file, by its suffix: `.csv`, `.jsonl` or `.parquet`; atomically.

        Where the kind stays and no column is added, the rows are the same bytes as in the file that was read.
        """
        positions = list(positions)
        check_output(path)
        kept = [self.rows[i] for i in positions]
        for name, values in (added or {}).items():
            kept = [{**row, name: value} for row, value in zip(kept, values, strict=True)]
        columns = [*self.columns, *(name for name in added or {} if name not in self.columns)]
        kind = KINDS[path.suffix]
        with atomic_path(path) as temporary:
            if kind == "parquet":
                self._write_parquet(positions, kept, columns, added or {}, temporary)
                return
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                if self._sources is not None and kind == self.kind and not added:
                    file.write(self._header)
                    file.writelines(self._sources[i] for i in positions)
                elif kind == "json":
                    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept)
                else:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(columns)
                    writer.writerows([_cell(row.get(name)) for name in columns] for row in kept)

    def _write_parquet(
        self, positions: list[int], kept: list[dict], columns: list[str], added: dict[str, Any], path: Path
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.kind == "parquet":
                table = self.document.take(positions)
                for name, values in added.items():
                    table = table.append_column(name, pa.array(values))
            else:
                table = pa.table({name: [row.get(name) for row in kept] for name in columns})
        except pa.ArrowException as error:
            self.refuse(f"its values do not fit into columns of one type ({error}); write .jsonl")
        pq.write_table(table, path)


def check_output(path: Path) -> None:
    """Raise `ValueError` for a suffix that nothing is written as."""
    known = [".csv", ".jsonl", ".parquet"]
    require(path.suffix in known, "output", str(path), f"unknown kind of file; give one of {', '.join(known)}")


def read(path: str | os.PathLike, what: str, kinds: Sequence[str] | None = None) -> Table:
    """
    Read a file of rows.

    Args:
        path: the file; `-` for standard input; compressed by gzip or not. What it is says its suffix, or, where it has
            none that is known, its content.
        what (`str`): the setting that names it, for errors.
        kinds (`Sequence[str]`, *optional*): the suffixes that make sense here; default: all.

    Raises:
        ValueError: for a file that is missing, empty, not UTF-8, or not of the form that its name says; names the
            file, the line and the remedy.
    """
    name = str(path)
    suffixes = Path(name.removesuffix(".gz")).suffix.lower() if name != STDIN else ""
    if kinds is not None and name != STDIN:
        require(Path(name).exists(), what, name, "no such file")
        require(
            suffixes in kinds or Path(name).is_dir(),
            what,
            name,
            f"unknown kind of file; give one of {', '.join(kinds)}",
        )
    data = _read_bytes(name, what)
    kind = KINDS.get(suffixes)
    if kind == "parquet" or data[:4] == b"PAR1":
        return _parquet(data, name, what)
    text = _decode(data, name, what)
    found = _form(text)
    if kind == "text" and found is not None:
        looks = {"json": "JSON", "csv": "the header of a table", "xml": "XML"}[found]
        suffix = {"json": ".jsonl", "csv": ".csv or .tsv", "xml": ".xml"}[found]
        require(False, what, name, f"line 1 is {looks}, but the name says plain text; name the file {suffix}")
    kind = kind or found or "text"
    if kind == "text":
        require(bool(text), what, name, "the file is empty")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        return Table(name, what, "text", ["text"], [{"text": line} for line in lines], range(1, len(lines) + 1))
    require(bool(text.strip()), what, name, "the file is empty")
    if kind == "xml":
        return Table(name, what, "xml", [], [], [], document=text)
    if kind == "json":
        return _json(text, name, what)
    return _csv(text, name, what)


# ---- Bytes and text ----


def _read_bytes(name: str, what: str) -> bytes:
    if name == STDIN:
        data = sys.stdin.buffer.read()
    else:
        path = Path(name)
        require(not path.is_dir(), what, name, "is a folder; name a file in it")
        require(path.exists(), what, name, "no such file")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{what}={name!r}: cannot be read ({error.strerror})") from None
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{what}={name!r}: the compressed file is broken ({error})") from None
    for magic, meaning in _FOREIGN.items():
        require(not data.startswith(magic), what, name, f"is {meaning}; give it unpacked, as text")
    return data


def _decode(data: bytes, name: str, what: str) -> str:
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]
    require(not utf16, what, name, "line 1 is not UTF-8 text but UTF-16; convert the file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{what}={name!r}: line {line} is not UTF-8 text; convert the file") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        require(False, what, name, f"line {line} has a NUL character: no text; convert the file")
    return text


def _form(text: str) -> str | None:
    """Return what a text is beyond doubt: `json`, `csv`, `xml`, or None."""
    begin = text.lstrip()
    if begin.startswith("<?xml") or begin.startswith("<benchmark"):
        return "xml"
    first, _, rest = begin.partition("\n")
    if begin.startswith("{"):
        second = rest.lstrip().partition("\n")[0]
        if all(_loads(line) is not None for line in (first, second) if line) or _loads(text) is not None:
            return "json"
    if begin.startswith("[") and (found := _loads(text, list)) is not None:
        return "json" if any(isinstance(item, (dict, str, list)) for item in found) else None
    return "csv" if is_header(split_header(first)) else None


def is_header(cells: list[str]) -> bool:
    """Whether a line is the header of a table of texts: it names a representation or an id, and a text."""
    names = [cell.strip().lower().replace("_", " ") for cell in cells]
    sources = {"mr", "src", "source", "meaning representation", "da", "input", "context", "id"}
    texts = {"ref", "reference", "output", "prediction", "hypothesis", "target", "trg", "tgt", "human reference"}
    return len(names) > 1 and any(name in sources for name in names) and any(name in texts for name in names)


def split_header(line: str) -> list[str]:
    """Return the names in a header, whatever divides them."""
    line = line.rstrip("\r\n")
    try:
        return next(csv.reader([line], delimiter=_delimiter(line)), [])
    except csv.Error:
        return []


def _loads(text: str, form: type = dict) -> Any:
    """Return the JSON value in a text if it is one of this form, else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, form) else None


# ---- Forms ----


def _delimiter(header: str) -> str:
    if "\t" in header:
        return "\t"  # as the E2E scripts decide, whatever the file is called
    return ";" if ";" in header and "," not in header else ","


def _csv(text: str, name: str, what: str) -> Table:
    lines = iter(io.StringIO(text, newline=""))
    numbered = _csv_rows(lines, name, what)
    begins, header, source = next(numbered)
    columns = [cell.strip() for cell in header]
    twice = [cell for cell in columns if columns.count(cell) > 1]
    require(not twice, what, name, f"line {begins} names the column {twice[0] if twice else None!r} twice")
    rows, places, sources = [], [], []
    for place, cells, raw in numbered:
        if len(cells) != len(columns):
            remedy = f"line {place} has {len(cells)} columns, the header {len(columns)}"
            remedy += "; a text with the delimiter in it needs quotation marks" if len(cells) > len(columns) else ""
            require(False, what, name, remedy)
        rows.append(dict(zip(columns, cells, strict=True)))
        places.append(place)
        sources.append(raw if raw.endswith(("\n", "\r")) else raw + "\n")
    require(bool(rows), what, name, "there are no rows below the header")
    delimiter = _delimiter(source)
    return Table(name, what, "csv", columns, rows, places, sources=sources, header=source, delimiter=delimiter)


def _csv_rows(lines: Iterator[str], name: str, what: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield the number of the line where a row begins, its cells, and the lines as they stand."""
    number, delimiter, blank, width = 0, None, None, 0
    for line in lines:
        number += 1
        if not line.strip():
            blank = blank or number
            continue
        if delimiter is None:
            delimiter, blank = _delimiter(line), None
        elif blank is not None and width == 1:
            require(False, what, name, f'line {blank} is empty; in a table of one column write "" for an empty text')
        begins, raw = number, line
        try:
            # Line by line, as the E2E scripts read: a quotation mark within a cell is a letter like any other.
            (row,) = csv.reader([line.rstrip("\r\n") + delimiter + _MARK], delimiter=delimiter)
            if row[-1] == _MARK:
                row.pop()
            else:  # a quotation mark is open: the cell goes on in the next lines, and has to be closed
                taken = [line]
                rest = itertools.chain([line], _kept(lines, taken))
                reader = csv.reader(rest, delimiter=delimiter, strict=True)
                row = next(reader)
                number += len(taken) - 1
                raw = "".join(taken)
        except csv.Error as error:
            problem = f"the row that begins in line {begins} is broken ({error}); is a quotation mark not closed?"
            raise ValueError(f"{what}={name!r}: {problem}") from None
        width = width or len(row)
        blank = None
        yield begins, row, raw


def _kept(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _json(text: str, name: str, what: str) -> Table:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = _loads(lines[0][1])
    if first is not None and (len(lines) > 1 or not _is_document(first)):
        rows = []
        for number, line in lines:
            rows.append(_object(line, f"line {number}", name, what))
        sources = [line + "\n" for _, line in lines]
        return Table(name, what, "json", _keys(rows), rows, [number for number, _ in lines], sources=sources)
    try:
        document = json.loads(text, object_pairs_hook=_once)
        problem = None
    except RecursionError:
        problem = f"line {lines[0][0]} is no JSON object"
    except json.JSONDecodeError as error:
        line = error.lineno if "\n" in text.strip() and text.lstrip()[0] in "[{" else lines[0][0]
        problem = f"line {line} is no JSON object ({error.msg})"
    except ValueError as error:
        problem = str(error)
    require(problem is None, what, name, str(problem))
    _check_letters(text, document, "line 1", name, what)
    if isinstance(document, list) and document and all(isinstance(item, dict) for item in document):
        return Table(
            name, what, "json", _keys(document), document, range(1, len(document) + 1), "entry", document=document
        )
    fine = isinstance(document, (list, dict)) and len(document) > 0
    require(fine, what, name, f"line {lines[0][0]} is no JSON object, and the file no list of objects or texts")
    return Table(name, what, "json", [], [], [], "entry", document=document)


def _is_document(value: dict) -> bool:
    """Whether one object is a whole data set, not a row of one."""
    return isinstance(value.get("entries"), list)


def _object(line: str, place: str, name: str, what: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_once)
    except RecursionError:
        record = None
    except json.JSONDecodeError:
        record = None
    except ValueError as error:
        raise ValueError(f"{what}={name!r}: {place}: {error}") from None
    require(isinstance(record, dict), what, name, f"{place} is no JSON object")
    _check_letters(line, record, place, name, what)
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in an object")
    return made


def _check_letters(source: str, value: Any, place: str, name: str, what: str) -> None:
    r"""Refuse halves of surrogate pairs (`\ud83d` alone), which no file can hold."""
    if re.search(r"\\u[dD][89a-fA-F]", source):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            require(False, what, name, f"{place} has half a character (an unpaired surrogate); mend the text")


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _parquet(data: bytes, name: str, what: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what}={name!r}: not a readable parquet file ({reason}); make it again") from None
    require(table.num_rows > 0, what, name, "there are no rows in it")
    rows = table.to_pylist()
    return Table(name, what, "parquet", table.column_names, rows, range(1, len(rows) + 1), "row", document=table)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
