"""Shared prompts: the gradients of the padded batch, in fewer positions, whatever is in common and wherever it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import attend_as, token_data, with_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import FAMILIES, adapted, distance, make_base, rows, trained
from transformers import Trainer

from darel_hf import DarelTrainer
from darel_hf.accelerators import share
from darel_hf.data import ShuffledByPrompt

#: Tokens of prompts and completions: long enough to be shared, one of a single token, an empty one.
LENGTHS = ((9, 5), (9, 3), (7, 6), (1, 4), (0, 5), (9, 1))


def nested(seed=0):
    """Three levels: four rows begin alike, two of them and two of them go on alike, and one is there twice."""
    batch = rows(((6, 6),) * 8, seed=seed)
    ids, labels = batch["input_ids"], batch["labels"]
    ids[1:6, :6], ids[3:6, :8], ids[4:6, :10] = ids[0, :6], ids[2, :8].clone(), ids[3, :10].clone()
    ids[3:6, :6] = ids[0, :6]
    ids[7] = ids[6]
    labels[:] = ids.masked_fill(torch.arange(12) < 6, -100)
    return batch


def gradients(model, batch):
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.item(), found


def check(model, batch, bound=1e-5, ways=(False, True)):
    loss, wanted = gradients(model, batch)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("darel_padding_free")
    for label_positions_only in ways:
        row = share(batch, label_positions_only)
        found_loss, found = gradients(model, row)
        assert found_loss == pytest.approx(loss, rel=bound)
        assert distance(found, wanted) < bound
    base.set_attn_implementation("sdpa")
    return row


@pytest.fixture(params=["one_by_one", "at_once", "packed"])
def way(request, monkeypatch):
    """Attend as on a CPU, and as on a GPU."""
    attend_as(request.param, monkeypatch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [adapted, make_base])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, make, side, way):
    lengths = [(p, c) for p, c in LENGTHS if p or side == "right"]  # what padding predicts is refused
    batch = rows(lengths, side=side, same_prompts=True)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    row = check(make(family), batch)
    assert row["input_ids"].shape[1] < batch["attention_mask"].sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_levels_and_equal_rows(family, way):
    batch = nested()
    row = check(adapted(family), batch)
    # 12 + 6 + 4 + 2 + 2 of the first family, 12 for what is there twice: counted by hand from `nested`.
    assert row["input_ids"].shape[1] == len(
        {tuple(r[: i + 1].tolist()) for r in batch["input_ids"] for i in range(12)}
    )


def test_labels_in_what_is_shared(way):
    """All tokens have labels: a position in common counts once for each of its samples."""
    batch = nested()
    batch["labels"] = batch["input_ids"].clone()
    row = check(adapted("llama"), batch)
    assert row["logits_to_keep"].shape[0] == 8 * 11


def test_in_bfloat16_no_further_from_float64_than_the_padded_batch():
    batch = nested()
    exact = gradients(adapted("llama").double(), batch)[1]
    model = adapted("llama").bfloat16()
    padded = gradients(model, batch)[1]
    model.get_base_model().set_attn_implementation("darel_padding_free")
    shared = gradients(model, share(batch, True))[1]
    assert distance(shared, exact) < 1.5 * distance(padded, exact)


def test_completions_do_not_see_each_other():
    model = adapted("qwen3")
    model.get_base_model().set_attn_implementation("darel_padding_free")
    batch = rows(((9, 5), (9, 5), (9, 5)), same_prompts=True)
    other = {key: value.clone() for key, value in batch.items()}
    other["input_ids"][1, 10:] = other["labels"][1, 10:] = (batch["input_ids"][1, 10:] + 5) % 60 + 3
    one, two = (share(some) for some in (batch, other))
    order = sorted(range(3), key=lambda i: batch["input_ids"][i].tolist())
    assert order == sorted(range(3), key=lambda i: other["input_ids"][i].tolist()), "they must stay in their places"
    same = (one["input_ids"] == two["input_ids"])[0]
    with torch.no_grad():
        first, second = (model(**{k: v for k, v in row.items() if k != "labels"}).logits[0] for row in (one, two))
    place = order.index(1)
    changed = slice(14, 20) if place == 1 else slice(20, 26) if place == 2 else slice(8, 14)
    mine = torch.zeros_like(same)
    mine[changed] = True
    assert not same[mine].all() and same[~mine].all()
    assert torch.equal(first[~mine], second[~mine])
    assert not torch.equal(first[mine], second[mine])


forests = st.lists(st.lists(st.integers(3, 5), min_size=2, max_size=14), min_size=1, max_size=7)
MODEL = adapted("gpt2")


@settings(max_examples=40, deadline=None)
@given(forests, st.data())
def test_random_forests(forest, data):
    width = max(map(len, forest))
    ids, labels, mask = (torch.full((len(forest), width), value) for value in (0, -100, 0))
    for row, tokens in enumerate(forest):
        start = data.draw(st.integers(0, len(tokens)))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    if labels[:, 1:].eq(-100).all():
        labels[0, 1] = ids[0, 1]
    check(MODEL, {"input_ids": ids, "attention_mask": mask, "labels": labels}, bound=2e-5)


# -- training --


@pytest.mark.parametrize("make", [adapted, make_base])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_trains_as_trainer_does(family, make, tmp_path):
    start = {name: p.detach().clone() for name, p in make(family).named_parameters() if p.requires_grad}
    data = with_prompts(token_data())
    more = {"train_dataset": data, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    plain = trained(Trainer, tmp_path / "plain", make(family), **more)
    ours = trained(DarelTrainer, tmp_path / "ours", make(family), {"share_prompts": 1}, **more)
    assert distance(ours, plain, start) < 1e-4


class ByPrompt(Trainer):
    """Plain Trainer on the order of `share_prompts`."""

    def _get_train_sampler(self, *args, **kwargs):
        prompts = np.arange(len(self.train_dataset)) % 3
        return ShuffledByPrompt(prompts, 2, self.args.train_batch_size, self.args.seed)


@pytest.mark.parametrize("kind", ["table", "items"])
def test_batches_of_the_same_prompt(kind, tmp_path, capsys):
    start = {name: p.detach().clone() for name, p in adapted("llama").named_parameters() if p.requires_grad}
    data = with_prompts(token_data())
    more = {"train_dataset": data if kind == "table" else [{**row} for row in data]}
    plain = trained(ByPrompt, tmp_path / "plain", adapted("llama"), **more)
    ours = trained(DarelTrainer, tmp_path / "ours", adapted("llama"), {"share_prompts": 2}, **more)
    assert distance(ours, plain, start) < 1e-4
    assert "up to 2 samples of a prompt" in capsys.readouterr().out


def test_rows_are_chosen_first(tmp_path):
    """With the online stage, what is shared is what is left of a batch."""
    more = {"train_dataset": with_prompts(token_data())}
    settings = {"online_keep": 0.5, "online_rule": "hardest"}
    found = [
        trained(DarelTrainer, tmp_path / str(i), adapted("gpt2"), {**settings, **one}, **more)
        for i, one in enumerate(({"unpad": True}, {"share_prompts": 1}))
    ]
    start = {name: p.detach().clone() for name, p in adapted("gpt2").named_parameters() if p.requires_grad}
    assert distance(found[1], found[0], start) < 1e-4


def test_a_loss_of_the_users_own(tmp_path):
    """It gets the logits of all positions: then only what precedes the labels is shared."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            flat, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = 2 * torch.nn.functional.cross_entropy(flat, wanted, ignore_index=-100)
            return (loss, outputs) if return_outputs else loss

    class OurOwn(DarelTrainer):
        compute_loss = Own.compute_loss

    more = {"train_dataset": with_prompts(token_data())}
    start = {name: p.detach().clone() for name, p in adapted("llama").named_parameters() if p.requires_grad}
    plain = trained(Own, tmp_path / "plain", adapted("llama"), **more)
    ours = trained(OurOwn, tmp_path / "ours", adapted("llama"), {"share_prompts": 1}, **more)
    assert distance(ours, plain, start) < 5e-4


