"""The prompt cache: completions alone are computed, with the loss and gradients of the slow way; stores that hold."""

import contextlib
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, attend_as
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from readers import (
    FAMILIES,
    GENTLE,
    adapted,
    data,
    distance,
    gradients,
    items_of,
    make_base,
    moved,
    oracle,
    rows,
    trained,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import CheapScores, FastLora, PromptCache
from darel_hf.accelerators.frozen_base import FrozenBase
from darel_hf.accelerators.unpad import PaddingFree
from darel_hf.adapters import acting_everywhere, completion_lora
from darel_hf.data import CarryIds, add_ids
from darel_hf.scoring import BatchScorer, score_dataset
from darel_hf.scoring.prompts import SharedPrompts

LENGTHS = [(7, 5), (10, 3), (1, 6), (2, 4), (12, 2), (7, 6)]
WAYS = ("ram", "disk", "recompute")


def cache_for(model, folder, way="ram", train_dataset=None, **more):
    trainer = DarelTrainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=train_dataset,
        darel=DarelConfig(prompt_cache=way),
    )
    return PromptCache(trainer)


@pytest.fixture(params=["at_once", "packed"])
def in_rows(request, monkeypatch):
    """Attend as on a GPU."""
    attend_as(request.param, monkeypatch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, way, side, tmp_path):
    check_twins(family, way, side, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_in_rows(family, tmp_path, in_rows):
    check_twins(family, "device", "right", tmp_path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_in_rows_of_few_lengths(family, way, tmp_path, monkeypatch):
    """As they are made where products are in 16 bits on a CPU."""
    monkeypatch.setattr(PromptCache, "is_narrow", lambda self, device: True)
    check_twins(family, way, "right", tmp_path, most=16)


def check_twins(family, way, side, folder, lengths=LENGTHS, same_prompts=True, dtype=torch.float32, most=0):
    inputs = rows(lengths, side=side, same_prompts=same_prompts)
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    stock, model = adapted(family).to(dtype), adapted(family, ReaderLoraConfig).to(dtype).train()
    loss, _ = oracle(stock, inputs)
    loss.backward()
    cache = cache_for(model, folder, way)
    assert cache.why_not(lambda: inputs) is None
    for _ in range(2):  # computed, then read
        model.zero_grad()
        row = cache.transform(inputs)
        assert row["input_ids"].shape[1] < int(inputs["labels"].ne(-100).sum()) + len(lengths) + most
        assert not most or not row["input_ids"].shape[1] % most
        found = model(**row).loss * inputs["labels"].ne(-100).sum()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        found.backward()
        assert distance(gradients(model), gradients(stock)) < 1e-5
    cache.detach()
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name.endswith("attn"))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=5), st.booleans())
def test_any_rows(tmp_path_factory, lengths, same_prompts):
    # In float32 norms of keys can make more of rounding: either way was 2e-5 to 6e-5 from this.
    check_twins("qwen3", "ram", "right", tmp_path_factory.mktemp("rows"), lengths, same_prompts, torch.float64)


def test_nested_prompts_one_group_and_none(tmp_path):
    """Prompts that begin alike, that are equal, that differ in their last token, and an empty one."""
    inputs = rows([(6, 4), (6, 4), (6, 5), (9, 3), (1, 4)], same_prompts=True)
    inputs["input_ids"][2, 4] += 1  # the last token that is prompt: the one after it predicts the first label
    model = adapted("llama", ReaderLoraConfig).train()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    stock = adapted("llama")
    loss, _ = oracle(stock, inputs)
    loss.backward()
    found = model(**cache.transform(inputs)).loss * inputs["labels"].ne(-100).sum()
    found.backward()
    assert distance(gradients(model), gradients(stock)) < 1e-5
    lengths = sorted(map(len, cache.store.known))
    assert lengths == [5, 5, 8]  # equal ones once, the empty one not at all


def with_preamble(lengths, most=20):
    """Rows that all begin with the same tokens, one of them with nothing else for a prompt."""
    inputs = rows(lengths)
    inputs["input_ids"][:, :most] = inputs["input_ids"][0, :most].clone()
    return inputs


