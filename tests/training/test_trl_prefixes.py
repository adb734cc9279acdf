"""trl's own trainers within `shared_prefixes`: their losses and weights, with prompts computed once."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from helpers import PAD, VOCABULARY, word_tokenizer
from peft import LoraConfig
from readers import distance, make_base
from transformers import LlamaConfig, LlamaForSequenceClassification

from darel_hf import shared_prefixes

trl = pytest.importorskip("trl")

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def words(generator, low, high):
    return " ".join(f"w{i}" for i in generator.integers(2, VOCABULARY, generator.integers(low, high)))


def pairs(n=16):
    generator = np.random.default_rng(0)
    rows = [(words(generator, 12, 20), words(generator, 3, 8), words(generator, 3, 8)) for _ in range(n)]
    return datasets.Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])


def reward(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]


def classifier():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_attention_heads=4, num_labels=1, pad_token_id=PAD))
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model


def make(kind, folder, tokenizer):
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.05,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
    }
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    more = {"train_dataset": pairs(), "processing_class": tokenizer, "peft_config": lora}
    if kind == "dpo":
        return trl.DPOTrainer(model=make_base("llama"), args=trl.DPOConfig(**common, max_length=64), **more)
    if kind == "reward":
        return trl.RewardTrainer(model=classifier(), args=trl.RewardConfig(**common, max_length=64), **more)
    given = {"num_generations": 4, "max_completion_length": 8, "temperature": 1.0}
    more["train_dataset"] = pairs().select_columns(["prompt"])
    return trl.GRPOTrainer(
        model=make_base("llama"), args=trl.GRPOConfig(**common, **given), reward_funcs=reward, **more
    )


@pytest.mark.parametrize("kind", ["dpo", "reward", "grpo"])
def test_trains_as_trl_does(kind, tmp_path, tokenizer, monkeypatch):
    counts, made = [], []
    forward = torch.nn.Embedding.forward

    def count(self, ids):
        counts.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", count)
    for shared in (False, True):
        trainer = make(kind, tmp_path / str(shared), tokenizer)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        del counts[:]
        if shared:
            with shared_prefixes(trainer.model):
                trainer.train()
        else:
            trainer.train()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        made.append((weights, losses, sum(counts)))
    (wanted, losses, plain), (found, ours, fewer) = made
    np.testing.assert_allclose(ours, losses, rtol=1e-4, atol=1e-5)
    assert distance(found, wanted, start) < 1e-3
    assert fewer < plain
