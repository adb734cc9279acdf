"""Data and collators that Trainer takes: what trains there trains here, too."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import PadCollator, arguments, assert_same_weights, tiny_gpt2, token_data, weights
from torch.utils.data import TensorDataset

from darel_hf import DarelConfig, DarelTrainer, Selector
from darel_hf.accelerators import share_rows
from darel_hf.data import feature_length, token_batches
from darel_hf.data.fingerprint import data_fingerprint
from darel_hf.scoring import BatchScorer, share_prompts, to_device


class Net(torch.nn.Module):
    """A classifier of vectors."""

    def __init__(self, between=torch.nn.Tanh):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), between())
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.layers(x))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def vectors(n):
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw))


def pairs(items):
    return {"x": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}


def test_items_that_are_no_mappings_where_nothing_needs_ids_in_them(tmp_path):
    trainer = DarelTrainer(
        model=Net(),
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=vectors(40),
        data_collator=pairs,
        darel=DarelConfig(offline_keep=0.5, offline_rule="random"),
    )
    trainer.train()
    assert trainer.report.kept.sum() == 20 and trainer.state.global_step == 10
    with pytest.raises(TypeError, match="items must be mappings"):
        DarelTrainer(
            model=Net(),
            args=arguments(tmp_path, remove_unused_columns=False),
            train_dataset=vectors(40),
            data_collator=pairs,
            darel=DarelConfig(online_keep=0.5),
        ).train()


@pytest.mark.parametrize("rule", ["random", "hardest"])
def test_a_last_batch_for_batch_normalization(tmp_path, rule):
    """34 samples in batches of 8 of 16 candidates: the last 2 would leave 1 row, which has no variance."""
    data = [{"x": x.numpy(), "labels": int(y)} for x, y in vectors(34)]
    trainer = DarelTrainer(
        model=Net(lambda: torch.nn.BatchNorm1d(8)),
        args=arguments(tmp_path, remove_unused_columns=False, per_device_train_batch_size=8, num_train_epochs=1),
        train_dataset=data,
        darel=DarelConfig(online_keep=0.5, online_rule=rule),
    )
    trainer.train()
    assert trainer.report.rows_backpropagated == 8 + 8 + 2


def test_processes_that_share_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DarelTrainer, "get_tp_size", lambda self: 2)
    darel = DarelConfig(online_keep=0.5)
    with pytest.raises(ValueError, match="tp_size=2: its processes share rows"):
        DarelTrainer(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=token_data(8), darel=darel)


class Patches(PadCollator):
    """As vision-language models have them: the patches of all images of a batch in one tensor."""

    def __call__(self, features):
        sizes = [2 + len(feature["input_ids"]) % 3 for feature in features]
        return {**super().__call__(features), "pixel_values": torch.ones(sum(sizes), 5)}


class Shared(PadCollator):
    """A tensor that is the same for all rows, and has by chance as many as a batch of candidates."""

    def __call__(self, features):
        return {**super().__call__(features), "scale": torch.arange(8.0)}


class Scaled(tf.GPT2LMHeadModel):
    def forward(self, input_ids=None, scale=None, **kwargs):
        assert scale.shape == (8,)
        return super().forward(input_ids, **kwargs)


def test_what_of_a_batch_belongs_to_rows(tmp_path):
    data = token_data(32).remove_columns("group")
    settings = {"args": arguments(tmp_path, num_train_epochs=1, remove_unused_columns=False), "train_dataset": data}
    with pytest.raises(ValueError, match=r"pixel_values=.*rows cannot be cut out of it"):
        DarelTrainer(
            model=tiny_gpt2(), data_collator=Patches(), darel=DarelConfig(online_keep=0.5), **settings
        ).train()
    model = Scaled(tiny_gpt2().config)
    DarelTrainer(model=model, data_collator=Shared(), darel=DarelConfig(online_keep=0.5), **settings).train()


IMAGE = 1  # a token that stands for a patch of an image


class Seeing(tf.GPT2LMHeadModel):
    """Puts patches in the places of image tokens, and like real ones refuses a wrong number of them."""

    def __init__(self, config):
        super().__init__(config)
        self.see = torch.nn.Linear(5, config.n_embd)

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        places = input_ids.eq(IMAGE)
        if places.sum() != len(pixel_values):
            raise ValueError("image tokens and patches do not match")
        embeddings = self.transformer.wte(input_ids).masked_scatter(places[..., None], self.see(pixel_values))
        return super().forward(inputs_embeds=embeddings, **kwargs)


def seeing():
    torch.manual_seed(0)
    return Seeing(tiny_gpt2().config)


def picture_books(patches):
    """Texts behind so many image tokens each."""
    draw, rows = np.random.default_rng(0), []
    for k, row in zip(patches, token_data(len(patches)), strict=True):
        ids = [IMAGE] * k + row["input_ids"]
        labels = [-100] * k + row["labels"]
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "patches": draw.normal(size=(k, 5))}
        )
    return rows


class Look(PadCollator):
    def __call__(self, features):
        patches = np.concatenate([feature["patches"] for feature in features])
        return {"pixel_values": torch.tensor(patches, dtype=torch.float32), **super().__call__(features)}


def look(folder, data, darel, **settings):
    trainer = DarelTrainer(
        model=seeing(), args=arguments(folder, num_train_epochs=1, remove_unused_columns=False, **settings),
        train_dataset=data, data_collator=Look(), darel=DarelConfig(**darel),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("patches", [[1, 2, 3, 4] * 8, [1, 1, 0, 2] * 8, [0, 2, 2, 0] * 8], ids=str)
@pytest.mark.parametrize("rule", ["hardest", "infobatch"])
def test_patches_of_several_images_offline(tmp_path, caplog, patches, rule):
    """Batches are collated, never cut: also where there are by chance as many patches as rows."""
    data, model = picture_books(patches), seeing().eval()
    with torch.no_grad():
        alone = [model(**Look()([row])).loss.item() for row in data]
    trainer = look(tmp_path, data, {"offline_keep": 0.5, "offline_rule": rule, "track": True})
    np.testing.assert_allclose(trainer.report.offline_losses, alone, rtol=1e-4)
    assert trainer.report.rows_backpropagated == trainer.report.kept.sum()
    assert "ranked by" not in caplog.text


def test_patches_of_several_images_online(tmp_path):
    for patches in ([1, 1, 0, 2] * 8, [1] * 16 + [2] * 16):
        with pytest.raises(ValueError, match=r"pixel_values=.*rows cannot be cut out of it; select offline"):
            look(tmp_path, picture_books(patches), {"online_keep": 0.5})
    patches = [1] * 32
    patches[1] = 2  # at none of the places that are looked at
    with pytest.raises(ValueError, match="pixel_values=9: its first size in a batch of 8 samples"):
        look(tmp_path, picture_books(patches), {"online_keep": 0.5})
    look(tmp_path, picture_books([1] * 32), {"online_keep": 0.5, "online_rule": "hardest"})  # one each: rows after all


def test_rows_of_a_last_batch_that_is_dropped(tmp_path):
    for keep in ({"offline_keep": 0.5, "offline_rule": "random"}, {"online_keep": 0.5}):
        trainer = DarelTrainer(
            model=tiny_gpt2(), args=arguments(tmp_path, dataloader_drop_last=True), train_dataset=token_data(20),
            data_collator=PadCollator(), darel=DarelConfig(**keep),
        )  # fmt: skip
        trainer.train()
        assert trainer.report.rows_backpropagated == 4 * trainer.state.global_step
        assert trainer.report.times_trained.sum() == pytest.approx(4 * trainer.state.global_step)


def test_positions_are_what_is_counted():
    choices = {"input_ids": [[1, 2], [1, 2, 3], [4]], "labels": 0}
    assert feature_length(choices) == 9  # three choices, padded to three tokens
    assert feature_length((torch.ones(3), 1)) == 1
    lengths = np.array([feature_length(choices)] * 256)
    assert max(len(batch) for batch in token_batches(lengths, 1024, 256)) == 1024 // 9


@pytest.mark.parametrize("lengths", [[3, 0, 5, 0], [2, 0], [4] * 9 + [0] * 40])
def test_empty_texts_are_scored_beside_others(lengths):
    batches = list(token_batches(np.array(lengths), 8, 4))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert all(np.array(lengths)[batch].max() > 0 for batch in batches)


def test_an_empty_text_among_others(tmp_path):
    data = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in token_data(16)]
    data[5] = {"input_ids": [], "attention_mask": [], "labels": []}
    trainer = DarelTrainer(
        model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=data, data_collator=PadCollator(),
        darel=DarelConfig(offline_keep=0.5, offline_rule="middle"),
    )  # fmt: skip
    trainer.train()
    assert not trainer.report.kept[5]


def test_torch_formatted_data_share_prompts():
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10, i], "labels": [-100] * 6 + [i]} for i in range(11, 31)]
    data, scorer = datasets.Dataset.from_list(rows), BatchScorer(tiny_gpt2())

    def collate(items):
        return lambda chosen: {k: torch.tensor([np.asarray(items[i][k]).tolist() for i in chosen]) for k in items[0]}

    for items in (list(data), list(data.with_format("torch"))):
        for share in (share_prompts, share_rows):
            assert share(scorer, items, collate(items)) is not None


class Slow(torch.utils.data.Dataset):
    """Items that are dear to read, and how often each was."""

    def __init__(self, n=600):
        self.rows, self.reads = [dict(row, number=1000 + i) for i, row in enumerate(token_data(n))], [0] * n

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.rows[index]


class Before(DarelTrainer):
    """Remembers how often items were read before the first step."""

    def _prepare_run(self):
        slow = self.train_dataset
        super()._prepare_run()
        self.reads = list(slow.reads)


def of_numbers(ids):
    """Slow items whose ids these are, where they say so."""
    slow = Slow(len(ids))
    for row, number in zip(slow.rows, ids, strict=True):
        row["number"] = number
    return slow


def select_slowly(folder, data, model=None, trained=DarelTrainer, **darel):
    """A trainer of an epoch that keeps half of the data offline, unless a budget decides."""
    darel = darel if "budget_time" in darel else {"offline_keep": 0.5, "offline_rule": "middle", **darel}
    return trained(
        model=model or tiny_gpt2(), args=arguments(folder, num_train_epochs=1, remove_unused_columns=False),
        train_dataset=data, data_collator=Known(), darel=DarelConfig(**darel),
    )  # fmt: skip


ALL_FACTS = {"id_column": "number", "group_column": "group", "batch_by_length": True}
PAPER = {"budget_time": 0.32, "budget_method": "paper"}  # keeps 0.8 offline and 0.4 online, whatever the clock says


class Known(PadCollator):
    def __call__(self, features):
        return super().__call__([{k: f[k] for k in ("input_ids", "attention_mask", "labels")} for f in features])


@pytest.mark.parametrize(
    ("darel", "times"),
    [
        ({"offline_keep": 0.5, "offline_rule": "random"}, 0),
        ({"online_keep": 0.5, "id_column": None}, 0),
        ({"offline_keep": 0.5, "offline_rule": "middle"}, 1),
        ({"offline_keep": 0.5, "offline_rule": "middle", "group_column": "group", "batch_by_length": True}, 1),
        ({"offline_keep": 0.5, "offline_rule": "middle", "id_column": "number"}, 1),
        ({"offline_keep": 0.5, "offline_rule": "middle", **ALL_FACTS}, 1),
        ({"offline_keep": 0.5, "offline_rule": "random", "group_column": "group"}, 1),
        ({"online_keep": 0.5, "batch_by_length": True}, 1),
        ({"online_keep": 0.5, "batch_by_length": True, "id_column": "number"}, 1),
    ],
    ids=["offline", "online", "scores", "while-scoring", "scored-ids", "scored-all", "groups", "lengths", "ids"],
)
def test_how_often_slow_items_are_read(tmp_path, darel, times):
    """Nothing where nothing is scored; else once, while scoring. A few are looked at, for other things."""
    data = Slow()
    trainer = Before(
        model=tiny_gpt2(), args=arguments(tmp_path, num_train_epochs=1, remove_unused_columns=False),
        train_dataset=data, data_collator=Known(), darel=DarelConfig(**darel),
    )  # fmt: skip
    trainer.train()
    looked_at = 2 * 64 + 8 * 4 + 8 + 3 + 3
    assert np.median(trainer.reads) == times and sum(trainer.reads) <= times * len(data) + looked_at
    if "group_column" in darel:
        kept = [row["group"] for row, keep in zip(data.rows, trainer.report.kept, strict=True) if keep]
        assert np.bincount(kept).tolist() == [60] * 5
    if darel.get("id_column") and times:
        assert trainer.report.ledger.ids.tolist() == list(range(1000, 1600))


@pytest.mark.parametrize(
    "darel",
    [
        {**PAPER, "id_column": "number"},
        {**PAPER, "group_column": "group"},
        {**PAPER, "batch_by_length": True},
        {**PAPER, **ALL_FACTS},
        {"budget_time": 0.6, "fast": False, **ALL_FACTS},  # of whatever is measured
    ],
    ids=["ids", "groups", "lengths", "all", "measured"],
)
def test_how_often_slow_items_are_read_under_a_budget(tmp_path, monkeypatch, darel):
    """Once, by the pass; besides 64 that are looked at twice, and what is timed: of the pass a window, and 256."""
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW", 64)
    data = Slow(2000)
    trainer = select_slowly(tmp_path, data, trained=Before, **darel)
    trainer.train()
    timed = 64 + 256 + 7 * 4 + 4 * 12 + 2
    assert np.median(trainer.reads) == 1 and sum(trainer.reads) <= len(data) + 2 * 64 + timed + 16 + 8 + 3
    if "budget_method" in darel:
        assert trainer.report.kept.sum() == 1600


@pytest.mark.parametrize("settings", [ALL_FACTS, {**ALL_FACTS, **PAPER}], ids=["settings", "budget"])
def test_what_the_facts_of_slow_items_are(tmp_path, settings):
    """Ids, lengths and groups noted while scoring are those that are read off a table."""
    ids, found = np.random.default_rng(0).permutation(5000)[:120].tolist(), []
    slow = of_numbers(ids)
    for name, data in (("slow", slow), ("table", datasets.Dataset.from_list(slow.rows))):
        trainer = select_slowly(tmp_path / name, data, **settings)
        trainer.train()
        report = trainer.report
        arrays = [report.kept, report.ledger.ids, report.ledger.loss, report.offline_losses, report.times_trained]
        found.append((arrays, report.plan.costs.padding, weights(trainer.model)))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(one, two)
    assert found[0][1] == found[1][1] and found[0][0][1].tolist() == sorted(ids)
    assert_same_weights(found[0][2], found[1][2])


def test_scores_of_slow_items_are_used_again(tmp_path):
    """The second run reads every item once, for what scores do not say; other ids are scored anew."""
    ids, losses = list(range(1000, 1400)), []
    for reused, shift in ((False, 0), (True, 0), (False, 1)):
        # Item 2 is none of the 64 that are looked at.
        data = of_numbers([*ids[:2], ids[2] - 1000 * shift, *ids[3:]])
        trainer = select_slowly(tmp_path, data, trained=Before, **ALL_FACTS)
        trainer.train()
        assert trainer.report.scores_reused == reused
        assert np.median(trainer.reads) == (2 if shift else 1)  # the file is compared, then not taken
        assert trainer.report.ledger.ids[0] == (2 if shift else 1000)
        losses.append(trainer.report.offline_losses)
    np.testing.assert_array_equal(losses[0], losses[1])
    np.testing.assert_array_equal(losses[2], losses[0][[2, 0, 1, *range(3, 400)]])


def test_a_pass_over_slow_items_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Items of finished parts are read for their facts, once, and not scored; their ids are those of now."""
    monkeypatch.setattr("darel_hf.scoring.dataset.WINDOW", 64)
    ids, folder = [*range(1000, 1010), 5, *range(1011, 1400)], tmp_path / "killed"
    broken, twice, good = (of_numbers(of) for of in (range(1000, 1400), [*ids[:398], 1000, ids[399]], ids))
    del broken.rows[300]["number"]
    with pytest.raises(ValueError, match="id_column='number': the items of the training set have no such key"):
        select_slowly(folder, broken, **ALL_FACTS).train()
    parts = folder / "darel"
    assert len(list(parts.glob("parts-*/*.npy"))) == 4
    with pytest.raises(ValueError, match=r"id_column='number': ids must be unique; .* more than once: \[1000\]"):
        select_slowly(folder, twice, **ALL_FACTS).train()
    assert np.median(twice.reads) == 1 and len(list(parts.glob("parts-*/*.npy"))) == 7
    resumed = select_slowly(folder, good, trained=Before, **ALL_FACTS)
    resumed.train()
    straight = select_slowly(tmp_path / "straight", of_numbers(ids), **ALL_FACTS)
    straight.train()
    assert np.median(resumed.reads) == 1 and not list(parts.glob("parts-*"))
    np.testing.assert_array_equal(resumed.report.ledger.ids, sorted(ids))
    np.testing.assert_array_equal(resumed.report.offline_losses, straight.report.offline_losses)
    assert_same_weights(weights(resumed.model), weights(straight.model))


