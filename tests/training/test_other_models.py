"""Models, data and trainers unlike the usual: each once did something wrong, or must be refused."""

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, tiny_gpt2, tiny_lora, token_data, weights
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from darel_hf import DarelConfig, DarelMixin, DarelTrainer
from darel_hf.scoring import is_causal_lm

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
}


def train(folder, model, data, darel, collator=None, cls=DarelTrainer, **settings):
    keywords = {key: settings.pop(key) for key in ("per_sample_loss", "compute_loss_func") if key in settings}
    trainer = cls(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=collator or PadCollator(),
        darel=DarelConfig(**darel),
        **keywords,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForTokenClassification])
def test_models_that_flatten_with_view(tmp_path, cls):
    """Trimmed batches must be contiguous."""
    torch.manual_seed(0)
    model = cls(BertConfig(**SMALL, num_labels=64))
    report = train(tmp_path, model, token_data(24), {"online_keep": 0.5, "online_rule": "hardest"}).report
    assert report.rows_backpropagated == 2 * 12


@pytest.mark.parametrize("form", ["torch", "list"])
def test_class_labels_that_are_tensors(tmp_path, form):
    rows = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask")} for row in token_data(20)]
    rows = [
        {**row, "input_ids": row["input_ids"][:4], "attention_mask": [1] * 4, "label": i % 2}
        for i, row in enumerate(rows)
    ]
    if form == "list":
        data = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    else:
        import datasets

        data = datasets.Dataset.from_list(rows).with_format("torch")
    from transformers import default_data_collator

    model = BertForSequenceClassification(BertConfig(**SMALL))
    report = train(
        tmp_path,
        model,
        data,
        {"offline_keep": 0.8, "offline_rule": "middle", "online_keep": 0.5, "online_rule": "hardest"},
        default_data_collator,
    ).report
    assert report.kept.sum() == 16


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def pair_data(n=24):
    """Sources and targets of such lengths that their padded widths are often the same."""
    generator = np.random.default_rng(0)
    return [
        {
            "input_ids": generator.integers(2, 64, generator.integers(2, 9)).tolist(),
            "labels": generator.integers(2, 64, generator.integers(2, 9)).tolist(),
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("given", [True, False], ids=["collator-makes-decoder-ids", "model-makes-them"])
@pytest.mark.parametrize("rule", ["hardest", "infobatch"])
def test_seq2seq(tmp_path, given, rule):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), t5()
    collator = DataCollatorForSeq2Seq(tokenizer, model=model if given else None)
    smoothing = 0.1 if given else 0.0  # which plain Trainer cannot do without decoder ids either
    darel = {"online_keep": 0.5, "online_rule": rule}
    report = train(tmp_path, model, pair_data(), darel, collator, label_smoothing_factor=smoothing).report
    assert report.rows_backpropagated == 2 * 12


class MultiLabelCollator:
    """Token inputs with float labels, one a class; twelve classes, which is also a frequent width of the inputs."""

    def __call__(self, features):
        batch = PadCollator()([{**f, "labels": [0]} for f in features])
        batch["labels"] = torch.tensor([[float((f["input_ids"][0] + k) % 2) for k in range(12)] for f in features])
        return batch


def test_several_labels_a_sample(tmp_path):
    """They are not cut like token labels, and weights of 1 (all kept but few) leave the size of the loss as it is."""
    losses = {}
    for rule in ("random", "infobatch"):
        torch.manual_seed(0)
        config = BertConfig(**SMALL, num_labels=12, problem_type="multi_label_classification", hidden_dropout_prob=0.0)
        model = BertForSequenceClassification(config)
        data = token_data(40).remove_columns(["labels"])
        trainer = train(
            tmp_path / rule, model, data, {"online_keep": 0.8, "online_rule": rule}, MultiLabelCollator(),
            learning_rate=0.0, num_train_epochs=1,
        )  # fmt: skip
        losses[rule] = np.mean([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    # InfoBatch's loss is larger by what its weights stand for: all candidates instead of the kept four fifths.
    assert losses["infobatch"] == pytest.approx(losses["random"] / 0.8, rel=0.05)


def test_frozen_adapter_weights_stay_frozen(tmp_path):
    """PEFT makes an adapter trainable when it is switched on again after scoring without it."""
    model = tiny_lora()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = weights(model)
    train(tmp_path, model, token_data(), {"offline_keep": 0.5, "offline_rule": "middle"})
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_A" in name)
    assert any(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


class Renamed(GPT2LMHeadModel):
    """A causal language model whose name is in no list."""


def test_the_shift_is_found_whatever_the_name(tmp_path):
    assert is_causal_lm(Renamed(tiny_gpt2().config))
    assert is_causal_lm(torch.compile(tiny_gpt2()))
    torch.manual_seed(0)
    model = Renamed(tiny_gpt2().config)
    darel = {"online_keep": 0.6, "online_rule": "infobatch"}
    trainer = train(tmp_path, model, token_data(24), darel, learning_rate=5e-3, num_train_epochs=6)
    batch = PadCollator()([{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in token_data(24)])
    with torch.no_grad():
        assert trainer.model.eval()(**batch).loss < 3.9  # it learns the next token, not the present one


class HiddenName(torch.nn.Module):
    """A causal language model that only its loss gives away."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_gpt2()

    def forward(self, input_ids, attention_mask=None, labels=None):
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": out.loss, "logits": out.logits}


def test_the_shift_is_found_by_the_loss(tmp_path):
    model = HiddenName()
    trainer = train(
        tmp_path, model, token_data(16), {"offline_keep": 0.5, "offline_rule": "middle"}, learning_rate=0.0,
        remove_unused_columns=False,
        collator=lambda rows: PadCollator()([{k: v for k, v in row.items() if k != "group"} for row in rows]),
    )  # fmt: skip
    model.eval()
    for i, row in enumerate(token_data(16)):
        with torch.no_grad():
            own = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))["loss"].item()
        assert trainer.report.ledger.loss[i] == pytest.approx(own, rel=1e-4)


# ---- Losses of the user's ----


class OwnLoss(Trainer):
    """A trainer whose compute_loss calls nobody."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not [key for key in inputs if key.startswith("darel")]
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class DarelOwnLoss(DarelMixin, OwnLoss):
    """DAREL above it."""


class OwnLossAbove(DarelTrainer):
    """The same, above DAREL."""

    compute_loss = OwnLoss.compute_loss


@pytest.mark.parametrize("cls", [DarelOwnLoss, OwnLossAbove])
def test_own_compute_loss(tmp_path, cls):
    """It gets clean inputs, also with tracking; a rule's weights that it would ignore are an error."""
    report = train(
        tmp_path / "a",
        tiny_lora(),
        token_data(),
        {"online_keep": 0.5, "online_rule": "hardest", "track": True},
        cls=cls,
    ).report
    assert np.isfinite(report.ledger.train_loss).sum() > 0
    with pytest.raises(ValueError, match="never called super"):
        train(tmp_path / "b", tiny_lora(), token_data(), {"online_keep": 0.6, "online_rule": "infobatch"}, cls=cls)


def mean_token_loss(outputs, inputs):
    """The loss of each row, as `per_sample_loss` gives it."""
    logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return nll.sum(1) / labels.ne(-100).sum(1)


def test_per_sample_loss_with_weights_and_accumulation(tmp_path):
    """Rows of equal length: the mean over rows is the mean over tokens, with and without `per_sample_loss`."""
    data = token_data(24)
    data = data.map(
        lambda row: {
            "input_ids": (row["input_ids"] * 3)[:8], "attention_mask": [1] * 8, "labels": (row["input_ids"] * 3)[:8],
        }
    )  # fmt: skip
    norms = {}
    for name, function in {"built-in": None, "given": mean_token_loss}.items():
        trainer = train(
            tmp_path / name, tiny_lora(), data, {"online_keep": 2 / 3, "online_rule": "infobatch"},
            per_sample_loss=function, gradient_accumulation_steps=3, num_train_epochs=1, learning_rate=0.0,
        )  # fmt: skip
        norms[name] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    # GPT-2 counts position 0 as an item although nothing is predicted there: 8 labels for 7 losses.
    np.testing.assert_allclose(np.array(norms["built-in"]) * 8 / 7, norms["given"], rtol=1e-4)


# ---- Life cycle ----


def test_model_init_is_scored_anew(tmp_path):
    """A second `train()` scores the fresh model that it will train, not the one that it has trained."""
    trainer = DarelTrainer(
        model_init=lambda: tiny_lora(),
        args=arguments(tmp_path, num_train_epochs=4),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(0.5, offline_rule="middle"),
    )
    trainer.train()
    first = trainer.report
    trainer.train()
    np.testing.assert_array_equal(first.kept, trainer.report.kept)


def test_auto_find_batch_size_starts_clean(tmp_path):
    """After an out-of-memory error Trainer tries again with a smaller batch: only that attempt counts."""

    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not tries:
                tries.append(1)
                raise RuntimeError("CUDA out of memory. Tried to allocate")

    tries = []
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, num_train_epochs=1),
        train_dataset=token_data(40),
        data_collator=PadCollator(),
        callbacks=[OutOfMemory()],
        darel=DarelConfig(online_keep=0.5, online_rule="hardest"),
    )
    trainer.train()
    assert tries and trainer.report.plan.batch_size < 8
    assert trainer.report.rows_backpropagated == 20 == trainer.report.ledger.times_trained.sum()


# ---- Refused, before any compute ----


@pytest.mark.parametrize(
    ("darel", "settings", "match"),
    [
        (
            {"online_keep": 0.9, "online_rule": "hardest"},
            {},
            "keeps 4 of 4 candidates, all of them; give at most 0.889",
        ),
        (
            {"online_keep": 0.5, "online_rule": "hardest"},
            {"train_sampling_strategy": "batch_rebalance"},
            "use another strategy",
        ),
        (
            {"online_keep": 0.05, "online_rule": "hardest"},
            {"dataloader_drop_last": True},
            "fewer samples than the 80 candidates",
        ),
        ({"offline_keep": 0.5, "offline_rule": "middle", "group_column": "nope"}, {}, "no such column"),
        (
            {"offline_keep": 0.1, "offline_rule": "middle", "group_column": "group"},
            {},
            "5 values, but offline_keep=0.1 leaves 4 places",
        ),
        (
            {"offline_keep": 0.5, "offline_rule": "kakurenbo"},
            {"per_sample_loss": mean_token_loss},
            "which per_sample_loss does not say",
        ),
        ({"offline_keep": 0.5, "group_column": "group", "offline_rule": "infobatch"}, {}, "do not work with groups"),
    ],
)
def test_refused_before_any_compute(tmp_path, monkeypatch, darel, settings, match):
    monkeypatch.setattr("darel_hf.training.offline.score_dataset", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(ValueError, match=match):
        train(tmp_path, tiny_lora(), token_data(), darel, **settings)


def test_a_loader_of_its_own_batch_size(tmp_path):
    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)

    class Mine(DarelMixin, OwnLoader):
        pass

    with pytest.raises(ValueError, match="batches of 4"):
        train(
            tmp_path,
            tiny_lora(),
            [dict(row) for row in token_data()],
            {"online_keep": 0.5, "online_rule": "hardest"},
            cls=Mine,
        )


def test_other_batch_size_on_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, tiny_lora(), token_data(), {"online_keep": 0.5, "online_rule": "hardest"}, **settings)
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(tmp_path, per_device_train_batch_size=8, **settings),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(online_keep=0.5, online_rule="hardest"),
    )
    with pytest.raises(ValueError, match="per_device_train_batch_size=8: the checkpoint was made with 4"):
        trainer.train(resume_from_checkpoint=True)


def test_scores_follow_the_adapters_scale(tmp_path):
    """`lora_alpha` is in no weight, but changes what a trained adapter does."""
    from darel_hf.scoring import model_fingerprint

    def adapted(alpha):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, lora_alpha=alpha, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
        )
        return get_peft_model(tiny_gpt2(), config)

    assert model_fingerprint(adapted(8)) == model_fingerprint(adapted(8)) != model_fingerprint(adapted(64))