@pytest.mark.parametrize("way", ["ram", "recompute", pytest.param("disk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_kept_once(family, way, tmp_path):
    check_kept_once(family, way, tmp_path)


def test_what_all_prompts_begin_with_in_rows(tmp_path, in_rows):
    check_kept_once("mistral", "ram", tmp_path)


def checked_cache(family, way, folder, inputs, few):
    """A cache on these rows, whose steps have the oracle's loss and gradients; first tried out on a few of them."""
    stock, model = adapted(family), adapted(family, ReaderLoraConfig).train()
    loss, _ = oracle(stock, inputs)
    loss.backward()
    cache = cache_for(model, folder, way, train_dataset=items_of(inputs))
    assert cache.why_not(lambda: few) is None
    for _ in range(2):
        model.zero_grad()
        found = model(**cache.transform(inputs)).loss * inputs["labels"].ne(-100).sum()
        found.backward()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        assert distance(gradients(model), gradients(stock)) < 1e-5
    return cache


def check_kept_once(family, way, folder):
    inputs = with_preamble([(25, 4), (27, 3), (21, 5), (30, 2), (25, 4)])
    inputs["input_ids"][4] = inputs["input_ids"][0]
    cache = checked_cache(family, way, folder, inputs, inputs)
    once = 20 + 4 + 6 + 0 + 9  # the first 20 tokens, and what the four different prompts have besides
    assert len(cache.base.step.positions) == once  # adapted keys and values are made once, too
    if way == "ram":
        assert sum(len(kept) for kept in cache.store.known.values()) == once
    if way == "disk":
        assert cache.store.path.stat().st_size == once * cache.base.row_bytes
    cache.detach()


def test_a_prompt_without_what_others_begin_with(tmp_path):
    """A few rows say what prompts begin with; those that do not are kept whole."""
    inputs = with_preamble([(25, 4), (27, 3), (30, 2)])
    others = rows([(25, 4), (6, 3)], seed=1)
    model, stock = adapted("llama", ReaderLoraConfig).train(), adapted("llama")
    cache = cache_for(model, tmp_path, train_dataset=items_of(inputs))
    assert cache.why_not(lambda: inputs) is None
    both = PadCollator()([*items_of(others), *items_of(inputs)])
    loss, _ = oracle(stock, both)
    loss.backward()
    found = model(**cache.transform(both)).loss * both["labels"].ne(-100).sum()
    found.backward()
    assert distance(gradients(model), gradients(stock)) < 1e-5
    assert {len(kept) for kept in cache.store.known.values()} == {24, 5, 20, 4, 6, 9}


def with_instructions(n=16):
    """Rows with one of two instructions, after the first of which a conversation goes on; and others without any."""
    made = rows([((18, 40, 24, 5)[i % 4] + i % 3, 2 + i % 4) for i in range(n)])
    first, second, more = (made["input_ids"][i, :20].clone() for i in (1, 2, 5))
    for i, ids in enumerate(made["input_ids"]):
        if i % 4 == 0 or i % 4 == 1:
            ids[:16] = first[:16]
        if i % 4 == 1:
            ids[16:36] = more
        if i % 4 == 2:
            ids[:20] = second
    return made


@pytest.mark.parametrize(("family", "way"), [("gpt2", "ram"), ("mistral", "disk")])
def test_beginnings_of_several_kinds_are_kept_once(family, way, tmp_path):
    inputs = with_instructions()
    cache = checked_cache(family, way, tmp_path, inputs, {key: values[:4] for key, values in inputs.items()})
    assert [len(beginning) for beginning in cache.store.beginnings] == [16, 20, 36]
    prompts = {tuple(ids[: int(own.nonzero()[0]) - 1].tolist()) for ids, own in zip(
        inputs["input_ids"], inputs["labels"].ne(-100), strict=True
    )}  # fmt: skip
    once = {prompt[:n] for prompt in prompts for n in range(1, len(prompt) + 1)}  # each beginning is one position
    positions = len(cache.base.step.positions)
    assert len(once) <= positions < len(once) + 8  # but for what few have in common by chance
    kept = sum(map(len, cache.store.known.values())) if way == "ram" else len(cache.store.path.read_bytes())
    assert kept == positions * (1 if way == "ram" else cache.base.row_bytes)
    cache.detach()


def test_what_is_kept_does_not_depend_on_who_comes_first(tmp_path):
    inputs, stores = with_instructions(), []
    for step in (1, -1):
        cache = cache_for(adapted("llama", ReaderLoraConfig), tmp_path, train_dataset=items_of(inputs))
        for i in range(16)[::step]:
            cache.transform({key: values[i : i + 1] for key, values in inputs.items()})
        stores.append(cache.store.known)
        cache.detach()
    assert stores[0].keys() == stores[1].keys() and len(stores[0]) > 16
    assert all(torch.equal(stores[0][prompt], stores[1][prompt]) for prompt in stores[0])


def test_resume_with_what_prompts_begin_with(tmp_path):
    more = {"train_dataset": items_of(with_preamble([(22 + i % 5, 3) for i in range(16)])), "num_train_epochs": 2}
    more |= {"save_strategy": "steps", "save_steps": 3}
    whole = trained(DarelTrainer, tmp_path, adapted("qwen3", ReaderLoraConfig), {"prompt_cache": "ram"}, **more)
    resume = str(tmp_path / "checkpoint-3")
    again = trained(
        DarelTrainer, tmp_path, adapted("qwen3", ReaderLoraConfig), {"prompt_cache": "ram"}, resume, **more
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_completions_do_not_see_each_other(tmp_path):
    inputs = rows([(7, 5), (7, 6), (4, 5)], same_prompts=True)
    model = adapted("llama", ReaderLoraConfig).eval()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None

    def logits():
        with torch.no_grad():
            return model(**cache.transform(inputs)).logits[0]

    before = logits()
    inputs["input_ids"][1, 8:] = 5  # what follows the first token of the second completion
    after = logits()
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[6:11], after[6:11])


def test_bfloat16_against_float64(tmp_path):
    """Keys and values made of what is stored are as near to the truth as the slow way in the same precision."""
    inputs = rows(LENGTHS, same_prompts=True)
    exact = adapted("qwen3", ReaderLoraConfig).double().eval()
    with torch.no_grad():
        wanted = exact(**inputs).loss
    model = adapted("qwen3", ReaderLoraConfig).bfloat16().eval()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    with torch.no_grad():
        slow, found = model(**inputs).loss, model(**cache.transform(inputs)).loss
    assert abs(found - wanted) < 2 * max(abs(slow - wanted), 1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_trains_as_the_slow_way_does(way, more, tmp_path):
    # With label smoothing Trainer keeps labels from the model; ours says where prompts end, with all settings off.
    slow = DarelTrainer if "label_smoothing_factor" in more else Trainer
    wanted = trained(slow, tmp_path / "slow", adapted("llama", ReaderLoraConfig), **more)
    start = {n: p for n, p in adapted("llama", ReaderLoraConfig).named_parameters() if p.requires_grad}
    found = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": way}, **more)
    assert distance(found, wanted, start) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("way", ["ram", "disk", pytest.param("recompute", marks=pytest.mark.slow)])
def test_resume_is_bit_exact(way, family, tmp_path):
    """With dropout in the base and in adapters: nothing but steps draws random numbers."""

    def model():
        return adapted(family, ReaderLoraConfig, dropout=0.1, lora_dropout=0.1)

    more = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3}
    whole = trained(DarelTrainer, tmp_path, model(), {"prompt_cache": way}, **more)
    again = trained(
        DarelTrainer,
        tmp_path,
        model(),
        {"prompt_cache": way},
        resume=str(tmp_path / "checkpoint-10"),
        **more,
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_evaluates_and_generates_on_the_way_as_after_it(tmp_path):
    """Batches that are not ours go through the same attention while training lasts."""
    model, found = adapted("llama", ReaderLoraConfig), []
    prompt = torch.tensor([[5, 6, 7, 8]])

    def look(current):
        current.eval()
        with torch.no_grad():
            loss = current(**rows(LENGTHS)).loss.item()
        said = current.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        current.train()
        return loss, said.tolist()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(look(model))

    trainer = DarelTrainer(
        model=model,
        args=arguments(tmp_path, **GENTLE, max_steps=2),
        train_dataset=data(),
        data_collator=PadCollator(),
        darel=DarelConfig(prompt_cache="ram"),
        callbacks=[Look()],
    )
    trainer.train()
    assert found[-1] == look(model)
    assert found[0] != found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_oracle(family, monkeypatch):
    """The offline pass computes shared prompts once, and reads them through adapted keys and values."""
    shared, batches = [], SharedPrompts.batches
    monkeypatch.setattr(SharedPrompts, "batches", lambda self, *size: shared.append(1) or batches(self, *size))
    table, stock = data(), adapted(family)
    rows_of = add_ids(table.select_columns(["input_ids", "attention_mask", "labels"]), np.arange(len(table)))
    scorer = BatchScorer(adapted(family, ReaderLoraConfig))
    found = score_dataset(scorer, rows_of, CarryIds(PadCollator()), dict, progress_bar=False).losses
    wanted = []
    for row in table:
        batch = PadCollator()([row])
        wanted.append(float(oracle(stock, batch)[0].detach()) / int(batch["labels"].ne(-100).sum()))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert shared and scorer.head is not None


@pytest.mark.parametrize(
    ("config", "darel"),
    [
        (ReaderLoraConfig, {"prompt_cache": "ram"}),
        (ReaderLoraConfig, {"prompt_cache": "recompute", "fast_lora": True}),
        (LoraConfig, {"unpad": True, "last_block": True}),
        (LoraConfig, {"share_prompts": 1}),
    ],
)
def test_fresh_scores_are_those_of_padded_batches(config, darel, tmp_path, monkeypatch):
    """Candidates are scored on the rows that steps get: no prompt is computed again, and no padding."""
    found, call = [], CheapScores._found

    def compare(self, inputs):
        cheap = call(self, inputs)
        found.append((cheap, self.scorer(inputs)))
        return cheap

    monkeypatch.setattr(CheapScores, "_found", compare)
    darel |= {"online_keep": 0.5, "online_rule": "hardest", "offline_keep": 1.0}
    more = {"per_device_train_batch_size": 3, "num_train_epochs": 2}
    trained(DarelTrainer, tmp_path, adapted("llama", config), darel, **more)
    assert len(found) >= 8  # of every step of the epochs in which they are fresh
    for cheap, slow in found:
        torch.testing.assert_close(cheap.losses, slow.losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cheap.n_tokens, slow.n_tokens)


def test_scores_that_differ_are_not_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    inputs, model = rows(LENGTHS), adapted("llama", ReaderLoraConfig)
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    scorer = BatchScorer(model, want_correct=True)
    wanted = scorer(inputs)

    class Wrong:
        def transform(self, given):
            row = dict(cache.transform(given))
            row["input_ids"] = row["input_ids"].flip(1)
            return row

    wrong, right = CheapScores(scorer, [Wrong()]), CheapScores(scorer, [cache])
    for _ in range(2):
        assert torch.equal(wrong(inputs).losses, wanted.losses)
        torch.testing.assert_close(tuple(right(inputs))[:3], tuple(wanted)[:3], rtol=1e-5, atol=0)
    assert (wrong.alike, right.alike) == (False, True)
    assert "samples are scored the plain way: [" in caplog.text


# ---- Stores ----


def computed(monkeypatch):
    """Count the prompts that are computed."""
    counted, record = [], FrozenBase.record

    def counting(self, prompts):
        counted.extend(prompts)
        return record(self, prompts)

    monkeypatch.setattr(FrozenBase, "record", counting)
    return counted


def test_each_prompt_is_computed_once(tmp_path, monkeypatch, caplog):
    counted = computed(monkeypatch)
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "ram"}, num_train_epochs=4)
    assert "prompts change" not in caplog.text
    distinct = {tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in data()}
    known = [prompt for prompt in counted if prompt in distinct]
    assert len(known) <= 2 * len(distinct) and set(known) == distinct  # once, and once more while it is tried out


@pytest.mark.slow
def test_a_later_run_uses_the_file_again(tmp_path, monkeypatch, caplog):
    first = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    files = sorted((tmp_path / "_prompts").iterdir())
    assert [file.suffix for file in files] == [".bin", ".jsonl"]
    counted = computed(monkeypatch)
    second = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    distinct = {tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in data()}
    assert not set(counted) & distinct
    assert all(torch.equal(first[name], second[name]) for name in first)

    # Cut off by a kill: in the middle of a prompt, of its line, or the line alone.
    data_file, listed = files
    whole, lines = data_file.read_bytes(), listed.read_bytes()
    for cut_data, cut_lines in ((7, 0), (0, 5), (0, len(lines.splitlines(True)[-1]))):
        data_file.write_bytes(whole[: len(whole) - cut_data])
        listed.write_bytes(lines[: len(lines) - cut_lines])
        again = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
        assert all(torch.equal(first[name], again[name]) for name in first)
        entries = [json.loads(line) for line in listed.read_bytes().splitlines()]
        assert {tuple(entry["tokens"]) for entry in entries} == distinct

    # Damaged: one bit.
    broken = bytearray(whole)
    broken[11] ^= 1
    data_file.write_bytes(broken)
    listed.write_bytes(lines)
    again = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [r.message for r in caplog.records if "damaged" in r.message] == [
        f"{data_file} is damaged; what is wrong in it is computed again"
    ]


class Changing(PadCollator):
    """Begins each prompt with another word, every time."""

    random = torch.Generator()

    def __call__(self, features):
        batch = super().__call__(features)
        batch["input_ids"][:, 0] = torch.randint(3, 60, (len(features),), generator=self.random)
        return batch


@pytest.mark.parametrize("way", ["ram", "disk"])
def test_prompts_that_change_are_noticed(way, tmp_path, caplog):
    trainer = DarelTrainer(
        model=adapted("llama", ReaderLoraConfig),
        args=arguments(tmp_path, **GENTLE, num_train_epochs=5),
        train_dataset=items_of(rows([(5 + i % 3, 3) for i in range(24)])),
        data_collator=Changing(),
        darel=DarelConfig(prompt_cache=way),
    )
    trainer.train()
    told = [record.message for record in caplog.records if "prompts change" in record.message]
    assert len(told) == 1 and told[0].startswith(f"prompt_cache={way!r}: prompts change from epoch to epoch (")
    kept = int(told[0].split(" were new, ")[1].split()[0])
    assert 24 <= kept <= 3 * 24  # it does not grow for ever


def test_a_run_that_is_resumed_sees_some_prompts_later(tmp_path, caplog):
    """Half of an epoch and half of the next are not all rows: that prompts are new then says nothing."""
    more = {"train_dataset": items_of(rows([(5, 2)] * 48)), "num_train_epochs": 3}
    more |= {"save_strategy": "steps", "save_steps": 6}
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "ram"}, **more)
    resume = str(tmp_path / "checkpoint-6")
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "ram"}, resume, **more)
    assert "prompts change" not in caplog.text