@pytest.mark.parametrize(
    ("bad", "place", "error"),
    [("7", 0, TypeError), (True, 0, TypeError), (2**63, 0, TypeError), (7.0, 1, TypeError), (1005, 1, ValueError)],
    ids=["text", "flag", "large", "fraction", "twice"],
)
def test_ids_of_slow_items_that_are_none(tmp_path, bad, place, error):
    """One error; for those of the first item before anything is computed, of others while or after they are scored."""
    data = of_numbers([*range(1000, 1000 + place), bad, *range(1001 + place, 1200)])
    match = "id_column='number': ids must be " + ("unique.* once: \\[1005\\]" if bad == 1005 else "integers, not ")
    with pytest.raises(error, match=match):
        select_slowly(tmp_path, data, id_column="number").train()
    assert place or sum(data.reads) == 1


def test_more_groups_of_slow_items_than_places(tmp_path):
    """That is known when all are scored; each was read once until then."""
    data = Slow(200)
    for i, row in enumerate(data.rows):
        row["group"] = 2 * i // 3
    with pytest.raises(ValueError, match=r"group_column='group': has 133 values, .* leaves 100 places; keep more"):
        select_slowly(tmp_path, data, group_column="group").train()
    assert sum(data.reads) <= len(data) + 2 * 64 + 7 * 4 + 8 + 3


