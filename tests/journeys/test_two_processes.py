"""Two processes, launched as a user launches them, equal one process with accumulation 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

SCRIPT = Path(__file__).with_name("train_script.py")
CONFIG = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu_2proc.yaml"


def launch(folder, processes, settings, script=SCRIPT):
    """Run the script under `accelerate launch`."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({**settings, "folder": str(folder)}))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        command += ["--config_file", str(CONFIG), "--num_processes", str(processes)]
    else:
        command += ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, str(script), str(folder / "settings.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (load_file(folder / f"weights-{rank}.safetensors"), np.load(folder / f"ledger-{rank}.npz"))
        for rank in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "darel",
    [
        {},
        {"offline_keep": 0.8, "online_keep": 0.5, "rescore_every": 2, "track": True},
        {"online_keep": 0.5, "online_rule": "percentile"},
    ],
    ids=["off", "both-stages", "random-rule"],
)
def test_two_processes_equal_accumulation(tmp_path, darel):
    # 40 kept samples (of 50, or all of 40) make whole batches of 8 candidates, so that no loader repeats samples.
    settings = {"darel": darel, "samples": 50 if "offline_keep" in darel else 32, "arguments": {"num_train_epochs": 4}}
    if "offline_keep" in darel:
        settings["arguments"]["per_device_train_batch_size"] = 5
    two = launch(tmp_path / "two", 2, settings)
    settings["arguments"] = {**settings["arguments"], "gradient_accumulation_steps": 2}
    ((one_weights, one_ledger),) = launch(tmp_path / "one", 1, settings)

    (weights, ledger), (other_weights, other_ledger) = two
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, other_weights[name], err_msg=name)
        np.testing.assert_allclose(weight, one_weights[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(ledger["rows"], other_ledger["rows"])
    assert ledger["rows"].sum() + other_ledger["rows"].sum() == one_ledger["rows"].sum()
    for name in ledger.files:
        if name in ("rows", "loss", "train_loss"):
            continue
        np.testing.assert_array_equal(ledger[name], other_ledger[name], err_msg=name)
        np.testing.assert_array_equal(ledger[name], one_ledger[name], err_msg=name)
    for name in {"loss", "train_loss"} & set(ledger.files):
        np.testing.assert_array_equal(ledger[name], other_ledger[name], err_msg=name)
        np.testing.assert_allclose(ledger[name], one_ledger[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_offline_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    settings = {"darel": {"offline_keep": 0.5}, "samples": 37, "arguments": {"learning_rate": 0.0}}
    (_, two), _ = launch(tmp_path / "two", 2, settings)
    ((_, one),) = launch(tmp_path / "one", 1, settings)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_array_equal(two["kept"], one["kept"])


@pytest.mark.slow
def test_off_on_two_processes_is_plain_trainer(tmp_path):
    """`darel=` off under the launcher ends like the same script with the class taken out."""
    text = SCRIPT.read_text()
    plain = tmp_path / "plain_script.py"
    text = text.replace("from darel_hf import DarelConfig, DarelTrainer", "from transformers import Trainer")
    text = text.replace("DarelTrainer(", "Trainer(").replace('        darel=DarelConfig(**settings["darel"]),\n', "")
    text = text.replace("Path(__file__).parents[1]", repr(str(SCRIPT.parents[1])))
    text = text.replace("trainer.report", "getattr(trainer, 'report', None)")
    assert "darel=" not in text and "Darel" not in text
    plain.write_text(text)
    settings = {"darel": {}, "dropout": 0.1, "arguments": {}}
    ours = launch(tmp_path / "ours", 2, settings)
    theirs = launch(tmp_path / "theirs", 2, settings, script=plain)
    for rank in range(2):
        for name, weight in ours[rank][0].items():
            np.testing.assert_array_equal(weight, theirs[rank][0][name], err_msg=name)
