"""Files of predictions and references: which column is which, and what belongs together, instance by instance."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..files import require
from .representations import parse
from .tables import Table, read

# How a header begins, by the E2E scripts. A table with exactly one column of each is read as they read it.
_SOURCE = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
_PREDICTION = re.compile(r"out|pred|ref|sys", re.IGNORECASE)
_REFERENCE = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
# Names that leave no doubt, the most telling first; blanks, dots and hyphens count as underscores.
_SOURCES = ("mr", "meaning_representation", "source", "src", "input", "inputs", "context", "triples", "da")
_PREDICTIONS = (
    *("prediction", "predictions", "output", "outputs", "hypothesis", "hypotheses", "generated_text", "generated"),
    *("generation", "system_output", "system", "predicted", "pred", "hyp", "out"),
)
_REFERENCES = (
    *("references", "refs", "reference", "ref", "human_reference", "human", "targets", "target", "tgt", "trg"),
    *("completion", "label", "text"),
)
# What the E2E scripts mend in tables: pound signs and accents that were decoded twice.
_MENDED = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


@dataclass
class Instance:
    """One meaning representation: its texts, what names it (`id`, `mr`), and where it begins (`line 3`)."""

    keys: dict[str, str]
    texts: list[str]
    place: str
    mr: str | None = None  # a representation of slots and values, if it is one
    ends: str | None = None  # of a plain text without empty lines: what its last line is, `text` or `blank`


@dataclass
class Columns:
    """The columns that a user named: of the text, of the meaning representation, of an id."""

    text: str | None = None
    mr: str | None = None
    id: str | None = None


def read_predictions(
    path: str | os.PathLike, columns: Columns | None = None, what: str = "predictions"
) -> list[Instance]:
    """
    Read predictions: plain text, one a line; JSON (lines) with `prediction` and perhaps `id` or `mr`; CSV or TSV.

    Args:
        path: the file; `-` for standard input.
        columns ([`Columns`], *optional*): what is where; default: by the names.
        what (`str`): the setting that names the file, for errors.

    Returns:
        `list[Instance]`.

    Raises:
        ValueError: for a file that cannot be read (see [`darel_hf.nlg.tables.read`]) or without a column for the
            predictions, and for an id that comes twice.
    """
    columns = columns or Columns()
    table = read(path, what)
    if table.kind == "text":
        return [Instance({}, [row["text"].strip()], table.place(i)) for i, row in enumerate(table.rows)]
    if not table.columns:
        return _texts_of_document(table, several=False)
    source, text, name = _find_columns(table, columns, _PREDICTIONS, _PREDICTION, "prediction")
    instances = []
    for i, row in enumerate(table.rows):
        if not isinstance(row.get(text), str):
            table.refuse(f"{table.place(i)} has no text {text!r}, only {', '.join(map(repr, row)) or 'nothing'}")
        instances.append(_instance(table, i, row, source, name, [row[text]]))
    seen: dict[str, Instance] = {}
    for instance in instances:
        if "id" in instance.keys:
            first = seen.setdefault(instance.keys["id"], instance)
            places = f"{first.place} and {instance.place}"
            places = places.replace("line ", "lines ", 1).replace("and line ", "and ")
            remedy = f"stands in {places} of {path}; predict each instance once"
            require(first is instance, "id", instance.keys["id"], remedy)
    return instances


def read_references(
    path: str | os.PathLike, columns: Columns | None = None, what: str = "references"
) -> list[Instance]:
    """
    Read references, one or more an instance.

    CSV and TSV: columns for the meaning representation (or an id) and the reference, rows of one instance together.
    JSON (lines): `references` (a list) or `ref`, with `id` or `mr`. WebNLG's XML and JSON, and DART's JSON, as they
    come. Any other file: one reference a line, an empty line between instances, or without empty lines one instance a
    line.

    Args:
        path: the file; `-` for standard input.
        columns ([`Columns`], *optional*): what is where; default: by the names.
        what (`str`): the setting that names the file, for errors.

    Raises:
        ValueError: for a file that cannot be read (see [`darel_hf.nlg.tables.read`]), without a column for the
            references, or with a reference that is empty.
    """
    columns = columns or Columns()
    table = read(path, what)
    if table.kind == "text":
        return _plain_references(table)
    if table.kind == "xml":
        return _webnlg_xml(table)
    if not table.columns:
        return _texts_of_document(table, several=True)
    if {"tripleset", "annotations"} <= set(table.columns):
        return _dart(table)
    source, text, name = _find_columns(table, columns, _REFERENCES, _REFERENCE, "references")
    instances = []
    for i, row in enumerate(table.rows):
        field = text if text in row else next((known for known in _REFERENCES if known in row), text)
        texts = row.get(field)
        texts = [texts] if isinstance(texts, str) else texts
        fine = isinstance(texts, list) and len(texts) > 0 and all(isinstance(text, str) for text in texts)
        if not fine:
            table.refuse(f"{table.place(i)} has no 'references' (a list of texts) and no 'ref'")
        if not all(text.strip() for text in texts):
            table.refuse(f"{table.place(i)} has an empty reference")
        instances.append(_instance(table, i, row, source, name, texts))
    return _grouped(instances)


def match(
    predictions: list[Instance], references: list[Instance], what: str = "predictions"
) -> tuple[list[str], list[list[str]]]:
    """Return the texts and the references that [`pair`] brings together."""
    paired = pair(predictions, references, what)
    return [text for text, _ in paired], [instance.texts for _, instance in paired]


def pair(
    predictions: list[Instance], references: list[Instance], what: str = "predictions"
) -> list[tuple[str, Instance]]:
    """
    Bring predictions and references together: by `id` or `mr` where all of both have it, else in order.

    In order, references of one representation that stand apart count as one instance if there are just as many
    predictions as representations, else as several, as in the official script.

    Returns:
        `list[tuple[str, Instance]]`: each prediction with its instance of the references; in the order of the
        references, or matched by `mr` in that of the predictions (two instances may share a representation).

    Raises:
        ValueError: if some have no counterpart; says how many there are and the first line where they part.
    """
    for key in ("id", "mr"):
        for side, instances in ((what, predictions), ("references", references)):
            without = [instance.place for instance in instances if key not in instance.keys]
            remedy = f"{without[0] if without else ''} of the {side} has none, others have; give it to all or none"
            require(len(without) in (0, len(instances)), key, None, remedy)
        if all(key in instance.keys for instance in [*predictions, *references]):
            by_key = _by_key(references, key)
            known = {instance.keys[key] for instance in predictions}
            places = Counter(instance.keys[key] for instance in references)
            for instance in predictions:
                places[instance.keys[key]] -= 1
                remedy = f"{instance.place} of the {what} predicts it once more than it stands in the references"
                again = instance.keys[key] in by_key and places[instance.keys[key]] < 0
                require(not again, key, instance.keys[key], remedy)
                remedy = f"{instance.place} of the {what} has no counterpart among {len(by_key)} references"
                require(instance.keys[key] in by_key, key, instance.keys[key], remedy)
            for instance in references:
                remedy = f"{instance.place} of the references has no counterpart among {len(known)} {what}"
                require(instance.keys[key] in known, key, instance.keys[key], remedy)
            if key == "id":
                text_of = {instance.keys[key]: instance.texts[0] for instance in predictions}
                return [(text_of[name], instance) for name, instance in by_key.items()]
            return [(instance.texts[0], by_key[instance.keys[key]]) for instance in predictions]
    n, m = len(predictions), len(references)
    joined = _by_key(references, "mr") if all("mr" in instance.keys for instance in references) else {}
    if n != m and n == len(joined):
        references = list(joined.values())
    elif n == 1 and m > 1 and references[-1].ends == "blank":  # several references of one instance
        whole = Instance({}, [text for instance in references for text in instance.texts], references[0].place)
        references = [whole]
    elif n != m:
        rest, side = (references[n:], "references") if n < m else (predictions[m:], what)
        remedy = f"there are references for {m} instances; {rest[0].place} of the {side} has no counterpart"
        if n == 1 and all(instance.ends for instance in references):
            remedy += " (if they are all of one instance, end their file with an empty line)"
        raise ValueError(f"{what}: {n} texts, but {remedy}")
    return [(p.texts[0], r) for p, r in zip(predictions, references, strict=True)]


def _by_key(references: list[Instance], key: str) -> dict[str, Instance]:
    """Return all references of each name as one instance, in the order in which names first come up."""
    groups: dict[str, Instance] = {}
    for instance in references:
        name = instance.keys[key]
        if name in groups:
            groups[name].texts.extend(instance.texts)
        else:
            groups[name] = Instance(instance.keys, [*instance.texts], instance.place, instance.mr)
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


# ---- Which column is which ----


def _find_columns(
    table: Table, columns: Columns, names: tuple[str, ...], begins: re.Pattern, wanted: str
) -> tuple[str | None, str, str | None]:
    """Return the columns of the meaning representation, the text and the id."""
    has = table.columns
    for option, column in (("text", columns.text), ("mr", columns.mr), ("id", columns.id)):
        known = column is None or column in has
        require(known, f"{option}_column", column, f"{table.path} has no such column, only {has}")
    name = columns.id or ("id" if "id" in has else None)
    free = [column for column in has if column not in (name, columns.mr, columns.text)]
    strong = _strong(free, names)
    official = [column for column in free if begins.match(column) and not _SOURCE.match(column)]
    text = columns.text or strong or (official[0] if len(official) == 1 and table.kind == "csv" else None)
    if text is None and table.kind == "json":
        table.refuse(
            f"{table.place(0)} has no text {wanted!r}, only {', '.join(map(repr, has))}; name it with --text-column"
            if wanted == "prediction"
            else f"{table.place(0)} has no 'references' (a list of texts) and no 'ref'; name it with --text-column"
        )
    free = [column for column in free if column != text]
    sources = [column for column in free if _SOURCE.match(column)] if table.kind == "csv" else []
    # Predictions in JSON often carry the prompt as `input`, which is not how the references spell it.
    known = _SOURCES if table.kind == "csv" or names is _REFERENCES else _SOURCES[:2]
    source = columns.mr or _strong(free, known) or (sources[0] if len(sources) == 1 else None)
    needs = f"needs one column for the meaning representation (or an id) and one for the {wanted}, but has {has}"
    needs += "; name them with --text-column and --mr-column"
    lost = source is None and name is None and len(free) > 0  # rows of one instance could not be told from others
    fine = text is not None and (table.kind == "json" or not (lost or len(sources) > 1))
    require(fine, table.what, table.path, needs)
    return source, text, name


def _strong(columns: list[str], names: tuple[str, ...]) -> str | None:
    spelled = {re.sub(r"[ .-]+", "_", column.strip().lower()): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


def _instance(
    table: Table, number: int, row: dict[str, Any], source: str | None, name: str | None, texts: list[str]
) -> Instance:
    keys = {}
    for key, column in (("id", name), ("mr", source)):
        value = row.get(column) if column is not None else None
        if value is not None:
            keys[key] = _key(value)
    if table.kind == "csv":
        texts = [" ".join(_mended(text).split()) for text in texts]
        keys = {key: _mended(value) for key, value in keys.items()}
    mr = keys.get("mr")
    return Instance(keys, texts, table.place(number), mr if mr is not None and parse(mr) else None)


def _mended(text: str) -> str:
    for wrong, right in _MENDED:
        text = text.replace(wrong, right)
    return text


def _key(value: Any) -> str:
    """Return what a name is compared by: a table with gaps stores 1 as 1.0, and blanks tell no two apart."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (dict, list)):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return " ".join(str(value).split())


