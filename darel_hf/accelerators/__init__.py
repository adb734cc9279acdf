"""
Whatever makes a training step cheaper: one file each, behind the contract in `base.py`.

Stands on `scoring/` and `adapters/`. The trainer, the planner and the report know the contract only, no accelerator
by name.
"""

from .base import (
    ACCELERATORS,
    Accelerator,
    CannotAccelerate,
    Choosing,
    find_exact,
    first_line,
    in_order,
    make_accelerators,
    make_allowed,
    register_accelerator,
)
from .base_precision import BasePrecision
from .fast_lora import FastLinear, FastLora
from .fused_activation import FusedActivation
from .last_block import LastBlock
from .prompt_cache import PromptCache
from .scores import CheapScores, share_rows
from .share_prompts import SharePrompts, share
from .shared_prefixes import shared_prefixes
from .sliced import CannotSlice, SlicedStep
from .unpad import PaddingFree, flatten
