"""The reader the slow way, written with stock parts only: row by row, on a stock cache; and small models."""

import inspect
import sys

import datasets
import torch
from helpers import PadCollator, arguments
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from darel_hf import DarelConfig

VOCABULARY = 64
#: An optimizer that makes no more of rounding than the gradients have of it.
GENTLE = {"optim": "sgd", "learning_rate": 0.05}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ROTARY = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),  # norms of keys and queries
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
}
FAMILIES = ("gpt2", *ROTARY)


def make_base(family, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    if family == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, **drops)
        )
    else:
        cls, config, more = ROTARY[family]
        model = cls(config(**SMALL, **more, attention_dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # so that attention has something to attend to
    model.config.bos_token_id, model.config.eos_token_id = 1, 2
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()


def moved(model, scale=0.2):
    """Move adapters off the point where they do nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapted(family, config=LoraConfig, targets="all-linear", dropout=0.0, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}
    return moved(get_peft_model(make_base(family, dropout), config(**settings)))


def rows(lengths, seed=0, side="right", same_prompts=False):
    """Return a padded batch of rows with so many tokens of prompt and completion each."""
    generator = torch.Generator().manual_seed(seed)
    width = max(p + c for p, c in lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    shared = torch.randint(3, VOCABULARY, (width,), generator=generator)
    for row, (p, c) in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (p + c,), generator=generator)
        if same_prompts:
            tokens[:p] = shared[:p]
        place = slice(0, p + c) if side == "right" else slice(width - p - c, width)
        ids[row, place], mask[row, place] = tokens, 1
        labels[row, place.start + p : place.stop] = tokens[p:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _keys_and_values(attention, x, positions):
    """Compute what a stock attention module would cache of x, by the formulas of its family."""
    if hasattr(attention, "c_attn"):
        _, k, v = attention.c_attn(x).chunk(3, dim=-1)
        return [t.view(*t.shape[:-1], -1, attention.head_dim).transpose(1, 2) for t in (k, v)]
    k, v = (proj(x).view(*x.shape[:-1], -1, attention.head_dim) for proj in (attention.k_proj, attention.v_proj))
    k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
    cos, sin = positions
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    k = k.transpose(1, 2)
    return [rotate(k, k, cos, sin)[1], v.transpose(1, 2)]


def prompt_cache(model, prompt):
    """Return a stock cache with the adapted keys and values of a prompt, int64 `[1, P]`."""
    base = model.get_base_model()
    caught, attentions = {}, [m for m in base.modules() if type(m).__name__.endswith("Attention")]

    def catch(module, args, kwargs):
        caught[module] = (args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))

    hooks = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in attentions]
    decoder = base.transformer if hasattr(base, "transformer") else base.model
    with torch.no_grad(), model.disable_adapter():
        decoder(input_ids=prompt, use_cache=False)
    for hook in hooks:
        hook.remove()
    cache = DynamicCache()
    for layer, module in enumerate(attentions):
        cache.update(*_keys_and_values(module, *caught[module]), layer)
    return cache


def oracle(model, batch):
    """Return the summed loss over all labels and a list of logits at the positions that predict them, row by row."""
    assert type(model.peft_config["default"]) is LoraConfig  # stock, nothing of ours
    base = model.get_base_model()
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    decoder = base.transformer if hasattr(base, "transformer") else base.model
    total, every = 0.0, []
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        ids, labels = ids[mask.bool()][None], labels[mask.bool()]
        first = int(labels.ne(-100).nonzero()[0])
        cut = max(first - 1, 0)
        past = {name: prompt_cache(model, ids[:, :cut])} if cut else {}
        positions = torch.arange(cut, ids.shape[1])[None]
        hidden = decoder(input_ids=ids[:, cut:], position_ids=positions, **past).last_hidden_state
        logits = base.get_output_embeddings()(hidden)[0, :-1]
        wanted = labels[cut + 1 :]
        keep = wanted.ne(-100)
        total = total + torch.nn.functional.cross_entropy(logits[keep].float(), wanted[keep], reduction="sum")
        every.append(logits[keep].detach())
    return total, every


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def items_of(made):
    return datasets.Dataset.from_list(
        [
            {key: values[used.bool()].tolist() for key, values in zip(made, row, strict=True)}
            for row, used in zip(zip(*made.values(), strict=True), made["attention_mask"], strict=True)
        ]
    )


def data(n=24):
    """Rows with prompts that several share."""
    return items_of(rows([(3 + i % 5, 2 + i % 4) for i in range(n)], same_prompts=True))


def trained(cls, folder, model, darel=None, resume=None, train_dataset=None, **more):
    given = {"darel": DarelConfig(**darel)} if darel else {}
    trainer = cls(
        model=model,
        args=arguments(folder, **{**GENTLE, **more}),
        train_dataset=data() if train_dataset is None else train_dataset,
        data_collator=PadCollator(),
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(left, right, start=None):
    """The largest distance of two tensors, relative to the second one, or to how far that is from `start`."""
    assert left.keys() == right.keys()
    sizes = {name: (value if start is None else value - start[name]).detach().norm() for name, value in right.items()}
    least = 0.1 * max(sizes.values())  # what is zero but for rounding has no scale of its own
    return max(float((left[name] - right[name]).detach().norm() / max(sizes[name], least)) for name in right)
