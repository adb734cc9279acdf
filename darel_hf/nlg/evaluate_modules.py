"""Our metrics as modules of Hugging Face `evaluate`; the files under eval/metrics are one line each on top of this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate

from ..files import require
from .metrics import NAMES, NLGMetrics

_CITATION = "Novikova, Dusek and Rieser 2017, The E2E dataset: new challenges for end-to-end generation"


def metric_module(name: str) -> type[evaluate.Metric]:
    """
    Return the `evaluate.Metric` of one score: `bleu`, `ter`, `meteor`, `nist`, `rouge_l`, `cider`, `chrf` or `chrf++`.

    Its `compute(predictions=, references=, **settings)` takes one text, and one or a list of reference texts, an
    instance; the settings are those of [`NLGMetrics`]. It returns the score, its `signature`, and with `bootstrap` the
    `interval`.
    """

    class Module(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description=f"{NAMES[name]} of generated text against several references, as the E2E challenge has it",
                citation=_CITATION,
                inputs_description="predictions: texts; references: for each a list of texts, or one text",
                features=[
                    datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                    datasets.Features({"predictions": text, "references": text}),
                ],
            )

        def add_batch(self, *, predictions: Any = None, references: Any = None, **more: Any) -> None:
            """Take texts; `evaluate` itself would take a text among lists letter by letter."""
            for what, given in (("predictions", predictions), ("references", references)):
                listed = hasattr(given, "__len__") and not isinstance(given, (str, bytes, Mapping))
                require(
                    given is None or listed,
                    what,
                    given,
                    "give a list of texts, or of lists of texts, an instance each",
                )
            kinds = {isinstance(group, str) for group in references or ()}
            remedy = "some are texts, others lists of texts; give a list an instance"
            require(len(kinds) < 2, "references", references, remedy)
            super().add_batch(predictions=predictions, references=references, **more)

        def _compute(self, predictions: list[str], references: list[Any], **settings: Any) -> dict[str, Any]:
            metrics = NLGMetrics(**settings, only=(name,))
            scores = metrics(predictions, references)
            if scores[name] is None:
                raise ValueError(" ".join(scores["notes"]))
            intervals = {"interval": scores["intervals"][name]} if scores["intervals"] else {}
            return {name: scores[name], "signature": scores["signatures"][name], **intervals}

    Module.__name__ = Module.__qualname__ = NAMES[name].replace("-", "")
    return Module
