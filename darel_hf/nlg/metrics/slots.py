"""Slot error rate: which values of a meaning representation a text leaves out, adds, or gets wrong, by open rules."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sacrebleu.metrics.base import Score, Signature

from ..._version import __version__
from ...files import require
from ..representations import parse
from .base import SummedMetric

E2E_RULES = Path(__file__).with_name("slots_e2e.yaml")
KINDS = ("missing", "added", "wrong")


@dataclass
class SlotError:
    """One error: its kind (of [`KINDS`]), the slot, the value that should be there, and what the text says instead."""

    kind: str
    slot: str
    value: str | None
    said: str | None

    def __str__(self) -> str:
        if self.kind == "missing":
            return f"{self.slot}[{self.value}] is missing"
        if self.kind == "added":
            return f"{self.slot}[{self.said}] is added"
        return f"{self.slot}[{self.value}] is said as [{self.said}]"


@dataclass
class Rules:
    """For each slot its values and how they are said (None: verbatim), and other names of slots."""

    slots: dict[str, dict[str, re.Pattern] | None]
    aliases: dict[str, str]
    name: str


@functools.cache
def load_rules(path: str | os.PathLike = E2E_RULES) -> Rules:
    """
    Read rules; see `slots_e2e.yaml` for their form.

    Raises:
        ValueError: for a file that is missing or no rules, naming what is wrong.
    """
    require(Path(path).is_file(), "slot_rules", str(path), "no such file; name a YAML file of rules")
    data = Path(path).read_bytes()
    try:
        loaded = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"slot_rules={str(path)!r}: no YAML ({' '.join(str(error).split())})") from None
    form = isinstance(loaded, dict) and isinstance(loaded.get("slots"), dict)
    require(form, "slot_rules", str(path), "needs `slots:`, and below it slots with values and patterns")
    slots: dict[str, dict[str, re.Pattern] | None] = {}
    for slot, values in loaded["slots"].items():
        fine = values == "verbatim" or isinstance(values, dict)
        require(fine, "slot_rules", str(path), f"slot {slot!r} needs values with lists of patterns, or `verbatim`")
        slots[str(slot)] = None if values == "verbatim" else _patterns(values, f"{path}, slot {slot!r}")
    name = f"{Path(path).stem}-{hashlib.blake2b(data, digest_size=4).hexdigest()}"
    return Rules(slots, {str(k): str(v) for k, v in (loaded.get("aliases") or {}).items()}, name)


def _patterns(values: dict[Any, Any], where: str) -> dict[str, re.Pattern]:
    made = {}
    for value, patterns in values.items():
        if isinstance(patterns, list):  # a list within the list: patterns shared by several values
            patterns = [one for item in patterns for one in (item if isinstance(item, list) else [item])]
        fine = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
        require(fine, "slot_rules", where, f"value {value!r} needs a list of patterns")
        try:
            made[str(value)] = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"slot_rules={where!r}: value {value!r} has a pattern that is none ({error})") from None
    return made


class SlotErrorRate(SummedMetric):
    """
    Slot error rate: (missing + added + wrong values) / values of the representations, in per cent.

    A value is *missing* if nothing of its slot is said, *wrong* if only other values of the slot are, *added* if it is
    said and the representation has it not (or another one besides). Values are found by the patterns of the rules;
    those of slots without patterns by themselves, whichever the representations of the file have. Slots that the rules
    do not know are looked for verbatim; those whose values are yes or no then count not at all.

    It is a metric over one "reference" an instance: its meaning representation.

    Args:
        rules (path, *optional*): a YAML file; default: the rules for E2E.
    """

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(rules=args["rules"].name, version=f"darel_hf-{__version__}")

    _SIGNATURE_TYPE = _Signature

    def __init__(self, rules: str | os.PathLike | None = None):
        super().__init__()
        self.rules = load_rules(E2E_RULES if rules is None else rules)
        self.verbatim: dict[str, dict[str, re.Pattern]] = {}

    def learn(self, mrs: Iterable[str]) -> None:
        """Take note of all values that are looked for verbatim."""
        for mr in mrs:
            for slot, value in self.slots_of(mr):
                if self.rules.slots.get(slot) is None and value.lower() not in ("", "yes", "no", "none"):
                    self.verbatim.setdefault(slot, {}).setdefault(value, _verbatim(value))

    def reads(self, mr: str) -> bool:
        """Whether a text is a meaning representation."""
        return parse(mr) is not None

    def slots_of(self, mr: str) -> list[tuple[str, str]]:
        """Return slots, under the names of the rules, and values; raises `ValueError` for any other text."""
        slots = parse(mr)
        require(slots is not None, "mr", mr, "is no meaning representation of the form slot[value], slot[value]")
        known = {name.lower(): name for name in self.rules.slots} | {
            k.lower(): v for k, v in self.rules.aliases.items()
        }
        return [(known.get(slot.lower(), slot), value) for slot, value in slots]

    def errors(self, text: str, mr: str) -> tuple[list[SlotError], int]:
        """Return what is wrong with a text, and how many values could be checked."""
        wanted: dict[str, list[str]] = {}
        checked = 0
        for slot, value in self.slots_of(mr):
            patterns = self._patterns_of(slot)
            value = next((known for known in patterns if known.lower() == value.lower()), value)
            if value in patterns and value not in wanted.get(slot, ()):
                wanted.setdefault(slot, []).append(value)
                checked += 1
        said = self._said(text, wanted)
        found = []
        for slot in [*wanted, *(slot for slot in said if slot not in wanted)]:
            missing = [value for value in wanted.get(slot, ()) if value not in said.get(slot, ())]
            extra = [value for value in said.get(slot, ()) if value not in wanted.get(slot, ())]
            while missing and extra:
                found.append(SlotError("wrong", slot, missing.pop(0), extra.pop(0)))
            found += [SlotError("missing", slot, value, None) for value in missing]
            found += [SlotError("added", slot, None, value) for value in extra]
        return found, checked

    def _patterns_of(self, slot: str) -> dict[str, re.Pattern]:
        return self.rules.slots.get(slot) or self.verbatim.get(slot, {})

    def _said(self, text: str, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
        """Return the values that a text says, by slot."""
        text = text.replace("\u2019", "'")
        spans: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for slot in {**self.rules.slots, **self.verbatim}:
            for value, pattern in self._patterns_of(slot).items():
                for match in pattern.finditer(text):
                    spans.setdefault(match.span(), []).append((slot, value))
        said: dict[str, list[str]] = {}
        for (start, end), meanings in spans.items():
            if any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans):
                continue
            right = [meaning for meaning in meanings if meaning[1] in wanted.get(meaning[0], ())]
            for slot, value in right or meanings[:1]:
                if value not in said.setdefault(slot, []):
                    said[slot].append(value)
        return said

    # ---- On sacrebleu's frame ----

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"mr": refs[0]}

    def _cache_references(self, references: Sequence[Sequence[str]]) -> list[Any]:
        self.learn(references[0])
        return super()._cache_references(references)

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        found, checked = self.errors(hypothesis, ref_kwargs["mr"])
        return [*(sum(error.kind == kind for error in found) for kind in KINDS), checked]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        wrong, values = sum(stats[:3]), stats[3]
        return Score("SER", 100.0 * wrong / values if values else (100.0 if wrong else 0.0))


def _verbatim(value: str) -> re.Pattern:
    words = re.sub(r"^the\s+", "", value, flags=re.IGNORECASE).split()
    the = r"(?:the\s+)?"
    return re.compile(rf"(?<!\w){the}{'[ -]+'.join(map(re.escape, words))}(?!\w)", re.IGNORECASE)
