"""On a GPU: the kernel of rows without padding, prompts in its memory, whole runs; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import PadCollator, arguments
from peft import LoraConfig
from readers import FAMILIES, GENTLE, adapted, data, distance, gradients, oracle, rows, trained
from transformers import Trainer

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import PromptCache, row_attention, share
from darel_hf.accelerators.unpad import flatten

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = ((9, 5), (9, 3), (7, 6), (1, 4), (9, 1))


@pytest.fixture
def packed(monkeypatch):
    """The calls of the kernel."""
    calls, real = [], row_attention.Rows.packed
    monkeypatch.setattr(row_attention.Rows, "packed", lambda *given: calls.append(1) or real(*given))
    return calls


def on_gpu(inputs):
    return {key: value.cuda() for key, value in inputs.items()}


def computed(model, inputs, bf16):
    """Return a loss and all gradients, in double precision on the CPU."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: gradient.double().cpu() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("put", [flatten, share])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_padding(family, put, packed):
    """In float32 the gradients of the padded batch; in bfloat16, by the kernel, no farther from these than it is."""
    model, inputs = adapted(family).cuda(), on_gpu(rows(LENGTHS, same_prompts=True))
    loss, wanted = computed(model, inputs, bf16=False)
    _, padded = computed(model, inputs, bf16=True)
    model.get_base_model().set_attn_implementation("darel_padding_free")
    for label_positions_only in (False, True):
        row = put(inputs, label_positions_only)
        found_loss, found = computed(model, row, bf16=False)
        assert found_loss == pytest.approx(loss, rel=1e-5) and distance(found, wanted) < 1e-4
        assert not packed
        _, found = computed(model, row, bf16=True)
        assert len(packed) == 2 and distance(found, wanted) < 2 * distance(padded, wanted) + 1e-3
        packed.clear()


@pytest.mark.parametrize("way", ["device", "ram", "disk", "recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read(family, way, tmp_path, packed):
    inputs = rows(LENGTHS, same_prompts=True)
    stock, model = adapted(family), adapted(family, ReaderLoraConfig).cuda().train()
    loss, _ = oracle(stock, inputs)  # on the CPU, row by row
    loss.backward()
    wanted = {name: gradient.double() for name, gradient in gradients(stock).items()}
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, use_cpu=False),
        train_dataset=data(),
        data_collator=PadCollator(),
        darel=DarelConfig(prompt_cache=way),
    )
    cache, labels = PromptCache(trainer), int(inputs["labels"].ne(-100).sum())
    assert cache.why_not(lambda: inputs) is None
    for _ in range(2):  # computed, then read
        model.zero_grad()
        found = model(**cache.transform(on_gpu(inputs))).loss * labels
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-4)
        assert distance({name: p.double().cpu() for name, p in gradients(model).items()}, wanted) < 1e-4
    if way in ("device", "ram"):
        assert {kept.device.type for kept in cache.store.known.values()} == {"cuda" if way == "device" else "cpu"}
    cache.detach()
    packed.clear()
    with torch.autocast("cuda", torch.bfloat16):
        assert cache.why_not(lambda: inputs) is None
        model(**cache.transform(on_gpu(inputs))).loss.backward()
    assert packed
    cache.detach()


@pytest.mark.parametrize("config", [LoraConfig, ReaderLoraConfig])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_all_that_is_exact(family, config, tmp_path):
    """Weights end where the plain (for a reader: the slow) run ends, but for rounding."""
    start = adapted(family, config)
    more = {**GENTLE, "use_cpu": False, "num_train_epochs": 2}
    wanted = trained(Trainer, tmp_path / "plain", copy.deepcopy(start), **more)
    found = trained(DarelTrainer, tmp_path / "fast", copy.deepcopy(start), {"fast": True}, **more)
    begun = {name: p.detach().cuda() for name, p in start.named_parameters() if p.requires_grad}
    assert distance(found, wanted, begun) < 1e-3


def test_a_budget_is_measured(tmp_path):
    model = adapted("llama")
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, use_cpu=False, bf16=True),
        train_dataset=data(),
        data_collator=PadCollator(),
        darel=DarelConfig(budget_time=0.5, budget_memory=1.0),
    )
    trainer.train()
    # A model so small is not worth its plan: what counts is that there is one.
    assert trainer.report.plan.costs.step_seconds > 0 and next(model.parameters()).is_cuda