# ---- Forms of references ----


def _plain_references(table: Table) -> list[Instance]:
    lines = [row["text"].strip() for row in table.rows]
    require(any(lines), table.what, table.path, "the file is empty: there is no reference in it")
    if all("||" in line and parse(line.split("||")[0]) for line in lines if line):
        return _lora(table, lines)
    ends = "blank" if not lines[-1] else "text"
    while not lines[-1]:
        lines.pop()
    if "" not in lines:
        return [Instance({}, [text], f"line {line}", ends=ends) for line, text in enumerate(lines, 1)]
    instances: list[Instance] = []
    opened = False
    for line, text in enumerate(lines, 1):
        if not text and not opened:
            table.refuse(f"line {line} is empty where a reference should stand")
        if text and opened:
            instances[-1].texts.append(text)
        elif text:
            instances.append(Instance({}, [text], f"line {line}"))
        opened = bool(text)
    return instances


def _lora(table: Table, lines: list[str]) -> list[Instance]:
    """Read the files of LoRA's repository: `slot : value | ...||reference`, one a line."""
    instances = []
    for i, line in enumerate(lines):
        if line:
            mr, text = (part.strip() for part in line.split("||", 1))
            if not text:
                table.refuse(f"{table.place(i)} has an empty reference")
            instances.append(Instance({"mr": _key(mr)}, [text], table.place(i), mr))
    return _grouped(instances)


