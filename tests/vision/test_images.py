"""Image classifiers, image files, scoring networks and the recipe, with tiny networks and made-up images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")

import datasets
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from transformers import Trainer, TrainingArguments

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.jobs import parse_settings
from darel_hf.scoring import BatchScorer
from darel_hf.vision.images import (
    ImageClassifier,
    crop_and_flip,
    load_images,
    load_weights,
    make_network,
    narrow,
    small_image_stem,
)
from darel_hf.vision.task import ImageArguments, load_data, make_scorer, plot_accuracy_time, run

ROOT = Path(__file__).parents[2]
SIZE = 12


def picture(label, draw):
    """Draw a noisy image whose brighter side tells its class."""
    pixels = draw.integers(0, 120, (SIZE, SIZE, 3))
    half = {0: np.s_[:, :6], 1: np.s_[:, 6:], 2: np.s_[:6, :]}[label]
    pixels[half] += 110
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with train.parquet (90 images) and test.parquet (30), three classes."""
    folder = tmp_path_factory.mktemp("images")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["left", "right", "top"])}
    )
    draw = np.random.default_rng(0)
    for split, n in (("train", 90), ("test", 30)):
        labels = [i % 3 for i in range(n)]
        rows = {"img": [picture(label, draw) for label in labels], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


class Tiny(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def tiny(seed=0, **keywords):
    torch.manual_seed(seed)
    return ImageClassifier(Tiny(), **keywords)


def training(folder, **more):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 10, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False, "learning_rate": 0.01}
    return TrainingArguments(output_dir=str(folder), **{**settings, **more})


# ---- Augmentation ----


def test_crops_are_shifts_and_flips_are_mirrors():
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for _ in range(200):
        out = crop_and_flip(images, 2, flip=True)
        for image, whole in zip(out, padded, strict=True):
            found = [
                (row, column, turned)
                for row in range(5)
                for column in range(5)
                for turned in (False, True)
                if torch.equal(whole[:, row : row + 8, column : column + 8].flip(-1) if turned
                               else whole[:, row : row + 8, column : column + 8], image)
            ]  # fmt: skip
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 50  # every shift, mirrored or not, comes up


def test_no_augmentation_changes_nothing_and_draws_nothing():
    images = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    assert crop_and_flip(images, 0, flip=False) is images
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_are_of_the_image_as_it_is():
    model = tiny(padding=4, flip=True)
    plain = tiny()
    batch = {"pixel_values": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), "labels": torch.arange(6) % 3}
    scored = BatchScorer(model)(batch).losses
    expected = nn.functional.cross_entropy(plain(batch["pixel_values"]).logits, batch["labels"], reduction="none")
    torch.testing.assert_close(scored, expected)
    model.train()
    assert not torch.equal(model(**batch).logits, plain(**batch).logits)


def test_normalization_of_uint8_and_float():
    model = tiny().eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(pixels).logits, model(pixels / 255).logits)
    expected = model.network((pixels / 255 - model.mean) / model.std)
    torch.testing.assert_close(model(pixels).logits, expected)
    assert model(pixels).loss is None


def test_augmentation_never_moves_an_id(images, tmp_path):
    """Every image is one bright pixel value, its id: whatever crops and flips do, ids and losses stay together."""
    pixels = [np.full((SIZE, SIZE, 3), i, np.uint8) for i in range(40)]
    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(p) for p in pixels], "label": [i % 3 for i in range(40)]}
    )
    table.to_parquet(str(tmp_path / "train.parquet"))
    data = load_images(tmp_path, "train")
    model = tiny(padding=2, flip=True)
    with torch.no_grad():
        stacked = torch.stack(data[:]["pixel_values"])
        logits = tiny()(stacked).logits
        expected = nn.functional.cross_entropy(logits, torch.tensor(data[:]["labels"]), reduction="none")
    trainer = DarelTrainer(
        model=model,
        args=training(tmp_path / "out", num_train_epochs=1, learning_rate=0.0),
        train_dataset=data,
        darel=DarelConfig(online_keep=0.5, online_rule="hardest", length_correction=False),
    )
    trainer.train()
    ledger = trainer.report.ledger
    np.testing.assert_allclose(ledger.loss, expected.numpy(), rtol=1e-4)


