"""METEOR: nltk's, with WordNet found wherever it is, and Meteor 1.5 run by Java."""

from __future__ import annotations

import functools
import io
import itertools
import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics.base import Score, Signature

from ...files import require
from .base import SegmentMean, SummedMetric
from .part import Part
from .ptb import ptb_words

DEBIAN_WORDNET = "/usr/share/wordnet"
NO_WORDNET = (
    "METEOR is left out: no WordNet was found. Run `python -m nltk.downloader wordnet` where there is a network, or "
    "name a folder with its files (wordnet=, --wordnet; Debian's package wordnet-base puts them in "
    f"{DEBIAN_WORDNET}), or ask for exact and stem matching only with the word none"
)


class METEOR(SegmentMean):
    """
    nltk's METEOR (Lavie and Agarwal 2007), the best over the references, averaged over segments.

    Far above Meteor 1.5 on the same text: other weights, no paraphrases. Its signature says `impl:nltk`.

    Args:
        wordnet (`str`, *optional*): folder with WordNet's files, or `"nltk"` for nltk's own copy; None matches exact
            words and stems only, and the signature says so.
    """

    name = "METEOR"

    class _Signature(Signature):
        def __init__(self, args: dict):
            import nltk

            super().__init__(args)
            match = (
                "exact,stem" if args["wordnet"] is None else f"exact,stem,wordnet{wordnet_version(args['wordnet'])}"
            )
            self.info.update(impl="nltk", match=match, alpha=0.9, beta=3.0, gamma=0.5, case="lc", tok="13a")
            self.info["version"] = f"nltk-{nltk.__version__}"

    _SIGNATURE_TYPE = _Signature

    def __init__(self, wordnet: str | None):
        super().__init__()
        self.wordnet = wordnet

    def words(self, part: Part) -> list[list[str]]:
        return part.words

    def segment(self, hypothesis: list[str], references: Sequence[list[str]]) -> float:
        return max(self._score(hypothesis, reference) for reference in references)

    def _score(self, hypothesis: list[str], reference: list[str]) -> float:
        matches = self._align(hypothesis, reference)
        if not matches:
            return 0.0
        precision, recall = len(matches) / len(hypothesis), len(matches) / len(reference)
        mean = (precision * recall) / (0.9 * precision + (1 - 0.9) * recall)
        following = sum(b == a + 1 and d == c + 1 for (a, c), (b, d) in itertools.pairwise(matches))
        return (1 - 0.5 * ((len(matches) - following) / len(matches)) ** 3.0) * mean

    def _align(self, hypothesis: list[str], reference: list[str]) -> list[tuple[int, int]]:
        """
        Return which words go together, in order: equal ones, then those of equal stems, then synonyms.

        As nltk does: from the last word of the hypothesis, each takes the last word of the reference that is left.
        """
        own, left = range(len(hypothesis)), range(len(reference))
        matches: list[tuple[int, int]] = []
        own, left = _match(matches, own, hypothesis, left, reference)
        if own and left:
            stems = {i: _stem(hypothesis[i]) for i in own}, {j: _stem(reference[j]) for j in left}
            own, left = _match(matches, own, stems[0], left, stems[1])
        if own and left and self.wordnet is not None:  # without synonyms nothing more can match
            places: dict[str, list[int]] = {}
            for j in left:
                places.setdefault(reference[j], []).append(j)
            for i in reversed(own):
                known = [places[word] for word in _synonyms(self.wordnet, hypothesis[i]) if places.get(word)]
                if known:
                    matches.append((i, max(known, key=lambda found: found[-1]).pop()))
        return sorted(matches)


def _match(
    matches: list[tuple[int, int]], own: Sequence[int], words: Any, left: Sequence[int], reference: Any
) -> tuple[Sequence[int], Sequence[int]]:
    """Add places of equal words to `matches`; return those that are left, of both sides."""
    places: dict[str, list[int]] = {}
    for j in left:
        places.setdefault(reference[j], []).append(j)
    alone = []
    for i in reversed(own):
        found = places.get(words[i])
        if found:
            matches.append((i, found.pop()))
        else:
            alone.append(i)
    return alone[::-1], sorted(itertools.chain.from_iterable(places.values()))


@functools.cache
def _stem(word: str) -> str:
    """nltk's Porter stemmer, each word once."""
    return _porter().stem(word)


@functools.cache
def _synonyms(wordnet: str, word: str) -> frozenset[str]:
    """Return a word and its synonyms of one word, each once."""
    lemmas = (lemma.name() for synset in open_wordnet(wordnet).synsets(word) for lemma in synset.lemmas())
    return frozenset([word, *(name for name in lemmas if "_" not in name)])


