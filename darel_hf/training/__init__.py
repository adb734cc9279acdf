"""
Trainer's hooks, and one `train()` from plan to report.

Stands on everything below it: `report/`, `budget/`, `accelerators/`, `scoring/`, `selection/`, `data/`.
"""

from . import checkpoints
from .trainer import DarelMixin, DarelSeq2SeqTrainer, DarelTrainer
