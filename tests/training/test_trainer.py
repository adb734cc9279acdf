"""The trainer: equal to Trainer when off, exact in what it trains on, right in loss, schedule, tracking and errors."""

import itertools
import logging
import math

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    PadCollator,
    arguments,
    assert_same_weights,
    tiny_gpt2,
    tiny_lora,
    token_data,
    weights,
)
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback

from darel_hf import DarelConfig, DarelMixin, DarelSeq2SeqTrainer, DarelTrainer
from darel_hf.scoring import load_scores
from darel_hf.scoring.losses import per_sample_losses


def make(cls, folder, model=None, data=None, collator=None, callbacks=None, darel=None, extra=None, **settings):
    """Build a trainer of class `cls` on tiny data."""
    keywords = dict(extra or {})
    if darel is not None:
        keywords["darel"] = darel
    return cls(
        model=model if model is not None else tiny_lora(),
        args=arguments(folder, **settings),
        train_dataset=token_data() if data is None else data,
        data_collator=collator or PadCollator(),
        callbacks=callbacks,
        **keywords,
    )


# ---- Off: equal to Trainer ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
        {"max_steps": 7},
    ],
    ids=["plain", "accumulation", "length-grouped", "smoothing", "max-steps"],
)
@pytest.mark.parametrize("cls", [DarelTrainer, type("Mine", (DarelMixin, Trainer), {})])
def test_off_equals_trainer_bit_for_bit(tmp_path, settings, cls):
    plain = make(Trainer, tmp_path / "a", tiny_lora(dropout=0.1), **settings)
    plain.train()
    ours = make(cls, tmp_path / "b", tiny_lora(dropout=0.1), darel=DarelConfig(1.0, 1.0), **settings)
    ours.train()
    assert_same_weights(weights(plain.model), weights(ours.model))
    assert [entry.get("loss") for entry in plain.state.log_history] == [
        entry.get("loss") for entry in ours.state.log_history
    ]


def test_operations_are_counted_as_trainer_counts_them(tmp_path):
    """Parameters once in a run, not in each step; a class below that counts in its own way is asked each time."""

    class Own(Trainer):
        def floating_point_ops(self, inputs):
            return 7

    class OwnDarel(DarelMixin, Own):
        pass

    darel = DarelConfig(unpad=True)
    for plain, ours, each in ((Trainer, DarelTrainer, None), (Own, OwnDarel, 7)):
        counts = []
        for cls, more in ((plain, {}), (ours, {"darel": darel})):
            trainer = make(cls, tmp_path / cls.__name__, **more)
            trainer.train()
            counts.append(trainer.state.total_flos)
        assert counts[0] == counts[1] > 0 and (each is None or counts[0] == each * trainer.state.global_step)


def test_tracking_changes_no_weight(tmp_path):
    plain = make(Trainer, tmp_path / "a", tiny_lora(dropout=0.1))
    plain.train()
    ours = make(DarelTrainer, tmp_path / "b", tiny_lora(dropout=0.1), darel=DarelConfig(track=True))
    ours.train()
    assert_same_weights(weights(plain.model), weights(ours.model))


def test_seq2seq_trainer_and_evaluation(tmp_path):
    args = Seq2SeqTrainingArguments(**{**arguments(tmp_path).to_dict(), "eval_strategy": "epoch"})
    trainer = DarelSeq2SeqTrainer(
        model=tiny_lora(),
        args=args,
        train_dataset=token_data(),
        eval_dataset=token_data(9, seed=1),
        data_collator=PadCollator(),
        darel=DarelConfig(online_keep=0.5, online_rule="hardest"),
    )
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


# ---- On: exactly the planned rows, their loss and gradient, and the whole schedule ----


class CountRows:
    """Count the rows that enter the model with gradients on."""

    def __init__(self, model):
        self.rows = []
        model.get_base_model().transformer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        if torch.is_grad_enabled():
            self.rows.append((args[0] if args else kwargs["input_ids"]).shape[0])