def test_losses_of_slow_items_that_are_not_finite(tmp_path):
    """The error names the ids, which were learned while scoring."""
    data, model = of_numbers(list(range(5000, 5030))), tiny_gpt2()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.transformer.wte.weight.data[63] = float("nan")
    bad = [row["number"] for row in data.rows if 63 in row["input_ids"]]
    assert 0 < len(bad) <= 10
    named = ", ".join(map(str, bad))
    with pytest.raises(ValueError, match=rf"NaN or infinite for sample ids \[{named}\]"):
        select_slowly(tmp_path, data, model=model, id_column="number").train()


def test_a_run_on_slow_items_is_resumed(tmp_path):
    """Checkpoints know ids and content of the data; nothing is scored again, and every item read once for its id."""
    ids, ends = list(range(1000, 1600)), []
    for name in ("straight", "resumed"):
        args = arguments(tmp_path / name, save_strategy="steps", save_steps=30, remove_unused_columns=False)
        darel = DarelConfig(offline_keep=0.5, offline_rule="middle", online_keep=0.5, **ALL_FACTS)
        for resume in [False, True] if name == "resumed" else [False]:
            trainer = Before(
                model=tiny_gpt2(), args=args, train_dataset=of_numbers(ids), data_collator=Known(), darel=darel
            )
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-30") if resume else None)
            if resume:
                assert np.median(trainer.reads) == 1
        ends.append((weights(trainer.model), trainer.report.ledger.ids.tolist(), trainer.report.kept.tolist()))
    assert ends[0][1:] == ends[1][1:] and ends[0][1] == ids
    assert_same_weights(ends[0][0], ends[1][0])
    state = json.loads((tmp_path / "straight" / "checkpoint-30" / "darel" / "state.json").read_text())
    assert state["data"] == data_fingerprint(of_numbers(ids).rows, np.array(ids))  # as of any data with these ids
    with pytest.raises(ValueError, match="made from another data set"):
        Before(
            model=tiny_gpt2(), args=args, train_dataset=of_numbers([*ids[:-3], 1, 2, ids[-1]]), data_collator=Known(),
            darel=darel,
        ).train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-30"))  # fmt: skip