@pytest.mark.parametrize(
    ("darel", "more", "match"),
    [
        ({"share_prompts": -1}, {}, "share_prompts=-1: give 1 to share"),
        ({"share_prompts": True}, {}, "share_prompts=True: give 1 to share"),
        ({"share_prompts": 5}, {}, "share_prompts=5: a batch has 4 rows; give at most so many"),
        ({"share_prompts": 1, "unpad": True}, {}, "unpad=True: what is shared is computed without padding anyway"),
        ({"share_prompts": 1, "prompt_cache": "ram"}, {}, "prompt_cache='ram': it computes prompts once already"),
        ({"share_prompts": 2, "batch_by_length": True}, {}, "batch_by_length=True: without padding"),
        ({"share_prompts": 2}, {"train_sampling_strategy": "group_by_length"}, "share_prompts decides the order"),
        ({"share_prompts": 1}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    ],
)
def test_one_clear_line(darel, more, match, tmp_path):
    with pytest.raises((ValueError, TypeError), match=match):
        trained(DarelTrainer, tmp_path, adapted("gpt2"), darel, train_dataset=with_prompts(token_data()), **more)


def test_samples_without_prompts(tmp_path):
    data = token_data().remove_columns("labels").map(lambda row: {"label": 0})
    with pytest.raises(ValueError, match=r"share_prompts=.*samples need input_ids, and labels or a completion_mask"):
        trained(DarelTrainer, tmp_path, adapted("gpt2"), {"share_prompts": 2}, train_dataset=data)


def test_a_model_whose_rows_know_of_each_other_is_refused(tmp_path):
    """The trial has samples that begin alike even where the data's first ones do not: it can fail."""
    model = make_base("gpt2")

    def mix(module, args, output):
        return output + 0.5 * output.mean(dim=(0, 1), keepdim=True)

    model.transformer.h[0].mlp.register_forward_hook(mix)
    with pytest.raises(ValueError, match=r"share_prompts=1: .* cannot be trained without padding"):
        trained(DarelTrainer, tmp_path, model, {"share_prompts": 1})


@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 5), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_sample_once_in_an_epoch(prompts, most, batch_size, epoch):
    prompts = np.unique(prompts, return_inverse=True)[1]
    sampler = ShuffledByPrompt(prompts, most, batch_size)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(prompts)))
    assert order == list(sampler) and len(sampler) == len(order)


def test_batches_have_groups_and_differ_by_epoch():
    prompts = np.random.default_rng(0).integers(0, 200, 4000)
    sampler = ShuffledByPrompt(prompts, 4, 8)
    first = prompts[np.array(list(sampler))].reshape(-1, 8)
    distinct = np.mean([len(np.unique(batch)) for batch in first])
    drawn = np.random.default_rng(1).permutation(prompts).reshape(-1, 8)
    assert distinct < 2.6 and np.mean([len(np.unique(batch)) for batch in drawn]) > 7.5
    # Small and large groups come all through the epoch, not at one end of it.
    quarters = [np.mean([len(np.unique(batch)) for batch in part]) for part in np.split(first[:500], 4)]
    assert max(quarters) - min(quarters) < 0.5
    sampler.set_epoch(1)
    assert not np.array_equal(prompts[np.array(list(sampler))].reshape(-1, 8), first)