def test_another_base_has_another_file(tmp_path):
    for seed in range(2):
        config = ReaderLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trained(
            DarelTrainer, tmp_path, get_peft_model(make_base("llama", seed=seed), config), {"prompt_cache": "disk"}
        )
    assert len(list((tmp_path / "_prompts").glob("*.bin"))) == 2


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_ends_nothing(tmp_path, monkeypatch, caplog, after):
    from darel_hf.accelerators import prompt_store

    wanted = trained(DarelTrainer, tmp_path / "ram", adapted("llama", ReaderLoraConfig), {"prompt_cache": "ram"})
    opened = prompt_store.OnDisk._open

    class Full:
        def __init__(self, file):
            self.file, self.left = file, after

        def write(self, content):
            if self.left == 0:
                self.file.write(content[:3])
                raise OSError(28, "No space left on device")
            self.left -= 1
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def open_full(self):
        if self._files is None:
            file, listed = opened(self)
            self._files = (Full(file), listed)
        return self._files

    monkeypatch.setattr(prompt_store.OnDisk, "_open", open_full)
    found = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    told = [record.message for record in caplog.records if "takes no more" in record.message]
    assert told and all("No space left on device" in line for line in told)
    monkeypatch.undo()
    again = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_auto_says_what_it_takes(tmp_path, capsys):
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "auto"}, num_train_epochs=3)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompt_cache='auto'")]
    distinct = {tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in data()}
    tokens = sum(map(len, distinct))
    begin = f"prompt_cache='auto' is 'ram': {len(distinct)} different prompts of 24 rows, {tokens} tokens together"
    assert len(told) == 1 and told[0].startswith(begin)
    assert f"each is read about {3 * 24 / len(distinct):.1f} times" in told[0]
    assert not (tmp_path / "_prompts").exists()


