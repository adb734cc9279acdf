"""Activation functions in one pass: the same values and gradients, less saved, and the model's own afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from readers import GENTLE, adapted
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from transformers.activations import NewGELUActivation

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.accelerators import FusedActivation, fused_activation


@pytest.mark.parametrize("cls", fused_activation.FUSED)
def test_values_and_gradients(cls):
    fused = fused_activation.FUSED[cls]
    x = (4 * torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    slope = torch.randn_like(x)
    own, found = (made(x) for made in (cls(), fused()))
    truth = torch.autograd.grad(own, x, slope)[0]
    torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found, x, slope)[0], truth, rtol=1e-9, atol=1e-9)

    def error(made):  # of a gradient in float32
        single = x.detach().float().requires_grad_()
        return (torch.autograd.grad(made(single), single, slope.float())[0].double() - truth).abs().max()

    assert error(fused()) <= 2 * error(cls()) < 1e-5
    assert torch.autograd.gradcheck(fused(), x.detach()[0, :, :5].requires_grad_())


def test_saves_its_input_alone():
    def saved(module):
        x, sizes = torch.randn(8, 16, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            module(x)
        return sum(sizes)

    assert saved(fused_activation.FusedNewGELU()) == 128 < saved(NewGELUActivation())


def trained(cls, folder, model, darel=None, **more):
    trainer = cls(
        model=model,
        args=arguments(folder, **{**GENTLE, **more}),
        train_dataset=token_data(24),
        data_collator=PadCollator(),
        **({} if darel is None else {"darel": DarelConfig(**darel)}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lora], ids=["full", "lora"])
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
def test_trains_as_trainer_does(make, more, tmp_path, monkeypatch):
    monkeypatch.setattr(FusedActivation, "most", 1e9)  # in so small a model nobody can tell what it saves
    plain = trained(Trainer, tmp_path / "plain", make(), **more)
    calls = []
    fused = fused_activation._TanhGELU.forward
    monkeypatch.setattr(fused_activation._TanhGELU, "forward", lambda *args: calls.append(1) or fused(*args))
    ours = trained(DarelTrainer, tmp_path / "ours", make(), {"fused_activation": True}, **more)
    assert len(calls) >= 2 * ours.state.global_step
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(ours.model)[name], value, rtol=1e-4, atol=1e-6)
    assert repr(ours.model) == repr(plain.model)
    assert list(ours.report.plan.costs.factors) == ["fused_activation"]


def test_switched_on_and_off(tmp_path):
    model = tiny_gpt2()
    ids, text, states = torch.randint(3, 60, (2, 30)), repr(model), list(model.state_dict())
    wanted = model(ids).logits
    accelerator = FusedActivation(DarelTrainer(model=model, args=arguments(tmp_path), train_dataset=token_data(8)))
    with accelerator.attached():
        acts = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
        assert {type(act) for act in acts} == {fused_activation.FusedNewGELU} and len(acts) == 2
        found = model(ids).logits
        torch.testing.assert_close(found, wanted)
        assert list(model.state_dict()) == states
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(ids).logits, found)
    assert repr(model) == text and torch.equal(model(ids).logits, wanted)


def test_is_the_models_own_again_after_an_error(tmp_path):
    class Stops(PadCollator):
        calls = 0

        def __call__(self, features):
            Stops.calls += 1
            if Stops.calls > 20:
                raise RuntimeError("the disk is gone")
            return super().__call__(features)

    model = tiny_gpt2()
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=20),
        train_dataset=token_data(24),
        data_collator=Stops(),
        darel=DarelConfig(fused_activation=True),
    )
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer.train()
    assert {type(m) for m in model.modules() if isinstance(m, NewGELUActivation)} == {NewGELUActivation}


def test_left_out(tmp_path, caplog):
    """Of a model that has none, of one whose activation another has changed, and where it was measured not to pay."""
    ours = trained(DarelTrainer, tmp_path / "llama", adapted("llama"), {"fused_activation": True})
    assert "LlamaForCausalLM has no activation function that is written out in many passes" in caplog.text
    assert ours.report.left_out.keys() == {"fused_activation"}

    class Own(NewGELUActivation):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, n_positions=64))
    model.transformer.h[0].mlp.act = Own()
    plain = copy.deepcopy(model)
    trained(DarelTrainer, tmp_path / "own", model, {"fused_activation": True})
    trained(Trainer, tmp_path / "plain", plain)
    assert_same_weights(weights(model), weights(plain))


def test_a_changed_activation_is_found_by_the_trial(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fused_activation._TanhGELU, "forward", lambda self, x: torch.nn.functional.gelu(1.01 * x))
    ours = trained(DarelTrainer, tmp_path, tiny_gpt2(), {"fused_activation": True})
    assert "would change by" in ours.report.left_out["fused_activation"]
    assert "fused_activation=True: " in caplog.text
