"""`fast=True`: whatever is exact and pays is used, the rest is left out and said; never an error."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, token_data, weights, with_prompts
from readers import GENTLE, adapted, distance, trained
from transformers import BertConfig, BertForSequenceClassification, Trainer

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.training import planner


@pytest.fixture(autouse=True)
def everything_pays(monkeypatch):
    """Steps of the tests' models are too short to tell what pays."""
    monkeypatch.setattr(planner, "PAYS", 1e9)


def moved(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("config", "name", "left"),
    [
        ({}, "share_prompts", "left out  prompt_cache: adapters act on prompts, too"),
        ({"reader": True}, "prompt_cache", None),
    ],
    ids=["lora", "reader"],
)
def test_trains_as_trainer_does(config, name, left, tmp_path, capsys):
    kind = {"config": ReaderLoraConfig} if config else {}
    more = {"train_dataset": with_prompts(token_data())}
    start = moved(adapted("llama", **kind))
    plain = trained(Trainer, tmp_path / "plain", adapted("llama", **kind), **more)
    ours = trained(DarelTrainer, tmp_path / "ours", adapted("llama", **kind), {"fast": True}, **more)
    assert distance(ours, plain, start) < 1e-3
    said = capsys.readouterr().out
    assert "(exact): a step takes" in said
    assert left is None or left in said


def fast(folder, model, darel=None, data=None, cls=DarelTrainer, **more):
    trainer = cls(
        model=model,
        args=arguments(folder, **{**GENTLE, **more}),
        train_dataset=token_data() if data is None else data,
        data_collator=PadCollator(),
        darel=DarelConfig(fast=True, **(darel or {})),
    )
    trainer.train()
    return trainer


def test_what_is_given_stays(tmp_path):
    trainer = fast(tmp_path, adapted("llama"), {"unpad": True})
    assert list(trainer.report.plan.costs.factors) == ["unpad", "last_block", "fast_lora"]


def test_what_does_not_pay_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planner, "PAYS", -1.0)  # whatever noise makes of steps of a millisecond
    trainer = fast(tmp_path / "ours", tiny_gpt2())
    plain = Trainer(
        model=tiny_gpt2(),
        args=arguments(tmp_path / "plain", **GENTLE),
        train_dataset=token_data(),
        data_collator=PadCollator(),
    )
    plain.train()
    assert_same_weights(weights(trainer.model), weights(plain.model))
    slow = [name for name, reason in trainer.report.plan.left_out.items() if "a step takes" in reason]
    assert slow == ["share_prompts", "last_block", "fused_activation", "unpad"]  # what another excluded comes last
    assert ": a step takes" in capsys.readouterr().out  # equal reasons share a line
    assert trainer.report.plan.costs.factors == {}


def test_a_model_that_takes_nothing(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=2))
    data = token_data().map(lambda row, i: {"labels": i % 2}, with_indices=True)

    def collate(features):
        labels = [feature["labels"] for feature in features]
        rest = [{**feature, "labels": feature["input_ids"]} for feature in features]
        return {**PadCollator()(rest), "labels": torch.tensor(labels)}

    trainer = DarelTrainer(
        model=model, args=arguments(tmp_path), train_dataset=data, data_collator=collate, darel=DarelConfig(fast=True)
    )
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(": ")[0].split("left out  ")[1] for line in said] == [
        "fast_lora",
        "fused_activation",
        "prompt_cache, share_prompts, unpad, last_block",
    ]
    assert said[2].endswith("BertForSequenceClassification is no causal language model")


