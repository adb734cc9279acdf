"""The demo: the corpus has what it promises, and a small run of it writes table and charts."""

import json
import random
import subprocess
import sys
from dataclasses import asdict

import pytest

from darel_hf.nlg.corpus import INNS, MARKETS, make_corpus, make_pairs
from darel_hf.nlg.demo import ARMS, DemoSettings, table
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


SMALL = DemoSettings(
    representations=60, warm_up_representations=40, warm_up_epochs=1, width=64, layers=2, epochs=2,
    test_representations=5,
)  # fmt: skip


@pytest.mark.slow
def test_small_demo(tmp_path):
    """In a process of its own: what other libraries write must not come between, what we warn of must."""
    code = f"import sys; from darel_hf.nlg.demo import *; run_demo(sys.argv[1], {SMALL!r}, print)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "demo")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert told["settings"] == asdict(SMALL)
    results = told["arms"]
    assert [result["arm"] for result in results] == list(ARMS)
    plain, fewer, fast, reader, finished, budget = results
    for other in (fast, reader, finished):  # nothing is dropped
        assert (other["steps"], other["rows_backpropagated"]) == (plain["steps"], plain["rows_backpropagated"])
    assert fewer["epochs"] == pytest.approx(min(reader["seconds"] / plain["seconds"], 1) * SMALL.epochs)
    assert budget["rows_backpropagated"] <= plain["rows_backpropagated"]
    assert not plain["factors"] and not fewer["factors"] and "prompt_cache" not in fast["factors"]
    adapters = {result["arm"]: tmp_path / "demo" / result["folder"] / "adapter_config.json" for result in results}
    kinds = {arm: json.loads(path.read_text())["peft_type"] for arm, path in adapters.items()}
    assert [arm for arm in kinds if kinds[arm] != "LORA"] == ["reader, fast=True", "reader, budget"]
    for name in ("quality_time.png", "data/trainset.csv", "model/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    assert table(results).row_count == len(ARMS)
    assert len(done.stdout.splitlines()) == 1 + len(ARMS)
    ours = ("no saving is predicted", "budget_time=")  # of so short a run
    assert not [line for line in done.stderr.splitlines() if line and not line.startswith(ours)], done.stderr
