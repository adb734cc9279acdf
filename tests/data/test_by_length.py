"""Batches of similar length: every sample once, in the seed's order, with less padding, in a real Trainer."""

from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from helpers import PadCollator, arguments, tiny_lora, token_data
from hypothesis import given, settings
from hypothesis import strategies as st

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.data import sample_lengths
from darel_hf.data.by_length import ShuffledByLength, token_batches


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=400),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_once(lengths, batch_size, seed, epoch):
    sampler, again = (ShuffledByLength(np.array(lengths), batch_size, seed) for _ in range(2))
    for each in (sampler, again):
        each.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) == list(range(len(sampler)))
    assert order == list(again)


def test_batches_are_alike_and_shuffled():
    lengths = np.random.default_rng(0).integers(10, 110, 4003)
    sampler = ShuffledByLength(lengths, 8)
    batches = lengths[list(sampler)[:4000]].reshape(-1, 8)
    drawn = np.random.default_rng(1).permutation(lengths)[:4000].reshape(-1, 8)
    padded, plain = (8 * values.max(1).sum() for values in (batches, drawn))
    assert padded < 1.06 * batches.sum() and plain > 1.5 * drawn.sum()
    assert sampler.positions(8, 8) == pytest.approx(padded / plain, rel=0.02)
    several = ShuffledByLength(lengths, 8 * 16)  # 16 micro-batches of a step, each padded to its own longest
    assert several.positions(8, 8) == pytest.approx(padded / plain, rel=0.06)
    assert ShuffledByLength(lengths, 8 * 1000).positions(8, 8) < 0.7  # a step has more than there is
    longest = batches.max(1)  # no run of long batches, no trend: as many above the median in each tenth of the epoch
    above = (longest > np.median(longest)).reshape(10, 50).mean(1)
    assert above.min() > 0.25 and above.max() < 0.75
    before = list(sampler)
    sampler.set_epoch(1)
    assert before != list(sampler)


class Seen(DarelTrainer):
    """Notes what it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), inputs["attention_mask"].sum(1).tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder, darel, n=64, **settings):
    trainer = Seen(
        model=tiny_lora(),
        args=arguments(folder, num_train_epochs=1, **settings),
        train_dataset=token_data(n),
        data_collator=PadCollator(),
        darel=None if darel is None else DarelConfig(**darel),
    )
    trainer.train()
    trainer.seen = trainer.seen[-trainer.state.global_step :]  # without what was measured before
    return trainer


def waste(batches):
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


@pytest.mark.parametrize(
    "darel",
    [
        {},
        {"offline_keep": 0.5, "offline_rule": "middle"},
        {"online_keep": 0.5},
        {"offline_keep": 0.75, "offline_rule": "middle", "online_keep": 0.5},
    ],
)
def test_less_padding_in_training(tmp_path, darel):
    plain = train(tmp_path / "plain", darel or None)
    ours = train(tmp_path / "ours", {**darel, "batch_by_length": True})
    assert waste(ours.seen) < 0.5 * waste(plain.seen)
    assert list(map(len, ours.seen)) == list(map(len, plain.seen))
    if "online_keep" not in darel:  # the same samples
        assert sorted(chain.from_iterable(ours.seen)) == sorted(chain.from_iterable(plain.seen))
    assert 0.5 < ours.report.plan.costs.padding < 0.95


def test_a_collator_that_pads_to_one_length(tmp_path):
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=token_data(64),
        data_collator=PadCollator(pad_to_multiple_of=32),
        darel=DarelConfig(batch_by_length=True),
    )
    trainer.train()
    assert trainer.report.plan.predicted_time == 1


@pytest.mark.parametrize("source", [list, datasets.Dataset.from_list])
def test_lengths(source):
    items = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},  # of one sequence
        {"input_ids": [1, 2], "labels": [1, 2, 3, 4]},  # of two
    ]
    np.testing.assert_array_equal(sample_lengths(source(items)), [3, 6])
    np.testing.assert_array_equal(sample_lengths(source([{"input_ids": [1, 2], "labels": 1}])), [2])


def test_a_loader_with_an_order_of_its_own(tmp_path):
    class Own(DarelTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Own(
        model=tiny_lora(),
        args=arguments(tmp_path),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(batch_by_length=True),
    )
    with pytest.raises(ValueError, match="batch_by_length=True: get_train_dataloader of this trainer has an order"):
        trainer.train()


def test_a_column_of_lengths_is_believed(tmp_path):
    data = token_data(64)
    data = data.add_column("length", [len(ids) for ids in data["input_ids"]])
    trainer = Seen(
        model=tiny_lora(),
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(batch_by_length=True),
    )
    trainer.train()
    assert trainer.seen == train(tmp_path / "other", {"batch_by_length": True}).seen


def test_what_has_no_length_or_another_order_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length': batch_by_length decides"):
        train(tmp_path, {"batch_by_length": True}, train_sampling_strategy="group_by_length")
    pictures = [{"pixel_values": torch.zeros(3), "labels": 0}] * 4
    trainer = DarelTrainer(
        model=tiny_lora(), args=arguments(tmp_path), train_dataset=pictures, darel=DarelConfig(batch_by_length=True)
    )
    with pytest.raises(ValueError, match="batch_by_length=True: the samples of the training set have no input_ids"):
        trainer.train()


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