@pytest.mark.parametrize(("epochs", "way"), [(1, "recompute"), (2, "ram")])
def test_auto_keeps_no_prompt_that_is_read_once(tmp_path, capsys, epochs, way):
    """Rows whose prompts are all different gain nothing in one epoch; in two they do."""
    table = items_of(rows([(5, 3)] * 8))
    trained(
        DarelTrainer,
        tmp_path,
        adapted("llama", ReaderLoraConfig),
        {"prompt_cache": "auto"},
        train_dataset=table,
        num_train_epochs=epochs,
    )
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompt_cache='auto'")]
    assert told[0].startswith(f"prompt_cache='auto' is {way!r}: 8 different prompts of 8 rows, 32 tokens together")


def test_how_much_a_disk_will_hold_is_said_first(tmp_path, capsys):
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "disk"})
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompt_cache='disk': ")]
    assert len(told) == 1 and " GiB, and each is read about " in told[0]


@pytest.mark.parametrize(("loading", "way"), [(0.0, "disk"), (1e9, "recompute")])
def test_auto_measures_a_disk(tmp_path, capsys, monkeypatch, loading, way):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(PromptCache, "_time", lambda self, prompt, folder: (1.0, loading))
    trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": "auto"})
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompt_cache='auto'")]
    assert told[0].startswith(f"prompt_cache='auto' is {way!r}: ") and "stored and loaded in" in told[0]
    assert (tmp_path / "_prompts").exists() == (way == "disk")


