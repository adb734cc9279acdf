"""The offline pass on rows in which what samples begin with is there once: losses of single samples, kept prompts."""

import logging

import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from readers import GENTLE, adapted, items_of, make_base, oracle, rows
from transformers import BloomConfig, BloomForCausalLM

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import PromptCache, share_rows, unpad
from darel_hf.accelerators.frozen_base import FrozenBase
from darel_hf.accelerators.scores import SharedRows
from darel_hf.adapters import completion_lora
from darel_hf.data import ID_KEY, CarryIds, add_ids, by_beginning
from darel_hf.scoring import BatchScorer, SharedPrompts, save_scores, score_dataset

COLUMNS = ["input_ids", "attention_mask", "labels"]


def nested(n=28, seed=0):
    """Samples whose prompts begin like one another, three levels of them; one of a single token, one taught whole."""
    lengths = [(1, 3), (12, 4), (18, 2), (18, 5), (23, 3), (6, 6), (1, 1)]
    made = rows([lengths[i % len(lengths)] for i in range(n)], seed=seed, same_prompts=True)
    made["labels"][0] = made["input_ids"][0].masked_fill(made["attention_mask"][0] == 0, -100)
    return items_of(made)


def scored(model, table, share=share_rows, **options):
    table = add_ids(table.select_columns(COLUMNS), np.arange(len(table)))
    scorer = BatchScorer(model, want_correct=True)
    return score_dataset(scorer, table, CarryIds(PadCollator()), dict, progress_bar=False, share=share, **options)


def one_by_one(model, table):
    """Losses by the model's own loss, and how many labels it predicts."""
    found = []
    for row in table:
        batch = PadCollator()([row])
        with torch.no_grad():
            outputs = model.eval()(**batch)
        wanted = batch["labels"][0, 1:]
        own = wanted.ne(-100)
        right = outputs.logits[0, :-1].argmax(-1)[own].eq(wanted[own]).float().mean()
        found.append((outputs.loss.item(), right.item()))
    return np.array(found).T


@pytest.fixture
def ways(monkeypatch):
    """Which way batches were scored, and how many samples each had."""
    found = []
    for cls in (SharedRows, SharedPrompts):
        batches = cls.batches

        def spy(self, *size, batches=batches):
            for chosen, samples in batches(self, *size):
                found.append((type(self), len(chosen)))
                yield chosen, samples

        monkeypatch.setattr(cls, "batches", spy)
    return found


def computed(model):
    """Count the positions that a model computes."""
    counted = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: counted.append(args[0].numel()))
    return counted


@pytest.mark.parametrize(
    ("family", "start"),
    [
        ("gpt2", "trained"),
        ("llama", "identity"),
        ("mistral", "trained"),
        pytest.param("qwen3", "trained", marks=pytest.mark.slow),
        pytest.param("gpt2", "base", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_single_samples(family, start, ways):
    model, table = make_base(family) if start == "base" else adapted(family), nested()
    if start == "identity":
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(make_base(family), config)
    counted = computed(model)
    scores = scored(model, table, max_tokens=100)
    in_rows = counted[-len(ways) :]
    losses, correct = one_by_one(model, table)
    np.testing.assert_allclose(scores.losses, losses, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(scores.correct, correct)
    assert len(ways) > 1 and {way for way, _ in ways} == {SharedRows}
    assert max(in_rows) <= 100 and sum(in_rows) < 0.5 * sum(map(len, table["input_ids"]))


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 5), min_size=2, max_size=9), min_size=2, max_size=12),
    st.integers(1, 60),
    st.integers(1, 6),
    st.data(),
)
def test_any_samples_in_any_batches(samples, max_tokens, max_rows, draw):
    starts = [draw.draw(st.integers(0, len(sample) - 1)) for sample in samples]
    table = [
        {"input_ids": s, "attention_mask": [1] * len(s), "labels": [-100] * k + s[k:], ID_KEY: i}
        for i, (s, k) in enumerate(zip(samples, starts, strict=True))
    ]
    model = make_base("llama")
    shared = share_rows(BatchScorer(model), table, lambda chosen: CarryIds(PadCollator())([table[i] for i in chosen]))
    if shared is None:  # little is in common
        return
    seen, losses = [], np.zeros(len(table))
    for chosen, found in shared.batches(max_tokens, max_rows):
        tokens = [np.array(samples[i]) for i in chosen]
        _, common = by_beginning(tokens)
        assert len(chosen) == 1 or sum(map(len, tokens)) - common.sum() <= max_tokens
        assert len(chosen) <= max_rows
        seen += chosen.tolist()
        losses[chosen] = found.losses.numpy()
    assert sorted(seen) == list(range(len(table)))
    wanted = [BatchScorer(model)(PadCollator()([row])).losses.item() for row in table]
    np.testing.assert_allclose(losses, wanted, rtol=2e-5, atol=1e-6)


