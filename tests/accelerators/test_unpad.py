"""Training without padding: the same as plain Trainer, in fewer positions; what cannot be trained so is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, attend_as, tiny_gpt2, tiny_lora, token_data, weights, with_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainerCallback,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from darel_hf import DarelConfig, DarelMixin, DarelTrainer
from darel_hf.accelerators import row_attention
from darel_hf.accelerators.unpad import PaddingFree, flatten, missing

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
#: An optimizer that makes no more of rounding than the gradients have of it.
GENTLE = {"optim": "sgd", "learning_rate": 0.1}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def windowed():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5))


def trained(cls, folder, model, darel=None, data=None, **settings):
    given = {"darel": darel} if issubclass(cls, DarelTrainer) else {}
    trainer = cls(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=token_data() if data is None else data,
        data_collator=PadCollator(),
        **given,
    )
    trainer.train()
    return trainer


def distance(left, right, start=None):
    """The distance of two sets of tensors, relative to the second one, or to how far that is from `start`."""
    total = torch.stack([(left[name] - right[name]).norm() for name in right]).norm()
    moved = torch.stack([(right[name] - start[name] if start else right[name]).norm() for name in right]).norm()
    return float(total / moved)


@pytest.mark.parametrize("model", [tiny_lora, tiny_gpt2, llama, windowed])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 3, "gradient_checkpointing": True}])
def test_trains_as_trainer_does(tmp_path, model, more):
    data = token_data(prompt=model is not tiny_gpt2)  # without prompts the first token has a label, too
    more = {**more, **GENTLE}
    plain = trained(Trainer, tmp_path / "plain", model(), data=data, **more)
    ours = trained(DarelTrainer, tmp_path / "ours", model(), DarelConfig(unpad=True), data=data, **more)
    assert distance(weights(ours.model), weights(plain.model), weights(model())) < 1e-4
    wanted = [log["loss"] for log in plain.state.log_history if "loss" in log]
    found = [log["loss"] for log in ours.state.log_history if "loss" in log]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("darel", [{"unpad": True}, {"share_prompts": 1}])
@pytest.mark.parametrize("last_block", [False, True])
@pytest.mark.parametrize("model", [tiny_lora, llama, windowed])
def test_rows_of_few_lengths(tmp_path, model, darel, last_block, monkeypatch):
    """As they are made where products are in 16 bits on a CPU: the same as plain Trainer, in float32."""
    monkeypatch.setattr(PaddingFree, "is_narrow", lambda self, device: True)
    widths, make = set(), PaddingFree.row

    def row(*args):
        made = make(*args)
        widths.add(made["input_ids"].shape[1])
        return made

    data = with_prompts(token_data())
    plain = trained(Trainer, tmp_path / "plain", model(), data=data, **GENTLE)
    monkeypatch.setattr(PaddingFree, "row", row)
    config = DarelConfig(**darel, last_block=last_block)
    ours = trained(DarelTrainer, tmp_path / "ours", model(), config, data=data, **GENTLE)
    assert distance(weights(ours.model), weights(plain.model), weights(model())) < 1e-4
    assert widths and all(width % 16 == 0 for width in widths)


@given(st.integers(1, 5000))
def test_lengths_are_few(n):
    most = n + missing(n)
    assert most >= n and most - n < max(16, n / 16) and missing(most) == 0
    assert len({m + missing(m) for m in range(n, 2 * n + 1)}) <= 66


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_of_few_lengths_where_products_are_in_16_bits(tmp_path, dtype):
    model, widths = tiny_lora(), []
    model.get_base_model().transformer.wte.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    more = {"bf16": dtype == torch.bfloat16, "use_cpu": True}
    trained(DarelTrainer, tmp_path, model, DarelConfig(unpad=True), **more)
    rows = widths[-10:]
    assert all(width % 16 == 0 for width in rows) == (dtype == torch.bfloat16)


class PadsLeft(PadCollator):
    def __call__(self, features):
        keys = ("input_ids", "attention_mask", "labels")
        batch = super().__call__([{key: feature[key][::-1] for key in keys} for feature in features])
        return {key: value.flip(1) for key, value in batch.items()}


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lora, llama, windowed])
@pytest.mark.parametrize("way", ["one_by_one", "at_once", "packed"])
@pytest.mark.parametrize("collator", [PadCollator, PadsLeft])
def test_gradients(make, way, collator, monkeypatch):
    model = make()
    batch = collator()([token_data()[i] for i in range(5)])
    wanted = gradients(model, batch)
    used = attend_as(way, monkeypatch)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("darel_padding_free")
    for label_positions_only in (False, True):
        assert distance(gradients(model, flatten(batch, label_positions_only)), wanted) < 1e-5
    assert len(used) == 2 * 2  # layers, times


@pytest.mark.parametrize("make", [tiny_lora, llama, windowed])
def test_mixed_precision_reaches_the_kernel(make, monkeypatch):
    """Rotary embeddings leave queries and keys in float32, which no kernel takes; torch's own attention rounds."""
    model = make()
    batch = PadCollator()([token_data()[i] for i in range(5)])
    attend_as("packed", monkeypatch)
    seen, real = set(), row_attention.varlen_attn

    def kernel(*states, **more):
        seen.update(one.dtype for one in states[:3])
        return real(*states, **more)

    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(model, batch)
        base.set_attn_implementation("darel_padding_free")
        found = gradients(model, flatten(batch))
    assert seen == {torch.bfloat16} and distance(found, wanted) < 0.05


