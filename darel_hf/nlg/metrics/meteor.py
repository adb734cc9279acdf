"""METEOR: nltk's, with WordNet found wherever it is, and Meteor 1.5 run by Java."""

from __future__ import annotations

import functools
import io
import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics.base import Score, Signature
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from ...files import require
from .base import SegmentMean, SummedMetric
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
        self.tokenizer = Tokenizer13a()

    def _preprocess_segment(self, sent: str) -> str:
        return self.tokenizer(sent.lower())

    def segment(self, hypothesis: str, references: list[str]) -> float:
        from nltk.translate.meteor_score import meteor_score

        synonyms = _Synonyms(self.wordnet)
        return meteor_score([ref.split() for ref in references], hypothesis.split(), stemmer=_Stems, wordnet=synonyms)


class _Stems:
    """nltk's Porter stemmer, each word once: nearly all of METEOR's time goes into stems and synonyms."""

    @staticmethod
    @functools.cache
    def stem(word: str) -> str:
        return _porter().stem(word)


class _Synonyms:
    """The part of WordNet's reader that METEOR asks for, each word once."""

    def __init__(self, wordnet: str | None):
        self.wordnet = wordnet

    def synsets(self, word: str) -> list[Any]:
        return [] if self.wordnet is None else _synsets(self.wordnet, word)


@functools.cache
def _porter() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@functools.cache
def _synsets(wordnet: str, word: str) -> list[Any]:
    return open_wordnet(wordnet).synsets(word)


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
        nltk.download("wordnet", quiet=True, print_error_to=io.StringIO())
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