def test_any_attention_of_the_registry_is_put_back(ways):
    model = make_base("llama")
    wanted = scored(model, nested()).losses
    model.set_attn_implementation("eager")
    np.testing.assert_allclose(scored(model, nested()).losses, wanted, rtol=2e-5, atol=1e-6)
    assert {way for way, _ in ways} == {SharedRows}
    assert model.config._attn_implementation == "eager"
    model.forward = None  # whatever happens
    with pytest.raises(TypeError):
        scored(model, nested())
    assert model.config._attn_implementation == "eager"


def test_models_without_such_an_attention_copy_keys_and_values(ways, caplog):
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    scores = scored(model, nested())
    np.testing.assert_allclose(scores.losses, one_by_one(model, nested())[0], rtol=2e-5)
    assert {way for way, _ in ways} == {SharedPrompts} and not caplog.records


def test_rows_that_would_change_scores_are_not_taken(ways, caplog):
    """A model that looks at more than its attention does: here how many tokens a row has."""
    caplog.set_level(logging.INFO)

    model = make_base("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output * (1 + output.shape[1] / 50))
    scores = scored(model, nested())
    assert "samples are scored the plain way: [" in caplog.text
    assert SharedRows not in {way for way, _ in ways}
    assert np.isfinite(scores.losses).all()


@pytest.mark.slow
def test_a_collator_that_cuts_off_what_is_long(ways):
    """What a batch holds is for the collator to say, also of samples that are not tried out."""

    class Cut(PadCollator):
        def __call__(self, features):
            return super().__call__(
                [{key: value[:20] for key, value in f.items() if key in COLUMNS} for f in features]
            )

    model, table = make_base("gpt2"), nested()
    ids = add_ids(table, np.arange(len(table)))
    found = score_dataset(
        BatchScorer(model), ids, CarryIds(Cut()), dict, progress_bar=False, share=share_rows, max_tokens=48
    )
    wanted = [BatchScorer(model)(Cut()([row])).losses.item() for row in table]
    np.testing.assert_allclose(found.losses, wanted, rtol=2e-5)
    assert {way for way, _ in ways} == {SharedRows}


def test_a_killed_pass_goes_on_where_it_was(tmp_path, monkeypatch, ways):
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW", 16)
    model, table = make_base("llama"), nested(40)
    whole = scored(model, table)
    batches = len(ways)

    def killed(self, *size):
        if (tmp_path / "rank0of1-from16.npy").exists():
            raise KeyboardInterrupt
        yield from once(self, *size)

    once = SharedRows.batches
    monkeypatch.setattr(SharedRows, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(model, table, parts=tmp_path)
    monkeypatch.setattr(SharedRows, "batches", once)
    ways.clear()
    again = scored(model, table, parts=tmp_path)
    assert 0 < len(ways) < batches
    np.testing.assert_array_equal(again.losses, whole.losses)


@pytest.mark.slow
def test_batches_get_smaller_where_memory_is_short():
    model = make_base("llama")
    wanted = scored(model, nested()).losses

    def forward(module, args, kwargs):
        if kwargs["input_ids"].numel() > 120:  # no more than what is tried out takes
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(forward, with_kwargs=True)
    np.testing.assert_allclose(scored(model, nested()).losses, wanted, rtol=2e-5)


# ---- With a prompt cache ----


class Spy(DarelTrainer):
    """Remembers which prompts were computed before the first step, and after."""

    def _prepare_run(self):
        self.before, self.after = [], []
        super()._prepare_run()
        self.before, Spy.counted = Spy.counted, self.after
        self.first_epochs = [accelerator.first_epoch for accelerator in self._run.planner.accelerators]


@pytest.fixture
def counted(monkeypatch):
    record = FrozenBase.record

    def counting(self, prompts):
        Spy.counted.extend(prompts)
        return record(self, prompts)

    monkeypatch.setattr(FrozenBase, "record", counting)
    Spy.counted = []


def trainer_for(folder, model, table, **darel):
    trainer = Spy(
        model=model,
        args=arguments(folder, **GENTLE),
        train_dataset=table,
        data_collator=PadCollator(),
        darel=DarelConfig(offline_keep=0.5, offline_rule="middle", **darel),
    )
    return trainer


def different(n=48):
    """Samples whose prompts are all different: more than are looked at before the pass."""
    return items_of(rows([(3 + i % 5, 2 + i % 4) for i in range(n)]))


def prompts_of(table):
    return [tuple(row["input_ids"][: row["labels"].count(-100) - 1]) for row in table]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("mistral", "ram"),
        pytest.param("gpt2", "disk", marks=pytest.mark.slow),
        pytest.param("qwen3", "recompute", marks=pytest.mark.slow),
        pytest.param("llama", "ram", marks=pytest.mark.slow),
    ],
)
def test_scores_of_a_reader_are_those_of_the_oracle_and_fill_its_store(family, way, tmp_path, counted, ways, caplog):
    table = different()
    trainer = trainer_for(tmp_path, adapted(family, ReaderLoraConfig), table, prompt_cache=way)
    trainer.train()
    stock, wanted = adapted(family), []
    for row in table:
        batch = PadCollator()([row])
        wanted.append(float(oracle(stock, batch)[0].detach()) / int(batch["labels"].ne(-100).sum()))
    np.testing.assert_allclose(trainer.report.offline_losses, wanted, rtol=1e-5)
    assert {way for way, _ in ways} == {SharedRows} and "prompts change" not in caplog.text
    known = {*prompts_of(table)}
    assert known <= {*trainer.before}
    # Once, and once more while it is tried out, with four rows; in steps none any more.
    if way != "recompute":
        assert sum(prompt in known for prompt in trainer.before) <= len(known) + 2 * 4 and len(known) > 40
        assert not known & {*trainer.after}