def test_other_batches_as_before():
    """With our attention on, whatever is padded is computed as by sdpa: evaluation during training, say."""
    model = llama().eval()
    batch = PadCollator()([token_data()[i] for i in range(5)])
    with torch.no_grad():
        wanted = model(**batch).logits
        model.set_attn_implementation("darel_padding_free")
        assert torch.equal(model(**batch).logits, wanted)
    prompt = batch["input_ids"][:, :3]
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(prompt))
    model.set_attn_implementation("sdpa")
    same = model.generate(prompt, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(generated, same)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 3))
def test_every_token_once_in_order(samples, extra):
    """Against a loop over the samples: tokens, positions, labels, places."""
    width = max(length for length, _ in samples) + extra
    ids, mask = torch.zeros(len(samples), width, dtype=torch.int64), torch.zeros(len(samples), width)
    labels = torch.full_like(ids, -100)
    tokens, positions, wanted, places = [], [], [], []
    for row, (length, prompt) in enumerate(samples):
        own = list(range(10 * row + 1, 10 * row + length + 1))
        ids[row, :length], mask[row, :length] = torch.tensor(own), 1
        own_labels = [-100 if i < prompt else token for i, token in enumerate(own)]
        labels[row, :length] = torch.tensor(own_labels)
        places.append(list(range(len(tokens), len(tokens) + length)))
        tokens += own
        positions += range(length)
        wanted += [-100, *own_labels[1:]]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    row = flatten(batch)
    assert row["input_ids"][0].tolist() == tokens
    assert row["position_ids"][0].tolist() == positions
    assert row["labels"][0].tolist() == wanted
    for found, own in zip(row["attention_mask"][0, 0].tolist(), places, strict=True):
        assert found == own + [len(tokens)] * (width - len(own))
    short = flatten(batch, label_positions_only=True)
    predicting = [i - 1 for i, label in enumerate(wanted) if label != -100]
    assert short["logits_to_keep"].tolist() == (predicting or [0])
    assert short["labels"][0].tolist() == [wanted[i + 1] for i in predicting] or not predicting


class Widths(DarelTrainer):
    """Notes the shapes that the model is trained on, and how many positions pass the head."""

    def __init__(self, *args, **kwargs):
        self.shapes, self.heads = [], []
        super().__init__(*args, **kwargs)
        self.model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs, outputs):
        if model.training:
            self.shapes.append(tuple(kwargs["input_ids"].shape))
            self.heads.append(outputs["logits"].shape[1])


