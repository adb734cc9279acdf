"""`shared_prefixes`: logits and gradients of rows that begin alike as ever, for any head and trainer on a decoder."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import PAD
from readers import FAMILIES, SMALL, adapted, distance, make_base, rows
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen2MoeConfig, Qwen2MoeForCausalLM

from darel_hf import ReaderLoraConfig, shared_prefixes
from darel_hf.accelerators import row_attention


def batch_of(side="right", n=4):
    """Answers to the same prompt of 9 tokens, of different length."""
    made = rows(((9, 5), (9, 3), (9, 6), (9, 1))[:n], side=side, same_prompts=True)
    if side == "left":
        made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return made


def results(model, batch, **more):
    model.zero_grad()
    outputs = model(**batch, use_cache=False, **more)
    loss = outputs.logits.square().mean() if "labels" not in batch else outputs.loss
    loss.backward()
    return outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def positions(monkeypatch):
    """How many positions attention has computed queries for."""
    seen, attend = [], row_attention.attend

    def spy(call, query, *args, **more):
        seen.append(query.shape[2])
        return attend(call, query, *args, **more)

    monkeypatch.setattr("darel_hf.accelerators.unpad.attend", spy)
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [adapted, make_base])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, make, side, positions):
    model, batch = make(family), batch_of(side)
    used = batch["attention_mask"].bool()
    logits, wanted = results(model, batch)
    with shared_prefixes(model):
        found, gradients = results(model, batch)
    assert positions[-1] == 9 + 5 + 3 + 6 + 1
    torch.testing.assert_close(found[used], logits[used], rtol=1e-4, atol=1e-4)
    assert distance(gradients, wanted) < 1e-5
    again, _ = results(model, batch)
    assert torch.equal(again, logits), "the model is as it was"


def test_a_window_that_attention_is_not_told_of(caplog):
    """Qwen2-MoE has its window in the mask alone; a first batch that is shorter than it does not show that."""
    torch.manual_seed(0)
    experts = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    experts |= {"num_experts": 2, "num_experts_per_tok": 1}
    window = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **experts, **window)).eval()
    batches = [rows(lengths, same_prompts=True) for lengths in ([(5, 3), (5, 2)], [(16, 5), (16, 4)])]
    wanted = [results(model, batch)[0] for batch in batches]
    with shared_prefixes(model):
        for batch, logits in zip(batches, wanted, strict=True):
            used = batch["attention_mask"].bool()
            torch.testing.assert_close(results(model, batch)[0][used], logits[used], rtol=1e-4, atol=1e-4)
    assert caplog.text.count("prefixes are not shared") == 1


def test_logits_to_keep(positions):
    model, batch = adapted("llama"), batch_of()
    batch.pop("labels")
    wanted = results(model, batch, logits_to_keep=4)
    with shared_prefixes(model):
        found = results(model, batch, logits_to_keep=4)
    used = batch["attention_mask"][:, -4:].bool()
    torch.testing.assert_close(found[0][used], wanted[0][used], rtol=1e-4, atol=1e-4)
    assert positions


def test_another_head():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, num_labels=1, pad_token_id=PAD))
    batch = batch_of()
    batch.pop("labels")
    wanted = results(model, batch)
    with shared_prefixes(model):
        found = results(model, batch)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert distance(found[1], wanted[1]) < 1e-5


def test_generates_as_ever(positions):
    model = adapted("llama").eval()
    prompts = torch.randint(3, 64, (1, 7)).repeat(3, 1)
    wanted = model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False)
    with shared_prefixes(model):
        assert torch.equal(model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False), wanted)
    assert not positions


def test_what_differs_is_left_alone_and_said(caplog, positions):
    model, batch = make_base("llama"), batch_of()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + out.mean(dim=(0, 1), keepdim=True))
    wanted = results(model, batch)
    with shared_prefixes(model), caplog.at_level(logging.WARNING):
        found = results(model, batch)
    assert "prefixes are not shared: hidden states or gradients would differ by" in caplog.text
    assert torch.equal(found[0], wanted[0])


def test_rows_that_have_nothing_in_common(positions):
    model = adapted("llama")
    batch = {"input_ids": torch.randint(3, 64, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    with shared_prefixes(model):
        results(model, batch)
    assert not positions


def test_an_error_in_between_leaves_nothing_behind():
    model, batch = make_base("llama"), batch_of()
    wanted = results(model, batch)
    with shared_prefixes(model):
        results(model, batch)
        with pytest.raises(RuntimeError), torch.no_grad():
            hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                model(**batch)
            except ZeroDivisionError:
                raise RuntimeError from None
            finally:
                hook.remove()
        found = results(model, batch)
    assert distance(found[1], wanted[1]) < 1e-5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: adapted("llama", ReaderLoraConfig), "a reader computes prompts and completions apart"),
        (lambda: make_base("llama").model, "model='LlamaModel': give a causal language model"),
    ],
)
def test_one_clear_line(make, match):
    with pytest.raises(ValueError, match=match), shared_prefixes(make()):
        pass


def test_attention_that_is_not_ours():
    model = make_base("llama")
    model.set_attn_implementation("eager")
    with (
        pytest.raises(ValueError, match="attn_implementation='eager': load the model with 'sdpa'"),
        shared_prefixes(model),
    ):
        pass
