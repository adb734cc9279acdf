"""What Trainer can do beside training works with selection: searches, samplers, compilation, checkpointing."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, tiny_lora, token_data, weights
from transformers import TrainerCallback, TrainingArguments

from darel_hf import RULES, DarelConfig, DarelTrainer, register_rule

BOTH = {
    "offline_keep": 0.8,
    "offline_rule": "hardest",
    "online_keep": 0.5,
    "online_rule": "hardest",
    "rescore_every": 2,
}


def trainer_for(folder, model=None, darel=BOTH, model_init=None, **settings):
    return DarelTrainer(
        model=model if model is not None or model_init is not None else tiny_lora(),
        model_init=model_init,
        args=arguments(folder, **settings),
        train_dataset=token_data(40),
        eval_dataset=token_data(8),
        data_collator=PadCollator(),
        darel=DarelConfig(**darel),
    )


@pytest.mark.slow
def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    trainer = trainer_for(tmp_path, model_init=lambda trial: tiny_lora(), eval_strategy="epoch")
    reports = []

    class Remember(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            reports.append(trainer._run.selector.ledger.times_trained.sum())

    trainer.add_callback(Remember())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert "learning_rate" in best.hyperparameters
    assert reports == [2 * 4 * 4] * 3  # every trial starts from a clean ledger: 4 batches of 4, two epochs
    # A trial with the same settings outside of the search ends with the same loss.
    rate = best.hyperparameters["learning_rate"]
    alone = trainer_for(tmp_path / "alone", model_init=lambda trial: tiny_lora(), learning_rate=rate)
    alone.train()
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)


def test_a_rule_of_the_users_own(tmp_path):
    """By lengths, which scoring finds: the longest offline, and the longest of each batch of candidates."""

    @register_rule("test_longest", needs=("lengths",))
    def longest(samples, keep, generator):
        return samples.lengths.astype(float)

    both = {"offline_rule": "test_longest", "online_rule": "test_longest", "length_correction": False}
    try:
        trainer = trainer_for(tmp_path, darel={**both, "offline_keep": 0.5, "online_keep": 0.5})
        trainer.train()
    finally:
        del RULES["test_longest"]
    lengths = np.array([sum(label != -100 for label in row["labels"][1:]) for row in token_data(40)])
    kept, times = trainer.report.kept, trainer.report.times_trained
    assert lengths[kept].min() >= lengths[~kept].max()
    assert lengths[times > 0].mean() > lengths[kept & (times == 0)].mean()
    with pytest.raises(ValueError, match=r"needs=\('lengths',\): what a rule needs is found by scoring"):
        register_rule("test_other", needs=("lengths",), reads_losses=False)(longest)


@pytest.mark.slow
def test_trials_are_planned_with_their_own_arguments(tmp_path):
    pytest.importorskip("optuna")
    darel = {"budget_memory": 0.9, "offline_rule": "random"}
    others = {"eval_strategy": "epoch", "gradient_checkpointing": True}  # so that batches must be smaller
    trainer = trainer_for(tmp_path, darel=darel, model_init=lambda trial: tiny_lora(), **others)
    seen = []

    class Remember(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            plan = trainer._run.plan
            seen.append((args.num_train_epochs, plan.epochs, args.per_device_train_batch_size, plan.batch_size))
            assert state.train_batch_size == plan.batch_size
            assert state.global_step <= plan.epochs * np.ceil(plan.kept_samples / plan.candidate_rows)

    trainer.add_callback(Remember())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "num_train_epochs": trial.suggest_categorical("num_train_epochs", [1, 3]),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 16]),
        },
        n_trials=4,
        backend="optuna",
        direction="minimize",
    )
    assert len(seen) == 4
    for epochs, planned, size, smaller in seen:
        assert epochs == planned and smaller < size
    assert all(size / 2 < smaller for _, _, size, smaller in seen)


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_sampling_strategies(tmp_path, strategy):
    trainer = trainer_for(
        tmp_path, darel={"online_keep": 0.5, "online_rule": "hardest"}, train_sampling_strategy=strategy
    )
    trainer.train()
    assert trainer.report.rows_backpropagated == 2 * 5 * 4


def test_a_sampler_of_the_users_own(tmp_path):
    """Candidates come in the order that the user's sampler gives."""

    class Backwards(DarelTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return list(range(len(train_dataset or self.train_dataset)))[::-1]

    data = token_data(40)
    trainer = Backwards(
        model=tiny_lora(),
        args=arguments(tmp_path, num_train_epochs=1, learning_rate=0.0),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(online_keep=0.5, online_rule="hardest", length_correction=False),
    )
    trainer.train()
    with torch.no_grad():
        losses = np.array([tiny_lora().eval()(**PadCollator()([row])).loss.item() for row in data])
    expected = np.zeros(40, int)
    for start in range(0, 40, 8):  # batches of eight from the back
        rows = np.arange(40)[::-1][start : start + 8]
        expected[rows[np.argsort(-losses[rows])[:4]]] = 1
    np.testing.assert_array_equal(trainer.report.ledger.times_trained, expected)


@pytest.mark.parametrize("checkpointing", ["gradient_checkpointing", "activation_checkpointing"])
def test_recomputed_activations_change_nothing(tmp_path, checkpointing):
    if checkpointing not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip(f"this transformers has no {checkpointing}")
    plain = trainer_for(tmp_path / "plain", tiny_gpt2())
    plain.train()
    ours = trainer_for(tmp_path / "ours", tiny_gpt2(), **{checkpointing: True})
    ours.train()
    np.testing.assert_array_equal(plain.report.ledger.times_trained, ours.report.ledger.times_trained)
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weight, weights(ours.model)[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_compiled_model(tmp_path):
    """The eager backend traces as every other does, and needs no compiler."""
    plain = trainer_for(tmp_path / "plain")
    plain.train()
    ours = trainer_for(tmp_path / "ours", torch_compile=True, torch_compile_backend="eager")
    ours.train()
    np.testing.assert_array_equal(plain.report.ledger.times_trained, ours.report.ledger.times_trained)
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weight, weights(ours.model)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_second_train_equals_the_first(tmp_path):
    """From the same weights a second `train()` selects the same and ends with the same weights."""
    trainer = trainer_for(tmp_path)
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    first, times = weights(trainer.model), trainer.report.ledger.times_trained
    trainer.model.load_state_dict(start)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert_same_weights(first, weights(trainer.model))
    np.testing.assert_array_equal(times, trainer.report.ledger.times_trained)


def test_text_classification(tmp_path):
    """NLU: one label a text; the hardest texts are those whose label is the least likely."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, num_labels=3
    )
    rows = [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "label": i % 3}
        for i, row in enumerate(token_data(40))
    ]

    def collate(features):
        batch = PadCollator()([{**f, "labels": [0]} for f in features])
        batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch

    import datasets

    data = datasets.Dataset.from_list(rows)
    model = BertForSequenceClassification(config)
    model.eval()
    with torch.no_grad():
        losses = np.array([model(**collate([row])).loss.item() for row in rows])
    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=data,
        data_collator=collate,
        darel=DarelConfig(**{**BOTH, "length_correction": False}),
    )
    trainer.train()
    assert set(np.flatnonzero(trainer.report.kept)) == set(np.argsort(-losses)[:32])
    assert trainer.report.rows_backpropagated == 2 * 16
