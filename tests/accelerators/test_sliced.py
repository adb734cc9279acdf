"""The one-forward step: gradients of a whole backward pass, a trainer like the subset step's, what is refused."""

import logging

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.models import resnet18
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.accelerators.sliced import CannotSlice, SlicedStep
from darel_hf.scoring.losses import per_sample_losses
from darel_hf.vision.images import ImageClassifier

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}


def llama(lora=False):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=2, **SMALL))
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])) if lora else model


def gpt2_classifier():
    """It picks the last token of every row by the row's number."""
    config = tiny_gpt2().config
    config.num_labels = 3
    return GPT2ForSequenceClassification(config)


def bert():
    return BertForSequenceClassification(BertConfig(num_hidden_layers=1, num_labels=3, **SMALL))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))


def image_network():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip
    return ImageClassifier(network, padding=0, flip=False)


def batch(model, rows, length, seed=0):
    """Build a batch of `rows` samples, the first one padded."""
    draw = np.random.default_rng(seed)
    if isinstance(model, ImageClassifier):
        pixels = draw.standard_normal((rows, 3, 8, 8)).astype(np.float32)
        return {"pixel_values": torch.tensor(pixels), "labels": torch.tensor(draw.integers(0, 3, rows))}
    ids = torch.tensor(draw.integers(3, 64, (rows, length)))
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    if isinstance(model, (BertForSequenceClassification, GPT2ForSequenceClassification)):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(draw.integers(0, 3, rows))}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_error(found, wanted):
    assert found.keys() == wanted.keys()
    difference = sum((found[name] - wanted[name]).norm() ** 2 for name in wanted) ** 0.5
    return (difference / sum(value.norm() ** 2 for value in wanted.values()) ** 0.5).item()


MODELS = {
    "gpt2": tiny_gpt2,
    "gpt2-lora": lambda: tiny_lora(dropout=0.1),
    "llama": llama,
    "llama-lora": lambda: llama(lora=True),
    "gpt2-classifier": gpt2_classifier,
    "bert": bert,
    "t5": t5,
    "images": image_network,
}


