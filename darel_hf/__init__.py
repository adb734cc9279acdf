"""DAREL (DAta REduction with Losses) for the Hugging Face Trainer: train on the samples that still teach something."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import DarelConfig
    from .ledger import LossLedger
    from .metrics import NLGMetrics
    from .planning import Plan
    from .report import Report
    from .selection import RULES, Samples, register_rule
    from .selector import Selector
    from .sft import DarelSFTTrainer
    from .trainer import DarelMixin, DarelSeq2SeqTrainer, DarelTrainer

# Imported on first use: `import darel_hf` costs milliseconds, not the seconds of torch and transformers.
_HOME = {
    "DarelConfig": "config",
    "DarelMixin": "trainer",
    "DarelSFTTrainer": "sft",
    "DarelSeq2SeqTrainer": "trainer",
    "DarelTrainer": "trainer",
    "LossLedger": "ledger",
    "NLGMetrics": "metrics",
    "Plan": "planning",
    "RULES": "selection",
    "Report": "report",
    "Samples": "selection",
    "Selector": "selector",
    "register_rule": "selection",
}

__all__ = [
    "RULES",
    "DarelConfig",
    "DarelMixin",
    "DarelSFTTrainer",
    "DarelSeq2SeqTrainer",
    "DarelTrainer",
    "LossLedger",
    "NLGMetrics",
    "Plan",
    "Report",
    "Samples",
    "Selector",
    "__version__",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
