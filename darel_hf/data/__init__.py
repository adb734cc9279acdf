"""
Data sets of any kind: ids, columns, rows of batches, batches of similar length, fingerprints.

Stands on `config` and `files`.
"""

from .by_length import ShuffledByLength, token_batches
from .by_prompt import (
    ShuffledByPrompt,
    by_beginning,
    common_beginnings,
    count_prompts,
    prompt_length,
    prompt_of,
    prompt_tokens,
)
from .columns import (
    Noting,
    cell,
    feature_length,
    group_numbers,
    has_labels,
    is_plain,
    is_stream,
    read_column,
    read_items,
    sample_lengths,
    stores_lengths,
)
from .fingerprint import code_fingerprint, data_content, data_fingerprint
from .ids import CarryIds, StreamWithIds, WithIds, add_ids, add_stream_ids, item_id, sample_ids, select_rows
from .rows import ID_KEY, WEIGHT_KEY, keys_without_rows, require_rows, take_rows