def _texts_of_document(table: Table, several: bool) -> list[Instance]:
    """Read a JSON document that is no list of objects: a list of texts (or of lists of texts), or WebNLG's."""
    document = table.document
    if several and isinstance(document, dict) and isinstance(document.get("entries"), list):
        return _webnlg(table, document["entries"])
    form = "a list of lists of texts" if several else "a list of texts"
    if not isinstance(document, list):
        kind = "one object" if isinstance(document, dict) else "a file of another form"
        table.refuse(f"line 1 begins {kind}; give {form}, or one object an instance")
    instances = []
    for number, item in enumerate(document, 1):
        texts = [item] if isinstance(item, str) else item
        fine = isinstance(texts, list) and len(texts) > 0 and all(isinstance(text, str) for text in texts)
        if not (fine and (several or isinstance(item, str))):
            table.refuse(f"entry {number} is no text; give {form}, or one object an instance")
        if several and not all(text.strip() for text in texts):
            table.refuse(f"entry {number} has an empty reference")
        instances.append(Instance({}, texts, f"entry {number}"))
    return instances


def _triples(triples: list[tuple[str, str, str]]) -> str:
    return _key(" | ".join(" : ".join(triple) for triple in triples))


def _entry(table: Table, number: int, triples: list[tuple[str, str, str]], texts: list[tuple[str, bool]]) -> Instance:
    """Make an instance of an entry of WebNLG or DART; texts that were not judged good are left out, as usual."""
    good = [text for text, fine in texts if fine] or [text for text, _ in texts]
    if not good or not all(isinstance(text, str) and text.strip() for text in good):
        table.refuse(f"entry {number} has no reference, or one that is empty or no text")
    return Instance({"mr": _triples(triples)}, good, f"entry {number}")