@pytest.mark.parametrize("online_keep", [0.2, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_in_backward_are_the_planned_number(tmp_path, online_keep, accumulation):
    model = tiny_lora()
    counter = CountRows(model)
    config = DarelConfig(online_keep=online_keep, online_rule="hardest")
    trainer = make(DarelTrainer, tmp_path, model, darel=config, gradient_accumulation_steps=accumulation)

    class StartHere(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            counter.rows.clear()  # what was measured before the loop does not count

    trainer.add_callback(StartHere())
    trainer.train()
    candidates = round(4 / online_keep)
    full, rest = divmod(37, candidates)
    expected = [4] * full + ([max(1, round(4 * rest / candidates))] if rest else [])
    assert counter.rows == expected * 2
    assert trainer.report.rows_backpropagated == sum(expected) * 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_plain_trainer_on_just_the_chosen_rows(tmp_path, accumulation, smoothing):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "label_smoothing_factor": smoothing,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
    }
    data = token_data(32)
    ours = make(
        DarelTrainer, tmp_path / "a", data=data, darel=DarelConfig(online_keep=0.5, online_rule="hardest"), **settings
    )
    chosen = []
    select = ours.get_batch_samples

    def remember(*args):
        batches, count = select(*args)
        chosen.extend(batch["input_ids"].shape[0] for batch in batches)
        taken.extend(batch for batch in batches)
        return batches, count

    taken = []
    ours.get_batch_samples = remember
    ours.train()
    # The rows that were chosen, found again in the data by their tokens, in order, for a plain Trainer.
    by_tokens = {tuple(row["input_ids"]): i for i, row in enumerate(data)}
    order = []
    for batch in taken:
        lengths = batch["attention_mask"].sum(1)
        order += [by_tokens[tuple(row[:n].tolist())] for row, n in zip(batch["input_ids"], lengths, strict=True)]
    plain = make(Trainer, tmp_path / "b", data=data.select(order), **settings)
    plain.train()
    assert chosen == [4] * 4
    left, right = weights(ours.model), weights(plain.model)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7)
    ours_log = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    plain_log = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    np.testing.assert_allclose(ours_log, plain_log, rtol=1e-6)


@pytest.mark.parametrize("offline_keep", [1.0, 0.6])
@pytest.mark.parametrize("online_keep", [1.0, 0.4])
@pytest.mark.parametrize("rescore_every", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_learning_rate_ends_at_zero(tmp_path, offline_keep, online_keep, rescore_every, accumulation):
    config = DarelConfig(offline_keep, online_keep, rescore_every, offline_rule="middle")
    trainer = make(DarelTrainer, tmp_path, darel=config, gradient_accumulation_steps=accumulation, num_train_epochs=3)
    trainer.train()
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}
    assert trainer.state.global_step == trainer.state.max_steps


def test_fresh_and_remembered_epochs(tmp_path):
    """Epochs 0 and 2 score by a forward pass, epochs 1 and 3 pick by the ledger: no forward without gradients."""
    model = tiny_lora()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer = make(
        DarelTrainer,
        tmp_path,
        model,
        darel=DarelConfig(online_keep=0.5, online_rule="hardest", rescore_every=2),
        num_train_epochs=4,
    )
    epochs = []

    class Mark(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            epochs.append(len(calls))

        def on_train_end(self, args, state, control, **kwargs):
            epochs.append(len(calls))

    trainer.add_callback(Mark())
    trainer.train()
    scoring = [calls[a:b].count(False) for a, b in itertools.pairwise(epochs)]
    assert scoring[0] > 0 and scoring[2] > 0
    assert scoring[1] == 0 and scoring[3] == 0


def test_online_selection_is_the_hardest_of_each_batch(tmp_path):
    """Against an oracle: eval-mode losses of the untrained model, learning rate 0, the top half of each batch."""
    data = token_data(32)
    model = tiny_lora(dropout=0.3)
    trainer = make(
        DarelTrainer,
        tmp_path,
        model,
        data=data,
        darel=DarelConfig(online_keep=0.5, online_rule="hardest", length_correction=False),
        learning_rate=0.0,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    model.eval()
    losses = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=torch.tensor([row["labels"]])).loss.item())
    np.testing.assert_allclose(trainer.report.ledger.loss, losses, rtol=1e-5)
    expected = np.zeros(32, int)
    for start in range(0, 32, 8):
        expected[start + np.argsort(losses[start : start + 8])[-4:]] = 1
    np.testing.assert_array_equal(trainer.report.ledger.times_trained, expected)


def test_autocast(tmp_path):
    """In bf16 the selection still is that of the scored losses, which are close to those of float32."""
    data = token_data(32)
    runs = {}
    for bf16 in (False, True):
        trainer = make(
            DarelTrainer,
            tmp_path / str(bf16),
            data=data,
            darel=DarelConfig(0.75, 0.5, offline_rule="middle"),
            learning_rate=0.0,
            bf16=bf16,
        )
        trainer.train()
        runs[bf16] = trainer.report
    np.testing.assert_allclose(runs[True].ledger.loss, runs[False].ledger.loss, rtol=2e-2)
    assert runs[True].rows_backpropagated == runs[False].rows_backpropagated


def test_second_train_starts_anew(tmp_path):
    """Trained twice, the second time from the first one's weights: fresh scores, the same number of rows."""
    trainer = make(DarelTrainer, tmp_path, darel=DarelConfig(0.6, 0.5, offline_rule="middle"))
    trainer.train()
    first = trainer.report
    trainer.train()
    second = trainer.report
    assert not second.scores_reused and not np.array_equal(first.ledger.loss, second.ledger.loss)
    assert first.rows_backpropagated == second.rows_backpropagated
    assert (tmp_path / "darel" / "report.json").exists() and (tmp_path / "darel" / "report-2.json").exists()
    hooks = [m for m in trainer.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks  # nothing of ours stays on the model


def test_model_init(tmp_path):
    trainer = DarelTrainer(
        model_init=lambda: tiny_lora(),
        args=arguments(tmp_path),
        train_dataset=token_data(),
        data_collator=PadCollator(),
        darel=DarelConfig(0.6, 0.5, offline_rule="middle"),
    )
    trainer.train()
    assert trainer.report.kept.sum() == round(0.6 * 37)


def test_scoring_leaves_the_random_state_alone(tmp_path):
    """Where the offline stage scores and then keeps all, the run ends like plain Trainer's: dropout draws the same."""
    plain = make(Trainer, tmp_path / "a", tiny_lora(dropout=0.2))
    plain.train()
    ours = make(
        DarelTrainer,
        tmp_path / "b",
        tiny_lora(dropout=0.2),
        darel=DarelConfig(offline_keep=0.99, offline_rule="middle"),
    )
    ours.train()
    assert ours.report.seconds["offline"] > 0 and ours.report.kept.all()
    assert_same_weights(weights(plain.model), weights(ours.model))


def test_offline_keeps_what_an_oracle_keeps(tmp_path):
    data = token_data(40)
    config = DarelConfig(offline_keep=0.5, offline_rule="hardest", length_correction=False)
    trainer = make(DarelTrainer, tmp_path, data=data, darel=config)
    model = trainer.model.eval()
    losses = []
    for row in data:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        losses.append(out.loss.item())
    trainer.train()
    np.testing.assert_array_equal(np.flatnonzero(trainer.report.kept), np.sort(np.argsort(losses)[20:]))
    assert trainer.state.global_step == 2 * 5
    scores = load_scores(next((tmp_path / "darel").glob("scores-*.parquet")))
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-5)
    assert trainer.train_dataset is data  # what the user gave is what the user still has


def test_groups_stay_represented(tmp_path):
    data = token_data(40)
    trainer = make(
        DarelTrainer,
        tmp_path,
        data=data,
        darel=DarelConfig(offline_keep=0.2, offline_rule="middle", group_column="group"),
    )
    trainer.train()
    kept = np.array(data["group"])[trainer.report.kept]
    assert sorted(set(kept)) == [0, 1, 2, 3, 4]
    assert trainer.report.kept.sum() == 8


def test_rho_loss_compares_with_a_reference_model(tmp_path):
    ids = np.arange(37)
    losses, reference = np.random.default_rng(0).uniform(1, 5, (2, 37)).astype(np.float32)
    for name, values in (("scores", losses), ("reference", reference)):
        pq.write_table(pa.table({"sample_id": ids, "loss": values}), tmp_path / f"{name}.parquet")
    config = DarelConfig(
        offline_keep=0.5,
        offline_rule="rho_loss",
        online_keep=0.5,
        online_rule="rho_loss",
        scores=str(tmp_path / "scores.parquet"),
        reference_scores=str(tmp_path / "reference.parquet"),
        length_correction=False,
    )
    trainer = make(DarelTrainer, tmp_path / "run", darel=config)
    trainer.train()
    kept = np.sort(np.argsort(-(losses - reference))[: round(0.5 * 37)])
    np.testing.assert_array_equal(np.flatnonzero(trainer.report.kept), kept)
    assert trainer.report.rows_backpropagated < 2 * len(kept)


def test_saved_scores_and_cache(tmp_path):
    """Scores of one run serve another, by path and by cache; a changed model or data set is scored anew."""
    config = DarelConfig(offline_keep=0.5, offline_rule="middle")
    make(DarelTrainer, tmp_path / "a", darel=config).train()
    saved = next((tmp_path / "a" / "darel").glob("scores-*.parquet"))
    by_path = make(
        DarelTrainer, tmp_path / "b", darel=DarelConfig(offline_keep=0.5, offline_rule="middle", scores=str(saved))
    )
    by_path.train()
    assert not list((tmp_path / "b" / "darel").glob("scores-*"))

    (tmp_path / "c" / "darel").mkdir(parents=True)
    (tmp_path / "c" / "darel" / saved.name).write_bytes(saved.read_bytes())
    again = make(DarelTrainer, tmp_path / "c", darel=config)
    again.train()
    assert again.report.scores_reused and again.report.plan.scores_free  # they cost nothing this time
    np.testing.assert_array_equal(again.report.kept, by_path.report.kept)
    # LoRA starts as the identity, so its random weights do not count; the model's own do, and so do the data.
    for name, changed in {
        "other-model": {"model": tiny_lora(seed=1)},
        "other-data": {"data": token_data(37, seed=3)},
    }.items():
        folder = tmp_path / name
        (folder / "darel").mkdir(parents=True)
        (folder / "darel" / saved.name).write_bytes(saved.read_bytes())
        fresh = make(DarelTrainer, folder, darel=config, **changed)
        fresh.train()
        assert not fresh.report.scores_reused
        plan = fresh.report.plan  # of what the pass has cost, as nothing was decided by an estimate
        full_pass = len(fresh.report.ledger) / plan.batch_size * plan.costs.step_seconds
        assert plan.costs.offline_share == pytest.approx(fresh.report.seconds["offline"] / full_pass)


def test_scorer_scores_in_place_of_the_model(tmp_path):
    scorer = tiny_gpt2(seed=5)
    config = DarelConfig(offline_keep=0.5, offline_rule="hardest", length_correction=False)
    trainer = make(DarelTrainer, tmp_path, darel=config, extra={"scorer": scorer})
    trainer.train()
    losses = []
    for row in token_data():
        with torch.no_grad():
            out = scorer.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        losses.append(out.loss.item())
    np.testing.assert_allclose(trainer.report.ledger.loss, losses, rtol=1e-5)


def test_track_records_the_losses_that_train(tmp_path):
    data = token_data(8)
    trainer = make(
        DarelTrainer,
        tmp_path,
        tiny_lora(dropout=0.3),
        data=data,
        darel=DarelConfig(track=True),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        label_smoothing_factor=0.1,
    )
    seen = []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["input_ids"], out.logits.detach())), with_kwargs=True
    )
    trainer.train()
    (tokens, logits), ledger = seen[-1], trainer.report.ledger
    by_tokens = {tuple(row["input_ids"]): i for i, row in enumerate(data)}
    for row, scores in zip(tokens, logits, strict=True):
        sample = next(i for t, i in by_tokens.items() if tuple(row[: len(t)].tolist()) == t)
        n = len(data[sample]["input_ids"])
        labels = torch.tensor([data[sample]["labels"]])
        expected = per_sample_losses(scores[None, :n], labels, shift=True).losses.item()
        assert ledger.train_loss[sample] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(ledger.loss).all()  # nothing was scored in eval mode


