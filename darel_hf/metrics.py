"""BLEU, TER, METEOR, NIST and ROUGE-L of generated text, as the E2E challenge has them, signatures included."""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sacrebleu.metrics import BLEU, TER
from sacrebleu.metrics.base import Metric, Score, Signature
from sacrebleu.metrics.lib_ter import translation_edit_rate
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.utils import sum_of_lists

from ._version import __version__
from .config import require

PROTOCOLS = ("e2e", "paper")
NAMES = {"bleu": "BLEU", "ter": "TER", "meteor": "METEOR", "nist": "NIST", "rouge_l": "ROUGE-L"}
DEBIAN_WORDNET = "/usr/share/wordnet"
NO_WORDNET = (
    "METEOR is left out: no WordNet was found. Run `python -m nltk.downloader wordnet` where there is a network, or "
    "name a folder with its files (wordnet=, --wordnet; Debian's package wordnet-base puts them in "
    f"{DEBIAN_WORDNET}), or ask for exact and stem matching only with the word none"
)
_PARALLEL_FROM = 400  # pairs of prediction and reference below which starting workers costs more than it saves


class SummedMetric(Metric):
    """What our metrics share: texts are taken as they are, and statistics of segments add up to the corpus's."""

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _aggregate_and_compute(self, stats: list[list[float]]) -> Score:
        return self._compute_score_from_stats(sum_of_lists(stats))


# ---- NIST ----


class NIST(SummedMetric):
    """
    The NIST score over several references, on sacrebleu's frame.

    With h the hypotheses' and r the references' n-grams, and the information of an n-gram counted over all references

        info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn))            count() of nothing: all words
        NIST = sum over n = 1..5 of [sum over matches of info / number of h's n-grams] * exp(-beta * ln(L_h / L_r)^2)

    where matches are clipped by the largest count in any one reference, beta makes the penalty 0.5 at a length ratio
    of 2/3, and L_h / L_r is at most 1. Source: Doddington 2002, "Automatic evaluation of machine translation quality
    using n-gram co-occurrence statistics", and the script mteval-v13a.pl, whose L_r is the words of all references
    divided by the mean number of references per segment.

    Args:
        reading (`str`): `"mteval"`, or `"nltk"`: `nltk.translate.nist_score.corpus_nist` takes the counts of the one
            reference with the highest precision, per segment and n-gram order. Where that divides by zero (no
            hypothesis with n words), the order counts 0 here.
        lowercase (`bool`): compare in lower case.
    """

    ORDER = 5
    BETA = -math.log(0.5) / math.log(1.5) ** 2

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            by = {"mteval": "mteval-v13a", "nltk": "nltk"}[args["reading"]]
            case = "lc" if args["lowercase"] else "mixed"
            self.info.update(reading=by, order=NIST.ORDER, case=case, tok="13a", version=f"darel_hf-{__version__}")

    _SIGNATURE_TYPE = _Signature

    def __init__(self, reading: str = "mteval", lowercase: bool = True):
        super().__init__()
        require(reading in ("mteval", "nltk"), "reading", reading, "give 'mteval' or 'nltk'")
        self.reading = reading
        self.lowercase = lowercase
        self.tokenizer = Tokenizer13a()

    def _preprocess_segment(self, sent: str) -> str:
        return self.tokenizer(sent.lower() if self.lowercase else sent)

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        words = [ref.split() for ref in refs]
        return {"words": words, "ngrams": [[_ngrams(ref, n) for n in range(1, self.ORDER + 1)] for ref in words]}

    def _cache_references(self, references: Sequence[Sequence[str]]) -> list[Any]:
        cache = super()._cache_references(references)
        total: Counter[tuple[str, ...]] = Counter()
        for info in cache:
            for orders in info["ngrams"]:
                for counts in orders:
                    total.update(counts)
        total[()] = sum(len(ref) for info in cache for ref in info["words"])
        # log(x, 2), as nltk has it and not log2: its choice among equally good references hangs on the last bit.
        self.information = {gram: math.log(total[gram[:-1]] / count, 2) for gram, count in total.items() if gram}
        return cache

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        words = hypothesis.split()
        of = self._mteval_statistics if self.reading == "mteval" else self._nltk_statistics
        return of(words, [_ngrams(words, n) for n in range(1, self.ORDER + 1)], **ref_kwargs)

    def _gain(self, hypothesis: Counter, reference: Counter) -> float:
        return sum(self.information[gram] * count for gram, count in (hypothesis & reference).items())

    def _mteval_statistics(self, hypothesis: list[str], counts: list[Counter], words: Any, ngrams: Any) -> list[float]:
        """Return information per order, n-grams per order, words of the hypothesis, of all references, references."""
        gains, totals = [], []
        for n, own in enumerate(counts):
            merged: Counter = Counter()
            for orders in ngrams:
                merged |= orders[n]
            gains.append(self._gain(own, merged))
            totals.append(max(0, len(hypothesis) - n))
        return [*gains, *totals, len(hypothesis), sum(map(len, words)), sum(1 for ref in words if ref), 1]

    def _nltk_statistics(self, hypothesis: list[str], counts: list[Counter], words: Any, ngrams: Any) -> list[float]:
        """Return the same fields; lengths are those of the best reference, summed over orders as nltk does."""
        gains, totals, length = [], [], 0
        for n, own in enumerate(counts):
            total = sum(own.values())
            best = []
            for ref, orders in zip(words, ngrams, strict=True):
                gain = self._gain(own, orders[n])
                best.append((gain / total if total else 0, gain, total, len(ref)))
            _, gain, _, ref_length = max(best)
            gains.append(gain)
            totals.append(total)
            length += ref_length
        return [*gains, *totals, self.ORDER * len(hypothesis), length, 1, 1]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        gains, totals = stats[: self.ORDER], stats[self.ORDER : 2 * self.ORDER]
        length, ref_length, references, segments = stats[2 * self.ORDER :]
        precision = sum(gain / total for gain, total in zip(gains, totals, strict=True) if total > 0)
        ratio = length * references / (ref_length * segments) if ref_length > 0 else 0.0
        penalty = math.exp(-self.BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio >= 1)
        return Score("NIST", float(precision * penalty))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


