"""
Which samples: rules, what is known of every loss, and the selector that joins them. Arrays only, no model, no Trainer.

Stands on `config` and `files`.
"""

from .ledger import LossLedger, OpenLedger, check_finite
from .rules import RULES, Rule, Samples, candidate_rows, kept_count, length_corrected, register_rule
from .selector import OfflineSelection, Scores, Selector
