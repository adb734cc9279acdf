"""`DarelSFTTrainer`: text and prompt-completion data, off and on, tracked, weighted, packing refused."""

import datasets
import numpy as np
import pytest
import torch
from helpers import VOCABULARY, assert_same_weights, tiny_lora, weights, word_tokenizer
from transformers import HfArgumentParser

trl = pytest.importorskip("trl")

from darel_hf import DarelConfig, DarelSFTTrainer, ReaderLoraConfig  # noqa: E402


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def sentences(form, n=24):
    generator = np.random.default_rng(0)

    def words(low, high):
        return " ".join(f"w{i}" for i in generator.integers(2, VOCABULARY, generator.integers(low, high)))

    if form == "text":
        return datasets.Dataset.from_list([{"text": words(4, 18)} for _ in range(n)])
    if form == "conversation":

        def said(role, low, high):
            return [{"role": role, "content": words(low, high)}]

        rows = [{"prompt": said("user", 3, 8), "completion": said("assistant", 3, 9)} for _ in range(n)]
        return datasets.Dataset.from_list(rows)
    return datasets.Dataset.from_list([{"prompt": words(3, 8), "completion": f" {words(3, 9)}"} for _ in range(n)])


def train(folder, tokenizer, form, darel=None, cls=DarelSFTTrainer, learning_rate=1e-2, model=None, **settings):
    torch.manual_seed(0)
    args = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=learning_rate,
        max_length=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=7,
        **settings,
    )
    more = {} if darel is None else {"darel": DarelConfig(**darel)}
    trainer = cls(
        model=model or tiny_lora(), args=args, train_dataset=sentences(form), processing_class=tokenizer, **more
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_off_equals_sft_trainer(tmp_path, tokenizer, form):
    plain = train(tmp_path / "plain", tokenizer, form, cls=trl.SFTTrainer)
    ours = train(tmp_path / "ours", tokenizer, form, {})
    assert_same_weights(weights(plain.model), weights(ours.model))


@pytest.mark.parametrize("form", ["text", "prompt-completion"])
@pytest.mark.parametrize("rule", ["hardest", "infobatch"])
def test_both_stages_and_tracking(tmp_path, tokenizer, form, rule):
    darel = {"offline_keep": 0.75, "offline_rule": "middle", "online_keep": 0.5, "online_rule": rule, "track": True}
    report = train(tmp_path, tokenizer, form, darel, learning_rate=0.0).report
    assert report.kept.sum() == 18
    assert report.rows_backpropagated == 2 * (4 + 4 + 1)  # of 8, 8 and 2 candidates
    trained = report.ledger.times_trained > 0
    # Without dropout and without learning the tracked loss is the scored one: trl's head agrees with our logits.
    np.testing.assert_allclose(report.ledger.train_loss[trained], report.ledger.loss[trained], rtol=1e-4)


@pytest.mark.parametrize("darel", [{"unpad": True}, {"share_prompts": 1}])
@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_without_padding(tmp_path, tokenizer, form, darel):
    more = {"optim": "sgd", "learning_rate": 0.1}
    plain = train(tmp_path / "plain", tokenizer, form, cls=trl.SFTTrainer, **more)
    ours = train(tmp_path / "ours", tokenizer, form, darel, **more)
    start, wanted = weights(tiny_lora()), weights(plain.model)
    for name, tensor in weights(ours.model).items():
        assert (tensor - wanted[name]).norm() <= 1e-4 * (wanted[name] - start[name]).norm() + 1e-6, name


def test_batches_of_the_same_prompt(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, "prompt-completion", {"share_prompts": 2})
    assert trainer.state.global_step == 2 * 6


@pytest.mark.parametrize("darel", [{"unpad": True}, {"offline_keep": 0.75, "offline_rule": "random"}])
def test_tokens_are_counted_as_trl_does(tmp_path, tokenizer, darel):
    """What is measured before training is not training, and a row of several samples has the tokens of them all."""
    plain = train(tmp_path / "plain", tokenizer, "text", cls=trl.SFTTrainer, logging_steps=1)
    ours = train(tmp_path / "ours", tokenizer, "text", darel, logging_steps=1)
    lengths = np.array([len(ids) for ids in ours.train_dataset["input_ids"]])
    for trainer, kept in ((plain, np.ones(24, bool)), (ours, ours.report.kept)):
        counts = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
        assert counts[-1] == 2 * lengths[kept].sum()


def test_settings_share_a_command_line_with_those_of_trl():
    parser = HfArgumentParser([DarelConfig, trl.SFTConfig])
    parsed = parser.parse_args_into_dataclasses(["--unpad", "true", "--bf16", "false"])
    assert parsed[0].unpad and not parsed[1].padding_free


def test_packing_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="packing=False"):
        train(tmp_path, tokenizer, "text", {"online_keep": 0.5, "online_rule": "hardest"}, packing=True)


@pytest.mark.parametrize("form", ["prompt-completion", "conversation"])
def test_reader(tmp_path, tokenizer, form):
    """trl says where completions begin; what it trains slowly is trained from a cache of prompts."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w2 ' if m['role'] == 'user' else 'w3 ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w3 {% endif %}"
    )
    more = {"optim": "sgd", "learning_rate": 0.1}
    readers = [tiny_lora(config_class=ReaderLoraConfig) for _ in range(3)]
    start = weights(readers[0])
    plain = train(tmp_path / "plain", tokenizer, form, cls=trl.SFTTrainer, model=readers[0], **more)
    ours = train(tmp_path / "ours", tokenizer, form, {"prompt_cache": "ram"}, model=readers[1], **more)
    wanted, found = weights(plain.model), weights(ours.model)
    moved = sum(float((wanted[name] - start[name]).norm()) for name in wanted)
    assert sum(float((wanted[name] - found[name]).norm()) for name in wanted) < 1e-4 * moved
    tokens = [t.state.log_history[-2].get("num_tokens") for t in (plain, ours)]
    assert tokens[0] == tokens[1]
