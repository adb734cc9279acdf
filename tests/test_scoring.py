"""Fast scoring equals slow scoring, for many models; a killed pass goes on; saved scores are checked."""

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, tiny_gpt2, tiny_lora, token_data
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from darel_hf.batching import token_batches
from darel_hf.data import ID_KEY, CarryIds, add_ids
from darel_hf.scoring import (
    BatchScorer,
    Scores,
    load_scores,
    match_scores,
    model_fingerprint,
    save_scores,
    score_dataset,
    skip_identity_adapters,
)

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2))


def gemma():
    """Soft-caps its logits after the head, so that the shortcut through the head would be wrong."""
    config = Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.05
    )
    return Gemma2ForCausalLM(config)


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def prompt_tuned():
    return get_peft_model(tiny_gpt2(), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))


def collate(n=7, seed=0):
    rows = token_data(n, seed)
    return PadCollator()([{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in rows])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_lora, llama, gemma, t5, prompt_tuned])
def test_scores_equal_the_models_own_loss_one_by_one(make):
    torch.manual_seed(0)
    model = make().train()
    batch = collate()
    scorer = BatchScorer(model, want_correct=True)
    ours = scorer(batch)
    assert model.training  # the mode is given back
    model.eval()
    for i in range(7):
        with torch.no_grad():
            own = model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
        assert ours.losses[i].item() == pytest.approx(own.item(), rel=1e-4)
    if make is gemma:
        assert scorer.head is None  # found out by itself that the shortcut is wrong here
    if make in (tiny_gpt2, tiny_lora, llama, t5):
        assert scorer.head is not None


def test_classification():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, intermediate_size=64, num_labels=3, hidden_dropout_prob=0.3)
    model = BertForSequenceClassification(config)
    batch = collate()
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    ours = BatchScorer(model)(batch)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(
        ours.losses, torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    )


def test_scoring_draws_nothing_and_needs_no_gradient():
    model = tiny_lora(dropout=0.5).train()
    state = torch.get_rng_state()
    losses = BatchScorer(model)(collate()).losses
    assert torch.equal(state, torch.get_rng_state())
    assert not losses.requires_grad


@pytest.mark.parametrize(("init", "skipped"), [(True, True), ("gaussian", True), (False, False), ("pissa", True)])
def test_adapters_are_skipped_only_while_they_change_nothing(init, skipped):
    """PiSSA changes the base weights to fit its adapter, so that with it off the model is another one."""
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=init)
    torch.manual_seed(0)
    model = get_peft_model(tiny_gpt2(), config)
    scorer, batch = BatchScorer(model), collate()
    before = scorer(batch).losses
    with skip_identity_adapters(scorer, batch) as off:
        torch.testing.assert_close(scorer(batch).losses, before, rtol=1e-5, atol=1e-6)
        if init == "pissa":
            assert not off
        else:
            assert off == skipped


def test_prompt_learning_is_never_skipped():
    scorer = BatchScorer(prompt_tuned())
    with skip_identity_adapters(scorer, collate()) as off:
        assert not off


def score(n=50, model=None, ids=None, **settings):
    data = add_ids(
        token_data(n).select_columns(["input_ids", "attention_mask", "labels"]), np.arange(n) if ids is None else ids
    )
    return score_dataset(BatchScorer(model or tiny_gpt2()), data, CarryIds(PadCollator()), lambda b: b, **settings)


def test_scores_do_not_depend_on_batches():
    one, many = score(max_tokens=1), score(max_tokens=10_000)
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)
    np.testing.assert_array_equal(one.ids, np.arange(50))
    expected = [len(row["input_ids"]) - 2 for row in token_data(50)]
    assert one.n_tokens.tolist() == expected