def test_logs(tmp_path):
    trainer = make(
        DarelTrainer,
        tmp_path,
        darel=DarelConfig(offline_keep=0.8, offline_rule="middle", online_keep=0.5, online_rule="hardest"),
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "darel/kept_fraction" in entry][-1]
    assert last["darel/rows_backpropagated"] == trainer.report.rows_backpropagated
    assert last["darel/kept_fraction"] == pytest.approx(0.8 * trainer.report.rows_backpropagated / 60, rel=0.03)
    assert 0 < last["darel/scoring_share"] < 1
    assert 0 < last["darel/coverage"] <= 1
    assert last["darel/loss_p10"] <= last["darel/loss_p50"] <= last["darel/loss_p90"]


# ---- Weights ----


def test_weights_are_honoured_in_the_loss(tmp_path):
    """One step with InfoBatch: the gradient is that of sum_i w_i * nll_i / (label tokens of the kept rows)."""
    data = token_data(12)
    model = tiny_lora()
    before = weights(model)
    gradients = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = make(
        DarelTrainer,
        tmp_path,
        model,
        data=data,
        darel=DarelConfig(online_keep=2 / 3, online_rule="infobatch"),
        callbacks=[Catch()],
        per_device_train_batch_size=8,
        max_steps=1,
        max_grad_norm=0,
    )
    caught = []
    select = trainer.get_batch_samples

    def remember(*args):
        batches, count = select(*args)
        caught.extend((dict(batch), count) for batch in batches)
        return batches, count

    trainer.get_batch_samples = remember
    trainer.train()
    batch, count = caught[0]
    weight = batch["darel_sample_weight"]
    assert weight.max() > 1 and len(weight) == 8
    model.load_state_dict(before)
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    ((nll.sum(1) * weight).sum() / count).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_offline_weights_reach_the_loss(tmp_path):
    trainer = make(DarelTrainer, tmp_path, darel=DarelConfig(offline_keep=0.6, offline_rule="infobatch"))
    seen = []
    select = trainer.get_batch_samples

    def remember(*args):
        batches, count = select(*args)
        seen.extend(batch["darel_sample_weight"] for batch in batches)
        return batches, count

    trainer.get_batch_samples = remember
    trainer.train()
    per_epoch = torch.cat(seen).sum().item() / 2
    assert per_epoch == pytest.approx(37, rel=1e-5)  # the weights of the kept samples stand for all samples