# ---- What cannot be had ----


def refusal(model, folder, **more):
    with pytest.raises(ValueError, match="prompt_cache='ram'") as caught:
        trained(DarelTrainer, folder, model, {"prompt_cache": "ram"}, **more)
    return str(caught.value)


def test_refusals(tmp_path):
    assert "use ReaderLoraConfig" in refusal(adapted("llama"), tmp_path)
    assert "neftune" in refusal(adapted("llama", ReaderLoraConfig), tmp_path, neftune_noise_alpha=5)
    model = adapted("llama", ReaderLoraConfig)
    model.get_base_model().set_attn_implementation("eager")
    assert "attn_implementation='sdpa'" in refusal(model, tmp_path)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    from readers import SMALL

    base = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=64))
    model = get_peft_model(base, ReaderLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "rotary embeddings change with the length" in refusal(moved(model), tmp_path)
    with pytest.raises(ValueError, match="unpad=True: completions are computed without padding anyway"):
        DarelConfig(prompt_cache="ram", unpad=True)
    with pytest.raises(ValueError, match="prompt_cache='tape': choose one of"):
        DarelConfig(prompt_cache="tape")


def test_padding_on_the_left_without_positions(tmp_path):
    """A prompt that stands elsewhere has other position embeddings: not the same prompt."""
    model = adapted("gpt2", ReaderLoraConfig)
    reason = cache_for(model, tmp_path).why_not(lambda: rows(LENGTHS, side="left"))
    assert "position_ids: those of a row do not begin at 0" in reason


def test_rows_that_are_all_prompt_or_have_none(tmp_path, caplog):
    """A row without labels teaches nothing and disturbs nobody; one without a prompt is a row like others."""
    inputs = rows([(5, 4), (4, 3), (1, 4)])
    inputs["labels"][1] = -100
    model = adapted("llama", ReaderLoraConfig).train()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    wanted = adapted("llama", ReaderLoraConfig).train()
    wanted(**inputs).loss.backward()
    model(**cache.transform(inputs)).loss.backward()
    assert distance(gradients(model), gradients(wanted)) < 1e-5


def test_dora_and_frozen_adapters(tmp_path):
    """DoRA needs the base's weight, not its output alone: its keys and values are computed from what was read."""
    inputs = rows(LENGTHS, same_prompts=True)
    wanted, model = (adapted("llama", ReaderLoraConfig, use_dora=True).train() for _ in range(2))
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    wanted(**inputs).loss.backward()
    model(**cache.transform(inputs)).loss.backward()
    assert cache.base.layers[0].linears == []
    assert distance(gradients(model), gradients(wanted)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_of_a_prompt(family, tmp_path):
    """What layers read, and what becomes keys and values: no queries, also where one layer makes all three."""
    inputs = rows(LENGTHS, same_prompts=True)
    cache = cache_for(adapted(family, ReaderLoraConfig), tmp_path)
    assert cache.why_not(lambda: inputs) is None
    cache.transform(inputs)
    widths = [32, 64] if family == "gpt2" else [32, 16, 16]  # of d = 32; two of four heads are for keys
    assert [layer.widths for layer in cache.base.layers] == [widths] * 2
    assert cache.base.row_bytes == 2 * sum(widths) * 4
    cache.detach()


def test_more_rank_for_what_reads_prompts(tmp_path):
    """PEFT's patterns give keys and values a rank and a scale of their own; what is kept does not grow with it."""
    inputs = rows(LENGTHS, same_prompts=True)
    more = {"rank_pattern": {"k_proj": 16, "v_proj": 16}, "alpha_pattern": {"k_proj": 32, "v_proj": 32}}
    stock, model = adapted("qwen3", **more), adapted("qwen3", ReaderLoraConfig, **more).train()
    ranks = {name.split(".")[-4]: len(p) for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks["k_proj"] == ranks["v_proj"] == 16 and ranks["q_proj"] == ranks["down_proj"] == 4
    loss, _ = oracle(stock, inputs)
    loss.backward()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    found = model(**cache.transform(inputs)).loss * inputs["labels"].ne(-100).sum()
    found.backward()
    assert distance(gradients(model), gradients(stock)) < 1e-5
    assert [layer.widths for layer in cache.base.layers] == [[32, 16, 16]] * 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_peft_alone_adds(family, fast, tmp_path):
    """A bias in adapters: PEFT's own layers make adapted keys and values of what is kept, beside fast ones as well."""
    inputs = rows(LENGTHS, same_prompts=True)
    more = {"lora_bias": True} if not fast else {"rank_pattern": {"k_proj": 6}}
    stock, model = adapted(family, **more), adapted(family, ReaderLoraConfig, **more).train()
    loss, _ = oracle(stock, inputs)
    loss.backward()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: inputs) is None
    with FastLora(cache.trainer).attached() if fast else contextlib.nullcontext():
        found = model(**cache.transform(inputs)).loss * inputs["labels"].ne(-100).sum()
        found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert distance(gradients(model), gradients(stock)) < 1e-5
    hooked = [module for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert not any(module._forward_hooks for module in hooked if not hasattr(module, "base_layer"))  # for a call only


def test_stock_lora_is_told_by_logging(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert "ReaderLoraConfig" in cache_for(adapted("llama", LoraConfig), tmp_path).why_not(None)


@pytest.mark.parametrize("way", WAYS)
def test_batches_with_one_prompt_and_with_several(way, tmp_path):
    """What is known by position of one prompt is not taken for what is known of several, one after the other."""
    table = items_of(rows([(8, 4), (9, 4), (7, 3), (9, 4), (9, 4)]))
    more = {"train_dataset": table, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    wanted = trained(Trainer, tmp_path / "slow", adapted("llama", ReaderLoraConfig), **more)
    start = {n: p for n, p in adapted("llama", ReaderLoraConfig).named_parameters() if p.requires_grad}
    found = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), {"prompt_cache": way}, **more)
    assert distance(found, wanted, start) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_resumes_with_a_prompt_longer_than_the_first_batch(way, tmp_path):
    table = items_of(rows([(4, 2), (5, 2)] * 2 + [(30, 4), (28, 3)] + [(5, 2)] * 2))
    more = {"train_dataset": table, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    more |= {"save_strategy": "steps", "save_steps": 4}
    darel = {"prompt_cache": way}
    whole = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), darel, **more)
    resume = str(tmp_path / "checkpoint-4")
    again = trained(DarelTrainer, tmp_path, adapted("llama", ReaderLoraConfig), darel, resume=resume, **more)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_base_that_is_trained_is_refused(tmp_path):
    """The few rows that are tried would not show it: what is kept is right, for one step."""
    for part in ("embed_tokens", "layers.1.mlp.down_proj.base_layer"):
        model = adapted("llama", ReaderLoraConfig)
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(True)
        assert f"{part}.weight is trained" in refusal(model, tmp_path)


class Meanwhile(TrainerCallback):
    """Do something to a weight of the base in the middle of training."""

    def __init__(self, do, step=3):
        self.do, self.step = do, step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.do(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)


def test_a_base_that_changes_meanwhile(tmp_path, caplog):
    """A callback that unfreezes it is refused; after one that changes it, prompts are computed again."""

    def run(cls, do, darel=None):
        model = adapted("llama", ReaderLoraConfig)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        trainer = cls(
            model=model,
            args=arguments(tmp_path, **GENTLE, num_train_epochs=2),
            train_dataset=data(),
            data_collator=PadCollator(),
            callbacks=[Meanwhile(do)],
            **({"darel": DarelConfig(**darel)} if darel else {}),
        )
        trainer.train()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, start

    message = r"prompt_cache='ram': .*layers\.0\.mlp\.up_proj\.base_layer\.weight is trained, .*; set it to None"
    with pytest.raises(ValueError, match=message):
        run(DarelTrainer, lambda weight: weight.requires_grad_(True), {"prompt_cache": "ram"})
    wanted, start = run(Trainer, lambda weight: weight.mul_(1.5))
    found, _ = run(DarelTrainer, lambda weight: weight.mul_(1.5), {"prompt_cache": "ram"})
    assert distance(found, wanted, start) < 1e-4
    assert caplog.text.count("up_proj.base_layer.weight was changed while training lasts") == 1


def test_a_row_that_is_all_padding(tmp_path):
    inputs = rows([(5, 4), (4, 3)])
    for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        inputs[key][1] = value
    model = adapted("llama", ReaderLoraConfig).train()
    cache = cache_for(model, tmp_path)
    assert cache.why_not(lambda: rows([(5, 4), (4, 3)])) is None
    wanted = model(**inputs).loss
    torch.testing.assert_close(model(**cache.transform(inputs)).loss, wanted, rtol=1e-5, atol=0)


# ---- aLoRA ----

END = [61, 62]


def invoked_rows(lengths):
    """Rows whose prompts end with the same two tokens, which occur nowhere else."""
    made = rows(lengths)
    made["input_ids"][made["input_ids"] >= END[0]] = 7
    for ids, labels in zip(made["input_ids"], made["labels"], strict=True):
        first = int(labels.ne(-100).nonzero()[0])
        ids[first - 2 : first] = torch.tensor(END)
    return made


def alora(family, made):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return moved(get_peft_model(make_base(family), completion_lora(config, items_of(made)))).train()


@pytest.mark.parametrize("most", [0, 16])  # rows of few lengths, as where products are in 16 bits on a CPU
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_alora_as_peft_trains_it(family, way, most, tmp_path, monkeypatch):
    monkeypatch.setattr(PromptCache, "is_narrow", lambda self, device: most > 0)
    inputs = invoked_rows([(7, 5), (10, 3), (2, 6), (3, 4), (12, 2)])
    model = alora(family, inputs)
    assert model.active_peft_config.alora_invocation_tokens == END
    loss = model(**inputs).loss  # PEFT's own masked forward, on the padded batch
    loss.backward()
    wanted = gradients(model)
    cache = cache_for(model, tmp_path, way)
    assert cache.why_not(lambda: inputs) is None
    model.zero_grad()
    row = cache.transform(inputs)
    assert row["input_ids"].shape[1] < int(inputs["attention_mask"].sum()) - 15 + most
    found = model(**row).loss
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert distance(gradients(model), wanted) < 1e-5


def test_other_rows_without_padding_are_not_for_readers(tmp_path):
    model = adapted("llama", ReaderLoraConfig)
    trainer = cache_for(model, tmp_path).trainer
    assert "a reader looks for the prompt of each sample" in PaddingFree(trainer).why_not(None)
    with acting_everywhere(model):
        assert PaddingFree(trainer).why_not(None) is None


def test_alora_rows_without_their_tokens(tmp_path):
    inputs = invoked_rows([(7, 5), (6, 4)])
    model = alora("llama", inputs)
    inputs["input_ids"][1, 4:6] = 9
    reason = cache_for(model, tmp_path).why_not(lambda: inputs)
    assert "row 1 of a batch does not have them" in reason


def test_completion_lora_finds_what_prompts_end_with():
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def found(*prompts, completion=(40, 41)):
        items = [
            {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + list(completion)}
            for prompt in prompts
        ]
        return completion_lora(config, items).alora_invocation_tokens

    assert found([1, 2, 3, 4], [9, 3, 4], [5, 5, 3, 4]) == [3, 4]
    assert config.alora_invocation_tokens is None
    with pytest.raises(ValueError, match=r"dataset: the prompt of row 1 ends with \[3, 5\], others with \[2, 3, 4\]"):
        found([1, 2, 3, 4], [3, 5])
    with pytest.raises(ValueError, match=r"the completion of row 0 has \[4\] again"):
        found([1, 4], [2, 4], completion=(8, 4, 9))