def test_seq2seq_data_set_through_its_usual_collator():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>")), pad_token="<pad>"
    )
    model = t5().eval()
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9]}] * 3
    rows.append({"input_ids": [5], "attention_mask": [1], "labels": [9, 4, 3, 2]})
    collator = CarryIds(DataCollatorForSeq2Seq(tokenizer, model=model))
    scores = score_dataset(BatchScorer(model), add_ids(rows, np.arange(4)), collator, lambda b: b)
    own = model(input_ids=torch.tensor([[5]]), labels=torch.tensor([[9, 4, 3, 2]])).loss.item()
    assert scores.losses[3] == pytest.approx(own, rel=1e-5)


def test_a_killed_pass_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("darel_hf.scoring.WINDOW", 16)
    whole = score()
    calls = []
    original = BatchScorer.__call__

    def fail_later(self, inputs):
        calls.append(len(inputs["input_ids"]))
        if sum(calls) > 40:
            raise KeyboardInterrupt
        return original(self, inputs)

    monkeypatch.setattr(BatchScorer, "__call__", fail_later)
    with pytest.raises(KeyboardInterrupt):
        score(parts=tmp_path)
    calls.clear()
    monkeypatch.setattr(BatchScorer, "__call__", lambda s, i: calls.append(len(i["input_ids"])) or original(s, i))
    again = score(parts=tmp_path)
    assert sum(calls) == 50 - 32  # two windows of sixteen were saved
    np.testing.assert_array_equal(again.losses, whole.losses)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(1, 300), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_token_batches(lengths, max_tokens, max_rows):
    lengths = np.array(lengths)
    batches = list(token_batches(lengths, max_tokens, max_rows))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens
    assert lengths[batches[0]].max() == lengths.max()  # what may not fit comes first


def test_saved_scores(tmp_path):
    scores = score(ids=np.arange(50) * 2)
    scores = Scores(scores.ids, scores.losses, scores.n_tokens, scores.correct, {"data": "abc"})
    save_scores(scores, tmp_path / "s.parquet")
    loaded = load_scores(tmp_path / "s.parquet")
    matched = match_scores(loaded, np.array([8, 2]), "abc", "s.parquet")
    np.testing.assert_array_equal(matched.losses, scores.losses[[4, 1]])
    with pytest.raises(ValueError, match="made from other data"):
        match_scores(loaded, np.array([2]), "xyz", "s.parquet")
    with pytest.raises(ValueError, match=r"no score for 1 of 2 samples, ids \[3\]"):
        match_scores(loaded, np.array([2, 3]), "abc", "s.parquet")


def test_unreadable_scores(tmp_path):
    with pytest.raises(ValueError, match="darel score"):
        load_scores(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="not a readable parquet"):
        load_scores(tmp_path / "bad.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"sample_id": [1]}), tmp_path / "no_loss.parquet")
    with pytest.raises(ValueError, match="'loss' is missing"):
        load_scores(tmp_path / "no_loss.parquet")
    pq.write_table(pa.table({"sample_id": [1, 2], "loss": [1.0, float("nan")]}), tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match=r"sample ids \[2\]"):
        load_scores(tmp_path / "nan.parquet")


def test_model_fingerprints():
    one, same, other = tiny_gpt2(), tiny_gpt2(), tiny_gpt2(seed=1)
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    with torch.no_grad():
        same.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    assert model_fingerprint(one) != model_fingerprint(same)
    left, right = tiny_lora(), tiny_lora()
    with torch.no_grad():
        for name, parameter in right.named_parameters():
            if "lora_A" in name:
                parameter.add_(1)
    assert model_fingerprint(left) != model_fingerprint(right)
    assert model_fingerprint(left, without_adapters=True) == model_fingerprint(right, without_adapters=True)


# ---- Prompts that are the same ----


def references(n=120, prompts=6, seed=0):
    """Samples with few distinct prompts of different lengths, one of them a single token."""
    draw = np.random.default_rng(seed)
    known = [draw.integers(2, 64, length).tolist() for length in (1, *draw.integers(8, 16, prompts - 1))]
    rows = []
    for i in range(n):
        prompt, target = known[draw.integers(prompts)], draw.integers(2, 64, draw.integers(1, 7)).tolist()
        labels = [-100] * len(prompt) + target
        rows.append({"input_ids": prompt + target, "attention_mask": [1] * len(labels), "labels": labels, ID_KEY: i})
    return datasets.Dataset.from_list(rows)


def score_counting(model, data, want_correct=True):
    """Score a data set; also return how many positions went through the model."""
    positions = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: positions.append(args[0].numel()))
    scorer = BatchScorer(model, want_correct=want_correct)
    scores = score_dataset(scorer, data, CarryIds(PadCollator()), dict, max_tokens=100, progress_bar=False)
    hook.remove()
    return scores, sum(positions)


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_lora, llama])
def test_shared_prompts_give_the_same_scores(make_model):
    torch.manual_seed(0)
    model, data = make_model(), references()
    scores, computed = score_counting(model, data)
    assert computed < 0.6 * sum(len(ids) for ids in data["input_ids"])
    one_by_one = BatchScorer(model, want_correct=True)
    np.testing.assert_array_equal(scores.ids, np.arange(120))
    for i, item in enumerate(data):
        batch = PadCollator()([item])
        alone = one_by_one(batch)
        with torch.no_grad():
            own = model.eval()(**batch).loss
        assert scores.losses[i] == pytest.approx(own.item(), rel=1e-4)
        assert scores.correct[i] == pytest.approx(alone.correct.item())
        assert scores.n_tokens[i] == alone.n_tokens.item()


