"""DAREL (DAta REduction with Losses) for the Hugging Face Trainer: train on the samples that still teach something."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapters import ReaderLoraConfig, to_lora
    from .budget import Plan
    from .config import DarelConfig
    from .nlg.metrics import NLGMetrics
    from .report import Report
    from .selection import RULES, LossLedger, Samples, Selector, register_rule
    from .training import DarelMixin, DarelSeq2SeqTrainer, DarelTrainer
    from .training.sft import DarelSFTTrainer

# Imported on first use: `import darel_hf` costs milliseconds, not the seconds of torch and transformers.
_HOME = {
    "DarelConfig": "config",
    "DarelMixin": "training",
    "DarelSFTTrainer": "training.sft",
    "DarelSeq2SeqTrainer": "training",
    "DarelTrainer": "training",
    "LossLedger": "selection",
    "NLGMetrics": "nlg.metrics",
    "Plan": "budget",
    "ReaderLoraConfig": "adapters",
    "RULES": "selection",
    "Report": "report",
    "Samples": "selection",
    "Selector": "selection",
    "register_rule": "selection",
    "to_lora": "adapters",
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
    "ReaderLoraConfig",
    "Report",
    "Samples",
    "Selector",
    "__version__",
    "register_rule",
    "to_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
