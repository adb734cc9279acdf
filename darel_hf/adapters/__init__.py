"""
Adapters of ours, as PEFT has its own: they train, save, load and generate with plain Trainer and PeftModel.

Stands on `files.py`.
"""

from .invocation import completion_lora, invoked
from .reader import (
    ReaderLoraConfig,
    ReaderModel,
    acting_everywhere,
    adapts_prompts,
    base_alone,
    find_reader,
    prompt_positions,
    recomputes,
    to_lora,
    with_prompt_lengths,
)