# ---- Networks ----


def test_stem():
    network = small_image_stem(resnet18(num_classes=10))
    assert network.conv1.kernel_size == (3, 3) and network.conv1.stride == (1, 1)
    assert network.layer1(network.maxpool(network.conv1(torch.zeros(1, 3, 32, 32)))).shape == (1, 64, 32, 32)
    with pytest.raises(ValueError, match="only ResNets"):
        small_image_stem(nn.Sequential())


def test_narrow():
    network = resnet18(num_classes=10)
    quarter = narrow(network, 4)
    assert quarter(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    widths = [(m.in_channels, m.out_channels) for m in network.modules() if isinstance(m, nn.Conv2d)]
    narrowed = [(m.in_channels, m.out_channels) for m in quarter.modules() if isinstance(m, nn.Conv2d)]
    assert narrowed == [(i if i == 3 else i // 4, o // 4) for i, o in widths]
    assert network.fc.in_features == 512  # the original is as it was
    assert narrow(quarter, 0.8).fc.in_features == 160  # a quarter wider again
    with pytest.raises(ValueError, match="divisor=5"):
        narrow(network, 5)


def test_make_network():
    assert make_network("mobilenet_v3_small", 7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"model='resnet19'.*list_models"):
        make_network("resnet19", 10)


# ---- Data ----


def test_parquet(images):
    data = load_images(images, "train")
    assert len(data) == 90
    item = data[4]
    assert item["pixel_values"].dtype == torch.uint8 and item["pixel_values"].shape == (3, SIZE, SIZE)
    assert item["labels"] == 1
    original = datasets.load_dataset("parquet", data_files=str(images / "train.parquet"), split="train")
    np.testing.assert_array_equal(item["pixel_values"].permute(1, 2, 0), np.asarray(original[4]["img"]))
    assert load_images(images, "train", size=6)[0]["pixel_values"].shape == (3, 6, 6)


def test_large_sets_are_decoded_when_asked_for(images, monkeypatch):
    whole = load_images(images, "train")
    monkeypatch.setattr("darel_hf.vision.images.IN_MEMORY", 0)
    lazy = load_images(images, "train")
    assert "pixels" not in lazy.column_names
    assert torch.equal(lazy[7]["pixel_values"], whole[7]["pixel_values"]) and lazy[7]["labels"] == whole[7]["labels"]


def test_folder_of_images(tmp_path):
    draw = np.random.default_rng(0)
    for label, name in enumerate(("left", "right")):
        for i in range(2):
            path = tmp_path / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, draw).save(path)
    data = load_images(tmp_path, "train")
    assert data.features["label"].names == ["left", "right"] and sorted(data[:]["labels"]) == [0, 0, 1, 1]


def test_bad_data(tmp_path, images):
    with pytest.raises(ValueError, match=r"no valid.parquet and no folder valid/"):
        load_images(images, "valid")
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match="no column img or image"):
        load_images(tmp_path, "train")
    draw = np.random.default_rng(0)
    rows = {"img": [picture(0, draw), picture(0, draw).resize((5, 5))], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"image_size.*differ in size"):
        load_images(tmp_path, "train")


# ---- Training ----


def test_off_it_is_trainer(images, tmp_path):
    data = load_images(images, "train")
    weights = []
    for cls, more in ((Trainer, {}), (DarelTrainer, {"darel": DarelConfig()})):
        model = tiny(padding=2, flip=True)
        cls(model=model, args=training(tmp_path / cls.__name__), train_dataset=data, **more).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("darel", "rows"),
    [
        ({"offline_keep": 0.5, "offline_rule": "middle", "group_column": "label"}, 90),
        ({"offline_keep": 0.5, "offline_rule": "ids", "group_column": "label"}, 90),
        ({"online_keep": 0.5, "online_rule": "adonis"}, 90),
        ({"online_keep": 0.5, "online_rule": "hardest", "rescore_every": 2}, 90),  # by the losses of the first epoch
        ({"budget_memory": 0.9, "online_rule": "hardest"}, None),
    ],
)
def test_selects(images, tmp_path, darel, rows):
    data = load_images(images, "train")
    args = training(tmp_path / "out", per_device_train_batch_size=10)
    trainer = DarelTrainer(model=tiny(), args=args, train_dataset=data, darel=DarelConfig(**darel))
    trainer.train()
    report = trainer.report
    assert rows is None or report.rows_backpropagated == rows
    if "group_column" in darel:
        labels = np.array(data.with_format(None)["label"])
        assert np.bincount(labels[report.kept]).tolist() == [15, 15, 15]
        assert sorted({d["why"].split(":")[0] for d in report.dropped()}) == [darel["offline_rule"]]


