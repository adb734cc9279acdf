"""Tiny real models, data and trainers that the tests share."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

VOCABULARY = 64
PAD = 0
#: Both stages, by rules that look at losses.
BOTH = {
    "offline_keep": 0.8,
    "offline_rule": "middle",
    "online_keep": 0.5,
    "online_rule": "hardest",
    "rescore_every": 2,
}


class PadCollator:
    """Right-pad `input_ids`, `attention_mask` and `labels`."""

    def __init__(self, pad_to_multiple_of: int | None = None):
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([list(f[key]) + [value] * (width - len(f[key])) for f in features])
            for key, value in fill.items()
        }


def tiny_gpt2(dropout: float = 0.0, seed: int = 0) -> GPT2LMHeadModel:
    """A 2-layer GPT-2 with random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config)


def tiny_lora(dropout: float = 0.0, seed: int = 0, config_class: type[LoraConfig] = LoraConfig):
    """A tiny GPT-2 with LoRA on its attention."""
    config = config_class(
        r=4, lora_alpha=8, target_modules=["c_attn"], lora_dropout=dropout, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    return get_peft_model(tiny_gpt2(dropout, seed), config)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w2, w3 and so on, one id each."""
    vocabulary = {"<pad>": PAD, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def with_prompts(data: datasets.Dataset, kinds: int = 3) -> datasets.Dataset:
    """Put one of so many prompts of 7 tokens before each sample, all of which is to be learnt then."""
    prompts = np.random.default_rng(1).integers(2, VOCABULARY, (kinds, 7)).tolist()

    def put(row: dict, i: int) -> dict:
        before = {"input_ids": prompts[i % kinds], "attention_mask": [1] * 7, "labels": [-100] * 7}
        return {key: value + row["input_ids" if key == "labels" else key] for key, value in before.items()}

    return data.map(put, with_indices=True)


def token_data(n: int = 37, seed: int = 0, prompt: bool = True) -> datasets.Dataset:
    """`n` sequences of 4 to 20 tokens, the first two without label if `prompt`; a `group` column beside them."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        ids = generator.integers(2, VOCABULARY, generator.integers(4, 21)).tolist()
        labels = [-100, -100, *ids[2:]] if prompt else list(ids)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "group": i % 5})
    return datasets.Dataset.from_list(rows)


def arguments(folder, **settings) -> TrainingArguments:
    """Training arguments for a few quiet steps on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Assert that two state dicts are equal bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def attend_as(way, monkeypatch):
    """
    Let samples in a row be attended to in a way that a CPU does not take by itself; return what will list its calls.

    The kernel of GPUs, which `packed` calls, is stood in for by a loop that does what torch says of it.
    """
    from darel_hf.accelerators import row_attention  # earlier code, which some tests run, has it elsewhere

    used, real = [], getattr(row_attention.Rows, way)

    def spy(*given):
        used.append(way)
        return real(*given)

    monkeypatch.setattr(row_attention, "on_cpu", lambda device: way == "one_by_one")
    monkeypatch.setattr(row_attention, "has_kernel", lambda *states: way == "packed")
    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    monkeypatch.setattr(row_attention.Rows, way, spy)
    return used


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """Do what `torch.nn.attention.varlen.varlen_attn` does, where causal means that the last query sees all keys."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and query.shape[1:] == key.shape[1:] == value.shape[1:]
    lengths, outputs = (cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()), []
    assert (max(lengths[0]), max(lengths[1])) == (max_q, max_k) and window_size[1] == 0
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)