@pytest.mark.parametrize("column", ["id_column", "group_column"])
def test_a_column_that_items_lack(tmp_path, column):
    trainer = DarelTrainer(
        model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Slow(20), data_collator=Known(),
        darel=DarelConfig(offline_keep=0.5, offline_rule="middle", **{column: "nope"}),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{column}='nope': the items of the training set have no such key"):
        trainer.train()
    assert sum(trainer.train_dataset.reads) == 1


def test_columns_of_fixed_shape_are_hashed_as_arrays():
    arrays = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    features = datasets.Features({"x": datasets.Array2D((2, 3), "float32")})
    one = datasets.Dataset.from_dict({"x": arrays.tolist()}, features=features)
    arrays[3, 1, 2] += 1
    other = datasets.Dataset.from_dict({"x": arrays.tolist()}, features=features)
    ids = np.arange(4)
    assert data_fingerprint(one, ids) == data_fingerprint(one, ids) != data_fingerprint(other, ids)


def test_a_model_that_was_placed_stays_where_it_is():
    class Placed(Net):
        hf_device_map = {"": "cpu"}

        def to(self, *args):
            raise RuntimeError("must not be moved")

    placed = Placed()
    assert to_device(placed, torch.device("cpu")) is placed


@pytest.mark.parametrize("losses", [2.0, [[1.0], [2.0], [3.0], [4.0]]])
def test_losses_of_a_wrong_shape(losses):
    selector = Selector(DarelConfig(online_keep=0.5, online_rule="hardest"), ids=range(4))
    with pytest.raises(ValueError, match="one loss a sample is wanted"):
        selector.select(ids=range(4), losses=losses, batch_size=2, batch=0)


def test_a_command_line_that_is_no_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", b"data-\xe9.csv".decode("utf-8", "surrogateescape")])
    trainer = DarelTrainer(
        model=tiny_gpt2(), args=arguments(tmp_path, num_train_epochs=1), train_dataset=token_data(8),
        data_collator=PadCollator(), darel=DarelConfig(offline_keep=0.5, offline_rule="random"),
    )  # fmt: skip
    trainer.train()
    command = json.loads((tmp_path / "darel" / "run.json").read_text())["environment"]["command"]
    assert "data-" in command[1] and command[1] == sys.argv[1]
    assert r"data-\udce9.csv" in (tmp_path / "darel" / "report.html").read_text()


def test_default_steps_are_no_ones_setting(tmp_path, caplog):
    """save_steps is 500 by default; a full run of 8 steps would not have reached it either."""
    DarelTrainer(
        model=tiny_gpt2(), args=arguments(tmp_path, num_train_epochs=1, save_strategy="steps"),
        train_dataset=token_data(32), data_collator=PadCollator(),
        darel=DarelConfig(offline_keep=0.5, offline_rule="random"),
    ).train()  # fmt: skip
    assert "made for the full run" not in caplog.text
    assert tf.TrainingArguments(str(tmp_path)).save_steps == 500


def test_scores_of_another_transform_are_not_used_again(tmp_path):
    """The table below is the same: a changed template, or augmentation, changes every loss."""
    reports = []
    for shift in (0, 0, 7):

        def moved(batch, shift=shift):
            ids = [[(token + shift) % 62 + 2 for token in row] for row in batch["input_ids"]]
            return {"input_ids": ids, "labels": ids, "attention_mask": batch["attention_mask"]}

        trainer = DarelTrainer(
            model=tiny_gpt2(), args=arguments(tmp_path, num_train_epochs=1, remove_unused_columns=False),
            train_dataset=token_data(24).remove_columns("group").with_transform(moved),
            data_collator=PadCollator(), darel=DarelConfig(offline_keep=0.5, offline_rule="middle"),
        )  # fmt: skip
        trainer.train()
        reports.append(trainer.report)
    assert [report.scores_reused for report in reports] == [False, True, False]
    assert not np.allclose(reports[1].offline_losses, reports[2].offline_losses)
