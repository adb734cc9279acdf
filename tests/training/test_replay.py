"""Selected rows replayed through plain Trainer end with the same weights, whatever the model, labels and rule."""

from collections import deque

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import arguments, assert_same_weights, tiny_gpt2, weights
from transformers import Trainer

from darel_hf import RULES, DarelConfig, DarelTrainer, Selector, register_rule

BERT = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
N = 25


@pytest.fixture(autouse=True)
def ones():
    """A rule with weights, all of them 1: then the step must be Trainer's own."""
    register_rule("test_ones", weigh=lambda s, k, p: np.ones(len(p)))(lambda s, k, g: s.losses)
    yield
    del RULES["test_ones"]


class Pad:
    """Pad what is in `fill`, stack the rest."""

    def __init__(self, floats=False, **fill):
        self.fill, self.floats = {"input_ids": 0, "attention_mask": 0, **fill}, floats

    def __call__(self, features):
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {}
        for key in features[0]:
            values = [feature[key] for feature in features]
            if key in self.fill:
                values = [list(value) + [self.fill[key]] * (width - len(value)) for value in values]
            batch[key] = torch.tensor(np.array(values))
        if self.floats:
            batch["labels"] = batch["labels"].float()
        return batch


def texts():
    draw = np.random.default_rng(0)
    rows = [draw.integers(2, 64, draw.integers(4, 20)).tolist() for _ in range(N)]
    return draw, [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def bert(name, **settings):
    torch.manual_seed(0)
    return getattr(tf, f"BertFor{name}")(tf.BertConfig(**BERT, **settings))


def mixture():
    torch.manual_seed(0)
    config = tf.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, output_router_logits=True, router_aux_loss_coef=0.001,
        pad_token_id=0,
    )  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


def t5():
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def hearing():
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, pad_token_id=0,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    return tf.Wav2Vec2ForCTC(config)


