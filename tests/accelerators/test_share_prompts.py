"""Shared prompts: the gradients of the padded batch, in fewer positions, whatever is in common and wherever it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import FAMILIES, adapted, distance, make_base, rows

from darel_hf.accelerators import row_attention, share

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


@pytest.fixture(params=["one_by_one", "at_once"])
def way(request, monkeypatch):
    """Attend as on a CPU, and as on a GPU."""
    monkeypatch.setattr(row_attention, "on_cpu", lambda states: request.param == "one_by_one")


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
