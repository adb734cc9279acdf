"""BLEU, TER, METEOR, NIST and ROUGE-L of generated text, as the E2E challenge has them, signatures included."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import joblib
import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric

from ...files import require
from .meteor import METEOR, NO_WORDNET, JavaMETEOR, find_wordnet, open_wordnet
from .nist import NIST
from .rouge import RougeL
from .ter import FastTER

PROTOCOLS = ("e2e", "paper")
NAMES = {"bleu": "BLEU", "ter": "TER", "meteor": "METEOR", "nist": "NIST", "rouge_l": "ROUGE-L"}
_PARALLEL_FROM = 400  # pairs of prediction and reference below which starting workers costs more than it saves


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