def test_embeddings_are_what_enters_the_head(images):
    model = tiny()
    batch = {"pixel_values": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "labels": torch.arange(4) % 3}
    scored = BatchScorer(model, want_embeddings=True)(batch)
    normalized = (batch["pixel_values"] / 255 - model.mean) / model.std
    torch.testing.assert_close(scored.embeddings, model.network.body(normalized))


def test_embeddings_need_a_head(images, tmp_path):
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    trainer = DarelTrainer(
        model=ImageClassifier(Headless()),
        args=training(tmp_path),
        train_dataset=load_images(images, "train"),
        darel=DarelConfig(offline_keep=0.5, offline_rule="ids"),
    )
    with pytest.raises(ValueError, match="no classification head"):
        trainer.train()
    with pytest.raises(ValueError, match="online_rule='ids'"):
        DarelTrainer(
            model=tiny(),
            args=training(tmp_path),
            train_dataset=load_images(images, "train"),
            darel=DarelConfig(online_keep=0.5, online_rule="ids"),
        )


def test_scores_with_embeddings_are_used_again(images, tmp_path):
    data = load_images(images, "train")
    kept = []
    darel = DarelConfig(offline_keep=0.5, offline_rule="ids", group_column="label")
    trainer = DarelTrainer(model=tiny(), args=training(tmp_path), train_dataset=data, darel=darel)
    trainer.train()
    kept.append(trainer.report.kept)
    trainer.model.load_state_dict(tiny().state_dict())
    trainer.train()
    assert trainer.report.scores_reused
    np.testing.assert_array_equal(kept[0], trainer.report.kept)


@pytest.mark.slow
def test_scorer_made_when_it_is_needed(images, tmp_path):
    data = load_images(images, "train")
    calls = []

    def make():
        calls.append(1)
        return tiny(seed=5)

    def kept(darel, **more):
        args = training(tmp_path / str(len(list(tmp_path.iterdir()))))
        trainer = DarelTrainer(model=tiny(), args=args, train_dataset=data, darel=darel, **more)
        trainer.train()
        return trainer.report.kept

    by_function = kept(DarelConfig(offline_keep=0.5, offline_rule="middle"), scorer=make)
    assert len(calls) == 1
    np.testing.assert_array_equal(
        by_function, kept(DarelConfig(offline_keep=0.5, offline_rule="middle"), scorer=tiny(seed=5))
    )
    kept(DarelConfig(offline_keep=0.5, offline_rule="random"), scorer=make)
    kept(DarelConfig(online_keep=0.5, online_rule="hardest"), scorer=make)
    assert len(calls) == 1
    with pytest.raises(TypeError, match="scorer='int'"):
        kept(DarelConfig(offline_keep=0.5, offline_rule="middle"), scorer=lambda: 3)


# ---- The recipe ----


def arguments(images, **more):
    settings = {"data_dir": str(images), "narrow": 8, "scorer_narrow": 1, "scorer_epochs": 1, "padding": 2}
    return ImageArguments(**{**settings, **more})


