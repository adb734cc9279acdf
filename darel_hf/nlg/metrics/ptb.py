"""The words of the COCO scripts: Penn Treebank tokens, as Stanford's PTBTokenizer 3.4.1 makes them."""

from __future__ import annotations

import re

# What stays one token with its full stop. A name's initial is one too, unless a new sentence begins after it.
_TITLES = (
    "mr|mrs|ms|dr|prof|st|mt|ft|jr|sr|rev|hon|gov|gen|lt|sgt|capt|col|maj|sen|rep|pres|inc|co|corp|ltd|bros|dept|univ|"
    "assn|ave|blvd|rd|etc|al|vs|sq|adv|esq|messrs|"
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri"
)
_OPENERS = "A|At|He|In|It|She|That|The|There|They|This|We|When|What|You"
_CLITIC = re.compile(r"(?<=[^\W_])(n['\u2019`]t|['\u2019](?:s|re|ll|ve|d|m))(?![^\W_])", re.IGNORECASE)
_FUSED = re.compile(
    r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me))\b|(?<![^\W_])('t)(is|was)\b", re.IGNORECASE
)
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u209c]+")
_TOKEN = re.compile(
    rf"""
      (?<!\S)[A-Za-z]+(?=[,;:!?]?(?:\s|$))                                     # as below, found sooner
    | https?://\S+ | www\.[^\s,]+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | n['\u2019`]t(?![^\W_]) | ['\u2019](?:s|re|ll|ve|d|m)(?![^\W_])
    | ['\u2019]n['\u2019] | ['\u2019](?:em|n|t|[0-9]0s)(?![^\W_])
    | [#@][^\W\d_]\w*
    | [0-9]{{1,2}}[-/][0-9]{{1,2}}[-/][0-9]{{2,4}}(?![0-9])
    | (?:[^\W\d_]\.)+[^\W\d_]?-(?:[^\W_]\.?)+(?=\W|$)                       # U.S.-based, N.Y.-N.J.
    | [A-Za-z0-9](?:[A-Za-z0-9.,]{{0,60}}[A-Za-z0-9])?
      (?:-(?:(?:[A-Za-z]\.){{2,}}|[A-Za-z0-9]+))+(?![^\W_])                     # 3.5-4, food,low-priced
    | (?<![^\W_])(?:[dlo]['\u2019])[^\W\d_]{{2,}}(?:[-_][^\W_]+)*                    # O'Neil, d'Or
    | [A-Za-z]{{1,2}}['\u2019](?:clock|am)(?![^\W_]) | c\+\+ | c\#
    | [A-Za-z]+(?:&[A-Za-z]+)+
    | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}(?![.,:]?[0-9])(?!['\u2019])
    | [-+]?(?:[0-9]+(?:[.:,][0-9]+)+|(?:[.:,][0-9]+)+)                        # 1,000.50, and 1.8 of 1.8g
    | [-+][0-9]+(?![^\W_])
    | (?:[^\W\d_]\.){{2,}}(?![^\W_]) | ph\.d\.                                # U.S., a.s.l.
    | [^\W\d_][^\W_]*(?:[.!?][^\W\d_][^\W_]*)+                                # sauce.It, S.S.Chieti
    | (?:{_TITLES})\.(?![^\W_])
    | (?:nos?|ca|pp|fig|figs)\.(?=\s*[0-9])
    | (?-i:(?<![^\W_])[^\W\d_]\.(?!\s+(?:{_OPENERS})\b)(?![^\W_]))
    | [^\W_]+\.(?=[,;:])                                                   # low., and
    | [^\W_]+(?:[-_][^\W_]+)*
    | \.\.+ | --+ | [!?]{{2,}} | __+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PUNCTUATION = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
        '"',
        *"\u2019\u2018\u201c\u201d\u2013\u2014\u2026",
    ]
)
_ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "\u00bd": " 1/2 ",
    "\u00bc": " 1/4 ",
    "\u00be": " 3/4 ",
}
_ENTITY = re.compile("|".join(_ENTITIES))


def ptb_words(text: str) -> list[str]:
    """
    Split English text as the COCO scripts do before ROUGE-L, CIDEr and METEOR: Penn Treebank, no punctuation.

    It stands in for the Java program PTBTokenizer; how often they agree, and on what texts, says `docs/metrics.md`.

    Example:

    ```python
    >>> ptb_words("It isn't cheap: £20-25!")
    ['it', 'is', "n't", 'cheap', '£', '20-25']
    ```
    """
    text = _ENTITY.sub(lambda found: _ENTITIES[found.group()], text)
    text = _FUSED.sub(lambda found: " ".join(filter(None, found.groups())), text)
    text = _RAISED.sub(r" \g<0> ", _CLITIC.sub(r" \1", text))
    words = (_spelled(word) for word in _TOKEN.findall(text))
    return [word for word in words if word not in _PUNCTUATION and not (word[0] in ".-" and len(set(word)) == 1)]


def _spelled(word: str) -> str:
    """Lower case, clitics with a straight apostrophe."""
    word = word.lower()
    return word.replace("\u2019", "'") if word.startswith("\u2019") or word == "n\u2019t" else word
