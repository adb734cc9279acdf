"""
Losses of samples, without gradients: of a batch, of a whole data set, from a file.

Stands on `data/` and `selection/`.
"""

from .dataset import default_max_tokens, read_window, rows_without_tokens, score_dataset
from .losses import IGNORE, SampleLosses, per_sample_losses, shift_labels, token_losses, weighted_loss
from .prompts import SharedPrompts, share_prompts
from .saved import (
    check_rows,
    label_hashes,
    load_scores,
    match_scores,
    model_fingerprint,
    row_hashes,
    save_scores,
)
from .scorer import (
    BatchScorer,
    PerSampleLoss,
    Reading,
    base_model,
    first_of,
    is_causal_lm,
    is_sharded,
    logits_of,
    precision,
    preserve_rng_state,
    rows_of,
    scorer_for,
    skip_identity_adapters,
    spread_before_training,
    to_device,
    untouched,
    with_decoder_inputs,
)
from .trial import Trial, counts_items, moved
