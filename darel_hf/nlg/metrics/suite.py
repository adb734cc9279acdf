"""All scores of one or many systems: statistics extracted once, on all cores, then scored, resampled and compared."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric
from tqdm.auto import tqdm

from ...files import require
from . import significance
from .base import CorpusMetric, PartMetric
from .bleu import FastBLEU, ScriptBLEU
from .chrf import FastCHRF
from .cider import CIDEr
from .grams import Encoded, distinct_of, orders
from .meteor import METEOR, NO_WORDNET, JavaMETEOR, find_wordnet, open_wordnet
from .nist import NIST
from .part import Part
from .rouge import RougeL
from .slots import SlotErrorRate
from .ter import FastTER

PROTOCOLS = ("e2e", "paper", "lora")
NAMES = {
    "bleu": "BLEU",
    "ter": "TER",
    "meteor": "METEOR",
    "nist": "NIST",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "chrf": "chrF",
    "chrf++": "chrF++",
    "ser": "SER",
}
LOWER_IS_BETTER = ("ter", "ser")
# Cubes of the characters of references, which is how TER's time grows: two to five seconds of one core. Below it,
# workers take longer to start than they save.
_PARALLEL_FROM = 2 * 10**10
_PART = 256  # instances a worker takes at a time, at most
_HERE = (JavaMETEOR, SlotErrorRate)  # one program, or one list of values: computed here, not by workers


class NLGMetrics:
    """
    Score generated texts with BLEU, TER, METEOR, NIST, ROUGE-L, CIDEr, chrF, chrF++ and, where there are meaning
    representations, the slot error rate (SER), over any number of references.

    BLEU, TER, chrF and SER are on a scale of 0 to 100, METEOR and ROUGE-L in [0, 1], CIDEr in [0, 10], NIST in bits,
    as in the scripts of the E2E challenge. Statistics are extracted once per segment and resampled for intervals.

    Args:
        protocol (`str`): `"e2e"`: what the challenge's scripts compute (METEOR is nltk's, unless `meteor_jar` is
            given); `"lora"`: the same with BLEU and NIST as the scripts compute them with `-p`, which LoRA's paper and
            its followers report; `"paper"`: METEOR and NIST by nltk, NIST with the case kept, our reading of DAREL's
            published table.
        bootstrap (`int`): resamples for 95 % intervals (percentiles) and paired tests; 0 for none.
        seed (`int`): of the resampling.
        wordnet (path, *optional*): see [`find_wordnet`]; `"none"` for exact and stem matching only. Where no WordNet
            is found, METEOR is None and `notes` say how to get it.
        meteor_jar (path, *optional*): run Meteor 1.5 by Java.
        processes (`int`, *optional*): worker processes; default: the cores this process may use.
        only (`Collection[str]`): the metrics to compute; the others are None in the result.
        slot_rules (path, *optional*): rules for the slot error rate; default: those for E2E.
        progress (`bool`): show a bar where it takes longer than two seconds.

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
        slot_rules: str | os.PathLike | None = None,
        progress: bool = False,
    ):
        require(protocol in PROTOCOLS, "protocol", protocol, f"give one of {', '.join(PROTOCOLS)}")
        whole = isinstance(bootstrap, int) and bootstrap >= 0
        require(whole, "bootstrap", bootstrap, "give a whole number, 0 or more")
        require(isinstance(seed, int) and seed >= 0, "seed", seed, "give a whole number, 0 or more")
        require(processes is None or processes >= 1, "processes", processes, "give a number of processes, 1 or more")
        remedy = "the paper protocol's METEOR is nltk's; leave it out, or take another protocol"
        require(protocol != "paper" or meteor_jar is None, "meteor_jar", str(meteor_jar), remedy)
        only = [only] if isinstance(only, str) else list(only)
        unknown = [name for name in only if name not in NAMES]
        require(not unknown, "only", unknown, f"give some of {', '.join(NAMES)}")
        require(bool(only), "only", only, f"give some of {', '.join(NAMES)}")
        self.protocol = protocol
        self.bootstrap = bootstrap
        self.seed = seed
        self.processes = processes
        self.progress = progress
        self.notes: list[str] = []
        self.only = only
        make: dict[str, Callable[[], Metric | None]] = {
            "bleu": lambda: ScriptBLEU() if protocol == "lora" else FastBLEU(),
            "ter": FastTER,
            "meteor": lambda: self._meteor(wordnet, meteor_jar),
            "nist": lambda: NIST(**_NIST[protocol]),
            "rouge_l": RougeL,
            "cider": CIDEr,
            "chrf": FastCHRF,
            "chrf++": lambda: FastCHRF(word_order=2),
            "ser": lambda: SlotErrorRate(slot_rules),
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
        mrs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """
        Score predictions, and compare them with those of a baseline.

        Args:
            predictions (`Sequence[str]`): one text an instance.
            references (`Sequence[Sequence[str]]`): one or more texts an instance; blank ones count as none.
            baseline (`Sequence[str]`, *optional*): another system's texts.
            mrs (`Sequence[str]`, *optional*): meaning representations, for the slot error rate.

        Returns:
            `dict`: `protocol`, `n`, the scores `bleu`, `ter`, `meteor`, `nist`, `rouge_l`, `cider`, `chrf`, `chrf++`,
            `ser`, their `signatures`; with `bootstrap` the 95 % `intervals`; with a baseline its scores under
            `baseline`, two-sided `p_values`, see [`paired_p_value`], `p_randomization`, and 95 % intervals of the
            `differences` to it; `texts` (lengths, distinct n-grams), and `notes`.

        Raises:
            ValueError: for unequal numbers, an empty list, or an instance without references.
        """
        systems = {"predictions": predictions}
        check_texts(predictions, references)
        if baseline is not None:
            require(self.bootstrap > 0, "bootstrap", self.bootstrap, "comparing with a baseline needs resamples")
            systems = {"baseline": baseline, **systems}
        return self.evaluate(systems, references, mrs).of_one()

    def evaluate(
        self,
        systems: Mapping[str, Sequence[str] | Sequence[Sequence[str]]],
        references: Sequence[Sequence[str]],
        mrs: Sequence[str] | None = None,
    ) -> Evaluation:
        """
        Score any number of systems, and compare them with the first.

        Args:
            systems (`dict`): by name, one text an instance; or several such lists: runs of one system.
            references (`Sequence[Sequence[str]]`): one or more texts an instance; blank ones count as none.
            mrs (`Sequence[str]`, *optional*): meaning representations, for the slot error rate.

        Returns:
            [`Evaluation`].

        Raises:
            ValueError: for unequal numbers, an empty list, or an instance without references.
        """
        require(isinstance(systems, Mapping) and len(systems) > 0, "systems", systems, "give texts by name, in a dict")
        runs: dict[str, list[list[str]]] = {}
        for name, texts in systems.items():
            several = not isinstance(texts, str) and len(texts) > 0 and not isinstance(texts[0], str)
            several = several and isinstance(texts[0], Sequence)
            for one in texts if several else [texts]:
                check_texts(one, references, name)
                runs.setdefault(name, []).append(list(one))
        references = [
            [group] if isinstance(group, str) else [text for text in group if text.strip()] for group in references
        ]
        metrics, notes = dict(self.metrics), list(self.notes)
        if "ser" in metrics:
            if mrs is not None:
                require(len(mrs) == len(references), "mrs", f"{len(mrs)} texts", "give one an instance")
            if mrs is None or not all(metrics["ser"].reads(mr) for mr in mrs):
                remedy = "the slot error rate needs a meaning representation (slot[value], ...) for each instance"
                require(len(self.only) > 1, "only", self.only, remedy)
                if mrs is not None or len(self.only) < len(NAMES):
                    notes.append(f"SER is left out: {remedy}")
                del metrics["ser"]
        statistics, described = self._extract(metrics, runs, references, mrs)
        numbers = {len(group) for group in references}
        for name, metric in metrics.items():
            metric.num_refs = 1 if name == "ser" else numbers.copy().pop() if len(numbers) == 1 else -1
        mrs = list(mrs) if mrs is not None else None
        return Evaluation(self, metrics, runs, references, mrs, statistics, described, notes)

    def _extract(
        self,
        metrics: dict[str, Metric],
        runs: dict[str, list[list[str]]],
        references: list[list[str]],
        mrs: Sequence[str] | None,
    ) -> tuple[dict[str, dict[str, list[np.ndarray]]], dict[str, list[dict[str, float]]]]:
        """Return statistics of all segments, by metric, system and run, float64 `[n, d]`; and what texts are like."""
        n = len(references)
        flat = [texts for name in runs for texts in runs[name]]
        work = len(flat) * sum(len(text) ** 3 for group in references for text in group)
        workers = self.processes or (1 if work < _PARALLEL_FROM else joblib.cpu_count())
        by_workers = {name: metric for name, metric in metrics.items() if not isinstance(metric, _HERE)}
        count = max(8 * workers if workers > 1 else 1, -(-n // _PART))
        bounds = np.linspace(0, n, min(n, count) + 1).astype(int)
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        bar = functools.partial(tqdm, delay=2, leave=False, disable=not self.progress, unit="part")
        answers = joblib.Parallel(n_jobs=workers, batch_size=1, return_as="generator")(
            joblib.delayed(_of_part)(by_workers, [texts[part] for texts in flat], references[part]) for part in parts
        )
        found: dict[str, list[np.ndarray]] = {}
        for name, metric in bar(list(metrics.items()), desc="scores of all references"):
            if name not in by_workers:
                of = [[mr] for mr in mrs] if name == "ser" else references
                found[name] = _by_segment(metric, Part(flat, of))
        answered: dict[str, list[Any]] = {name: [] for name in (*by_workers, "texts")}
        for answer in bar(answers, total=len(parts), desc="scoring"):
            for name, part in answer.items():
                answered[name].append(part)
        described = describe(Encoded.join(answered.pop("texts")), flat)
        for name, metric in by_workers.items():
            several = answered.pop(name)
            if isinstance(metric, CorpusMetric):
                found[name] = metric.statistics_of(Encoded.join(several))
            else:
                found[name] = [np.concatenate(of_run) for of_run in zip(*several, strict=True)]
        of_runs = iter(range(len(flat)))
        places = {system: [next(of_runs) for _ in runs[system]] for system in runs}
        return (
            {
                name: {system: [found[name][k].astype(np.float64) for k in places[system]] for system in runs}
                for name in metrics
            },
            {system: [described[k] for k in places[system]] for system in runs},
        )

    def compute_metrics(
        self, tokenizer: Any, references: Sequence[Sequence[str]] | None = None
    ) -> Callable[..., dict[str, float]]:
        """
        Return a `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

        With `batch_eval_metrics=True` texts are kept from batch to batch and scored at the end.

        Args:
            tokenizer: decodes predictions and labels.
            references (`Sequence[Sequence[str]]`, *optional*): the references of the evaluation set, in its order;
                default: the labels, one reference each.

        Returns:
            `Callable`: takes an `EvalPrediction`, returns the scores by name.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        kept: tuple[list[str], list[list[str]]] = ([], [])

        def decode(ids: Any, what: str) -> list[str]:
            ids = np.asarray(ids[0] if isinstance(ids, tuple) else ids.cpu() if hasattr(ids, "cpu") else ids)
            remedy = "these are no tokens but scores of tokens; set predict_with_generate=True"
            tokens = ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer)
            require(tokens, what, f"{ids.dtype} {list(ids.shape)}", remedy)
            texts = tokenizer.batch_decode(np.where(ids < 0, pad, ids), skip_special_tokens=True)
            return [" ".join(text.split()) for text in texts]

        def compute(evaluated: Any, compute_result: bool = True) -> dict[str, float]:
            kept[0].extend(decode(evaluated.predictions, "predictions"))
            if references is None:
                remedy = "there are no labels to compare with; give references=, or keep the labels (label_names)"
                require(evaluated.label_ids is not None, "label_ids", None, remedy)
                kept[1].extend([text] for text in decode(evaluated.label_ids, "label_ids"))
            if not compute_result:
                return {}
            predictions, targets = list(kept[0]), list(kept[1]) if references is None else references
            kept[0].clear()
            kept[1].clear()
            scores = self(predictions, targets)
            return {name: scores[name] for name in NAMES if scores[name] is not None}

        return compute


_NIST = {
    "e2e": {},
    "lora": {"reading": "pymteval"},
    "paper": {"reading": "nltk", "lowercase": False},
}


@dataclass
class Evaluation:
    """
    What [`NLGMetrics.evaluate`] returns: the statistics of every segment, and what follows from them.

    Attributes:
        made_by ([`NLGMetrics`]): the settings.
        metrics (`dict[str, Metric]`): those that were computed.
        systems (`dict[str, list[list[str]]]`): the texts of each run of each system.
        references (`list[list[str]]`), mrs (`list[str]`, *optional*): what they were compared with.
        statistics: by metric, system and run, float64 `[n, d]`.
        described: by system and run, see [`describe`].
        notes (`list[str]`): what was left out, and why.
    """

    made_by: NLGMetrics
    metrics: dict[str, Metric]
    systems: dict[str, list[list[str]]]
    references: list[list[str]]
    mrs: list[str] | None
    statistics: dict[str, dict[str, list[np.ndarray]]]
    described: dict[str, list[dict[str, float]]]
    notes: list[str]

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """
        Everything that a table needs, ready for JSON: `protocol`, `n`, `first`, `bootstrap`, `seed`, `signatures`,
        `notes`, and under `systems` by name: `runs`, `scores` (means over runs), `each` (of every run), `spread`
        (standard deviation over runs), `intervals`, `differences` (to the first system: `value`, `interval`,
        `p_bootstrap`, `p_randomization`, both corrected for how many systems there are), `ranks`, `texts`.
        """
        made, names = self.made_by, list(self.systems)
        n = len(self.references)
        systems: dict[str, dict[str, Any]] = {}
        for name in names:
            each = {metric: self._each(metric, name) for metric in self.metrics}
            runs = len(self.systems[name])
            systems[name] = {"runs": runs, "scores": {m: float(np.mean(v)) for m, v in each.items()}}
            if runs > 1:
                systems[name] |= {"each": each, "spread": {m: float(np.std(v, ddof=1)) for m, v in each.items()}}
            described = self.described[name]
            texts = {key: float(np.mean([one[key] for one in described])) for key in described[0]}
            systems[name] |= {
                "intervals": {},
                "texts": texts,
            }
        result = {"protocol": made.protocol, "n": n, "first": names[0], "bootstrap": made.bootstrap, "seed": made.seed}
        signatures, notes = {}, list(self.notes)
        if made.bootstrap:
            self._intervals(systems, self._resampled(), notes)
        for metric, computed in self.metrics.items():
            signature = computed.get_signature()
            if made.bootstrap:
                signature.update("bs", made.bootstrap)
                signature.update("seed", made.seed)
            signatures[metric] = str(signature)
        return {**result, "signatures": signatures, "notes": notes, "systems": systems}

    def _each(self, metric: str, system: str) -> list[float]:
        """Return the score of every run, summed in the order of the segments, as sacrebleu sums."""
        computed = self.metrics[metric]
        sums = ([sum(column) for column in run.T.tolist()] for run in self.statistics[metric][system])
        return [computed._compute_score_from_stats(one).score for one in sums]

    def _resampled(self) -> dict[str, np.ndarray]:
        """Return by metric the scores of each system on each draw: float64 `[systems, resamples]`."""
        columns = [
            (metric, k, run)
            for metric in self.metrics
            for k, system in enumerate(self.systems)
            for run in self.statistics[metric][system]
        ]
        everything = np.concatenate([run for _, _, run in columns], axis=1)
        ends = np.cumsum([run.shape[1] for _, _, run in columns])
        scores = {metric: np.zeros((len(self.systems), self.made_by.bootstrap)) for metric in self.metrics}
        runs = [len(several) for several in self.systems.values()]
        drawn = significance.bootstrap(everything, self.made_by.bootstrap, self.made_by.seed)
        for part, sums in self._bar(drawn, "resampling"):
            for (metric, k, run), end in zip(columns, ends, strict=True):
                one = significance.scores_of(self.metrics[metric], sums[:, end - run.shape[1] : end])
                scores[metric][k, part] += one / runs[k]
        return scores

    def _intervals(self, systems: dict[str, dict], resampled: dict[str, np.ndarray], notes: list[str]) -> None:
        names = list(self.systems)
        first = names[0]
        for metric, scores in resampled.items():
            for k, name in enumerate(names):
                systems[name]["intervals"][metric] = np.percentile(scores[k], (2.5, 97.5)).tolist()
            if len(names) == 1:
                continue
            found, one = {}, len(self.references) == 1  # nothing can be said of one instance
            for k, name in enumerate(names[1:], 1):
                value = systems[name]["scores"][metric] - systems[first]["scores"][metric]
                differences = scores[k] - scores[0]
                found[name] = {
                    "value": value,
                    "interval": np.percentile(differences, (2.5, 97.5)).tolist(),
                    "p_bootstrap": 1.0 if one else significance.paired_p_value(differences, value),
                    "p_randomization": 1.0 if one else self._randomization(metric, first, name, value),
                }
            for test in ("p_bootstrap", "p_randomization"):
                known = [name for name in found if found[name][test] is not None]
                corrected = significance.holm([found[name][test] for name in known])
                for name, p in zip(known, corrected, strict=True):
                    found[name][test] = p
            for name, difference in found.items():
                systems[name].setdefault("differences", {})[metric] = difference
            means = [systems[name]["scores"][metric] for name in names]
            places = significance.ranks(means, scores, metric in LOWER_IS_BETTER) if not one else [1] * len(names)
            for name, rank in zip(names, places, strict=True):
                systems[name].setdefault("ranks", {})[metric] = rank
        pairs = len(names) * (len(names) - 1) / 2
        if pairs / (self.made_by.bootstrap + 1) >= significance.LEVEL:
            needed = int(np.ceil(pairs / significance.LEVEL / 1000) * 1000)
            notes.append(
                f"{self.made_by.bootstrap} resamples are too few to tell {len(names)} systems apart; take {needed}"
            )
        if len({len(runs) for runs in self.systems.values()}) > 1:
            notes.append(
                "approximate randomization swaps run for run: left out where a system has another number of runs"
            )

    def _randomization(self, metric: str, first: str, name: str, observed: float) -> float | None:
        runs, others = self.statistics[metric][name], self.statistics[metric][first]
        if len(runs) != len(others):
            return None
        computed, made = self.metrics[metric], self.made_by
        differences = np.zeros(made.bootstrap)
        one, other = np.concatenate(runs, axis=1), np.concatenate(others, axis=1)
        ends = np.cumsum([run.shape[1] for run in runs])
        for part, sums, other_sums in significance.swapped(one, other, made.bootstrap, made.seed):
            for end, run in zip(ends, runs, strict=True):
                columns = slice(end - run.shape[1], end)
                gap = significance.scores_of(computed, sums[:, columns])
                gap = gap - significance.scores_of(computed, other_sums[:, columns])
                differences[part] += gap / len(runs)
        return significance.randomization_p_value(differences, observed)

    def _bar(self, parts: Iterator, what: str) -> Any:
        return tqdm(parts, desc=what, delay=2, leave=False, disable=not self.made_by.progress, unit="block")

    def of_one(self) -> dict[str, Any]:
        """Return the result in the form of [`NLGMetrics.__call__`]: the last system, the first as its baseline."""
        result = self.result
        own, compared = list(result["systems"].values())[-1], len(self.systems) > 1
        flat: dict[str, Any] = {"protocol": result["protocol"], "n": result["n"], **dict.fromkeys(NAMES)}
        flat |= own["scores"]
        flat |= {"signatures": result["signatures"], "intervals": own["intervals"], "notes": result["notes"]}
        if compared:
            differences = own["differences"]
            flat["baseline"] = result["systems"][result["first"]]["scores"]
            flat["p_values"] = {metric: found["p_bootstrap"] for metric, found in differences.items()}
            flat["p_randomization"] = {metric: found["p_randomization"] for metric, found in differences.items()}
            flat["differences"] = {metric: found["interval"] for metric, found in differences.items()}
        return flat | {"texts": own["texts"]}

    def instances(self) -> Iterator[dict[str, Any]]:
        """
        Yield every instance: `instance` (its number), `mr`, `references`, and under `systems` by name a list with, for
        each run, the `prediction`, its `scores` and its slot `errors`.
        """
        for i, group in enumerate(self.references):
            row: dict[str, Any] = {"instance": i + 1}
            if self.mrs is not None:
                row["mr"] = self.mrs[i]
            row |= {"references": group, "systems": {}}
            for name, runs in self.systems.items():
                row["systems"][name] = [self._instance(i, name, k, texts[i]) for k, texts in enumerate(runs)]
            yield row

    def _instance(self, i: int, system: str, run: int, text: str) -> dict[str, Any]:
        scores = {
            name: instance_score(metric, self.statistics[name][system][run][i].tolist())
            for name, metric in self.metrics.items()
        }
        found: dict[str, Any] = {"prediction": text, "scores": scores}
        if "ser" in self.metrics:
            found["errors"] = [str(error) for error in self.metrics["ser"].errors(text, self.mrs[i])[0]]
        return found


def instance_score(metric: Metric, statistics: list[float]) -> float:
    """Return the score of one segment; BLEU's counts only the n-gram orders that a text is long enough to have."""
    if isinstance(metric, BLEU):
        return BLEU.compute_bleu(
            correct=statistics[2 : 2 + metric.max_ngram_order],
            total=statistics[2 + metric.max_ngram_order :],
            sys_len=int(statistics[0]),
            ref_len=int(statistics[1]),
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
            effective_order=True,
            max_ngram_order=metric.max_ngram_order,
        ).score
    return metric._compute_score_from_stats(statistics).score


def describe(encoded: Encoded, systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """
    Return how long texts are and how much those of a system repeat each other, in words as BLEU has them, lower case.

    Args:
        encoded ([`Encoded`]): these words, of all systems and references.
        systems (`Sequence`): the texts.

    Returns:
        `list[dict]`: for each system `words` a text and `reference_words`; `distinct_1` and `distinct_2`, the distinct
        n-grams of all texts over their number (Li et al. 2016); `distinct_texts`, likewise of whole texts; `empty`
        texts.
    """
    n = len(systems[0])
    lengths = encoded.lengths[encoded.references]
    means = np.add.reduceat(lengths, encoded.groups) / np.diff(np.append(encoded.groups, len(lengths)))
    counted = list(orders(encoded, 2))
    ends = np.cumsum(encoded.lengths)
    found = []
    for k, texts in enumerate(systems):
        own = encoded.texts(k)
        one = {"words": int(encoded.lengths[own].sum()) / n, "reference_words": sum(means.tolist()) / n}
        for order in counted:
            total, different = int(encoded.counts(k, order.n).sum()), len(distinct_of(order.of(k).gram))
            one[f"distinct_{order.n}"] = different / total if total else 0.0
        spans = zip(ends[own], encoded.lengths[own], strict=True)
        one["distinct_texts"] = len({encoded.tokens[end - length : end].tobytes() for end, length in spans}) / n
        one["empty"] = float(sum(not text.strip() for text in texts))
        found.append(one)
    return found


def check_texts(predictions: Sequence[str], references: Sequence[Any], what: str = "predictions") -> None:
    """Raise `ValueError` for texts that cannot be compared, naming the first instance that is wrong."""
    wanted = {
        what: "give a list of texts, one an instance",
        "references": "give a list with a list of texts an instance",
    }
    for name, given in ((what, predictions), ("references", references)):
        fine = hasattr(given, "__len__") and not isinstance(given, (str, bytes, Mapping, set, frozenset))
        require(fine, name, given, wanted[name])
    n, m = len(predictions), len(references)
    part = f"number {min(n, m) + 1} of the {'references' if n < m else what} has no counterpart"
    require(n == m, what, f"{n} texts", f"there are references for {m} instances, and {n} {what}; {part}")
    require(n > 0, what, list(predictions), "there is nothing to score")
    for i, (text, group) in enumerate(zip(predictions, references, strict=True), 1):
        require(isinstance(text, str), what, text, f"number {i} is no text")
        listed = isinstance(group, str) or (
            hasattr(group, "__iter__") and not isinstance(group, (bytes, Mapping, set, frozenset))
        )
        require(listed, "references", group, f"instance {i} needs a list of texts")
        texts = [group] if isinstance(group, str) else list(group)
        fine = all(isinstance(reference, str) for reference in texts) and any(ref.strip() for ref in texts)
        require(fine, "references", group, f"instance {i} has no reference, or one that is no text")


def _of_part(metrics: dict[str, Metric], systems: list[list[str]], references: list[list[str]]) -> dict[str, Any]:
    """Return what each metric makes of some instances, and their words; runs in a worker."""
    part = Part(systems, references)
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        if isinstance(metric, CorpusMetric):
            found[name] = metric.encode(part)
        else:
            found[name] = metric.statistics(part) if isinstance(metric, PartMetric) else _by_segment(metric, part)
    return found | {"texts": part.encoded(part.words)}


def _by_segment(metric: Metric, part: Part) -> list[np.ndarray]:
    """Return a metric's statistics for each system, as sacrebleu extracts them: segment by segment."""
    groups = [group for _, group in part.pairs(part.texts, 0)]
    columns = [[group[i] if i < len(group) else None for group in groups] for i in range(max(part.numbers))]
    metric._ref_cache = metric._cache_references(columns)  # once for all systems
    n, found = len(groups), []
    for k in range(part.systems):
        texts = part.texts[k * n : (k + 1) * n]
        found.append(np.asarray(metric._extract_corpus_statistics(texts, None), dtype=np.float64))
    metric._ref_cache = None
    return found
