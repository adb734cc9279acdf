"""The demo: the corpus has what it promises, and a small run of it writes table and charts."""

import random

import pytest

from darel_hf.nlg.corpus import INNS, MARKETS, make_corpus, make_pairs
from darel_hf.nlg.demo import DemoSettings, run_demo, table
from darel_hf.nlg.task import group_references, read_pairs


def test_corpus(tmp_path):
    splits = make_corpus(tmp_path)
    train = splits["train"]
    assert len(train) >= 2000
    assert len({pair["ref"] for pair in train}) / len(train) > 0.9
    groups = group_references(train)
    assert min(len(group) for group in groups.values()) >= 2
    assert 0.02 <= sum(pair["noisy"] for pair in train) / len(train) <= 0.06
    assert not any(pair["noisy"] for pair in splits["test"])
    assert not {pair["mr"] for pair in train} & {pair["mr"] for pair in splits["test"] + splits["dev"]}
    assert read_pairs(tmp_path / "trainset.csv") == [{"mr": p["mr"], "ref": p["ref"]} for p in train]


def test_corpus_is_reproducible(tmp_path):
    assert make_corpus(tmp_path / "a") == make_corpus(tmp_path / "b")
    assert make_corpus(tmp_path / "c", seed=1) != make_corpus(tmp_path / "d")


@pytest.mark.parametrize("domain", [INNS, MARKETS])
def test_references_say_what_the_representation_says(domain):
    """Every clean reference names the thing, and every value but yes and no."""
    for pair in make_pairs(domain, 60, (3, 4), random.Random(3)):
        slots = dict(part.rstrip("]").split("[") for part in pair["mr"].split("], "))
        for slot, value in slots.items():
            assert value in ("yes", "no") or value in pair["ref"], (slot, pair)
        assert "{" not in pair["ref"] and pair["ref"].endswith(".")


@pytest.mark.slow
def test_small_demo(tmp_path):
    settings = DemoSettings(
        representations=60, warm_up_representations=40, warm_up_epochs=1, width=64, layers=2, epochs=2,
        test_representations=5,
    )  # fmt: skip
    results = run_demo(str(tmp_path / "demo"), settings)
    assert [result["arm"] for result in results] == [
        "full data", "random subset", "DAREL offline", "DAREL offline + online",
    ]  # fmt: skip
    full, chance, offline, both = results
    assert chance["steps"] == offline["steps"] < full["steps"]  # the control takes as many steps
    assert both["rows_backpropagated"] < offline["rows_backpropagated"] < full["rows_backpropagated"]
    assert chance["scoring_seconds"] < offline["scoring_seconds"]
    for name in ("results.json", "losses.png", "quality_time.png", "data/trainset.csv", "model/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    assert table(results).row_count == 4
