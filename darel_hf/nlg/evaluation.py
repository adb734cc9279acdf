"""`darel eval` from files to files: systems and their runs, brought together with references, scored, written out."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_path, refuse_overwrite, require, write_json
from .metrics import FORMATS, Evaluation, NLGMetrics, score_table, shown
from .metrics.page import write_page
from .tables import STDIN
from .texts import Columns, Instance, pair, read_predictions, read_references


@dataclass
class Request:
    """What `darel eval` was asked for; see its options."""

    references: str
    systems: list[str]
    predictions: str | None = None
    baseline: str | None = None
    protocol: str = "e2e"
    only: str | None = None
    bootstrap: int = 1000
    seed: int = 12345
    form: str = "text"
    output: Path | None = None
    per_instance: Path | None = None
    html: Path | None = None
    text_column: str | None = None
    reference_column: str | None = None
    mr_column: str | None = None
    extra: Sequence[str] = ()
    slot_rules: Path | None = None
    wordnet: str | None = None
    meteor_jar: Path | None = None
    force: bool = False

    def check(self) -> None:
        """Raise `ValueError` for what can be seen before anything is read."""
        require(self.form in FORMATS, "format", self.form, f"give one of {', '.join(FORMATS)}")
        one = self.predictions is not None
        require(one or bool(self.systems), "predictions", None, "name a file of predictions, or several by --systems")
        require(not (one and self.systems), "systems", self.systems, "leave out --predictions, or name it among them")
        remedy = "needs --predictions; among several systems the first is the baseline"
        require(one or self.baseline is None, "baseline", self.baseline, remedy)
        compared = self.baseline is None or self.bootstrap > 0
        require(compared, "bootstrap", self.bootstrap, "comparing with a baseline needs resamples")
        outputs = {"output": self.output, "per_instance": self.per_instance, "html": self.html}
        given = [*self.systems, self.predictions, self.baseline, self.references]
        inputs = {os.path.realpath(file) for what in given if what for file in _files_of("systems", what)[1]}
        seen: set[str] = set()
        for name, path in outputs.items():
            if path is not None:
                refuse_overwrite(path, self.force, name)
                real = os.path.realpath(path)
                require(real not in inputs, name, str(path), "is a file to be read; name another one")
                require(real not in seen or not path.is_file(), name, str(path), "two outputs have this name")
                seen.add(real)


def run(request: Request, out: Any, errors: Any) -> Evaluation:
    """
    Do what `darel eval` was asked for: read, score, print, write.

    Args:
        request ([`Request`]): what was asked for.
        out, errors (`rich.console.Console`): where the table goes, and notes.

    Returns:
        [`Evaluation`].

    Raises:
        ValueError: for files that cannot be read or do not fit together; then nothing is written.
    """
    request.check()
    metrics = NLGMetrics(
        request.protocol,
        bootstrap=request.bootstrap,
        seed=request.seed,
        wordnet=request.wordnet,
        meteor_jar=request.meteor_jar,
        slot_rules=request.slot_rules,
        progress=errors.is_terminal,
        **({} if request.only is None else {"only": _only(request.only)}),
    )
    if request.systems:
        named = [("systems", spec) for spec in request.systems]
    else:
        pair_of = {"baseline": request.baseline, "predictions": request.predictions}
        compared = request.baseline is not None
        named = [(what, f"{what}={file}" if compared else file) for what, file in pair_of.items() if file is not None]
    inputs = read_inputs(
        named,
        request.references,
        Columns(text=request.text_column, mr=request.mr_column),
        Columns(text=request.reference_column, mr=request.mr_column),
    )
    evaluation = metrics.evaluate(inputs.systems, inputs.references, inputs.mrs)
    result = evaluation.result
    if request.extra:
        result["extra"] = extra_scores(request.extra, inputs)
    written = result if request.systems else evaluation.of_one()
    if request.extra and not request.systems:
        written["extra"] = result["extra"]
    if request.output is not None:
        write_json(request.output, written)
    if request.per_instance is not None:
        write_instances(evaluation, inputs, request.per_instance)
    if request.html is not None:
        write_page(evaluation, request.html)
    if request.form == "text":
        _print(result, out)
    else:
        text = (
            json.dumps(written, indent=2, ensure_ascii=False)
            if request.form == "json"
            else shown(result, request.form)
        )
        out.file.write(text.rstrip("\n") + "\n")
    for note in result["notes"]:
        errors.print(note, highlight=False, soft_wrap=True, markup=False)
    return evaluation


def _only(names: str) -> list[str]:
    return [name.strip().lower().replace("-", "_") for name in names.split(",") if name.strip()]


def _print(result: dict[str, Any], out: Any) -> None:
    out.print(score_table(result))
    for name, system in result["systems"].items():
        texts = system["texts"]
        shares = {"words": "distinct_1", "pairs": "distinct_2", "texts": "distinct_texts"}
        distinct = ", ".join(f"{texts[key]:.1%} of {what}" for what, key in shares.items())
        lengths = f"{texts['words']:.1f} words a text (references {texts['reference_words']:.1f})"
        line = f"{name}: {lengths}, distinct: {distinct}"
        line += f", {texts['empty']:.0f} empty" if texts["empty"] else ""
        out.print(line, highlight=False, markup=False)
    for module, systems in result.get("extra", {}).items():
        for name, numbers in systems.items():
            listed = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            out.print(f"{module}, {name}: {listed}", highlight=False, markup=False)
    for name, signature in result["signatures"].items():
        out.print(f"{name}: {signature}", highlight=False, soft_wrap=True, markup=False)


@dataclass
class Inputs:
    """
    Texts and references, instance by instance.

    Attributes:
        systems (`dict[str, list[list[str]]]`): by name, the texts of each run.
        instances (`list[Instance]`): their references.
    """

    systems: dict[str, list[list[str]]]
    instances: list[Instance]

    @property
    def references(self) -> list[list[str]]:
        return [instance.texts for instance in self.instances]

    @property
    def mrs(self) -> list[str] | None:
        """The meaning representations, where every instance has one of slots and values."""
        found = [instance.mr for instance in self.instances]
        return [mr for mr in found if mr is not None] if all(mr is not None for mr in found) else None


def read_inputs(
    systems: Sequence[tuple[str, str]],
    references: str | os.PathLike,
    columns: Columns | None = None,
    reference_columns: Columns | None = None,
) -> Inputs:
    """
    Read systems and references, and bring them together.

    Args:
        systems (`Sequence[tuple[str, str]]`): the setting that names a system, for errors, and its file; with `*`, `?`
            or `[` in it a pattern, whose files are runs of one system; `name=` before it names it.
        references: the file of references.
        columns, reference_columns ([`Columns`], *optional*): which columns are which.

    Raises:
        ValueError: for files that cannot be read or do not belong together, see [`darel_hf.nlg.texts`].
    """
    specified = [(what, *_files_of(what, spec)) for what, spec in systems]
    files = [file for _, _, several in specified for file in several]
    repeated = [*files, str(references)].count(STDIN) > 1
    require(not repeated, "references", STDIN, "standard input can be read once; name files for the others")
    expected = read_references(references, reference_columns)
    names = _names([(name, several) for _, name, several in specified])
    read: dict[str, list[list[str]]] = {}
    instances: list[Instance] | None = None
    for (what, _, several), name in zip(specified, names, strict=True):
        for file in several:
            predictions = read_predictions(file, columns, what)
            paired = pair(predictions, expected, what)
            if instances is None:
                instances = [instance for _, instance in paired]
                for one, (_, instance) in zip(predictions, paired, strict=False):
                    same = one.keys.get("mr") == instance.keys.get("mr") or "mr" not in instance.keys
                    instance.mr = instance.mr or (one.mr if same else None)
            read.setdefault(name, []).append(_in_order(paired, instances, what, file))
    assert instances is not None
    return Inputs(read, instances)


def _files_of(what: str, spec: str) -> tuple[str | None, list[str]]:
    """Return the name that was given to a system, if any, and its files."""
    name, equals, rest = spec.partition("=")
    if not equals or Path(spec).exists() or "/" in name:
        name, rest = "", spec
    if any(letter in rest for letter in "*?[") and not Path(rest).exists():
        found = sorted(glob.glob(rest))
        require(bool(found), what, rest, "no such files")
        return name or Path(rest).stem, found
    return name or None, [rest]


def _names(systems: list[tuple[str | None, list[str]]]) -> list[str]:
    """Name systems by their files: as short as tells them apart."""
    short = [name or Path(files[0].removesuffix(".gz")).stem for name, files in systems]
    long = [name or files[0] for name, files in systems]
    names = [one if short.count(one) == 1 else other for one, other in zip(short, long, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, "systems", twice[0] if twice else None, "stands there twice; name each system once")
    return names


def _in_order(
    paired: list[tuple[str, Instance]], instances: list[Instance], what: str, file: str | os.PathLike
) -> list[str]:
    """Return texts in the order of the first system's instances."""
    places = [instance.place for instance in instances]
    if [instance.place for _, instance in paired] == places:
        return [text for text, _ in paired]
    by_place = {instance.place: text for text, instance in paired}
    fits = len(by_place) == len(paired) and sorted(by_place) == sorted(places)
    remedy = "its instances are not those of the first system, or come in another order; give all an id, or one order"
    require(fits, what, str(file), remedy)
    return [by_place[place] for place in places]


