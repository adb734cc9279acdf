"""Finishing: a reader's last epochs train everywhere, and what is saved is stock LoRA."""

import json
import logging

import pytest
import torch
from helpers import PadCollator, arguments
from peft import LoraConfig, PeftModel
from readers import GENTLE, adapted, data, distance, make_base, trained
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig


def saved_type(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("prompt_cache", [None, "ram"])
def test_as_a_reader_and_then_as_lora(prompt_cache, tmp_path):
    """One epoch as plain Trainer trains a reader, then one as it trains LoRA from there."""
    more = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}  # the same rows in each epoch
    reader = adapted("qwen3", ReaderLoraConfig)
    half = trained(Trainer, tmp_path / "first", reader, num_train_epochs=1, **more)
    stock = adapted("qwen3", LoraConfig)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name in half:
                parameter.copy_(half[name])
    wanted = trained(Trainer, tmp_path / "second", stock, num_train_epochs=1, **more)
    model = adapted("qwen3", ReaderLoraConfig)
    darel = {"finish_epochs": 1, "prompt_cache": prompt_cache}
    more |= {"save_strategy": "epoch", "num_train_epochs": 2}
    found = trained(DarelTrainer, tmp_path, model, darel, **more)
    assert distance(found, wanted, half) < 1e-4
    assert [saved_type(tmp_path / f"checkpoint-{step}") for step in (6, 12)] == ["READER", "LORA"]
    # In stock PEFT it is what it is here.
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path / "checkpoint-12").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    batch = PadCollator()([data()[i] for i in range(5)])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("prompt_cache", [None, "ram", "disk"])
@pytest.mark.parametrize("step", [5, 10])
def test_resume_on_either_side(step, prompt_cache, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2.5}
    darel = {"finish_epochs": 1, "prompt_cache": prompt_cache}  # from step 10 of 15 on
    whole = trained(DarelTrainer, tmp_path, adapted("gpt2", ReaderLoraConfig), darel, **more)
    again = trained(
        DarelTrainer,
        tmp_path,
        adapted("gpt2", ReaderLoraConfig),
        darel,
        resume=str(tmp_path / f"checkpoint-{step}"),
        **more,
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert [saved_type(tmp_path / f"checkpoint-{s}") for s in (5, 15)] == ["READER", "LORA"]


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_scored_as_they_are_trained(seed, tmp_path):
    """At the first step of finishing, too: else a run that is resumed there would choose other rows."""
    more = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "data_seed": seed}
    darel = {"finish_epochs": 1, "online_keep": 0.5, "online_rule": "hardest"}  # from step 3 of 6 on
    whole = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), darel, **more)
    resume = str(tmp_path / "checkpoint-3")
    again = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), darel, resume=resume, **more)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_steps_cost_in_both_parts(tmp_path, monkeypatch):
    """Half of the steps are a reader's and half LoRA's, also for what comes on top; operations stand for seconds."""

    def operations(call, device):
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    monkeypatch.setattr("darel_hf.budget.measure._seconds", operations)

    def step(adapter, **darel):
        trainer = DarelTrainer(
            model=adapted("gpt2", adapter),
            args=arguments(tmp_path / str(len(list(tmp_path.iterdir()))), num_train_epochs=2),
            train_dataset=data(),
            data_collator=PadCollator(),
            darel=DarelConfig(**darel, fast_lora=True),
        )
        trainer.train()
        return trainer.report.plan.costs.accelerated

    reading, everywhere = step(ReaderLoraConfig, prompt_cache="ram"), step(LoraConfig, unpad=True)
    both = step(ReaderLoraConfig, prompt_cache="ram", finish_epochs=1)
    assert reading < 0.9 * everywhere
    assert both == pytest.approx((reading + everywhere) / 2, rel=0.05)


def test_a_second_run_begins_as_a_reader_again(tmp_path):
    trainer = DarelTrainer(
        model=adapted("llama", ReaderLoraConfig),
        args=arguments(tmp_path, **GENTLE, save_strategy="epoch"),
        train_dataset=data(),
        data_collator=PadCollator(),
        darel=DarelConfig(prompt_cache="ram", finish_epochs=0.01),
    )
    for _ in range(2):
        trainer.train()
        assert [saved_type(tmp_path / f"checkpoint-{step}") for step in (6, 12)] == ["READER", "LORA"]


def finishing(folder, **more):
    model = adapted("gpt2", ReaderLoraConfig)
    return model, trained(DarelTrainer, folder, model, {"finish_epochs": 1}, save_strategy="epoch", **more)


def test_a_run_that_goes_on_from_its_end_is_stock_lora(tmp_path):
    """No further step is done, and what is saved afterwards is what the checkpoint is."""
    finishing(tmp_path)
    model, _ = finishing(tmp_path, resume=True)
    model.save_pretrained(tmp_path / "saved")
    assert saved_type(tmp_path / "saved") == "LORA"


def test_a_longer_run_says_that_adapters_leave_prompts_alone_again(tmp_path, caplog):
    finishing(tmp_path)
    with caplog.at_level(logging.WARNING):
        finishing(tmp_path, resume=True, num_train_epochs=4)
    assert "act everywhere already, and this run is longer: from step 13 to 18 they leave prompts alone" in caplog.text


def test_training_that_is_stopped_before_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    trainer = DarelTrainer(
        model=adapted("gpt2", ReaderLoraConfig),
        args=arguments(tmp_path, **GENTLE),
        train_dataset=data(),
        data_collator=PadCollator(),
        callbacks=[Stop()],
        darel=DarelConfig(finish_epochs=1),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "finish_epochs=1: training ended after step 6, before adapters act everywhere (from step 7" in caplog.text
    caplog.clear()
    finishing(tmp_path / "whole")
    assert "training ended" not in caplog.text


def test_weights_of_the_other_kind_are_not_gone_on_with(tmp_path):
    """They would fit, and act at other positions."""
    for first, second, said in (
        (ReaderLoraConfig, LoraConfig, "peft_type='READER' there and 'LORA' in the model"),
        (LoraConfig, ReaderLoraConfig, "peft_type='LORA' there and 'READER' in the model"),
    ):
        folder = tmp_path / first.__name__
        darel = {"base_precision": "bf16"}
        trained(DarelTrainer, folder, adapted("gpt2", first), darel, save_strategy="epoch", num_train_epochs=1)
        with pytest.raises(ValueError, match=f"resume_from_checkpoint=.*checkpoint-6.*{said}.*of the same kind"):
            trained(DarelTrainer, folder, adapted("gpt2", second), darel, resume=True)


def test_refusals(tmp_path):
    def refused(message, model=None, settings=None, **darel):
        with pytest.raises(ValueError, match=message):
            DarelTrainer(
                model=model or adapted("llama", ReaderLoraConfig),
                args=arguments(tmp_path, **(settings or {})),
                train_dataset=data(),
                data_collator=PadCollator(),
                darel=DarelConfig(**{"finish_epochs": 1, **darel}),
            )

    refused(r"finish_epochs=2: the run has 2 epochs; give fewer", finish_epochs=2)
    refused(r"finish_epochs=1: only a reader has something to finish", model=adapted("llama"))
    refused(r"finish_epochs=-1: give a number of epochs", finish_epochs=-1)
    refused(r"finish_epochs=1: a run that may end early", budget_time=0.5)
    with pytest.raises(ValueError, match="finish_epochs=1: the run has 3 steps, 6 an epoch; give less"):
        trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"finish_epochs": 1}, max_steps=3)
    best = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}
    refused(r"load_best_model_at_end=True: the best checkpoint may be of before", settings=best)
