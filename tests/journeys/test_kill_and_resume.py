"""A run that is killed again and again ends like one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

SCRIPT = Path(__file__).with_name("train_script.py")


def start(folder, settings):
    """Start the script in a process of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({**settings, "folder": str(folder)}))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder / "settings.json")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    """Wait for a process and show what it said if it failed."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def step_of(folder):
    """Read the step that the run has last reported."""
    try:
        return int((folder / "step").read_text())
    except (FileNotFoundError, ValueError):
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "darel",
    [
        {
            "offline_keep": 0.8,
            "offline_rule": "middle",
            "online_keep": 0.4,
            "online_rule": "hardest",
            "rescore_every": 2,
            "track": True,
        },
        {"offline_keep": 0.8, "online_keep": 0.6, "online_rule": "infobatch", "offline_rule": "infobatch"},
        {"offline_keep": 0.8, "offline_rule": "middle", "share_prompts": 2},
        {"prompt_cache": "disk", "finish_epochs": 7.5},  # from step 6 of 96 on: among the kills
    ],
    ids=["hardest", "infobatch", "shared-prompts", "reader"],
)
def test_five_kills_end_bit_identical(tmp_path, darel):
    settings = {
        "darel": darel,
        "dropout": 0.1,
        "reader": "prompt_cache" in darel,
        "samples": 45,
        "arguments": {
            "num_train_epochs": 8,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        },
    }
    finish(start(tmp_path / "straight", settings))
    chance = random.Random(5)
    folder = tmp_path / "killed"
    kills, before = 0, 0
    while kills < 5:
        process = start(folder, {**settings, "pause": 0.05})
        aim = step_of(folder) + chance.randint(1, 4)
        while step_of(folder) < aim and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "the run was over before it could be killed"
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        assert step_of(folder) > before
        before = step_of(folder)
    finish(start(folder, settings))

    straight, killed = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("straight", "killed"))
    for name, weight in straight.items():
        np.testing.assert_array_equal(weight, killed[name], err_msg=name)
    straight, killed = (np.load(tmp_path / name / "ledger-0.npz") for name in ("straight", "killed"))
    for name in straight.files:
        if name != "rows":
            np.testing.assert_array_equal(straight[name], killed[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "least"), [(1, 30), (2, 12)])
def test_killed_at_each_file_of_a_checkpoint(tmp_path, processes, least):
    """Before and inside of each file that is written, and at each step of rotation; each rank where there are two."""
    script = Path(__file__).with_name("kill_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(processes)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= least and [case for case in found if case[1] != "exact"] == []