# ---- Other models and data ----


class Regressor(torch.nn.Module):
    """A model whose loss cannot be read off: two outputs, absolute errors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, y=None):
        out = self.layer(x)
        return {"loss": (out - y).abs().mean(), "out": out}


def absolute_error(outputs, inputs):
    """Mean absolute error of each sample."""
    return (outputs["out"] - inputs["y"]).abs().mean(1)


def test_per_sample_loss_for_unknown_models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "y": torch.randn(2, generator=generator)} for _ in range(20)]
    for number, config in enumerate(
        [DarelConfig(0.5, 0.5, offline_rule="middle"), DarelConfig(online_keep=0.5, online_rule="infobatch")]
    ):
        trainer = DarelTrainer(
            model=Regressor(),
            args=arguments(tmp_path / str(number), label_names=["y"], remove_unused_columns=False),
            train_dataset=data,
            darel=config,
            per_sample_loss=absolute_error,
        )
        trainer.train()
        assert trainer.report.rows_backpropagated > 0


def test_without_per_sample_loss_the_error_names_it(tmp_path):
    data = [{"x": torch.zeros(3), "y": torch.zeros(2)} for _ in range(20)]
    trainer = DarelTrainer(
        model=Regressor(),
        args=arguments(tmp_path),
        train_dataset=data,
        darel=DarelConfig(offline_keep=0.5, offline_rule="middle"),
    )
    with pytest.raises(ValueError, match="per_sample_loss"):
        trainer.train()


def test_torch_data_set_and_transform(tmp_path):
    """A list, and a data set behind `with_transform`, train as the plain data set does."""
    data = token_data(24)
    keys = ("input_ids", "attention_mask", "labels")
    kinds = {
        "plain": data,
        "list": [{k: row[k] for k in keys} for row in data],
        "transform": data.with_transform(lambda rows: {k: rows[k] for k in keys}),
    }
    results = {}
    for name, kind in kinds.items():
        trainer = make(DarelTrainer, tmp_path / name, data=kind, darel=DarelConfig(0.75, 0.5, offline_rule="middle"))
        trainer.train()
        results[name] = (weights(trainer.model), trainer.report.kept)
    for name in ("list", "transform"):
        assert_same_weights(results["plain"][0], results[name][0])
        np.testing.assert_array_equal(results["plain"][1], results[name][1])


def test_id_column(tmp_path):
    data = token_data(20).add_column("key", [1000 - 7 * i for i in range(20)])
    trainer = make(
        DarelTrainer, tmp_path, data=data, darel=DarelConfig(0.5, 0.5, offline_rule="middle", id_column="key")
    )
    trainer.train()
    assert {row["sample_id"] for row in trainer.report.dropped()} < set(data["key"])


# ---- Budgets ----


def test_budget_memory_lowers_the_batch_size(tmp_path):
    trainer = make(
        DarelTrainer,
        tmp_path,
        darel=DarelConfig(budget_memory=0.7, online_rule="hardest"),
        per_device_train_batch_size=8,
        gradient_checkpointing=True,  # else it would be switched on, and be enough
    )
    counter = CountRows(trainer.model)
    trainer.train()
    assert 1 <= trainer.report.plan.batch_size < 8
    assert max(counter.rows[-3:]) <= trainer.report.plan.batch_size
    assert trainer.args.per_device_train_batch_size == 8


def test_paper_budget_in_the_trainer(tmp_path):
    trainer = make(
        DarelTrainer, tmp_path, darel=DarelConfig(budget_time=0.32, online_rule="hardest", budget_method="paper")
    )
    trainer.train()
    plan = trainer.report.plan
    assert (plan.offline_keep, plan.online_keep, plan.rescore_every) == pytest.approx((0.8, 0.4, 3))


def test_warns_when_no_saving_is_predicted(tmp_path, caplog):
    trainer = make(DarelTrainer, tmp_path, darel=DarelConfig(online_keep=0.8, online_rule="hardest"))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "no saving is predicted" in caplog.text


def test_warns_of_an_absolute_warmup(tmp_path, caplog):
    trainer = make(DarelTrainer, tmp_path, darel=DarelConfig(offline_keep=0.5, offline_rule="middle"), warmup_steps=6)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "warmup_steps=6" in caplog.text


# ---- Bad input ----


def test_missing_labels(tmp_path):
    data = token_data().remove_columns("labels")

    def collate(features):
        return {"input_ids": torch.zeros(len(features), 3, dtype=torch.long)}

    trainer = make(
        DarelTrainer, tmp_path, data=data, collator=collate, darel=DarelConfig(offline_keep=0.5, offline_rule="middle")
    )
    with pytest.raises(ValueError, match="must provide labels"):
        trainer.train()


def test_packed_batches_are_refused(tmp_path):
    def flatten(features):
        flat = [token for feature in features for token in feature["input_ids"]]
        return {"input_ids": torch.tensor([flat]), "labels": torch.tensor([flat])}

    trainer = make(DarelTrainer, tmp_path, collator=flatten, darel=DarelConfig(online_keep=0.5, online_rule="hardest"))
    with pytest.raises(ValueError, match="Switch off packing"):
        trainer.train()


@pytest.mark.parametrize(
    ("column", "match"),
    [("missing", "no such column"), ("group", "occur more than once"), ("name", "must be integers")],
)
def test_bad_ids(tmp_path, column, match):
    data = token_data(20).add_column("name", [f"row {i}" for i in range(20)])
    trainer = make(DarelTrainer, tmp_path, data=data, darel=DarelConfig(0.5, offline_rule="middle", id_column=column))
    with pytest.raises((ValueError, TypeError), match=match):
        trainer.train()


def test_nan_losses_name_the_ids(tmp_path):
    model = tiny_lora()
    with torch.no_grad():
        model.get_base_model().transformer.wte.weight[5] = math.nan
    bad = [i for i, row in enumerate(token_data()) if 5 in row["input_ids"]]
    trainer = make(DarelTrainer, tmp_path, model, darel=DarelConfig(offline_keep=0.5, offline_rule="middle"))
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        trainer.train()
    assert str(bad[:3])[1:-1] in str(caught.value) or "0, 1, 2" in str(caught.value)


def test_scores_that_do_not_fit(tmp_path):
    make(DarelTrainer, tmp_path / "a", darel=DarelConfig(0.5, offline_rule="middle")).train()
    saved = str(next((tmp_path / "a" / "darel").glob("scores-*.parquet")))
    other = make(
        DarelTrainer,
        tmp_path / "b",
        data=token_data(37, seed=9),
        darel=DarelConfig(0.5, offline_rule="middle", scores=saved),
    )
    with pytest.raises(ValueError, match="made from other data"):
        other.train()
    few, other = str(tmp_path / "few.parquet"), str(tmp_path / "other.parquet")
    datasets.Dataset.from_dict({"sample_id": [0, 1], "loss": [1.0, 2.0]}).to_parquet(few)
    datasets.Dataset.from_dict({"sample_id": list(range(1, 38)), "loss": [1.0] * 37}).to_parquet(other)
    for path, match in ((few, "2 scores for 37 samples"), (other, r"no score for 1 of 37 samples, ids \[0\]")):
        with pytest.raises(ValueError, match=match):
            make(DarelTrainer, tmp_path / "c", darel=DarelConfig(0.5, offline_rule="middle", scores=path)).train()


def test_budget_that_cannot_be_met(tmp_path):
    trainer = make(DarelTrainer, tmp_path, darel=DarelConfig(budget_time=0.01, online_rule="hardest"))
    with pytest.raises(ValueError, match="smallest possible here is 0"):
        trainer.train()


def test_compute_loss_func_and_weights(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        make(
            DarelTrainer,
            tmp_path,
            darel=DarelConfig(online_keep=0.5, online_rule="infobatch"),
            extra={"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()},
        )


def test_several_gpus_in_one_process(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        DarelTrainer(
            model=tiny_lora(),
            args=args,
            train_dataset=token_data(),
            darel=DarelConfig(0.5, offline_rule="middle"),
            data_collator=PadCollator(),
        )


def test_darel_must_be_a_config(tmp_path):
    with pytest.raises(TypeError, match="DarelConfig"):
        make(DarelTrainer, tmp_path, darel={"offline_keep": 0.5, "offline_rule": "middle"})


def test_the_report_keeps_the_offline_losses(tmp_path):
    """Online scoring refreshes the ledger; what the offline stage went by stays in the report, also after a resume."""
    darel = DarelConfig(offline_keep=0.5, offline_rule="middle", online_keep=0.5, online_rule="hardest")
    settings = {"learning_rate": 0.05, "num_train_epochs": 2, "save_strategy": "epoch"}
    losses = []
    for resume in (False, True):
        trainer = make(DarelTrainer, tmp_path, tiny_lora(), data=token_data(48), darel=darel, **settings)
        first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
        trainer.train(resume_from_checkpoint=str(first) if resume else None)
        report = trainer.report
        losses.append(report.offline_losses)
        refreshed = report.ledger.loss != report.offline_losses
        assert refreshed.any() and not refreshed[~report.kept].any()
    np.testing.assert_array_equal(*losses)
    assert np.isfinite(losses[0]).all()
