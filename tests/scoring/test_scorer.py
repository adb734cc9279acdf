"""Scores of a batch: the model's own losses, one by one."""

import re

import pytest
import torch
from helpers import PadCollator, tiny_gpt2, tiny_lora, token_data
from models import SMALL, gemma, llama, prompt_tuned, t5
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import ImageClassifierOutput

from darel_hf.scoring import (
    BatchScorer,
    skip_identity_adapters,
)


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


def test_a_network_that_returns_nothing_but_logits():
    """Its first row is no tuple's first element."""

    class Bare(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model, x, labels = Bare(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    expected = torch.nn.functional.cross_entropy(model(x), labels, reduction="none")
    torch.testing.assert_close(BatchScorer(model)({"x": x, "labels": labels}).losses, expected.detach())


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


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.7])
def test_a_penalty_says_nothing_of_which_label_a_position_predicts(penalty):
    """AdaLoRA's, or a router's: added to a loss of ln 64, it brought it nearer to that of the wrong labels."""

    class Penalized(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            if outputs.loss is not None:
                outputs.loss = outputs.loss + penalty
            return outputs

    for seed in range(8):
        torch.manual_seed(seed)
        model, rows = Penalized(llama().config).eval(), collate(seed=seed)
        scorer = BatchScorer(model)
        found = scorer(rows).losses
        with torch.no_grad():
            own = [model(**{k: v[i : i + 1] for k, v in rows.items()}).loss.item() - penalty for i in range(7)]
        assert found.tolist() == pytest.approx(own, rel=1e-4)
        assert scorer.reading.matches_own_loss is False


@pytest.mark.parametrize("penalty", [0.0, 1e-4])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_causal_model_of_another_name(penalty, hidden):
    """What its class does not say, its loss does, or the trainer's where its signature hides that it takes labels."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_gpt2()

        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            if labels is None:
                return {"logits": outputs.logits}
            return {"loss": outputs.loss + penalty, "logits": outputs.logits}

    class Hidden(Own):
        def forward(self, **kwargs):
            return super().forward(**kwargs)

    model = Hidden() if hidden else Own()
    scorer = BatchScorer(model, own_loss=lambda inputs: model(**inputs)["loss"])
    assert not scorer.reading.shift
    scorer(collate())
    assert scorer.reading.shift


def test_keys_that_only_some_batches_have():
    """A batch with images after one without: what was not there to be handed to the model is not withheld from it."""

    class Optional(GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, labels=None, shift=None):
            embeddings = self.transformer.wte(input_ids)
            if shift is not None:
                embeddings = embeddings + shift[:, None, None] * torch.linspace(-1, 1, embeddings.shape[-1])
            return super().forward(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels)

    model = Optional(tiny_gpt2().config).eval()
    scorer = BatchScorer(
        model, own_loss=lambda inputs: model(**{k: v for k, v in inputs.items() if k != "extra"}).loss
    )
    batch = {**collate(4), "extra": torch.ones(4)}
    scorer(batch)
    moved = {**batch, "shift": torch.full((4,), 0.5)}
    with torch.no_grad():
        own = [model(**{k: v[i : i + 1] for k, v in moved.items() if k != "extra"}).loss.item() for i in range(4)]
    assert scorer(moved).losses.tolist() == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_row_alone_is_rounded_otherwise_than_among_others(penalty, caplog):
    """As in 16 bits, where other shapes take other kernels; of a penalty the warning names both losses."""

    class Rounded(torch.nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x).float() * (1.1 if len(x) > 1 else 1.0)
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels) + penalty
            return ImageClassifierOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    model, labels = Rounded(4, 3).bfloat16(), torch.arange(5) % 3
    scorer = BatchScorer(model)
    scorer({"x": 4 * torch.randn(5, 4).bfloat16(), "labels": labels})
    assert scorer.reading.matches_own_loss is (penalty == 0)
    said = re.findall(r"\((\S+) of a first batch or row\), the loss that trains is (\S+): it adds", caplog.text)
    assert [float(own) - float(ranked) for ranked, own in said] == pytest.approx([penalty] * bool(penalty), abs=1e-3)
