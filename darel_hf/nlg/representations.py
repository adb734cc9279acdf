"""Meaning representations as text: `name[Blue Spice], area[riverside]`, or as LoRA's files have it, taken apart."""

from __future__ import annotations

import re

_SLOT = r"\s*([^\W\d_]\w*(?:[ _.-]\w+)*)\[([^\[\]]*)\]\s*"
_WHOLE = re.compile(rf"{_SLOT}(?:,{_SLOT})*,?\s*")
_ONE = re.compile(_SLOT)
_PIPED = re.compile(r"\s*[^|:]+ : [^|]*(?:\|\s*[^|:]+ : [^|]*)*\s*(?:\|\|?\s*)?")


def parse(mr: str) -> list[tuple[str, str]] | None:
    """
    Return the slots and values of a meaning representation; None for any other text.

    Only what is `slot[value]`, with commas between, from the first letter to the last, or `slot : value | ...`.

    Example:

    ```python
    >>> parse("name[Blue Spice], area[riverside]")
    [('name', 'Blue Spice'), ('area', 'riverside')]
    >>> parse("Sort the list [3, 1, 2].")
    ```
    """
    if _WHOLE.fullmatch(mr):
        return [(name.strip(), value.strip()) for name, value in _ONE.findall(mr)]
    if _PIPED.fullmatch(mr):
        parts = [part.split(" : ") for part in mr.rstrip(" |").split("|")]
        if all(len(part) == 2 for part in parts):  # three are a triple
            return [(name.strip(), value.strip()) for name, value in parts]
    return None
