"""What an arm of a comparison is: settings on top of a recipe, by a name that stands here or by key=value."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import DarelConfig
from ..files import require

Settings = dict[str, Any]
DAREL = {field.name for field in dataclasses.fields(DarelConfig)}
DERIVED = ("offline_keep", "online_keep", "rescore_every")  # by a budget
OURS = ("seed", "output_dir", "resume")  # what the comparison sets in every run
EPOCHS = 3.0  # of TrainingArguments, where a recipe names none


def plain(recipe: Settings, budget: float) -> Settings:
    """DAREL off: plain Trainer."""
    return {key: value for key, value in recipe.items() if key not in DAREL}


def fewer_epochs(recipe: Settings, budget: float) -> Settings:
    """Plain, with `budget` times the epochs (or `max_steps`); warmup and decay are planned for that."""
    made = plain(recipe, budget)
    steps, warmup = made.get("max_steps", -1), made.get("warmup_steps", 0)
    if float(steps) > 0:
        made["max_steps"] = max(1, round(float(steps) * budget))
    else:
        made["num_train_epochs"] = float(made.get("num_train_epochs", EPOCHS)) * budget
    if float(warmup) >= 1:  # below 1 it is a fraction of all steps
        made["warmup_steps"] = round(float(warmup) * budget)
    return made


def random(recipe: Settings, budget: float) -> Settings:
    """Plain, with a backward pass for `budget` times the samples, drawn anew in every epoch; nothing is scored."""
    return {**plain(recipe, budget), "online_keep": budget, "online_rule": "random"}


def fast(recipe: Settings, budget: float) -> Settings:
    """Plain, with every exact accelerator that the model passes and that pays."""
    return {**plain(recipe, budget), "fast": True}


def darel(recipe: Settings, budget: float) -> Settings:
    """The recipe with `budget_time=budget`: its rules, groups and accelerators, the fractions from the planner."""
    left_out = (*DERIVED, "finish_epochs")  # a run that may end early has no last epochs
    return {**{key: value for key, value in recipe.items() if key not in left_out}, "budget_time": budget}


def as_it_stands(recipe: Settings, budget: float) -> Settings:
    """The recipe with all of its settings."""
    return dict(recipe)


#: Arms by name; what they do is said by their first lines, and in docs/compare.md.
ARMS: dict[str, Callable[[Settings, float], Settings]] = {
    "plain": plain,
    "fewer_epochs": fewer_epochs,
    "random": random,
    "fast": fast,
    "darel": darel,
    "recipe": as_it_stands,
}


def parse_setting(text: str, name: str = "set") -> tuple[str, Any]:
    """
    Return key and value of `key=value`, the value read as in YAML, but that `no` is a word and 5e-4 a number.

    Raises `ValueError` for anything else.
    """
    key, equals, value = text.partition("=")
    require(bool(equals) and key.strip().isidentifier(), name, text, "give key=value")
    if value.lower() in ("yes", "no", "on", "off"):
        return key.strip(), value
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return key.strip(), float(value)
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def parse_arms(texts: Sequence[str]) -> dict[str, Settings | None]:
    """
    Read arms as they are typed: names, `name:key=value,key=value`, or a YAML file that maps names to settings.

    Example:

    ```python
    >>> parse_arms(["plain,half:online_keep=0.5,online_rule=random,fast"])
    {'plain': None, 'half': {'online_keep': 0.5, 'online_rule': 'random'}, 'fast': None}
    ```
    """
    arms: dict[str, Settings | None] = {}
    for text in texts:
        if text.endswith((".yaml", ".yml")):
            found = read_settings(text, "arms")
            for name, settings in found.items():
                ok = settings is None or isinstance(settings, dict)
                require(
                    ok and str(name) not in arms, "arms", str(name), f"in {text}: give each name one map of settings"
                )
                arms[str(name)] = settings
            continue
        current: Settings | None = None
        for part in text.split(","):
            name, colon, rest = part.partition(":")
            if "=" in name or not colon:
                if "=" in part:  # more settings of the arm before
                    require(current is not None, "arms", part, "settings follow a name: name:key=value,key=value")
                    key, value = parse_setting(part, "arms")
                    current[key] = value
                    continue
                name, rest = part, ""
            require(name.strip() not in arms, "arms", name.strip(), "is there twice; give each arm a name of its own")
            current = dict([parse_setting(rest, "arms")]) if rest else None
            arms[name.strip()] = current
    return arms


def read_settings(path: str | Path, name: str) -> Settings:
    """Read a YAML file of `key: value` lines. Raises `ValueError` if there is none."""
    require(Path(path).is_file(), name, str(path), "no such file")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = str(error).splitlines()[0]
    require(isinstance(found, dict), name, str(path), f"the file must hold `key: value` lines, not {found!r}")
    return found


def settings_of(
    arms: Sequence[str] | Mapping[str, Settings | None], recipe: Settings, budget: float
) -> dict[str, Settings]:
    """
    Return all settings of each arm: those of the recipe as the arm has them, and its own.

    Args:
        arms: names, see `ARMS`; or a map from names to settings of one's own (`None`: the arm of that name), which
            stand on top of `plain`, or of what their key `arm` names.
        recipe (`dict`): what all of them start from.
        budget (`float`): fraction of the time of plain training, in (0, 1], for arms that have one.

    Raises:
        ValueError: for unknown or double names, and settings that do not go together; names the arm.
    """
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    require(number and 0 < budget <= 1, "budget", budget, "give a fraction of the time, in (0, 1]")
    if isinstance(arms, Mapping):
        wanted = dict(arms)
    else:
        require(len(set(arms)) == len(arms), "arms", list(arms), "one is there twice; give each a name of its own")
        wanted = dict.fromkeys(arms)
    require(len(wanted) > 1, "arms", list(wanted), "give two or more; the others are compared with the first")
    made = {}
    for name, own in wanted.items():
        good = re.fullmatch(r"[\w+-][\w.+-]{0,14}", name) is not None
        require(good, "arms", name, "give a name of at most 15 letters, digits and _ . + -")
        own = dict(own or {})
        base = own.pop("arm", "plain") if own else name
        close = difflib.get_close_matches(str(base), ARMS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        remedy = f"unknown; {hint}choose of {', '.join(ARMS)}, or give settings: {name}:key=value,key=value"
        require(base in ARMS, "arms", base, remedy)
        for key in OURS:
            require(key not in own, "arms", f"{name}:{key}={own.get(key)}", "the comparison sets this; leave it out")
        made[name] = {key: value for key, value in ARMS[base](recipe, budget).items() if key not in OURS} | own
        try:
            darel_of(made[name])
        except (ValueError, TypeError) as error:
            raise type(error)(f"arms={name!r}: {error}") from None
    return made


def darel_of(settings: Settings) -> DarelConfig:
    """Return what of the settings is DAREL's. Raises as [`DarelConfig`] does."""
    return DarelConfig(**{key: value for key, value in settings.items() if key in DAREL})
