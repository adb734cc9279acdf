"""Every kind of adapter trains and selects, quantized bases included; online losses are what the model itself says."""

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, tiny_gpt2, token_data, weights
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)

from darel_hf import DarelConfig, DarelTrainer

CAUSAL = {"task_type": "CAUSAL_LM"}
ATTENTION = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
METHODS = {
    "lora": LoraConfig(r=4, **ATTENTION, **CAUSAL),
    "dora": LoraConfig(r=4, use_dora=True, **ATTENTION, **CAUSAL),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **ATTENTION, **CAUSAL),
    "ia3": IA3Config(target_modules=["c_attn", "mlp.c_fc"], feedforward_modules=["mlp.c_fc"], **CAUSAL),
    "loha": LoHaConfig(r=4, target_modules=["lm_head"], **CAUSAL),
    "prompt-tuning": PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prefix-tuning": PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
}


def oracle(model, data):
    """Return each sample's mean loss, one at a time, as the model itself computes it."""
    model.eval()
    losses = []
    with torch.no_grad():
        for row in data:
            batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask", "labels")}
            losses.append(model(**batch).loss.item())
    return np.array(losses)


def check(folder, model, tolerance=1e-4, **settings):
    data = token_data(24)
    expected = oracle(model, data)
    before = weights(model)
    trainer = DarelTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(
            offline_keep=0.75, offline_rule="hardest", online_keep=0.5, online_rule="hardest", length_correction=False
        ),
    )
    trainer.train()
    report = trainer.report
    np.testing.assert_allclose(report.offline_losses, expected, rtol=tolerance, atol=tolerance)
    if tolerance < 1e-3:
        assert set(np.flatnonzero(report.kept)) == set(np.argsort(-expected)[:18])
    assert report.rows_backpropagated == 2 * (4 + 4 + 1)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name].cpu())}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed and changed <= trained


@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_and_select(tmp_path, method):
    check(tmp_path, get_peft_model(tiny_gpt2(), METHODS[method]))


def test_half_precision_base(tmp_path):
    """As QLoRA has it: a frozen base in bf16, prepared by PEFT, with recomputed activations and float32 adapters."""
    model = prepare_model_for_kbit_training(tiny_gpt2().to(torch.bfloat16), use_gradient_checkpointing=True)
    check(tmp_path, get_peft_model(model, METHODS["lora"]), gradient_checkpointing=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes has no backward pass on CPUs: needs a GPU")
def test_quantized_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits, device_map="cuda")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **CAUSAL))
    check(tmp_path / "run", model, tolerance=1e-2)