def test_a_reader_at_its_start_fills_the_store(tmp_path, counted, ways):
    """Adapters that change nothing are switched off for scoring; what is kept of prompts is the same."""
    config = ReaderLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    table = different()
    trainer = trainer_for(tmp_path, get_peft_model(make_base("qwen3"), config), table, prompt_cache="ram")
    trainer.train()
    np.testing.assert_allclose(trainer.report.offline_losses, one_by_one(make_base("qwen3"), table)[0], rtol=2e-5)
    assert not {*prompts_of(table)} & {*trainer.after}
    assert {way for way, _ in ways} == {SharedRows}
    # Scores are those of the base all the same: another start of the adapters takes them again.
    torch.manual_seed(5)
    again = trainer_for(tmp_path, get_peft_model(make_base("qwen3"), config), table, prompt_cache="ram")
    again.train()
    assert again.report.scores_reused


def test_alora_fills_the_store(tmp_path, counted, ways):
    made = rows([(4 + i % 4, 2 + i % 3) for i in range(16)], same_prompts=True)
    for ids, labels in zip(made["input_ids"], made["labels"], strict=True):
        ids[: int(labels.ne(-100).nonzero()[0])][-2:] = torch.tensor([61, 62])
        ids[labels.ne(-100)] = ids[labels.ne(-100)].clamp(max=60)
    table = items_of(made)
    config = completion_lora(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), table)

    def model():
        torch.manual_seed(1)
        model = get_peft_model(make_base("llama"), config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
        return model

    trainer = trainer_for(tmp_path, model(), table, prompt_cache="ram")
    trainer.train()
    np.testing.assert_allclose(trainer.report.offline_losses, one_by_one(model(), table)[0], rtol=2e-5)
    assert {way for way, _ in ways} == {SharedRows}
    assert not {prompt for prompt in trainer.after if len(prompt) > 2} & {*trainer.before}


def test_more_prompts_than_are_kept_of_the_data_are_no_change(tmp_path, counted, caplog, monkeypatch):
    """The store knows the prompts of all samples, the loop visits half of them, its first epoch computes none."""
    monkeypatch.setattr(PromptCache, "first_epoch", 3.0)
    monkeypatch.setattr(PromptCache, "measure", unpad.PaddingFree.measure)
    table = items_of(rows([(5 + i % 3, 3) for i in range(40)]))
    trainer = trainer_for(tmp_path, adapted("llama", ReaderLoraConfig), table, prompt_cache="ram")
    trainer.train()
    assert "prompts change" not in caplog.text and trainer.first_epochs == [1.0]


@pytest.mark.parametrize("there", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_auto_counts_the_pass(tmp_path, there, counted, capsys):
    """A prompt that is read in the pass and in the only epoch is worth keeping."""
    table, darel = items_of(rows([(5 + i % 3, 3) for i in range(20)])), {}
    if there:
        save_scores(scored(make_base("llama"), table), tmp_path / "there.parquet")
        darel = {"scores": str(tmp_path / "there.parquet")}
    trainer = trainer_for(tmp_path, adapted("llama", ReaderLoraConfig), table, prompt_cache="auto", **darel)
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert f"prompt_cache='auto' is {'recompute' if there else 'ram'!r}" in capsys.readouterr().out
