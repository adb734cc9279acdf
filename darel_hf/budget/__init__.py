"""
What a run costs, what a budget leaves of it, and keeping to that while training.

Stands on `scoring/`, and on `accelerators/` by their contract only. Planning alone needs no torch, so what measures
and paces is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .plan import Costs, Plan, assumed_costs, batch_size_within, budget_plan, online_term, paper_budget, time_of_epochs

if TYPE_CHECKING:
    from .measure import SHARE, clock, measure_costs, measure_memory, measure_slowdown
    from .pace import KeepBudget, usual_step

_LATER = dict.fromkeys(("SHARE", "clock", "measure_costs", "measure_memory", "measure_slowdown"), "measure")
_LATER |= dict.fromkeys(("KeepBudget", "usual_step"), "pace")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
