"""Per-sample losses against plain loops, and against the models' own losses."""

import pytest
import torch
from helpers import PadCollator, tiny_gpt2, token_data
from torch.nn import functional as F

from darel_hf.scoring.losses import per_sample_losses, token_losses, weighted_loss


def oracle(logits, labels, shift, smoothing=0.0):
    """Ten obvious lines: the mean over label positions, one by one."""
    losses, counts = [], []
    for scores, row in zip(logits, labels, strict=True):
        if shift:
            scores, row = scores[:-1], row[1:]
        kept = [(s, t) for s, t in zip(scores, row, strict=True) if t != -100]
        values = [F.cross_entropy(s[None], t[None], label_smoothing=smoothing) for s, t in kept]
        losses.append(torch.stack(values).mean() if values else torch.tensor(0.0))
        counts.append(len(kept))
    return torch.stack(losses), torch.tensor(counts)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_against_an_oracle(shift, smoothing, monkeypatch):
    monkeypatch.setattr("darel_hf.scoring.losses.CHUNK", 7)  # so that chunks end within rows
    torch.manual_seed(0)
    logits = torch.randn(5, 11, 13)
    labels = torch.randint(0, 13, (5, 11))
    labels[labels < 4] = -100
    labels[2] = -100
    ours = per_sample_losses(logits, labels, shift, smoothing, want_correct=True)
    losses, counts = oracle(logits, labels, shift, smoothing)
    torch.testing.assert_close(ours.losses, losses)
    torch.testing.assert_close(ours.n_tokens, counts)
    assert ours.losses[2] == 0 and ours.n_tokens[2] == 0


def test_logits_of_prepended_positions_are_ignored():
    logits, labels = torch.randn(2, 9, 5), torch.randint(0, 5, (2, 6))
    longer = per_sample_losses(logits, labels, shift=True)
    exact = per_sample_losses(logits[:, 3:], labels, shift=True)
    torch.testing.assert_close(longer.losses, exact.losses)


def test_projection_of_hidden_states_equals_full_logits():
    hidden, head = torch.randn(3, 8, 4), torch.nn.Linear(4, 20)
    labels = torch.randint(0, 20, (3, 8))
    labels[:, :3] = -100
    torch.testing.assert_close(
        token_losses(hidden, labels, project=head).losses, token_losses(head(hidden), labels).losses
    )


def test_mean_over_samples_is_the_models_own_loss():
    model = tiny_gpt2().eval()
    batch = PadCollator()([{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in token_data(9)])
    out = model(**batch)
    ours = per_sample_losses(out.logits, batch["labels"], shift=True)
    torch.testing.assert_close((ours.losses * ours.n_tokens).sum() / ours.n_tokens.sum(), out.loss)


def test_classification_regression_and_several_labels():
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, -100, 1, 0])
    ours = per_sample_losses(logits, labels, shift=False, want_correct=True)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours.losses, expected)
    assert ours.n_tokens.tolist() == [1, 1, 1, 0, 1, 1]
    torch.testing.assert_close(ours.correct[labels >= 0], logits.argmax(1).eq(labels).float()[labels >= 0])

    several = (torch.rand(6, 3) > 0.5).float()
    torch.testing.assert_close(
        per_sample_losses(logits, several, False).losses,
        F.binary_cross_entropy_with_logits(logits, several, reduction="none").mean(1),
    )
    target = torch.randn(6)
    torch.testing.assert_close(
        per_sample_losses(logits[:, :1], target, False).losses, (logits[:, 0] - target).square()
    )


def test_unknown_shapes_say_what_to_do():
    with pytest.raises(ValueError, match="pass per_sample_loss="):
        per_sample_losses(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, dtype=torch.long), False)


@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)])
def test_weighted_loss_with_weights_of_one_is_the_plain_loss(count):
    logits = torch.randn(4, 6, 5, requires_grad=True)
    labels = torch.randint(0, 5, (4, 6))
    labels[0, :4] = -100
    samples = per_sample_losses(logits, labels, shift=False)
    ours = weighted_loss(samples, torch.ones(4), count)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, plain / (labels.ne(-100).sum() if count is None else 17))
    ours.backward()
    assert logits.grad.abs().sum() > 0
