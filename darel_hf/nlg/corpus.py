"""A data-to-text corpus made by a small grammar: the E2E format, several references each, some noise."""

from __future__ import annotations

import csv
import os
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..files import atomic_path
from .task import FILES

#: What the demo's prompts begin with, as prompts of people do.
TASK = "write one or two sentences for guests who look for a place and say all that is given but nothing else"
NOISE = 0.04  # fraction of references that are wrong, cut off or scrambled


@dataclass(frozen=True)
class Domain:
    """
    One subject to write about; those of the demo are in `domains.yaml`.

    Attributes:
        first, second: parts of names.
        kinds: what a thing of this domain is.
        slots: attribute -> its `values`, `phrases` after the noun, whole `predicates`, `openings` of a sentence; `{}`
            is the value.
    """

    first: list[str]
    second: list[str]
    kinds: list[str]
    slots: dict[str, dict[str, list[str]]]


_DOMAINS = yaml.safe_load(Path(__file__).with_name("domains.yaml").read_text(encoding="utf-8"))
INNS, MARKETS = Domain(**_DOMAINS["inns"]), Domain(**_DOMAINS["markets"])


def _fill(pattern: str, value: str) -> str:
    """Put a value into a phrase; `{yes:...|no:...}` chooses by it."""
    if "{yes:" not in pattern:
        return pattern.format(value)
    before, rest = pattern.split("{", 1)
    inside, after = rest.split("}", 1)
    choices = dict(choice.split(":", 1) for choice in inside.split("|"))
    return before + choices[value] + after


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _representation(domain: Domain, generator: random.Random) -> dict[str, str]:
    name = f"The {generator.choice(domain.first)} {generator.choice(domain.second)}"
    mr = {"name": name, "kind": generator.choice(domain.kinds)}
    chosen = set(generator.sample(sorted(domain.slots), generator.randint(2, 5)))
    return mr | {slot: generator.choice(domain.slots[slot]["values"]) for slot in domain.slots if slot in chosen}


def _reference(domain: Domain, mr: dict[str, str], generator: random.Random) -> str:
    """Say a representation in one or two sentences."""
    slots = [slot for slot in mr if slot in domain.slots]
    generator.shuffle(slots)
    opening = ""
    if generator.random() < 0.35:
        slot = slots.pop()
        opening = _fill(generator.choice(domain.slots[slot]["openings"]), mr[slot]) + " "
    cut = len(slots) if len(slots) < 3 or generator.random() < 0.4 else generator.randint(1, len(slots) - 1)
    verb = generator.choice(("is", "is")) if not opening else generator.choice(("is", "offers itself as"))
    text = f"{opening}{mr['name']} {verb} {_a(mr['kind'])}"
    phrases = [_fill(generator.choice(domain.slots[slot]["phrases"]), mr[slot]) for slot in slots[:cut]]
    text += (" " + " ".join(phrases[:2]) if phrases else "") + "".join(f", {phrase}" for phrase in phrases[2:]) + "."
    predicates = [_fill(generator.choice(domain.slots[slot]["predicates"]), mr[slot]) for slot in slots[cut:]]
    if predicates:
        joined = predicates[0] if len(predicates) == 1 else ", ".join(predicates[:-1]) + " and " + predicates[-1]
        text += f" {generator.choice(('It', 'The place', 'This ' + mr['kind']))} {joined}."
    return text


def _spoil(text: str, others: list[str], generator: random.Random) -> str:
    """Return a noisy reference: that of another thing, a scrambled one, or one that breaks off."""
    kind = generator.randrange(3)
    if kind == 0:
        return generator.choice(others)
    words = text.split()
    if kind == 1:
        generator.shuffle(words)
        return " ".join(words)
    return " ".join(words[: max(2, len(words) // 3)])


def make_pairs(
    domain: Domain,
    representations: int,
    references: tuple[int, int],
    generator: random.Random,
    task: str | None = None,
) -> list[dict[str, str | bool]]:
    """
    Make pairs of a domain.

    Args:
        domain ([`Domain`]): what to write about.
        representations (`int`): distinct meaning representations.
        references (`tuple[int, int]`): fewest and most references of each.
        generator (`random.Random`): source of randomness; the same one makes the same pairs.
        task (`str`, *optional*): an instruction, the first slot of each representation.

    Returns:
        A list of `{"mr": str, "ref": str, "noisy": bool}`; references of one representation are distinct and adjacent.
    """
    seen: dict[str, dict[str, str]] = {}
    while len(seen) < representations:
        mr = _representation(domain, generator)
        seen.setdefault(", ".join(f"{slot}[{value}]" for slot, value in mr.items()), mr)
    pairs = []
    begin = "" if task is None else f"task[{task}], "
    for text, mr in seen.items():
        wanted = generator.randint(*references)
        unique = dict.fromkeys(_reference(domain, mr, generator) for _ in range(3 * wanted))
        pairs += [{"mr": begin + text, "ref": reference, "noisy": False} for reference in list(unique)[:wanted]]
    return pairs


def add_noise(pairs: list[dict[str, str | bool]], fraction: float, generator: random.Random) -> None:
    """Spoil a fraction of the references in place, and flag them as `noisy`."""
    clean = [pair["ref"] for pair in pairs]
    for index in generator.sample(range(len(pairs)), round(fraction * len(pairs))):
        spoiled = _spoil(clean[index], clean, generator)
        pairs[index] |= {"ref": spoiled, "noisy": spoiled != clean[index]}


def write_pairs(pairs: list[dict], path: str | os.PathLike) -> None:
    """Write pairs as a CSV file with the columns `mr,ref`."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows([pair["mr"], pair["ref"]] for pair in pairs)


def make_corpus(
    folder: str | os.PathLike, representations: int = 560, seed: int = 0, task: str | None = None
) -> dict[str, list[dict]]:
    """
    Write the demo's data set of inns in the layout of the E2E challenge; `task`: see [`make_pairs`].

    The test set has no noise, and shares no representation with the training set.

    Returns:
        The pairs by split, with the flag `noisy` that the files do not have.
    """
    generator = random.Random(seed)
    counts = {"train": representations, "dev": representations // 14, "test": representations // 8}
    pairs = make_pairs(INNS, sum(counts.values()), (3, 5), generator, task)
    mrs = list(dict.fromkeys(pair["mr"] for pair in pairs))
    splits, start = {}, 0
    for split, count in counts.items():
        chosen = set(mrs[start : start + count])
        splits[split] = [pair for pair in pairs if pair["mr"] in chosen]
        start += count
    add_noise(splits["train"], NOISE, generator)
    for split, name in FILES.items():
        write_pairs(splits[split], Path(folder) / name)
    return splits