def _webnlg(table: Table, entries: list[Any]) -> list[Instance]:
    instances = []
    for number, entry in enumerate(entries, 1):
        try:
            (content,) = entry.values()
            triples = [(t["subject"], t["property"], t["object"]) for t in content["modifiedtripleset"]]
            texts = [(text["lex"], text["comment"] == "good") for text in content["lexicalisations"]]
            instances.append(_entry(table, number, triples, texts))
        except (AttributeError, KeyError, TypeError):
            table.refuse(f"entry {number} is none of WebNLG (modifiedtripleset, lexicalisations)")
        except ValueError as error:
            if str(error).startswith(table.what):
                raise
            table.refuse(f"entry {number} is none of WebNLG (one object under its number)")
    return instances


def _webnlg_xml(table: Table) -> list[Instance]:
    try:
        root = ElementTree.fromstring(table.document)
    except ElementTree.ParseError as error:
        table.refuse(f"line {error.position[0]} is broken XML ({error})")
    entries = root.findall("./entries/entry")
    require(bool(entries), table.what, table.path, "line 1 begins XML, but there are no entries of WebNLG in it")
    instances = []
    for number, entry in enumerate(entries, 1):
        triples = [tuple(part.strip() for part in (t.text or "").split("|")) for t in entry.iter("mtriple")]
        texts = []
        for lex in entry.findall("lex"):
            if lex.get("lang") in (None, "", "en"):
                inner = lex.find("text")  # enriched versions have templates beside the text
                text = "".join((lex if inner is None else inner).itertext()).strip()
                texts.append((text, lex.get("comment", "good") == "good"))
        instances.append(_entry(table, number, triples, texts))
    return instances


def _dart(table: Table) -> list[Instance]:
    instances = []
    for number, entry in enumerate(table.rows, 1):
        try:
            triples = [tuple(triple) for triple in entry["tripleset"]]
            texts = [(text["text"], True) for text in entry["annotations"]]
            instances.append(_entry(table, number, triples, texts))
        except (KeyError, TypeError):
            table.refuse(f"entry {number} is none of DART (tripleset, annotations)")
    return instances