@pytest.mark.parametrize(
    "darel",
    [
        {"offline_keep": 0.5, "offline_rule": "middle"},
        {"online_keep": 0.5},
        {
            "online_keep": 0.5,
            "online_rule": "hardest",
            "offline_keep": 0.75,
            "offline_rule": "middle",
            "rescore_every": 2,
        },
        {"budget_time": 0.6},
    ],
)
def test_with_selection(tmp_path, darel):
    """The same samples are chosen as with padding (losses are scored with padding), and the result is the same."""
    if "budget_time" in darel:  # what it decides depends on what was measured
        ours = trained(Widths, tmp_path / "ours", tiny_lora(), DarelConfig(**darel, unpad=True), **GENTLE)
        assert ours.report.plan.method == "measured"
        assert {rows for rows, _ in ours.shapes[-ours.state.global_step :]} == {1}
        return
    padded = trained(Widths, tmp_path / "padded", tiny_lora(), DarelConfig(**darel), **GENTLE)
    ours = trained(Widths, tmp_path / "ours", tiny_lora(), DarelConfig(**darel, unpad=True), **GENTLE)
    steps = padded.state.global_step
    assert ours.state.global_step == steps
    assert ours.report.rows_backpropagated == padded.report.rows_backpropagated
    np.testing.assert_array_equal(ours.report.times_trained, padded.report.times_trained)
    assert distance(weights(ours.model), weights(padded.model), weights(tiny_lora())) < 1e-4
    before, after = padded.shapes[-steps:], ours.shapes[-steps:]
    assert {rows for rows, _ in after} == {1}
    assert sum(width for _, width in after) < 0.9 * sum(rows * width for rows, width in before)
    assert sum(ours.heads[-steps:]) < sum(width for _, width in after)
    assert ours.model.get_base_model().config._attn_implementation == "sdpa"


def test_the_plan_counts_it(tmp_path, capsys):
    ours = trained(DarelTrainer, tmp_path, tiny_lora(), DarelConfig(unpad=True), token_data(200))
    costs = ours.report.plan.costs
    assert costs.measured and costs.padding_free != 1
    assert ours.report.plan.predicted_time == pytest.approx(
        ours.report.plan.overhead + (1 - costs.data_share) * costs.padding_free + costs.data_share
    )
    assert "without padding" in capsys.readouterr().out


def test_a_checkpoint_has_nothing_of_it(tmp_path):
    config = DarelConfig(unpad=True, offline_keep=0.8, offline_rule="middle")
    whole = trained(DarelTrainer, tmp_path / "a", tiny_gpt2(), config, save_strategy="epoch")
    half = tmp_path / "a" / f"checkpoint-{whole.state.global_step // 2}"
    loaded = AutoModelForCausalLM.from_pretrained(half)
    assert loaded.config._attn_implementation == "sdpa"
    again = DarelTrainer(
        model=tiny_gpt2(),
        args=arguments(tmp_path / "a", save_strategy="epoch"),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=config,
    )
    again.train(resume_from_checkpoint=str(half))
    assert distance(weights(again.model), weights(whole.model)) < 1e-6


def test_autocast(tmp_path):
    """What rounding to bfloat16 changes is no reason to refuse."""
    plain = trained(Trainer, tmp_path / "plain", llama(), bf16=True, **GENTLE)
    ours = trained(DarelTrainer, tmp_path / "ours", llama(), DarelConfig(unpad=True), bf16=True, **GENTLE)
    assert distance(weights(ours.model), weights(plain.model), weights(llama())) < 0.05


@pytest.mark.parametrize("selects", [{}, {"online_keep": 0.5}])
def test_a_stream(tmp_path, selects):
    data = token_data(40).add_column("number", list(range(40))).to_iterable_dataset()
    settings = {"max_steps": 5, **GENTLE, "accelerator_config": {"dispatch_batches": False}}
    config = {**selects, "id_column": "number"}
    padded = trained(DarelTrainer, tmp_path / "a", tiny_lora(), DarelConfig(**config), data, **settings)
    config = DarelConfig(**config, unpad=True)
    ours = trained(DarelTrainer, tmp_path / "b", tiny_lora(), config, data, **settings)
    assert distance(weights(ours.model), weights(padded.model), weights(tiny_lora())) < 1e-4
    assert ours.report.rows_backpropagated == 5 * 4


def test_model_init(tmp_path):
    """Trainer makes the model anew after it was tried out."""
    plain = Trainer(
        model_init=lambda: tiny_lora(),
        args=arguments(tmp_path / "a", **GENTLE),
        train_dataset=token_data(),
        data_collator=PadCollator(),
    )
    plain.train()
    ours = DarelTrainer(
        model_init=lambda: tiny_lora(),
        args=arguments(tmp_path / "b", **GENTLE),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(unpad=True),
    )
    ours.train()
    assert distance(weights(ours.model), weights(plain.model), weights(tiny_lora())) < 1e-4