FAST = ("gpt2-lora", "images")  # tracing takes ten seconds a model


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_gradient_of_the_kept_rows(name):
    """With the same dropout masks: the whole forward pass by eager autograd, of which the kept rows' losses count."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    shift = name in ("gpt2", "gpt2-lora", "llama", "llama-lora")
    step = SlicedStep(model)
    assert step.shift == shift
    # As many rows as positions; other sizes; one kept row; all rows; rows in front.
    cases = [(8, 8, [1, 4, 6]), (6, 12, [0, 5]), (5, 9, [3]), (4, 10, [0, 1, 2, 3]), (7, 11, [0, 1, 2])]
    for number, (rows, length, kept) in enumerate(cases):
        inputs = batch(model, rows, length, number)
        torch.manual_seed(number)
        samples = step(inputs)
        step.keep(kept)
        (samples.losses * samples.n_tokens)[kept].sum().backward()
        found = gradients(model)
        torch.manual_seed(number)
        reference = per_sample_losses(model(**inputs).logits, inputs["labels"], shift)
        (reference.losses * reference.n_tokens)[kept].sum().backward()
        assert relative_error(found, gradients(model)) < 1e-5
        torch.testing.assert_close(samples.losses, reference.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-lora", "bert"])
def test_inductor_has_the_same_gradients(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    step = SlicedStep(model, backend="inductor")
    for number, (rows, length, kept) in enumerate([(8, 8, [1, 4, 6]), (6, 12, [0, 5])]):
        inputs = batch(model, rows, length, number)
        torch.manual_seed(number)
        samples = step(inputs)
        step.keep(kept)
        samples.losses[kept].sum().backward()
        found = gradients(model)
        torch.manual_seed(number)
        per_sample_losses(model(**inputs).logits, inputs["labels"], step.shift).losses[kept].sum().backward()
        assert relative_error(found, gradients(model)) < 1e-5


@pytest.mark.slow
def test_activation_checkpointing_without_dropout():
    torch.manual_seed(0)
    model = tiny_gpt2().train()
    inputs, kept = batch(model, 6, 10), [1, 3]
    per_sample_losses(model(**inputs).logits, inputs["labels"], True).losses[kept].sum().backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = SlicedStep(model)
    samples = step(inputs)
    step.keep(kept)
    samples.losses[kept].sum().backward()
    assert relative_error(gradients(model), wanted) < 1e-5


def test_what_others_see_is_left_alone():
    """Rows move inside of what the forward pass has saved: not in the batch, in outputs, nor if it is needed again."""
    torch.manual_seed(0)
    model, seen = image_network().train(), []
    hook = model.network[0].register_forward_hook(lambda module, args, output: seen.append(output))
    inputs, kept = batch(model, 7, 8), [2, 5, 6]
    before = {name: value.clone() for name, value in inputs.items()}
    step = SlicedStep(model)
    for _ in range(2):  # the first backward pass checks itself
        samples = step(inputs)
        losses = samples.losses.detach().clone()
        step.keep(kept)
        samples.losses[kept].sum().backward()
        wanted = gradients(model)
    for name, value in before.items():
        torch.testing.assert_close(inputs[name], value, rtol=0, atol=0)
    torch.testing.assert_close(samples.losses.detach(), losses, rtol=0, atol=0)
    model(**inputs)
    torch.testing.assert_close(seen[-2], seen[-1])
    hook.remove()
    samples = step(inputs)
    for again in (True, False):
        step.keep(kept)
        samples.losses[kept].sum().backward(retain_graph=again)
        assert relative_error(gradients(model), wanted) < 1e-5


def test_autocast():
    torch.manual_seed(0)
    model = tiny_gpt2().train()
    inputs, kept, step = batch(model, 6, 10), [1, 3], SlicedStep(model)
    with torch.autocast("cpu", torch.bfloat16):
        samples = step(inputs)
    step.keep(kept)
    samples.losses[kept].sum().backward()
    found = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    per_sample_losses(logits, inputs["labels"], True).losses[kept].sum().backward()
    assert relative_error(found, gradients(model)) < 2e-2


# ---- Refused ----


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_refused(training):
    model = ImageClassifier(resnet18(num_classes=3), padding=0, flip=False).train(training)
    with pytest.raises(CannotSlice, match="batch normalization"):
        SlicedStep(model)
    assert all(module.training == training for module in model.modules())


class Coupled(nn.Module):
    """A classifier whose rows depend on each other in a way that no type of layer tells."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, features):
        hidden = self.layer(features).tanh()
        return self.head(hidden / hidden.std(0))


class Broken(Coupled):
    """A classifier that cannot be one graph."""

    def forward(self, features):
        hidden = self.layer(features)
        torch._dynamo.graph_break()
        return self.head(hidden)


