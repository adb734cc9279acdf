"""DAREL (DAta REduction with Losses) for the Hugging Face Trainer: train on the samples that still teach something."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapters import ReaderLoraConfig, to_lora
    from .budget import Plan
    from .comparison import compare
    from .config import DarelConfig
    from .nlg.metrics import NLGMetrics
    from .report import Report
    from .selection import RULES, LossLedger, Samples, Selector, register_rule
    from .training import DarelMixin, DarelSeq2SeqTrainer, DarelTrainer
    from .training.sft import DarelSFTTrainer

# Imported on first use: `import darel_hf` costs milliseconds, not the seconds of torch and transformers.
_HOME = {
    "accelerators": ("shared_prefixes",),
    "adapters": ("ReaderLoraConfig", "to_lora"),
    "budget": ("Plan",),
    "comparison": ("compare",),
    "config": ("DarelConfig",),
    "nlg.metrics": ("NLGMetrics",),
    "report": ("Report",),
    "selection": ("RULES", "LossLedger", "Samples", "Selector", "register_rule"),
    "training": ("DarelMixin", "DarelSeq2SeqTrainer", "DarelTrainer"),
    "training.sft": ("DarelSFTTrainer",),
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
    "compare",
    "register_rule",
    "shared_prefixes",
    "to_lora",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
