"""Several processes, on one host or two, launched as a user launches them, equal one process that accumulates."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import BOTH
from safetensors.numpy import load_file

SCRIPT = Path(__file__).with_name("train_script.py")
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
CONFIG = RECIPES / "cpu_2proc.yaml"


def command(*options):
    return [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", *options]


def launch(folder, processes, settings, script=SCRIPT, hosts=1):
    """Run the script under `accelerate launch`, once a host (two loopback addresses); return what each rank stored."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({**settings, "folder": str(folder)}))
    if hosts > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        recipe = yaml.safe_load((RECIPES / "multi_node.yaml").read_text())
        recipe |= {"use_cpu": True, "mixed_precision": "no", "num_processes": processes}
        (folder / "multi_node.yaml").write_text(yaml.safe_dump(recipe))
        common = ["--config_file", str(folder / "multi_node.yaml"), "--main_process_port", port]
        started = [[*common, "--machine_rank", str(host)] for host in range(hosts)]
    elif processes > 1:
        started = [["--config_file", str(CONFIG), "--num_processes", str(processes)]]
    else:
        started = [["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]]
    running = []
    for host, options in enumerate(started):
        address = {"LOCAL_ADDR": f"127.0.0.{host + 1}"} if hosts > 1 else {}
        running.append(
            subprocess.Popen(
                command(*options, "--dynamo_backend", "no", str(script), str(folder / "settings.json")),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **address},
            )
        )
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
    return [
        (load_file(folder / f"weights-{rank}.safetensors"), np.load(folder / f"ledger-{rank}.npz"))
        for rank in range(processes)
    ]


TRACKED = {**BOTH, "track": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "hosts", "darel"),
    [
        (2, 1, {}),
        (2, 1, TRACKED),
        (2, 1, {"online_keep": 0.5, "online_rule": "percentile"}),
        (2, 1, {**TRACKED, "online_backward": "sliced"}),
        (2, 1, {"online_keep": 0.5, "online_rule": "hardest", "id_column": "number"}),
        (2, 1, {"online_keep": 0.5, "batch_by_length": True}),
        (2, 1, {"online_keep": 0.5, "unpad": True}),
        (2, 1, {"online_keep": 0.5, "share_prompts": 2}),
        (2, 1, {"fast_lora": True, "last_block": True, "unpad": True}),
        (2, 1, {"base_precision": "bf16", "unpad": True}),
        (2, 1, {"prompt_cache": "disk", "finish_epochs": 2}),
        (2, 1, {"prompt_cache": "recompute", "online_keep": 0.5, "online_rule": "hardest"}),
        (
            2,
            1,
            {
                "prompt_cache": "ram",
                "offline_keep": 0.8,
                "offline_rule": "middle",
                "online_keep": 0.5,
                "online_rule": "hardest",
            },
        ),
        (3, 1, TRACKED),
        (2, 2, TRACKED),
    ],
    ids=[
        "off",
        "both-stages",
        "random-rule",
        "sliced",
        "stream",
        "by-length",
        "padding-free",
        "shared-prompts",
        "fast-lora-and-last-block",
        "frozen-weights-in-bfloat16",
        "reader-on-disk",
        "reader-recomputed",
        "reader-scored-before",
        "three-processes",
        "two-hosts",
    ],
)
def test_processes_equal_accumulation(tmp_path, processes, hosts, darel):
    # Kept samples make whole batches of candidates for all processes, so that no loader repeats samples.
    candidates = 2 * 5 * processes if "online_keep" in darel else 4 * processes
    kept = 2 * candidates
    settings = {
        "darel": darel,
        "samples": round(kept / 0.8) if "offline_keep" in darel else kept,
        "arguments": {"num_train_epochs": 4, "per_device_train_batch_size": 5 if "online_keep" in darel else 4},
    }
    if "id_column" in darel:
        settings["stream"] = True
        settings["arguments"] |= {"max_steps": 2, "accelerator_config": {"dispatch_batches": False}}
    settings["reader"] = "prompt_cache" in darel
    if darel.keys() & {"online_backward", "unpad", "share_prompts", "prompt_cache", "fast_lora"}:
        # Adam makes whole steps out of the rounding of gradients near zero.
        settings["arguments"] |= {"optim": "sgd", "learning_rate": 0.5}
    all_ranks = launch(tmp_path / "several", processes, settings, hosts=hosts)
    settings["arguments"]["gradient_accumulation_steps"] = processes
    ((one_weights, one_ledger),) = launch(tmp_path / "one", 1, settings)

    (weights, ledger), *others = all_ranks
    for other_weights, other_ledger in others:
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, other_weights[name], err_msg=name)
        for name in set(ledger.files) - {"rows"}:
            np.testing.assert_array_equal(ledger[name], other_ledger[name], err_msg=name)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, one_weights[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert sum(ledger["rows"].sum() for _, ledger in all_ranks) == one_ledger["rows"].sum()
    for name in set(ledger.files) - {"rows", "loss", "train_loss"}:
        np.testing.assert_array_equal(ledger[name], one_ledger[name], err_msg=name)
    for name in {"loss", "train_loss"} & set(ledger.files):
        np.testing.assert_allclose(ledger[name], one_ledger[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_resumes_in_the_middle_of_an_epoch(tmp_path):
    """The order by length is that of the epoch, also behind the loaders that skip what was done."""
    settings = {
        "darel": {"online_keep": 0.5, "batch_by_length": True},
        "samples": 80,
        "arguments": {"num_train_epochs": 3, "per_device_train_batch_size": 5, "save_strategy": "steps"},
    }
    settings["arguments"]["save_steps"] = 6  # an epoch has four steps
    whole = launch(tmp_path / "whole", 2, settings)
    shutil.copytree(tmp_path / "whole" / "run" / "checkpoint-6", tmp_path / "resumed" / "run" / "checkpoint-6")
    resumed = launch(tmp_path / "resumed", 2, settings)
    for (weights, ledger), (other_weights, other_ledger) in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(ledger["times_trained"], other_ledger["times_trained"])
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, other_weights[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [37, 1])
def test_sharded_model_equals_whole_one(samples):
    """FSDP2's `fully_shard` on gloo: the ranks have unequal numbers of batches, and one of them may have none."""
    script = SCRIPT.with_name("sharded_script.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(samples)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded equals whole") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("which", "rows"), [("memory", (1, 2, 3)), ("window", (4,))])
def test_what_one_process_tries_out_waits_for_nobody(tmp_path, which, rows):
    """A memory budget, and a row beyond the window that only one process meets."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT.with_name("alone_script.py")), which, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(done.stdout.count(f"{which}: trained, {n} rows") == 2 for n in rows) == 1


@pytest.mark.slow
def test_processes_that_share_rows_are_refused(tmp_path):
    """Tensor, context and sequence parallelism as meshes on gloo, where plain Trainer is made without a word."""
    script = SCRIPT.with_name("parallel_script.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("refused by name") == 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["single_gpu", "ddp_2gpu", "fsdp2_2gpu", "deepspeed_zero2"])
def test_recipes_that_need_gpus(tmp_path, recipe):
    needed = 1 if recipe == "single_gpu" else 2
    if torch.cuda.device_count() < needed:
        pytest.skip(f"{recipe}.yaml needs {needed} GPU(s)")
    if recipe == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    settings = {"darel": TRACKED, "samples": 50, "arguments": {"use_cpu": False}, "folder": str(tmp_path)}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    config = str(RECIPES / f"{recipe}.yaml")
    done = subprocess.run(
        command("--config_file", config, str(SCRIPT), str(tmp_path / "settings.json")),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_offline_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    settings = {
        "darel": {"offline_keep": 0.5, "offline_rule": "middle"},
        "samples": 37,
        "arguments": {"learning_rate": 0.0},
    }
    (_, two), _ = launch(tmp_path / "two", 2, settings)
    ((_, one),) = launch(tmp_path / "one", 1, settings)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_array_equal(two["kept"], one["kept"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("darel", "samples"),
    [({"offline_keep": 0.5, "offline_rule": "middle"}, 300), ({"budget_time": 0.32, "budget_method": "paper"}, 300)],
    ids=["settings", "budget"],
)
def test_items_are_read_once_by_one_of_the_processes(tmp_path, darel, samples):
    """Ids, lengths and groups of data that are no table are noted while scoring, each item by one process."""
    darel = {**darel, "id_column": "number", "group_column": "group", "batch_by_length": True}
    arguments = {"remove_unused_columns": False, "num_train_epochs": 1, "learning_rate": 0.0}
    settings = {"darel": darel, "samples": samples, "items": True, "arguments": arguments}
    both = launch(tmp_path / "two", 2, settings)
    ((_, one),) = launch(tmp_path / "one", 1, settings)
    reads = [ledger["reads"] for _, ledger in both]
    if "offline_keep" in darel:  # what the pass costs is timed, under a budget, on a second of reading: all of these
        assert [np.median(r[rank::2]) for rank, r in enumerate(reads)] == [1, 1]
        assert [np.median(r[1 - rank :: 2]) for rank, r in enumerate(reads)] == [0, 0]
    for _, ledger in both:
        np.testing.assert_array_equal(ledger["kept"], one["kept"])
        np.testing.assert_array_equal(ledger["ids"], np.arange(1000, 1000 + samples))


@pytest.mark.slow
def test_off_on_two_processes_is_plain_trainer(tmp_path):
    """`darel=` off under the launcher ends like the same script with the class taken out."""
    text = SCRIPT.read_text()
    plain = tmp_path / "plain_script.py"
    both = "from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig"
    text = text.replace(both, "from transformers import Trainer\n\nfrom darel_hf import ReaderLoraConfig")
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