def test_a_later_batch_whose_prompts_cannot_be_read(tmp_path, caplog):
    """Padded on the left, as the reader alone takes it."""

    class Left(PadCollator):
        def __call__(self, features):
            made = super().__call__(features)
            lengths = [len(feature["input_ids"]) for feature in features]
            width = made["input_ids"].shape[1]
            turned = {k: [row.roll(width - n) for row, n in zip(v, lengths, strict=True)] for k, v in made.items()}
            return {key: torch.stack(rows) for key, rows in turned.items()}

    ids = [[5, 6, 7, 8, 9, 10, 11, 12] + ([13] * 8 if i == 100 else []) for i in range(200)]
    data = datasets.Dataset.from_list(
        [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * 4 + row[4:]} for row in ids]
    )
    trainer = DarelTrainer(
        model=adapted("llama", config=ReaderLoraConfig),
        args=arguments(tmp_path, **{**GENTLE, "num_train_epochs": 1}),
        train_dataset=data,
        data_collator=Left(),
        darel=DarelConfig(fast=True),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 50 and "prompt_cache" in trainer.report.left_out
    assert "going on without prompt_cache: position_ids: those of a row do not begin at 0" in caplog.text


def test_a_later_batch_that_cannot_be(tmp_path, caplog):
    """What nobody has asked for by name is given up, not training."""

    class Late(PadCollator):
        calls = 0

        def __call__(self, features):
            Late.calls += 1
            batch = super().__call__(features)
            return {**batch, "extra": torch.ones(len(features), 3)} if Late.calls > 30 else batch

    class Takes(DarelTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs = {key: value for key, value in inputs.items() if key != "extra"}
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Takes(
        model=adapted("llama"),
        args=arguments(tmp_path, **{**GENTLE, "num_train_epochs": 6, "remove_unused_columns": False}),
        train_dataset=token_data().select_columns(["input_ids", "attention_mask", "labels"]),
        data_collator=Late(),
        darel=DarelConfig(fast=True),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "going on without" in caplog.text and "['extra']" in caplog.text
    assert trainer.state.global_step == 60


def test_a_resumed_run_has_what_the_first_had(tmp_path, monkeypatch):
    more = {"save_strategy": "steps", "save_steps": 10}
    whole = fast(tmp_path / "whole", adapted("llama"), **more)
    monkeypatch.setattr(planner, "PAYS", 0.0)  # were it measured again, it would be left out
    again = DarelTrainer(
        model=adapted("llama"),
        args=arguments(tmp_path / "whole", **{**GENTLE, **more}),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(fast=True),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert_same_weights(weights(again.model), weights(whole.model))
    assert list(again.report.plan.costs.factors) == list(whole.report.plan.costs.factors)
    assert list(whole.report.plan.costs.factors) == ["share_prompts", "last_block", "fast_lora"]


def test_streams_and_mistakes(tmp_path, capsys):
    with pytest.raises(TypeError, match="fast='yes': give True or False"):
        DarelConfig(fast="yes")
    assert DarelConfig(fast=True).active
    data = token_data()
    stream = data.add_column("number", list(range(len(data)))).to_iterable_dataset()
    trainer = fast(tmp_path, adapted("llama"), {"id_column": "number"}, stream, max_steps=3)
    assert trainer.state.global_step == 3
    assert "of a stream nothing can be tried out" in capsys.readouterr().out


@pytest.mark.parametrize("darel", [{"fast": True}, {"unpad": True}], ids=["fast", "unpad"])
def test_a_stream_whose_rows_have_no_numbers(darel, tmp_path):
    """Where nothing is chosen none are needed."""
    stream, more = token_data().remove_columns("group").to_iterable_dataset(), {**GENTLE, "max_steps": 4}
    models = adapted("llama"), adapted("llama")
    trainers = [
        Trainer(
            model=models[0],
            args=arguments(tmp_path / "plain", **more),
            train_dataset=stream,
            data_collator=PadCollator(),
        ),
        DarelTrainer(
            model=models[1],
            args=arguments(tmp_path / "ours", **more),
            train_dataset=stream,
            data_collator=PadCollator(),
            darel=DarelConfig(**darel),
        ),
    ]
    for trainer in trainers:
        trainer.train()
    assert distance(moved(models[1]), moved(models[0]), moved(adapted("llama"))) < 1e-3
    assert trainers[1].report.rows_backpropagated == 4 * 4
