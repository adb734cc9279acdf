"""Files of predictions and references: read, checked, and brought together instance by instance."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import require

# Columns as the E2E scripts guess them, by how a header begins.
_SOURCE = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
_PREDICTION = re.compile(r"out|pred|ref|sys", re.IGNORECASE)
_REFERENCE = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
# What the E2E scripts mend in tables: pound signs and accents that were decoded twice.
_MENDED = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


@dataclass
class Instance:
    """One meaning representation: its texts, what names it (`id`, `mr`), and the line where it begins."""

    keys: dict[str, str]
    texts: list[str]
    line: int


def read_predictions(path: str | os.PathLike) -> list[Instance]:
    """
    Read predictions: plain text, one a line; `.jsonl` with `prediction` and perhaps `id` or `mr`; or `.csv`/`.tsv`.

    Raises:
        ValueError: if the file is missing, empty or not UTF-8, a column or field is missing, or an id comes twice.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        instances = [
            Instance(_keys(record), [_text(record, "prediction", path, line)], line)
            for line, record in _json_lines(path, "predictions")
        ]
    elif suffix in (".csv", ".tsv"):
        instances = _read_table(path, "predictions", _PREDICTION)
    else:
        instances = [Instance({}, [text], line) for line, text in enumerate(_lines(path, "predictions"), 1)]
    seen: dict[str, int] = {}
    for instance in instances:
        name = instance.keys.get("id")
        first = seen.setdefault(name, instance.line) if name is not None else instance.line
        remedy = f"stands in lines {first} and {instance.line} of {path}; predict each instance once"
        require(first == instance.line, "id", name, remedy)
    return instances