def test_run(images, tmp_path):
    darel = DarelConfig(offline_keep=0.6, offline_rule="middle", group_column="label")
    settings = {"optim": "sgd", "learning_rate": 0.05, "save_strategy": "epoch"}
    results = run(arguments(images), darel, training(tmp_path / "a", **settings))
    for name in ("results.json", "model.safetensors", "losses.png", "embeddings.png", "removed_kept.png", "darel"):
        assert (tmp_path / "a" / name).exists(), name
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert 0 <= results["accuracy"] <= 1 and results["rows_backpropagated"] == 2 * 54
    assert 0 < results["scoring_seconds"] < results["seconds"]  # the scoring network's training is counted
    with pytest.raises(ValueError, match="holds another run"):
        run(arguments(images), darel, training(tmp_path / "a", **settings))
    again = run(arguments(images, resume=True), darel, training(tmp_path / "a", **settings))
    assert again["accuracy"] == results["accuracy"]
    weights = arguments(images, scorer=str(tmp_path / "a"))
    data = load_data(weights, 0)
    loaded = make_scorer(weights, data["train"], 3, training(tmp_path / "b"))
    assert torch.equal(loaded.network.fc.weight, load_weights(loaded, tmp_path / "a").network.fc.weight)


def test_missing_or_other_weights(images, tmp_path):
    with pytest.raises(ValueError, match=r"scorer=.*no model.safetensors"):
        run(
            arguments(images, scorer=str(tmp_path / "none")),
            DarelConfig(offline_keep=0.5, offline_rule="middle"),
            training(tmp_path / "o"),
        )
    Trainer(model=tiny(), args=training(tmp_path / "t")).save_model(str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"scorer=.*weights of another model"):
        run(
            arguments(images, scorer=str(tmp_path / "t")),
            DarelConfig(offline_keep=0.5, offline_rule="middle"),
            training(tmp_path / "p"),
        )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "cifar").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_files(path, tmp_path):
    task, darel, args = parse_settings(
        (ImageArguments, DarelConfig, TrainingArguments),
        [str(path), "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"],
    )
    assert task.model.startswith("resnet") and args.optim == "sgd" and (args.warmup_steps or 0) < 1
    assert darel.active


@pytest.mark.slow
def test_script(images, tmp_path):
    recipe = ROOT / "recipes" / "cifar"
    command = [sys.executable, str(recipe / "train.py"), str(recipe / "resnet18_cifar10.yaml")]
    command += ["--output_dir", str(tmp_path / "out"), "--data_dir", str(images), "--narrow", "16", "--bf16", "false"]
    command += ["--num_train_epochs", "2", "--per_device_train_batch_size", "10", "--use_cpu", "true"]
    command += ["--dataloader_num_workers", "0", "--scorer_narrow", "1", "--disable_tqdm", "true", "--algebra", "dual"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy:" in done.stdout and "DAREL plan" in done.stdout


def test_plot(tmp_path):
    points = [
        {"arm": "full", "accuracy": [0.5, 0.6], "time": [1, 1]},
        {"arm": "half", "accuracy": [0.4], "time": [0.5]},
    ]
    plot_accuracy_time(points, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_core_knows_no_images():
    core = (
        "training/trainer",
        "training/run",
        "selection/selector",
        "selection/ledger",
        "selection/rules",
        "budget/plan",
    )
    for name in core:
        text = (ROOT / "darel_hf" / f"{name}.py").read_text().lower()
        assert not any(word in text for word in ("pixel", "image", "torchvision")), name


def test_memory_budget(images, tmp_path):
    """What is saved for backward, counted here by torch's own hooks, stays within the fraction asked for."""
    data = load_images(images, "train")
    full = 30
    trainer = DarelTrainer(
        model=tiny(),
        args=training(tmp_path, per_device_train_batch_size=full),
        train_dataset=data,
        darel=DarelConfig(budget_memory=0.6, online_rule="hardest"),
    )
    trainer.train()
    chosen = trainer.report.plan.batch_size

    def memory(rows):
        model, held = tiny(), {}
        batch = {
            "pixel_values": torch.stack(data[:rows]["pixel_values"]),
            "labels": torch.tensor(data[:rows]["labels"]),
        }

        def count(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(**batch).loss
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        del loss
        activations = sum(size for pointer, size in held.items() if pointer not in weights)
        return activations + 4 * sum(weights.values())  # weights, gradients, two moments of AdamW

    assert chosen < full
    assert memory(chosen) <= 0.6 * memory(full)
    assert memory(chosen + 2) > 0.6 * memory(full)  # not smaller than it has to be
