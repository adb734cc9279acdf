"""Small models of several families, and scores of a small data set, that the tests of scoring share."""

import numpy as np
from helpers import PadCollator, tiny_gpt2, token_data
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from darel_hf.data import CarryIds, add_ids
from darel_hf.scoring import BatchScorer, score_dataset

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2))


def gemma():
    """Soft-caps its logits after the head, so that the shortcut through the head would be wrong."""
    config = Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.05
    )
    return Gemma2ForCausalLM(config)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def prompt_tuned():
    return get_peft_model(tiny_gpt2(), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))


def score(n=50, model=None, ids=None, **settings):
    data = add_ids(
        token_data(n).select_columns(["input_ids", "attention_mask", "labels"]), np.arange(n) if ids is None else ids
    )
    return score_dataset(BatchScorer(model or tiny_gpt2()), data, CarryIds(PadCollator()), lambda b: b, **settings)