class Images(torch.nn.Module):
    """A classifier whose labels are classes, or probabilities of them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.layers(pixel_values))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def images():
    torch.manual_seed(0)
    return Images()


def stack(features):
    return {key: torch.tensor(np.stack([feature[key] for feature in features])) for key in features[0]}


def tasks():
    draw, rows = texts()
    some = [[int(t) if draw.random() > 0.3 else -100 for t in draw.integers(0, 5, len(r["input_ids"]))] for r in rows]
    parts = [{**row, "labels": labels} for row, labels in zip(rows, some, strict=True)]
    causal = [{**row, "labels": row["input_ids"]} for row in rows]
    pixels = draw.normal(size=(N, 12)).astype(np.float32)
    soft = draw.dirichlet(np.ones(3), N).astype(np.float32)
    labelled = Pad(labels=-100)
    return {
        "causal LM": (tiny_gpt2, causal, labelled),
        "mixture of experts": (mixture, causal, labelled),
        "masked LM": (
            lambda: bert("MaskedLM"),
            parts,
            labelled,
        ),
        "sequence to sequence": (t5, [{**row, "labels": row["input_ids"][::-1]} for row in rows], labelled),
        "token classes": (
            lambda: bert("TokenClassification", num_labels=5),
            parts,
            labelled,
        ),
        "classes": (
            lambda: bert("SequenceClassification", num_labels=3),
            [{**row, "labels": int(draw.integers(3))} for row in rows],
            Pad(),
        ),
        "regression": (
            lambda: bert("SequenceClassification", num_labels=1),
            [{**row, "labels": float(draw.normal())} for row in rows],
            Pad(floats=True),
        ),
        "several targets": (
            lambda: bert("SequenceClassification", num_labels=3, problem_type="regression"),
            [{**row, "labels": draw.normal(size=3)} for row in rows],
            Pad(floats=True),
        ),
        "several labels": (
            lambda: bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
            [{**row, "labels": draw.integers(0, 2, 3)} for row in rows],
            Pad(floats=True),
        ),
        "multiple choice": (
            lambda: bert("MultipleChoice"),
            [
                {"input_ids": draw.integers(2, 64, (3, 8)), "attention_mask": np.ones((3, 8), int), "labels": i % 3}
                for i in range(N)
            ],
            stack,
        ),
        "question answering": (
            lambda: bert("QuestionAnswering"),
            [{**row, "start_positions": i % 4, "end_positions": 3} for i, row in enumerate(rows)],
            Pad(),
        ),
        "CTC": (
            hearing,
            [
                {"input_values": x, "labels": y}
                for x, y in zip(
                    draw.normal(size=(N, 80)).astype(np.float32), draw.integers(1, 12, (N, 5)), strict=True
                )
            ],
            stack,
        ),
        "images": (images, [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(pixels)], stack),
        "images, soft": (images, [{"pixel_values": x, "labels": y} for x, y in zip(pixels, soft, strict=True)], stack),
    }


TASKS = tasks()
KINDS = {
    "random": {"online_rule": "random"},
    "hardest": {"online_rule": "hardest"},
    "weights": {"online_rule": "test_ones", "length_correction": False},
    "sliced": {"online_rule": "hardest", "online_backward": "sliced"},
    "unpad": {"online_rule": "hardest", "unpad": True},
}
CAUSAL = ("causal LM", "mixture of experts")


def refused(task, kind):
    """What a refusal says, or `None`. (Sliced steps fall back, with a warning; then they are subset steps.)"""
    if kind == "unpad" and task not in CAUSAL:
        return "unpad=True: .* is no causal language model; set it to False"
    if task == "question answering" and kind != "random":
        return "BertForQuestionAnswering takes no labels for; pass per_sample_loss="
    if task == "CTC" and kind != "random":
        return r"labels=\(\d, 5\): the model predicts 18 positions, .*; pass per_sample_loss="
    if task == "mixture of experts" and kind == "unpad":  # the router's loss looks at the mask of a padded batch
        return "Qwen2MoeForCausalLM cannot be trained without padding: "
    if task == "mixture of experts" and kind == "weights":
        return "its loss would change by .*, so the rule's weights cannot be honoured"
    return None


def settings(accumulation):
    return {
        "num_train_epochs": 2, "remove_unused_columns": False, "gradient_accumulation_steps": accumulation,
        "optim": "sgd", "learning_rate": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "sliced")) for k in KINDS])
@pytest.mark.parametrize("task", TASKS)
def test_plain_trainer_on_the_chosen_rows(tmp_path, monkeypatch, task, kind, accumulation):
    if kind == "sliced" and accumulation == 1 and task not in ("causal LM", "classes"):
        pytest.skip("compiling takes seconds; accumulation is the harder case")
    make, data, collator = TASKS[task]
    chosen, select = [], Selector.select

    def remember(self, ids, *args, **kwargs):
        rows, weights = select(self, ids, *args, **kwargs)
        chosen.append(np.asarray(ids)[rows].tolist())
        return rows, weights

    monkeypatch.setattr(Selector, "select", remember)
    darel = DarelConfig(online_keep=0.5, **KINDS[kind])
    ours = DarelTrainer(
        model=make(),
        args=arguments(tmp_path / "ours", **settings(accumulation)),
        train_dataset=data,
        data_collator=collator,
        darel=darel,
    )
    if refused(task, kind) is not None:
        with pytest.raises(ValueError, match=refused(task, kind)):
            ours.train()
        return
    ours.train()
    left = deque(chosen)

    class Replayed:
        dataset = data

        def __len__(self):
            return len(chosen) // 2

        def __iter__(self):
            return iter([collator([data[i] for i in left.popleft()]) for _ in range(len(self))])

    class Replay(Trainer):
        def get_train_dataloader(self):
            return Replayed()

    plain = Replay(
        model=make(),
        args=arguments(tmp_path / "plain", **settings(accumulation)),
        train_dataset=data,
        data_collator=collator,
    )
    plain.train()
    if kind in ("random", "hardest"):
        assert_same_weights(weights(plain.model), weights(ours.model))
    start = weights(make())
    for name, wanted in weights(plain.model).items():
        if wanted.is_floating_point():
            moved = (wanted - start[name]).abs().max()
            assert (weights(ours.model)[name] - wanted).abs().max() <= 1e-4 * moved + 1e-6, name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def answers(outputs, inputs):
    start, end = (
        torch.nn.functional.cross_entropy(outputs[f"{side}_logits"], inputs[f"{side}_positions"], reduction="none")
        for side in ("start", "end")
    )
    return (start + end) / 2


def heard(outputs, inputs):
    scores = outputs["logits"].log_softmax(-1).transpose(0, 1)
    lengths, labels = torch.full((scores.shape[1],), len(scores)), inputs["labels"]
    found = torch.nn.functional.ctc_loss(scores, labels, lengths, labels.ge(0).sum(1), reduction="none")
    return found / labels.ge(0).sum(1)


@pytest.mark.parametrize(("task", "losses"), [("question answering", answers), ("CTC", heard)])
def test_the_remedy_of_what_is_refused(tmp_path, task, losses):
    make, data, collator = TASKS[task]
    if task == "question answering":  # of one width: this head's loss counts padding
        data = [{key: value[:4] if isinstance(value, list) else value for key, value in row.items()} for row in data]
    model = make().eval()
    with torch.no_grad():
        own = [model(**collator([row])).loss.item() for row in data]
    trainer = DarelTrainer(
        model=make(), args=arguments(tmp_path, **settings(2)), train_dataset=data, data_collator=collator,
        per_sample_loss=losses,
        darel=DarelConfig(offline_keep=0.8, offline_rule="middle", online_keep=0.5, online_rule="infobatch"),
    )  # fmt: skip
    trainer.train()
    np.testing.assert_allclose(trainer.report.offline_losses, own, rtol=1e-4)
    assert trainer.report.rows_backpropagated == 2 * (4 + 4 + 2)
