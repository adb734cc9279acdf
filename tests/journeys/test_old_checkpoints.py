"""A checkpoint that the code wrote before it was divided into wings goes on in today's code, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import BOTH, assert_same_weights
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BEFORE = "c7d859e"  # the last commit of the package in one folder
#: Run by either code: trains, and stops after some steps if told so.
SCRIPT = """
import json, sys
from pathlib import Path
from helpers import PadCollator, arguments, tiny_lora, token_data
from safetensors.torch import save_file
from transformers import TrainerCallback
from darel_hf import DarelConfig, DarelTrainer

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = 0 < stop <= state.global_step

folder, darel, stop, resume = json.loads(sys.argv[1])
trainer = DarelTrainer(
    model=tiny_lora(dropout=0.1),
    args=arguments(folder, save_strategy="steps", save_steps=3, num_train_epochs=4),
    train_dataset=token_data(),
    data_collator=PadCollator(),
    callbacks=[Stop()],
    darel=DarelConfig(**darel),
)
trainer.train(resume_from_checkpoint=resume)
state = {name: value.contiguous().clone() for name, value in trainer.model.state_dict().items() if "lora" in name}
save_file(state, Path(folder) / "end.safetensors")
trainer.report.ledger.to_parquet(Path(folder) / "ledger.parquet") if not stop else None
"""


def run(code, folder, darel, stop=0, resume=False):
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(code), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    given = json.dumps([str(folder), darel, stop, resume])
    subprocess.run([sys.executable, "-c", SCRIPT, given], env=environment, check=True, capture_output=True, cwd=folder)
    return load_file(folder / "end.safetensors")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The code of before, from the history of this checkout."""
    folder = tmp_path_factory.mktemp("before")
    archive = subprocess.run(["git", "archive", BEFORE, "darel_hf"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"the history does not go back to {BEFORE}")
    subprocess.run(["tar", "x"], input=archive.stdout, cwd=folder, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "darel",
    [
        {**BOTH, "track": True},
        {"offline_keep": 0.7, "offline_rule": "infobatch", "batch_by_length": True},
        {"offline_keep": 0.8, "offline_rule": "middle", "unpad": True},
        {"online_keep": 0.5, "online_rule": "hardest", "online_backward": "sliced"},
    ],
    ids=["both", "weights", "unpad", "sliced"],
)
def test_a_checkpoint_of_before_goes_on(tmp_path, before, darel):
    import pyarrow.parquet as pq

    run(before, tmp_path / "old", darel, stop=5)
    state = json.loads((tmp_path / "old" / "checkpoint-3" / "darel" / "state.json").read_text())
    assert "padding_free" in state["plan"]["costs"] and "factors" not in state["plan"]["costs"]
    resumed = run(ROOT, tmp_path / "old", darel, resume=True)
    straight = run(ROOT, tmp_path / "new", darel)
    assert_same_weights(straight, resumed)
    ledgers = [pq.read_table(tmp_path / name / "ledger.parquet").to_pydict() for name in ("old", "new")]
    for name in ledgers[0]:
        np.testing.assert_array_equal(ledgers[0][name], ledgers[1][name], err_msg=name)
