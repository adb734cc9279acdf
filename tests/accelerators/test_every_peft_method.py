"""Every method of the installed PEFT that a small Llama takes: right gradients without padding, or it is refused."""

import dataclasses

import pytest
import torch
from helpers import PadCollator, arguments, token_data
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from darel_hf import DarelConfig, DarelTrainer

SETTINGS = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj"],
    "num_virtual_tokens": 3,
    "r": 4,
    "token_indices": [5, 6],
    "feedforward_modules": [],
}
METHODS = sorted(PEFT_TYPE_TO_CONFIG_MAPPING, key=str)


def adapted(method):
    """The model with its adapter, moved off its starting point, as training would."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        model = get_peft_model(LlamaForCausalLM(config), cls(**{k: v for k, v in SETTINGS.items() if k in known}))
    except Exception as error:  # it wants more settings, data or a kernel: not what is tested here
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        pytest.skip("nothing of it is trained")
    with torch.no_grad():
        for parameter in trained:
            if parameter.is_floating_point():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def gradients(cls, folder, method, seed=0, **darel):
    """The gradients of the first step, on all samples."""
    found = {}

    class Spy(cls):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return loss

    trainer = Spy(
        model=adapted(method),
        args=arguments(folder, max_steps=1, per_device_train_batch_size=8, seed=seed),
        train_dataset=token_data(8),
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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(getattr(method, "value", method)))
def test_without_padding(tmp_path, method):
    try:
        wanted = gradients(Trainer, tmp_path / "plain", method)
        again = gradients(Trainer, tmp_path / "again", method, seed=1)
    except Exception as error:  # plain Trainer cannot train it either
        pytest.skip(f"plain Trainer: {type(error).__name__}: {str(error)[:80]}")
    if not wanted:
        pytest.skip("plain Trainer computes no gradient")
    if far(again, wanted):
        pytest.skip("it draws at random in every forward pass, as dropout does")
    try:
        found = gradients(DarelTrainer, tmp_path / "ours", method, darel=DarelConfig(unpad=True))
    except ValueError as refused:
        assert "cannot be trained without padding" in str(refused)
        return
    assert found.keys() == wanted.keys() and not far(found, wanted)