def write_instances(evaluation: Evaluation, inputs: Inputs, path: str | os.PathLike) -> None:
    """Write every score of every instance as JSON lines, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, instance in zip(evaluation.instances(), inputs.instances, strict=True):
            named = {"id": instance.keys["id"]} if "id" in instance.keys else {}
            file.write(json.dumps({**named, **row}, ensure_ascii=False) + "\n")


def extra_scores(names: Sequence[str], inputs: Inputs) -> dict[str, dict[str, dict[str, float]]]:
    """
    Score with modules of Hugging Face `evaluate`, such as `bertscore`: by module and system, every number it returns.

    A number an instance becomes a mean; several runs of a system too.

    Raises:
        ValueError: if `evaluate` or the module is not there, or cannot be computed on these texts.
    """
    try:
        import evaluate
    except ImportError:
        raise ValueError(f"extra={list(names)!r}: needs Hugging Face evaluate; pip install '.[eval]'") from None
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        settings = {"lang": "en"} if name == "bertscore" else {}
        try:
            module = evaluate.load(name)
            for system, runs in inputs.systems.items():
                found = [
                    _numbers(module.compute(predictions=texts, references=inputs.references, **settings))
                    for texts in runs
                ]
                means = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
                result.setdefault(name, {})[system] = means
        except Exception as error:  # whatever other people's modules raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"extra={name!r}: cannot be computed here ({type(error).__name__}: {reason})") from None
    return result


def _numbers(found: dict[str, Any] | None) -> dict[str, float]:
    numbers = {}
    for key, value in (found or {}).items():
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values):
            numbers[key] = float(sum(values) / len(values))
    return numbers
