"""The recipes that are scripts of their own: text classification and trl, run as a user runs them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

RECIPES = Path(__file__).parents[1] / "recipes"
QUIET = ["--report_to", "none", "--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--logging_steps", "1"]


@pytest.fixture
def model(tmp_path):
    """A tiny GPT-2 with a tokenizer of words, in a folder."""
    vocabulary = {"<end>": 0, **{f"w{i}": i for i in range(1, 64)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def words(generator, low=3, high=10):
    return " ".join(f"w{i}" for i in generator.integers(1, 64, generator.integers(low, high)))


def run(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_text_classification(tmp_path, model):
    generator = np.random.default_rng(0)
    for name, n in (("train", 40), ("dev", 10)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            writer.writerows([words(generator), ("bad", "good")[i % 2]] for i in range(n))
    files = ["--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "dev.csv"]
    common = [RECIPES / "nlu" / "train.py", RECIPES / "nlu" / "sst2.yaml", "--model_name_or_path", model, *QUIET]
    size = ["--per_device_train_batch_size", 4, "--num_train_epochs", 2, "--output_dir", tmp_path / "out"]
    done = run(*common, *files, *size)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= results["accuracy"] <= 1
    assert results["rows_backpropagated"] == 2 * 20
    assert (tmp_path / "out" / "darel" / "report.html").exists()
    again = run(*common, *files, *size)
    assert again.returncode != 0 and "holds another run" in again.stderr
    missing = run(*common, *files[:2], *size[:-1], tmp_path / "other")
    assert missing.returncode != 0 and "validation_file=None" in missing.stderr


@pytest.mark.slow
def test_dpo(tmp_path, model):
    pytest.importorskip("trl")
    generator = np.random.default_rng(0)
    keys = ("prompt", "chosen", "rejected")
    rows = [{key: f" {words(generator)}" for key in keys} for _ in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    weights = []
    for share in ("true", "false"):
        done = run(
            RECIPES / "dpo" / "train.py", "--train_file", tmp_path / "data.jsonl", "--model_name_or_path", model,
            *QUIET, "--output_dir", tmp_path / share, "--per_device_train_batch_size", 4, "--num_train_epochs", 1,
            "--max_length", 64, "--save_strategy", "no", "--share", share, "--optim", "sgd",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(tmp_path / share / "adapter_model.safetensors"))
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


@pytest.mark.slow
def test_sft(tmp_path, model):
    pytest.importorskip("trl")
    generator = np.random.default_rng(0)
    rows = [{"prompt": words(generator), "completion": " " + words(generator)} for _ in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run(
        RECIPES / "sft" / "train.py", "--train_file", tmp_path / "data.jsonl", "--model_name_or_path", model, *QUIET,
        "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 4, "--num_train_epochs", 2,
        "--offline_keep", 0.8, "--online_keep", 0.5, "--max_length", 32, "--save_strategy", "no",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows_backpropagated"] == 2 * 16