@pytest.mark.parametrize(("model", "reason"), [(Coupled(), "differs"), (Broken(), "one graph")])
def test_what_cannot_be_sliced_says_so(model, reason):
    step = SlicedStep(model.train())
    inputs = {"features": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    with pytest.raises(CannotSlice, match=reason):
        samples = step(inputs)
        step.keep([0, 2])
        samples.losses[[0, 2]].sum().backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_losses_are_per_sample_losses(smoothing):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (4, 5), generator=draw).masked_fill(torch.rand(4, 5, generator=draw) < 0.3, -100)
    labels[2] = -100
    for logits, wanted, shift in (
        (torch.randn(4, 5, 7, generator=draw), labels, True),
        (torch.randn(4, 8, 7, generator=draw), labels, False),  # positions that prompt tuning prepends
        (torch.randn(4, 7, generator=draw), torch.tensor([0, 1, 6, 3]), False),
    ):
        found = per_sample_losses(logits, wanted, shift, smoothing, want_correct=True, dense=True)
        reference = per_sample_losses(logits, wanted, shift, smoothing, want_correct=True)
        for ours, theirs in zip(found[:3], reference[:3], strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- In the trainer ----


def train(folder, backward, model=None, darel=None, resume=None, **settings):
    config = {"online_keep": 0.5, "online_rule": "hardest", "length_correction": False, **(darel or {})}
    trainer = DarelTrainer(
        model=tiny_lora() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(online_backward=backward, **config),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("darel", "settings"),
    [
        ({}, {}),
        pytest.param(
            {"track": True, "online_rule": "kakurenbo"},
            {"gradient_accumulation_steps": 3},
            marks=pytest.mark.slow,
        ),
        ({"online_rule": "infobatch"}, {"label_smoothing_factor": 0.1}),
        pytest.param(
            {"rescore_every": 2},
            {"average_tokens_across_devices": False, "num_train_epochs": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "accumulation", "weights-smoothing", "ledger"],
)
def test_trains_as_the_subset_step_does(tmp_path, darel, settings):
    """Without dropout losses of train and eval mode are the same, and so must be all that follows."""
    subset = train(tmp_path / "subset", "subset", darel=darel, **settings)
    sliced = train(tmp_path / "sliced", "sliced", darel=darel, **settings)
    for name, value in weights(subset.model).items():
        torch.testing.assert_close(weights(sliced.model)[name], value, rtol=1e-4, atol=1e-5)
    assert sliced.report.rows_backpropagated == subset.report.rows_backpropagated
    np.testing.assert_array_equal(sliced.report.times_trained, subset.report.times_trained)
    for ours, theirs in zip(sliced.state.log_history, subset.state.log_history, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-3)
    assert sliced.report.plan.costs.one_forward


@pytest.mark.slow
def test_a_model_that_is_made_anew(tmp_path):
    """Trainer throws the model away that was tried out."""
    trained = {}
    for backward in ("subset", "sliced"):
        trainer = DarelTrainer(
            model_init=lambda: tiny_lora(),
            args=arguments(tmp_path / backward),
            train_dataset=token_data(),
            data_collator=PadCollator(),
            darel=DarelConfig(online_keep=0.5, online_rule="hardest", online_backward=backward),
        )
        trainer.train()
        trained[backward] = weights(trainer.model)
    for name, value in trained["subset"].items():
        torch.testing.assert_close(trained["sliced"][name], value, rtol=1e-4, atol=1e-5)
    assert any(value.abs().max() > 0 for name, value in trained["sliced"].items() if "lora_B" in name)


@pytest.mark.slow
def test_autocast_in_the_trainer(tmp_path):
    """In bfloat16 losses nearly tie, so the rule is one that both ways agree on: chance that the seed decides."""
    rule = {"online_rule": "loss_bins_high"}
    subset = train(tmp_path / "subset", "subset", darel=rule, bf16=True, max_steps=2)
    sliced = train(tmp_path / "sliced", "sliced", darel=rule, bf16=True, max_steps=2)
    assert sliced.report.plan.costs.one_forward
    for ours, theirs in zip(sliced.state.log_history[:-1], subset.state.log_history[:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


@pytest.mark.slow
def test_hooks_that_come_after_the_trial_count():
    model = tiny_gpt2().train()
    step, inputs = SlicedStep(model), batch(tiny_gpt2(), 4, 8)
    before = step(inputs).losses.detach()
    model.transformer.wte.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        wanted = per_sample_losses(model(**inputs).logits, inputs["labels"], True).losses
    torch.testing.assert_close(step(inputs).losses.detach(), wanted)
    assert not torch.allclose(before, wanted)


@pytest.mark.slow
def test_resumes_bit_for_bit(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path, "sliced", tiny_lora(dropout=0.1), **saves)
    resumed = train(tmp_path, "sliced", tiny_lora(dropout=0.1), resume=str(tmp_path / "checkpoint-4"), **saves)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    np.testing.assert_array_equal(whole.report.times_trained, resumed.report.times_trained)


def test_falls_back_for_noise_that_comes_by_a_hook(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="darel_hf"):
        trainer = train(tmp_path, "sliced", max_steps=2, neftune_noise_alpha=5.0)
    assert "neftune_noise_alpha" in caplog.text
    assert not trainer.report.plan.costs.one_forward


def test_falls_back_where_the_loss_is_not_the_models(tmp_path, caplog):
    class Own(DarelTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer = Own(
        model=tiny_lora(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(online_keep=0.5, online_rule="hardest", online_backward="sliced"),
    )
    with caplog.at_level(logging.WARNING, logger="darel_hf"):
        trainer.train()
    assert "Own computes a loss of its own; going on with 'subset'" in caplog.text
    assert trainer.report.seconds["scoring"] > 0
    assert not trainer.report.plan.costs.one_forward