def test_shared_prompts_at_the_longest_length():
    """A long prompt with a short target beside a short prompt with a long one, and no position to spare."""
    draw, rows = np.random.default_rng(0), []
    for i in range(20):
        prompt, target = (60, 4) if i % 2 else (30, 34)
        ids = [*range(2, 2 + prompt), *draw.integers(2, 64, target).tolist()]
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, ID_KEY: i})
    data, model = datasets.Dataset.from_list(rows), tiny_gpt2()
    assert model.config.n_positions == 64
    scorer = BatchScorer(model)
    scores = score_dataset(scorer, data, CarryIds(PadCollator()), dict, max_tokens=10_000, progress_bar=False)
    alone = [scorer(PadCollator()([item])).losses.item() for item in data]
    np.testing.assert_allclose(scores.losses, alone, rtol=1e-4)


class WithoutCache(GPT2LMHeadModel):
    """Forgets what came before."""

    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class AfterTheCollator(PadCollator):
    """Labels only the last token, whatever the data say."""

    def __call__(self, features):
        batch = super().__call__(features)
        for row, feature in enumerate(features):
            batch["labels"][row, : len(feature["labels"]) - 1] = -100
        return batch


def test_prompts_are_not_shared_where_scores_would_differ():
    data, model = references(), WithoutCache(tiny_gpt2().config)
    for parameter in model.parameters():  # so that a prompt matters: freshly initialized, all tokens are as likely
        parameter.data.mul_(8)
    scores, computed = score_counting(model, data)
    assert computed > sum(len(ids) for ids in data["input_ids"])
    expected = [BatchScorer(model)(PadCollator()([item])).losses.item() for item in data]
    np.testing.assert_allclose(scores.losses, expected, rtol=1e-4)

    model, collator = tiny_gpt2(), AfterTheCollator()
    scores = score_dataset(BatchScorer(model), data, CarryIds(collator), dict, progress_bar=False)
    np.testing.assert_array_equal(scores.n_tokens, 1)
    expected = [BatchScorer(model)(collator([item])).losses.item() for item in data]
    np.testing.assert_allclose(scores.losses, expected, rtol=1e-4)


def test_distinct_prompts_are_scored_the_simple_way():
    data = add_ids(token_data(), np.arange(37))
    _, computed = score_counting(tiny_gpt2(), data.remove_columns("group"))
    assert computed >= sum(len(ids) for ids in data["input_ids"])