# ---- TER ----


class FastTER(TER):
    """
    sacrebleu's TER, to the last digit, without computing references that cannot be the closest.

    Edits never number fewer than the words of the longer side that the other lacks (shifts move words, they change
    none): references are tried in the order of that bound, until it reaches the best found.
    """

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        words, references = hypothesis.split(), ref_kwargs["ref_words"]
        have = Counter(words)
        bounds = [max(len(words), len(ref)) - (have & Counter(ref)).total() for ref in references]
        best = math.inf
        for bound, i in sorted(zip(bounds, itertools.count(), strict=False)):
            if bound >= best:
                break
            best = min(best, translation_edit_rate(words, references[i])[0])
        return [best, sum(map(len, references)) / len(references)]


# ---- Means over segments: ROUGE-L and METEOR ----


class SegmentMean(SummedMetric):
    """A metric whose corpus score is the mean over segments of `segment(hypothesis, references)`; in [0, 1]."""

    name: str

    @abstractmethod
    def segment(self, hypothesis: str, references: list[str]) -> float:
        """Return the score of one segment."""

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        return [self.segment(hypothesis, ref_kwargs["references"]), 1.0]

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        return Score(self.name, float(stats[0] / stats[1]) if stats[1] else 0.0)


_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ll|ve|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ll|ve|d|m)\b|[^\W_]+(?:(?:[-']|(?<=\d)[.,:/](?=\d))[^\W_]+)*|\S")
_PUNCTUATION = frozenset("'`\".?!,:-;")


def ptb_words(text: str) -> list[str]:
    """
    Split English text as the COCO scripts do before ROUGE-L and METEOR: lower case, Penn Treebank, no punctuation.

    It stands in for the Java program PTBTokenizer; on the 51,426 references of E2E, 99.87 % come out alike.

    Example:

    ```python
    >>> ptb_words("It isn't cheap: £20-25!")
    ['it', 'is', "n't", 'cheap', '£', '20-25']
    ```
    """
    text = _CLITIC.sub(r" \1", text.lower().replace("cannot", "can not"))
    return [word for word in _TOKEN.findall(text) if word not in _PUNCTUATION]


class RougeL(SegmentMean):
    """
    ROUGE-L as in the COCO and E2E scripts: F with beta 1.2 of the longest common subsequence (LCS).

    Precision and recall are each the best over the references. Source: Lin and Och 2004.
    """

    name = "ROUGE-L"
    BETA = 1.2

    class _Signature(Signature):
        def __init__(self, args: dict):
            super().__init__(args)
            self.info.update(impl="coco", beta=RougeL.BETA, case="lc", tok="ptb", punct="no")
            self.info["version"] = f"darel_hf-{__version__}"

    _SIGNATURE_TYPE = _Signature

    def segment(self, hypothesis: str, references: list[str]) -> float:
        words = ptb_words(hypothesis)
        precision = recall = 0.0
        for reference in references:
            ref = _ptb_cached(reference)
            common = lcs_length(words, ref)
            precision = max(precision, common / max(1, len(words)))
            recall = max(recall, common / max(1, len(ref)))
        if precision == 0 or recall == 0:
            return 0.0
        return (1 + self.BETA**2) * precision * recall / (recall + self.BETA**2 * precision)


_ptb_cached = functools.lru_cache(maxsize=1 << 16)(ptb_words)


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit-parallel rows (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matched = row & where.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


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
        nltk.download("wordnet", quiet=True)
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


# ---- All together ----


class NLGMetrics:
    """
    Score generated texts with BLEU, TER, METEOR, NIST and ROUGE-L over any number of references.

    BLEU and TER are on sacrebleu's scale of 0 to 100, METEOR and ROUGE-L in [0, 1], NIST in bits, as in the scripts
    of the E2E challenge. Statistics are extracted once per segment (TER, which costs most, on all cores) and resampled
    for intervals.

    Args:
        protocol (`str`): `"e2e"`: what the challenge's scripts compute (METEOR is nltk's, unless `meteor_jar` is
            given); `"paper"`: METEOR and NIST by nltk, NIST with the case kept, our reading of DAREL's published
            table.
        bootstrap (`int`): resamples for 95 % intervals (percentiles) and paired tests; 0 for none.
        seed (`int`): of the resampling.
        wordnet (path, *optional*): see [`find_wordnet`]; `"none"` for exact and stem matching only. Where no WordNet
            is found, METEOR is None and `notes` say how to get it.
        meteor_jar (path, *optional*): run Meteor 1.5 by Java.
        processes (`int`, *optional*): worker processes; default: the cores this process may use.
        only (`Collection[str]`): the metrics to compute; the others are None in the result.

    Raises:
        ValueError: for a setting that cannot be.

    Example:

    ```python
    >>> scores = NLGMetrics(wordnet="none")(["a b c d"], [["a b c d", "a b"]])
    >>> scores["bleu"], scores["n"]
    (100.00000000000004, 1)
    ```
    """

    def __init__(
        self,
        protocol: str = "e2e",
        *,
        bootstrap: int = 0,
        seed: int = 12345,
        wordnet: str | os.PathLike | None = None,
        meteor_jar: str | os.PathLike | None = None,
        processes: int | None = None,
        only: Collection[str] = tuple(NAMES),
    ):
        require(protocol in PROTOCOLS, "protocol", protocol, f"give one of {', '.join(PROTOCOLS)}")
        require(
            isinstance(bootstrap, int) and bootstrap >= 0, "bootstrap", bootstrap, "give a whole number, 0 or more"
        )
        require(processes is None or processes >= 1, "processes", processes, "give a number of processes, 1 or more")
        remedy = "the paper protocol's METEOR is nltk's; leave it out, or take the protocol e2e"
        require(protocol == "e2e" or meteor_jar is None, "meteor_jar", str(meteor_jar), remedy)
        unknown = [name for name in only if name not in NAMES]
        require(not unknown, "only", unknown, f"give some of {', '.join(NAMES)}")
        self.protocol = protocol
        self.bootstrap = bootstrap
        self.seed = seed
        self.processes = processes
        self.notes: list[str] = []
        make: dict[str, Callable[[], Metric | None]] = {
            "bleu": lambda: BLEU(lowercase=True, tokenize="13a"),
            "ter": FastTER,
            "meteor": lambda: self._meteor(wordnet, meteor_jar),
            "nist": lambda: NIST() if protocol == "e2e" else NIST(reading="nltk", lowercase=False),
            "rouge_l": RougeL,
        }
        made = {name: make[name]() for name in NAMES if name in only}
        self.metrics: dict[str, Metric] = {name: metric for name, metric in made.items() if metric is not None}

    def _meteor(self, wordnet: str | os.PathLike | None, jar: str | os.PathLike | None) -> Metric | None:
        if jar is not None:
            return JavaMETEOR(jar)
        if wordnet == "none":
            return METEOR(None)
        found = find_wordnet(wordnet)
        if found is None:
            self.notes.append(NO_WORDNET)
            return None
        try:
            open_wordnet(found).synsets("inn")
        except Exception as error:  # whatever nltk raises on damaged files
            problem = f"WordNet cannot be read there ({type(error).__name__}: {error}); get its files anew"
            raise ValueError(f"wordnet={found!r}: {problem}") from None
        return METEOR(found)

    def __call__(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        baseline: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """
        Score predictions, and compare them with those of a baseline.

        Args:
            predictions (`Sequence[str]`): one text an instance.
            references (`Sequence[Sequence[str]]`): one or more texts an instance.
            baseline (`Sequence[str]`, *optional*): another system's texts.

        Returns:
            `dict`: `protocol`, `n`, the scores `bleu`, `ter`, `meteor`, `nist`, `rouge_l`, their `signatures`; with
            `bootstrap` the 95 % `intervals`; with a baseline its scores under `baseline`, two-sided `p_values`, see
            [`paired_p_value`], and 95 % intervals of the `differences` to it; and `notes`.

        Raises:
            ValueError: for unequal numbers, an empty list, or an instance without references.
        """
        check_texts(predictions, references)
        systems = {"": list(predictions)}
        if baseline is not None:
            require(self.bootstrap > 0, "bootstrap", self.bootstrap, "comparing with a baseline needs resamples")
            check_texts(baseline, references, "baseline")
            systems["baseline"] = list(baseline)
        references = [
            [references_of] if isinstance(references_of, str) else list(references_of) for references_of in references
        ]
        statistics = self._extract(systems, references)
        numbers = {len(group) for group in references}
        num_refs = numbers.pop() if len(numbers) == 1 else -1
        result: dict[str, Any] = {"protocol": self.protocol, "n": len(predictions)}
        result |= dict.fromkeys(NAMES)
        result |= {"signatures": {}, "intervals": {}, "notes": [*self.notes]}
        if baseline is not None:
            result |= {"baseline": dict.fromkeys(NAMES), "p_values": {}, "differences": {}}
        draws = _draws(len(predictions), self.bootstrap, self.seed) if self.bootstrap else None
        for name in NAMES:
            if name not in self.metrics:
                continue
            metric = self.metrics[name]
            metric.num_refs = num_refs
            result[name] = metric._aggregate_and_compute(statistics[name, ""]).score
            signature = metric.get_signature()
            if draws is not None:
                signature.update("bs", self.bootstrap)
                signature.update("seed", self.seed)
                sampled = _resample(metric, statistics[name, ""], draws)
                result["intervals"][name] = np.percentile(sampled, (2.5, 97.5)).tolist()
            result["signatures"][name] = str(signature)
            if baseline is not None:
                other = metric._aggregate_and_compute(statistics[name, "baseline"]).score
                result["baseline"][name] = other
                differences = sampled - _resample(metric, statistics[name, "baseline"], draws)
                p = paired_p_value(differences, result[name] - other) if len(predictions) > 1 else 1.0
                result["p_values"][name] = p
                result["differences"][name] = np.percentile(differences, (2.5, 97.5)).tolist()
        return result

    def _extract(self, systems: dict[str, list[str]], references: list[list[str]]) -> dict[tuple[str, str], list]:
        """Return the statistics of each segment by metric and system; TER's, which cost most, come from workers."""
        few = sum(map(len, references)) * len(systems) < _PARALLEL_FROM
        workers = self.processes or (1 if few else joblib.cpu_count())
        bounds = np.linspace(0, len(references), min(len(references), 8 * workers) + 1).astype(int)
        parts = [(s, slice(a, b)) for s in systems for a, b in itertools.pairwise(bounds) if "ter" in self.metrics]
        edits = joblib.Parallel(n_jobs=workers, batch_size=1, return_as="generator")(
            joblib.delayed(_statistics)(self.metrics["ter"], systems[s][part], references[part]) for s, part in parts
        )
        results = {
            (name, s): _statistics(metric, texts, references)
            for name, metric in self.metrics.items()
            for s, texts in systems.items()
            if name != "ter"
        }
        for (s, _), part in zip(parts, edits, strict=True):
            results.setdefault(("ter", s), []).extend(part)
        return results

    def compute_metrics(
        self, tokenizer: Any, references: Sequence[Sequence[str]] | None = None
    ) -> Callable[[Any], dict[str, float]]:
        """
        Return a `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

        Args:
            tokenizer: decodes predictions and labels.
            references (`Sequence[Sequence[str]]`, *optional*): the references of the evaluation set, in its order;
                default: the labels, one reference each.

        Returns:
            `Callable`: takes an `EvalPrediction`, returns the scores by name.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

        def decode(ids: Any) -> list[str]:
            ids = ids[0] if isinstance(ids, tuple) else ids
            texts = tokenizer.batch_decode(np.where(np.asarray(ids) < 0, pad, ids), skip_special_tokens=True)
            return [" ".join(text.split()) for text in texts]

        def compute(evaluated: Any) -> dict[str, float]:
            targets = references if references is not None else [[text] for text in decode(evaluated.label_ids)]
            scores = self(decode(evaluated.predictions), targets)
            return {name: scores[name] for name in NAMES if scores[name] is not None}

        return compute


def score_table(scores: dict[str, Any]) -> Any:
    """Return a `rich.table.Table` of what [`NLGMetrics`] returned."""
    from rich.table import Table

    compared = "baseline" in scores
    table = Table(title=f"{scores['n']} instances, protocol {scores['protocol']}")
    table.add_column("metric")
    for column in ["score", *(["95 % interval"] if scores["intervals"] else [])]:
        table.add_column(column, justify="right")
    for column in ["baseline", "difference", "p"] if compared else []:
        table.add_column(column, justify="right")
    for name, title in NAMES.items():
        if scores[name] is None:
            continue
        digits = 2 if name in ("bleu", "ter") else 4
        row = [title, f"{scores[name]:.{digits}f}"]
        if scores["intervals"]:
            row.append("{:.{d}f} to {:.{d}f}".format(*scores["intervals"][name], d=digits))
        if compared:
            other = scores["baseline"][name]
            row += [f"{other:.{digits}f}", f"{scores[name] - other:+.{digits}f}", f"{scores['p_values'][name]:.3f}"]
        table.add_row(*row)
    return table


def check_texts(predictions: Sequence[str], references: Sequence[Any], what: str = "predictions") -> None:
    """Raise `ValueError` for texts that cannot be compared, naming the first instance that is wrong."""
    require(not isinstance(predictions, str), what, predictions, "give a list of texts, one an instance")
    n, m = len(predictions), len(references)
    part = f"number {min(n, m) + 1} of the {'references' if n < m else what} has no counterpart"
    require(n == m, what, f"{n} texts", f"there are references for {m} instances, and {n} {what}; {part}")
    require(n > 0, what, list(predictions), "there is nothing to score")
    for i, (text, group) in enumerate(zip(predictions, references, strict=True), 1):
        require(isinstance(text, str), what, text, f"number {i} is no text")
        texts = [group] if isinstance(group, str) else list(group)
        fine = all(isinstance(reference, str) for reference in texts) and any(ref.strip() for ref in texts)
        require(fine, "references", group, f"instance {i} has no reference, or one that is no text")


def _statistics(metric: Metric, predictions: list[str], references: list[list[str]]) -> list:
    """Extract one metric's statistics, segment by segment; runs in a worker."""
    most = max(len(group) for group in references)
    columns = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    return metric._extract_corpus_statistics(predictions, columns)


# ---- Resampling ----


def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each of `n` segments is drawn in each resample, float64 (resamples, n)."""
    drawn = np.random.default_rng(seed).choice(n, size=(resamples, n), replace=True)
    return np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)


def _resample(metric: Metric, statistics: Iterable[Sequence[float]], draws: np.ndarray) -> np.ndarray:
    """Return the corpus score of each resample, float64 (resamples,)."""
    sums = draws @ np.asarray(statistics, dtype=np.float64)
    return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])


def paired_p_value(differences: np.ndarray, observed: float) -> float:
    """
    Return the two-sided p-value of a paired bootstrap: how often chance alone moves the difference as far as observed.

    Chance is the resampled differences, centred on their mean (Koehn 2004); corrected by one, so that it is never 0.
    sacrebleu takes absolute values before it centres, which makes its values about half as large.

    Args:
        differences (`np.ndarray`): float `[resamples]`, of the two systems on the same draws.
        observed (`float`): their difference on all segments.
    """
    beyond = int((np.abs(differences - differences.mean()) >= abs(observed)).sum())
    return (beyond + 1) / (len(differences) + 1)