@functools.cache
def _porter() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@functools.cache
def open_wordnet(folder: str) -> Any:
    """Open WordNet's files; Debian's lack the list of lexicographer files, whose names METEOR never asks for."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i:02d}\tunnamed{i}\t0\n" for i in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Skip the mapping to other languages, which costs seconds and needs files that Debian leaves out."""

    if folder != "nltk" and folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk reads nothing from outside its path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has English only
        return Reader(_wordnet_of_nltk() if folder == "nltk" else folder, None)


@functools.cache
def wordnet_version(folder: str) -> str:
    """Return the version that WordNet's files state."""
    return str(open_wordnet(folder).get_version() or "?")


def _wordnet_of_nltk() -> Any:
    """Return nltk's own copy, unpacked or not; raises `LookupError` where there is none."""
    import nltk

    try:
        return nltk.data.find("corpora/wordnet")
    except LookupError:
        return nltk.data.find("corpora/wordnet.zip/wordnet/")


def find_wordnet(folder: str | os.PathLike | None = None) -> str | None:
    """
    Find WordNet: in the folder named, in nltk's data, where Debian puts it, or by `nltk.download` over the network.

    Returns:
        `str`, *optional*: a folder, `"nltk"`, or None where there is none.

    Raises:
        ValueError: if a folder was named and holds no WordNet.
    """
    import nltk

    def in_nltk() -> bool:
        try:
            _wordnet_of_nltk()
        except LookupError:
            return False
        return True

    if folder is not None and str(folder) != "nltk":
        for found in (Path(folder), Path(folder) / "dict", Path(folder) / "corpora" / "wordnet"):
            if (found / "data.noun").is_file() and (found / "index.noun").is_file():
                return str(found)
        raise ValueError(f"wordnet={str(folder)!r}: no WordNet there (data.noun, index.noun, ...); name its folder")

    if in_nltk():
        return "nltk"
    require(folder is None, "wordnet", folder, "nltk has none; run `python -m nltk.downloader wordnet`")
    if Path(DEBIAN_WORDNET, "data.noun").is_file():
        return DEBIAN_WORDNET
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return None
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # nltk's downloader has no time-out of its own
    try:
        nltk.download("wordnet", quiet=True, print_error_to=io.StringIO())  # the note says what to do
    except OSError:
        pass
    finally:
        socket.setdefaulttimeout(before)
    return "nltk" if in_nltk() else None


class JavaMETEOR(SummedMetric):
    """
    Meteor 1.5 itself, run from its jar as the E2E scripts do: `-l en -norm` on Penn Treebank words, no punctuation.

    Args:
        jar (path): `meteor-1.5.jar`, with `data/paraphrase-en.gz` beside it.

    Raises:
        ValueError: if the jar is missing or does not answer as Meteor 1.5 does, or there is no Java.
    """

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(impl="meteor-1.5", norm="yes", case="lc", tok="ptb", punct="no", version="1.5")

    _SIGNATURE_TYPE = _Signature

    def __init__(self, jar: str | os.PathLike):
        super().__init__()
        require(Path(jar).is_file(), "meteor_jar", str(jar), "no such file; name meteor-1.5.jar")
        require(shutil.which("java") is not None, "meteor_jar", str(jar), "needs Java, and there is no `java` here")
        self.jar = str(Path(jar).resolve())
        stats = self._compute_segment_statistics("an inn", {"references": ["an inn"]})
        require(
            self._compute_score_from_stats(stats).score > 0, "meteor_jar", str(jar), "it scores equal texts with 0"
        )

    def _preprocess_segment(self, sent: str) -> str:
        return " ".join(ptb_words(sent)).replace("|||", "")

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        answer = self._ask(["SCORE", *ref_kwargs["references"], hypothesis], 1)[0]
        try:
            stats = [float(number) for number in answer.split()]
        except ValueError:
            stats = []
        require(len(stats) == 23, "meteor_jar", self.jar, f"this is not Meteor 1.5: it answers {answer!r}")
        words, ref_words, chunks, matched, ref_matched = (stats[i] for i in (0, 1, 20, 21, 22))
        if chunks == 1 and matched == words and ref_matched == ref_words:
            stats[20] = 0.0  # adding up, Meteor counts no chunk for a segment that is matched as a whole
        return stats

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        # Meteor adds statistics up before it scores them: one line with the sums is the whole corpus.
        answers = self._ask(["EVAL", " ".join(repr(float(number)) for number in stats)], 2)
        return Score("METEOR", float(answers[-1]))

    def _ask(self, fields: list[str], lines: int) -> list[str]:
        java = _java(self.jar)
        try:
            java.stdin.write(" ||| ".join(fields) + "\n")
            java.stdin.flush()
            answers = [java.stdout.readline().strip() for _ in range(lines)]
        except OSError:
            answers = [""]
        if not all(answers):
            _java.cache_clear()
            remedy = f"Meteor gives no answer; try `java -jar {self.jar}` by hand"
            raise ValueError(f"meteor_jar={self.jar!r}: {remedy}")
        return answers


@functools.cache
def _java(jar: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["java", "-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
