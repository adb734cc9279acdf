"""Scores of a whole data set: whatever the batches, resumable, prompts computed once."""

import weakref

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, tiny_gpt2, tiny_lora, token_data
from models import llama, score, t5
from PIL import Image
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2LMHeadModel,
)

from darel_hf.data import ID_KEY, CarryIds, add_ids
from darel_hf.scoring import (
    BatchScorer,
    read_window,
    score_dataset,
    share_prompts,
)


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
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW", 16)
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


class Spectrograms(torch.utils.data.Dataset):
    """Items of a megabyte; counts the bytes of those that are alive."""

    live = most = 0

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        values = np.full(2**18, index, np.float32)
        self.live += values.nbytes
        self.most = max(self.most, self.live)
        weakref.finalize(values, self._gone, values.nbytes)
        return {"x": values, "labels": index % 3, ID_KEY: index}

    def _gone(self, size):
        self.live -= size


class Hearing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 3)

    def forward(self, x):
        return {"logits": self.layer(x[:, :1] / 100)}


def hear(data, **settings):
    def collate(items):
        return {
            "x": torch.tensor(np.stack([i["x"] for i in items])),
            "labels": torch.tensor([i["labels"] for i in items]),
        }

    torch.manual_seed(0)
    return score_dataset(BatchScorer(Hearing()), data, CarryIds(collate), dict, max_rows=8, **settings)


def test_memory_is_that_of_batches_not_of_so_many_samples(monkeypatch):
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 20 * 2**20)
    data = Spectrograms(100)
    few = hear(data)
    assert data.most <= 20 * 2**20
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 2**40)
    np.testing.assert_allclose(few.losses, hear(data).losses, rtol=1e-6)
    assert data.most == 100 * 2**20


def test_a_killed_pass_over_large_samples_goes_on(tmp_path, monkeypatch):
    """Windows are of as many samples as fit: what is left of a pass must not depend on how many those are now."""
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 20 * 2**20)
    whole = hear(Spectrograms(50), parts=tmp_path)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 7 * 2**20)
    data = Spectrograms(50)
    again = hear(data, parts=tmp_path)
    np.testing.assert_array_equal(again.ids, whole.ids)
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-6)


@pytest.mark.slow
def test_batches_get_smaller_where_memory_is_short():
    """What plain training has room for is no matter of how wide batches of scoring are."""
    model, rows = tiny_gpt2(), []

    def forward(module, args, kwargs):
        if kwargs["input_ids"].numel() > 90:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        rows.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(forward, with_kwargs=True)
    np.testing.assert_allclose(score(model=model, max_tokens=600).losses, score().losses, rtol=1e-5)
    assert max(rows) > 1

    def never(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(never, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        score(model=model)


@pytest.mark.parametrize(
    ("item", "size"),
    [
        ({"x": np.zeros((80, 30), np.float32)}, 9600),
        ({"x": torch.zeros(80, 30)}, 9600),
        ({"x": [[0.5] * 30] * 80}, 76800),
        ({"x": Image.new("RGB", (80, 40))}, 9600),
        ((np.zeros(2400, np.float32), b"1"), 9634),
    ],
    ids=["array", "tensor", "lists", "image", "tuple"],
)
def test_samples_of_any_kind_are_measured(monkeypatch, item, size):
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 10 * size + 5)
    assert len(read_window([item] * 40, range(40))) == 10
    assert len(read_window([item] * 4, range(4))) == 4
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW_BYTES", 5)
    assert len(read_window([item] * 40, range(40))) == 1


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
    assert computed < 0.65 * sum(len(ids) for ids in data["input_ids"])  # what is tried out, included
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


def test_a_collator_that_cuts_off_what_is_long():
    """Prompts are shared without it: then its batches must be the same, those of the longest sample as well."""
    rows = list(references())
    long = np.random.default_rng(1).integers(2, 64, 30).tolist()
    prompt = rows[57]["labels"].count(-100)
    ids = rows[57]["input_ids"][:prompt] + long
    rows[57] = {**rows[57], "input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt + long}

    class Cut(PadCollator):
        def __call__(self, features):
            return super().__call__([{key: value[:24] for key, value in feature.items()} for feature in features])

    data, model = datasets.Dataset.from_list(rows), tiny_gpt2()
    scores = [
        score_dataset(BatchScorer(model), data, CarryIds(Cut()), dict, progress_bar=False, share=share)
        for share in (share_prompts, None)
    ]
    np.testing.assert_array_equal(scores[0].n_tokens, scores[1].n_tokens)
    np.testing.assert_allclose(scores[0].losses, scores[1].losses, rtol=1e-4)


def test_distinct_prompts_are_scored_the_simple_way():
    data = add_ids(token_data(), np.arange(37))
    _, computed = score_counting(tiny_gpt2(), data.remove_columns("group"))
    assert computed >= sum(len(ids) for ids in data["input_ids"])