def read_references(path: str | os.PathLike) -> list[Instance]:
    """
    Read references, one or more an instance.

    `.csv`/`.tsv`: columns for the meaning representation and the reference, rows of one instance together; `.jsonl`:
    `references` (a list) or `ref`, with `id` or `mr`; any other file: one reference a line, an empty line between
    instances, or without empty lines one instance a line.

    Raises:
        ValueError: if the file is missing, empty or not UTF-8, or a column or field is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        rows = []
        for line, record in _json_lines(path, "references"):
            texts = record.get("references", record.get("ref"))
            texts = [texts] if isinstance(texts, str) else texts
            fine = isinstance(texts, list) and len(texts) > 0 and all(isinstance(text, str) for text in texts)
            require(fine, "references", str(path), f"line {line} has no 'references' (a list of texts) and no 'ref'")
            require(
                all(text.strip() for text in texts), "references", str(path), f"line {line} has an empty reference"
            )
            rows.append(Instance(_keys(record), texts, line))
        return _grouped(rows)
    if suffix in (".csv", ".tsv"):
        rows = _read_table(path, "references", _REFERENCE)
        for row in rows:
            require(bool(row.texts[0]), "references", str(path), f"line {row.line} has an empty reference")
        return _grouped(rows)
    lines = _lines(path, "references")
    while not lines[-1]:
        lines.pop()
    if "" not in lines:
        return [Instance({}, [text], line) for line, text in enumerate(lines, 1)]
    instances: list[Instance] = []
    opened = False
    for line, text in enumerate(lines, 1):
        require(bool(text) or opened, "references", str(path), f"line {line} is empty where a reference should stand")
        if text and opened:
            instances[-1].texts.append(text)
        elif text:
            instances.append(Instance({}, [text], line))
        opened = bool(text)
    return instances


def match(
    predictions: list[Instance], references: list[Instance], what: str = "predictions"
) -> tuple[list[str], list[list[str]]]:
    """
    Bring predictions and references together: by `id` or `mr` where all of both have it, else in order.

    In order, references of one representation that stand apart count as one instance if there are just as many
    predictions as representations, else as several, as in the official script.

    Returns:
        `tuple`: the predictions, and the references of each; in the order of the references, or matched by `mr` in
        that of the predictions (two instances may share a representation).

    Raises:
        ValueError: if some have no counterpart; says how many there are and the first line where they part.
    """
    for key in ("id", "mr"):
        for side, instances in ((what, predictions), ("references", references)):
            without = [instance.line for instance in instances if key not in instance.keys]
            remedy = f"line {without[0] if without else 0} of the {side} has none, others have; give it to all or none"
            require(len(without) in (0, len(instances)), key, None, remedy)
        if all(key in instance.keys for instance in [*predictions, *references]):
            by_key = _by_key(references, key)
            known = {instance.keys[key] for instance in predictions}
            places = Counter(instance.keys[key] for instance in references)
            for instance in predictions:
                places[instance.keys[key]] -= 1
                remedy = f"line {instance.line} of the {what} predicts it once more than it stands in the references"
                again = instance.keys[key] in by_key and places[instance.keys[key]] < 0
                require(not again, key, instance.keys[key], remedy)
                remedy = f"line {instance.line} of the {what} has no counterpart among {len(by_key)} references"
                require(instance.keys[key] in by_key, key, instance.keys[key], remedy)
            for instance in references:
                remedy = f"line {instance.line} of the references has no counterpart among {len(known)} {what}"
                require(instance.keys[key] in known, key, instance.keys[key], remedy)
            if key == "id":
                text_of = {instance.keys[key]: instance.texts[0] for instance in predictions}
                return [text_of[name] for name in by_key], list(by_key.values())
            return (
                [instance.texts[0] for instance in predictions],
                [by_key[instance.keys[key]] for instance in predictions],
            )
    n, m = len(predictions), len(references)
    joined = _by_key(references, "mr") if all("mr" in instance.keys for instance in references) else {}
    if n != m and n == len(joined):
        return [instance.texts[0] for instance in predictions], list(joined.values())
    if n != m:
        rest, side = (references[n:], "references") if n < m else (predictions[m:], what)
        remedy = f"there are references for {m} instances; line {rest[0].line} of the {side} has no counterpart"
        raise ValueError(f"{what}: {n} texts, but {remedy}")
    return [instance.texts[0] for instance in predictions], [instance.texts for instance in references]


def _by_key(references: list[Instance], key: str) -> dict[str, list[str]]:
    """Return all references of each name, in the order in which names first come up."""
    groups: dict[str, list[str]] = {}
    for instance in references:
        groups.setdefault(instance.keys[key], []).extend(instance.texts)
    return groups


def _grouped(rows: list[Instance]) -> list[Instance]:
    """Join neighbours that carry the same name."""
    instances: list[Instance] = []
    for row in rows:
        if instances and row.keys and row.keys == instances[-1].keys:
            instances[-1].texts.extend(row.texts)
        else:
            instances.append(row)
    return instances


def _lines(path: str | os.PathLike, what: str, strip: str | None = None) -> list[str]:
    """Return the lines of a file, stripped; raises `ValueError` for a file that cannot be read or is empty."""
    require(Path(path).is_file(), what, str(path), "no such file")
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{what}={str(path)!r}: line {line} is not UTF-8 text; convert the file") from None
    require(bool(text.strip()), what, str(path), "the file is empty")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip(strip) for line in text.removesuffix("\n").split("\n")]


def _json_lines(path: str | os.PathLike, what: str) -> list[tuple[int, dict[str, Any]]]:
    records = []
    for number, line in enumerate(_lines(path, what), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        require(isinstance(record, dict), what, str(path), f"line {number} is no JSON object")
        records.append((number, record))
    return records


def _keys(record: dict[str, Any]) -> dict[str, str]:
    keys = {key: record[key] for key in ("id", "mr") if record.get(key) is not None}
    whole = {key: int(value) for key, value in keys.items() if isinstance(value, float) and value.is_integer()}
    return {key: str(value) for key, value in (keys | whole).items()}  # a table with gaps stores 1 as 1.0


def _text(record: dict[str, Any], field: str, path: str | os.PathLike, line: int) -> str:
    remedy = f"line {line} has no text {field!r}, only {', '.join(map(repr, record))}"
    require(isinstance(record.get(field), str), "predictions", str(path), remedy)
    return record[field]


def _read_table(path: str | os.PathLike, what: str, wanted: re.Pattern) -> list[Instance]:
    lines = _lines(path, what, strip="\n")
    for wrong, right in _MENDED:
        lines = [line.replace(wrong, right) for line in lines]
    delimiter = "\t" if "\t" in lines[0] else ","
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for row in reader:
            rows.append((begins, [" ".join(cell.split()) for cell in row]))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{what}={str(path)!r}: the row that begins in line {begins} is broken ({error})") from None
    (_, header), *rows = rows
    sources = [i for i, name in enumerate(header) if _SOURCE.match(name)]
    columns = [i for i, name in enumerate(header) if wanted.match(name) and i not in sources]
    remedy = f"needs one column for the meaning representation and one for the {what} (mr,ref), but has {header}"
    require(len(sources) == 1 and len(columns) == 1, what, str(path), remedy)
    names = {"mr": sources[0], **({"id": header.index("id")} if "id" in header else {})}
    instances = []
    for line, row in rows:
        if any(row):
            remedy = f"line {line} has {len(row)} columns, the header {len(header)}"
            require(len(row) == len(header), what, str(path), remedy)
            keys = {key: row[column] for key, column in names.items()}
            instances.append(Instance(keys, [row[columns[0]]], line))
    require(len(instances) > 0, what, str(path), "there are no rows below the header")
    return instances
