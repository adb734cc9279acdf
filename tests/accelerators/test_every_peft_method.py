"""
Every method of the installed PEFT that a small Llama takes: right gradients and losses, or it is refused.

The table in docs/launch.md is what is found here: `DAREL_WRITE_TABLE=1 pytest -n 0 tests/accelerators/
test_every_peft_method.py` writes it anew.
"""

import dataclasses
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, token_data
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from darel_hf import DarelConfig, DarelTrainer, Selector
from darel_hf.scoring import BatchScorer, skip_identity_adapters

DOC = Path(__file__).parents[2] / "docs" / "launch.md"
SETTINGS = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj"],
    "num_virtual_tokens": 3,
    "r": 4,
    "token_indices": [5, 6],
    "feedforward_modules": [],
}
#: What some of them want besides, for a model so small.
MORE = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 20},
    "OFT": {"oft_block_size": 8, "r": 0},
    "ROAD": {"group_size": 16},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 1},
    "WAVEFT": {"n_frequency": 100},
}
METHODS = sorted(PEFT_TYPE_TO_CONFIG_MAPPING, key=str)


def named(method):
    return str(getattr(method, "value", method))


def adapted(method, move=True):
    """The model with its adapter, moved off its starting point, as training would."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    settings = {**SETTINGS, **MORE.get(named(method), {})}
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        model = get_peft_model(LlamaForCausalLM(config), cls(**{k: v for k, v in settings.items() if k in known}))
    except Exception as error:  # it wants more settings, data or a kernel: not what is tested here
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        pytest.skip("nothing of it is trained")
    with torch.no_grad():
        for parameter in trained if move else ():
            if parameter.is_floating_point():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def gradients(cls, folder, method, seed=0, data=None, rows=8, **darel):
    """The gradients of the first step, on all samples."""
    found = {}

    class Spy(cls):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return loss

    trainer = Spy(
        model=adapted(method),
        args=arguments(folder, max_steps=1, per_device_train_batch_size=rows, seed=seed),
        train_dataset=token_data(8) if data is None else data,
        data_collator=PadCollator(),
        **darel,
    )
    trainer.train()
    return found


def far(found, wanted):
    """The names of gradients that differ by more than rounding."""
    largest = max(gradient.norm() for gradient in wanted.values())
    return [
        name
        for name, gradient in wanted.items()
        if (found[name] - gradient).norm() > 1e-3 * max(gradient.norm(), 1e-3 * largest)
    ]


def reference(folder, method):
    """The gradients of plain Trainer, where it computes any and they are always the same."""
    try:
        wanted = gradients(Trainer, folder / "plain", method)
        again = gradients(Trainer, folder / "again", method, seed=1)
    except Exception as error:  # plain Trainer cannot train it either
        pytest.skip(f"plain Trainer: {type(error).__name__}: {str(error)[:80]}")
    if not wanted:
        pytest.skip("plain Trainer computes no gradient")
    if not all(gradient.isfinite().all() for gradient in wanted.values()):
        pytest.skip("plain Trainer's gradients are not finite")
    if far(again, wanted):
        pytest.skip("it draws at random in every forward pass, as dropout does")
    return wanted


def without_padding(folder, method, wanted):
    """Whether it is right without padding; else it is refused."""
    try:
        found = gradients(DarelTrainer, folder / "ours", method, darel=DarelConfig(unpad=True))
    except ValueError as refused:
        assert "cannot be trained without padding" in str(refused)
        return "refused"
    assert found.keys() == wanted.keys() and not far(found, wanted)
    return "right"


def sliced(folder, method, monkeypatch, caplog):
    """Whether rows chosen in the forward pass that trains have their gradients; else they get a step of their own."""
    chosen, select = [], Selector.select

    def remember(self, ids, *args, **kwargs):
        rows, weights = select(self, ids, *args, **kwargs)
        chosen.append(np.asarray(ids)[rows])
        return rows, weights

    darel = DarelConfig(online_keep=0.5, online_rule="hardest", online_backward="sliced")
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Selector, "select", remember)
        found = gradients(DarelTrainer, folder / "sliced", method, rows=4, darel=darel)
    wanted = gradients(Trainer, folder / "chosen", method, data=token_data(8).select(sorted(chosen[0])), rows=4)
    assert found.keys() == wanted.keys() and not far(found, wanted)
    return "two passes" if "going on with 'subset'" in caplog.text else "right"


def scored(method):
    """Whether losses are those of the model itself, adapters moved or not; and whether those may be skipped."""
    data = PadCollator()([{k: v for k, v in row.items() if k != "group"} for row in token_data(8, seed=3)])
    for model in (adapted(method), adapted(method, move=False)):
        model.eval()
        with torch.no_grad():
            own = [model(**{k: v[i : i + 1] for k, v in data.items()}).loss.item() for i in range(8)]
        if not np.isfinite(own).all():
            pytest.skip("its own loss of a row is not finite")
        scorer, own = BatchScorer(model), np.array(own)
        losses = scorer(data).losses.numpy()
        penalty = np.mean(own - losses) if scorer.reading.matches_own_loss is False else 0.0  # of all rows alike
        np.testing.assert_allclose(losses + penalty, own, rtol=1e-4)
        before = [p.requires_grad for p in model.parameters()]
        with skip_identity_adapters(scorer, {k: v[:4] for k, v in data.items()}) as skipped:
            np.testing.assert_allclose(scorer(data).losses + penalty, own, rtol=1e-4)
        assert before == [p.requires_grad for p in model.parameters()]
    what = "right" if not penalty else "cross-entropy, with a warning"
    return what + (", skipped at the start" if skipped else "")


SOME = ("IA3", "LORA", "PROMPT_TUNING", "VERA")  # the table has all of them


@pytest.mark.parametrize("method", [method for method in METHODS if named(method) in SOME], ids=named)
def test_without_padding(tmp_path, method):
    without_padding(tmp_path, method, reference(tmp_path, method))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_table(tmp_path, method, monkeypatch, caplog):
    wanted = reference(tmp_path, method)
    found = [without_padding(tmp_path, method, wanted), sliced(tmp_path, method, monkeypatch, caplog), scored(method)]
    row, text = f"| {named(method)} | {' | '.join(found)} |", DOC.read_text(encoding="utf-8")
    if os.environ.get("DAREL_WRITE_TABLE"):
        begin, table, end = re.split("(?<=<!-- methods -->\n)|(?=<!-- end of methods -->)", text)
        head, rows = table.splitlines()[:2], {line.split("|")[1]: line for line in [*table.splitlines()[2:], row]}
        DOC.write_text(begin + "\n".join([*head, *map(rows.get, sorted(rows))]) + "\n" + end, encoding="utf-8")
    else:
        assert row in text