@pytest.mark.slow
def test_own_losses_get_all_logits(tmp_path):
    """Label smoothing and a loss of the user's read logits and labels at every position: the same as with padding."""

    def loss(outputs, labels, num_items_in_batch=None):
        nll = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return 2 * nll

    class Own(DarelTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return loss(outputs, inputs["labels"])

    class OwnPlain(Trainer):
        compute_loss = Own.compute_loss

    smoothing = {"label_smoothing_factor": 0.1}
    for name, more, ours_cls, plain_cls in (("a", smoothing, DarelTrainer, Trainer), ("b", {}, Own, OwnPlain)):
        more |= GENTLE
        ours = trained(ours_cls, tmp_path / f"{name}-ours", tiny_lora(), DarelConfig(unpad=True), **more)
        plain = trained(plain_cls, tmp_path / f"{name}-plain", tiny_lora(), **more)
        assert distance(weights(ours.model), weights(plain.model), weights(tiny_lora())) < 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_by_length": True}, "batch_by_length=True: without padding there is nothing"),
        ({"track": True}, "track=True: losses of rows"),
        (
            {"online_keep": 0.5, "online_rule": "hardest", "online_backward": "sliced"},
            "online_backward='sliced': it slices the rows",
        ),
        ({"online_keep": 0.5, "online_rule": "infobatch"}, "online_rule='infobatch': its weights need losses of rows"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        DarelConfig(**settings, unpad=True)


@pytest.mark.parametrize("darel", [{"unpad": True}, {"offline_keep": 0.5, "offline_rule": "middle"}])
def test_weights_that_are_spread_before_training(tmp_path, monkeypatch, darel):
    monkeypatch.setattr("darel_hf.scoring.scorer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="deepspeed zero_stage=3"):
        DarelTrainer(
            model=tiny_lora(),
            args=arguments(tmp_path),
            train_dataset=token_data(),
            data_collator=PadCollator(),
            darel=DarelConfig(**darel),
        )


def refused(tmp_path, model, data=None, collator=None, **settings):
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, **settings),
        train_dataset=token_data() if data is None else data,
        data_collator=collator or PadCollator(),
        darel=DarelConfig(unpad=True),
    )
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(caught.value)


def test_models_and_batches_that_are_refused(tmp_path):
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SIZES))
    assert "unpad=True: BertForMaskedLM is no causal language model" in refused(tmp_path / "bert", bert)
    eager = llama()
    eager.set_attn_implementation("eager")
    assert "attn_implementation='sdpa'" in refused(tmp_path / "eager", eager)
    # Where the first token has a label and padding is on the left, a padded position predicts it.
    data = token_data(prompt=False)
    assert "padding on the left" in refused(tmp_path / "left", tiny_lora(), data, collator=PadsLeft())

    class More(PadCollator):
        def __call__(self, features):
            batch = super().__call__(features)
            return {**batch, "mm_token_type_ids": batch["input_ids"]}

    assert "mm_token_type_ids" in refused(tmp_path / "more", tiny_lora(), collator=More())
    virtual = get_peft_model(tiny_gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "number of dimensions" in refused(tmp_path / "virtual", virtual)
    assert "neftune_noise_alpha=5" in refused(tmp_path / "noise", tiny_lora(), neftune_noise_alpha=5)


def rows_of(lengths, prompt=True):
    """Rows of such lengths; of two hundred, the one at 100 is none of those that are read on trial."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(2, 64, length).tolist() for length in lengths]
    labels = [[-100, *ids[1:]] if prompt else list(ids) for ids in rows]
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": own}
        for ids, own in zip(rows, labels, strict=True)
    ]
    return datasets.Dataset.from_list(rows)


class Hides(Trainer):
    """Trains on other inputs than a loss is tried out with."""

    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, {**inputs, "labels": hidden(inputs["labels"])}, *args, **kwargs)


class Prepares(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": hidden(inputs["labels"])}


def hidden(labels):
    """Without the labels of the second half of a row: of a batch in one row, not those."""
    return labels.clone().index_fill_(1, torch.arange(labels.shape[1] // 2, labels.shape[1]), -100)


@pytest.mark.parametrize("base", [Hides, Prepares])
def test_a_step_that_does_more_to_its_inputs(base, tmp_path):
    """Below ours it would be given one row; on top of ours it gets the batch before."""

    class Below(DarelMixin, base):
        pass

    class OnTop(Hides, DarelTrainer):
        pass

    def run(cls, **darel):
        more = {"darel": DarelConfig(**darel)} if darel else {}
        args = arguments(tmp_path, num_train_epochs=1, optim="sgd")
        trainer = cls(model=tiny_lora(), args=args, train_dataset=token_data(16), data_collator=PadCollator(), **more)
        trainer.train()
        return weights(trainer.model)

    with pytest.raises(ValueError, match=rf"unpad=True: .*{base.__name__}\.(training_step|_prepare_inputs) would be"):
        run(Below, unpad=True)
    wanted = run(base)
    for found in [run(Below, fast=True), *([run(OnTop, unpad=True)] if base is Hides else [])]:
        assert all((found[name] - value).abs().max() < 1e-5 for name, value in wanted.items())


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([20] * 16, "before training"),
        ([8] * 200, "nothing"),
        ([8] * 100 + [20] + [8] * 99, "before training"),
        ([8] * 100 + [20] + [8] * 99, "later"),
    ],
)
def test_a_window_that_attention_is_not_told_of(tmp_path, lengths, found):
    """Qwen2-MoE has its window in the mask alone. Of data that are no table, longer rows may be met in training."""
    torch.manual_seed(0)
    experts = {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    window = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_key_value_heads=2, **experts, **window))
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1, seed=3),
        train_dataset=list(rows_of(lengths)) if found == "later" else rows_of(lengths),
        data_collator=PadCollator(),
        darel=DarelConfig(unpad=True),
    )
    if found == "nothing":
        trainer.train()
        return
    with pytest.raises(ValueError, match="would change by"):
        trainer.train()
    assert (trainer.state.global_step > 0) == (found == "later")


def test_a_row_beyond_the_window_later_keeps_what_was_accumulated(tmp_path):
    """What is tried out between the micro-batches of a step leaves the gradients of those before it alone."""

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            self.steps = [*getattr(self, "steps", []), found]

    def run(cls, **more):
        watch = Gradients()
        trainer = cls(
            model=windowed(),
            args=arguments(tmp_path, num_train_epochs=1, gradient_accumulation_steps=4, **GENTLE),
            train_dataset=list(rows_of([4] * 100 + [20] + [4] * 99)),
            data_collator=PadCollator(),
            callbacks=[watch],
            **more,
        )
        trainer.train()
        return watch.steps

    for ours, plain in zip(run(DarelTrainer, darel=DarelConfig(unpad=True)), run(Trainer), strict=True):
        assert distance(ours, plain) < 1e-4


def test_labels_that_padding_predicts_later(tmp_path):
    """Rows of one length are never padded, so on trial there was nothing to see."""
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(tmp_path, num_train_epochs=1, seed=3),
        train_dataset=rows_of([8] * 100 + [20] + [8] * 99, prompt=False),
        data_collator=PadsLeft(),
        darel=DarelConfig(unpad=True),
    )
    with pytest.raises(ValueError, match="padding on the left"):
        trainer.train()
    assert trainer.state.global_step > 0


def test_a_model_that_mixes_samples_is_found_out(tmp_path):
    """One whose attention is not transformers', so that ours is never asked: nothing else keeps the samples apart."""

    class Leaky(type(tiny_gpt2())):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = None
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, **kwargs
            )

    torch.manual_seed(0)
    assert "would change by" in refused(tmp_path, Leaky(tiny_gpt2().config))
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("autocast", [False, True])
def test_a_cpu_attends_to_samples_in_float32(autocast):
    """Also in bfloat16: what it gives is what all digits of the products give, rounded once."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8).bfloat16().requires_grad_() for _ in range(3))
    used = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def call(q, k, v, mask, causal):
        return sdpa(q, k, v, mask, is_causal=causal).transpose(1, 2)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = row_attention.attend(call, query, (key, value), row_attention.places_of(used), None)
    parts = [
        [states.detach().float()[:, :, part] for states in (query, key, value)] for part in (slice(4), slice(4, 9))
    ]
    wanted = torch.cat([sdpa(*part, is_causal=True).transpose(1, 2) for part in parts], dim=1)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    found.float().sum().backward()
    assert all(states.grad.dtype == torch.bfloat16 for states in (query, key, value))
