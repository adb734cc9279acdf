"""
Faults: kill a rank, fill the disk, cut off a checkpoint, corrupt the score cache, send SIGTERM; then go on.

    python eval/benchmarks/faults.py [--rounds 20] [--seed 0] [--processes 2]

Every round breaks a run (a GPT-2 of two layers with LoRA, on made-up tokens, both stages of DAREL) at a random step,
and starts it again as a user would, until it is over. A round is lost unless weights and ledger end bit for bit as
those of a run that nothing happened to; errors on the way must name the file and the last good checkpoint. A full
disk needs the right to mount a small tmpfs; without it that fault is left out, and the output says so. A row goes to
results/faults.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FAULTS = ("kill", "full-disk", "cut-off", "cache", "sigterm")
SAVE_STEPS = 2


def worker(folder: Path, pause: float) -> None:
    """Train in this process, from the newest complete checkpoint if there is one."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import DefaultDataCollator, GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

    from darel_hf import DarelConfig, DarelTrainer
    from darel_hf.training.checkpoints import all_in, problem

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(2, 64, (60, 12))
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=1)
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    run = folder / "run"

    class Heartbeat(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                (folder / "step").write_text(str(state.global_step))
            time.sleep(pause)

    trainer = DarelTrainer(
        model=get_peft_model(GPT2LMHeadModel(config), lora),
        args=TrainingArguments(
            str(run),
            per_device_train_batch_size=2,
            num_train_epochs=6,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=3,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        data_collator=DefaultDataCollator(),
        darel=DarelConfig(offline_keep=0.8, offline_rule="middle", online_keep=0.5, rescore_every=2, track=True),
        callbacks=[Heartbeat()],
    )
    (folder / f"pid-{trainer.args.process_index}").write_text(str(os.getpid()))
    trainer.train(resume_from_checkpoint=any(problem(path) is None for path in all_in(run)) or None)
    if trainer.is_world_process_zero():
        state = {name: value.detach().clone().contiguous() for name, value in trainer.model.state_dict().items()}
        save_file(state, folder / "weights.safetensors")
        np.savez(folder / "ledger.npz", **trainer.report.ledger.state_dict(), kept=trainer.report.kept)


def start(folder: Path, processes: int, pause: float = 0.0) -> subprocess.Popen:
    """Start the run, or go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step").write_text("0")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(Path(__file__).resolve()), "--worker", str(folder), "--pause", str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(folder / "errors.txt", "w", encoding="utf-8") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, start_new_session=True
        )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> bool:
    """Wait until the run has done a step; return whether it is still alive."""
    while process.poll() is None:
        text = (folder / "step").read_text() if (folder / "step").exists() else ""
        if text.isdigit() and int(text) >= step:
            return True
        time.sleep(0.005)
    return False


def stop(process: subprocess.Popen) -> None:
    """End the whole process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(20)
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def cut_off(folder: Path, chance: random.Random) -> str:
    """Cut a file of the newest checkpoint off at a random point."""
    newest = max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    names = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "ledger.safetensors", "state.json")
    path = chance.choice([path for path in sorted(newest.rglob("*")) if path.name in names])
    os.truncate(path, chance.randrange(path.stat().st_size))
    return f"{newest.name}/{path.name}"


def corrupt_cache(folder: Path, chance: random.Random) -> str:
    """Change a few bytes in the middle of the score cache."""
    (path,) = (folder / "run" / "darel").glob("scores-*.parquet")
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[chance.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)
    return path.name


def one_round(fault: str, folder: Path, processes: int, chance: random.Random) -> tuple[bool, str]:
    """Break a run and go on with it; return whether every error was clear, and what happened."""
    step = chance.randint(3, 20)
    if fault == "full-disk":
        run, size = folder / "run", chance.randint(120, 700)
        run.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(run)], check=True)
        try:
            code = start(folder, processes).wait(300)
            said = (folder / "errors.txt").read_text(encoding="utf-8")
            complete = any((path / "trainer_state.json").exists() for path in run.glob("checkpoint-*"))
            named = "newest complete checkpoint is" if complete else "no complete checkpoint"
            clear = code == 0 or ("the disk is full" in said and named in said)
            shutil.copytree(run, folder / "copy")
        finally:
            subprocess.run(["umount", str(run)], check=True)
        run.rmdir()
        (folder / "copy").rename(run)
        if not clear:
            print("\n".join(line for line in said.splitlines() if "Error" in line or "rror:" in line))
        return clear, f"{size} KB" + ("" if code else ", which was enough")
    process = start(folder, processes, pause=0.05)
    alive = wait_for_step(process, folder, step)
    time.sleep(chance.random() * 0.1)
    if fault == "kill":
        rank = chance.randrange(processes)
        os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
        process.wait(120)
        return alive, f"rank {rank} at step {step}"
    if fault == "sigterm":
        stop(process)
        return alive, f"at step {step}"
    stop(process)
    if fault == "cut-off":
        return alive, cut_off(folder, chance)
    # The cache is read by a run that begins anew: take the checkpoints away.
    for path in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    return alive, corrupt_cache(folder, chance)


def same(left: Path, right: Path) -> bool:
    """Whether two finished runs have the same weights and ledger, bit for bit."""
    if (left / "weights.safetensors").read_bytes() != (right / "weights.safetensors").read_bytes():
        return False
    a, b = np.load(left / "ledger.npz"), np.load(right / "ledger.npz")
    return a.files == b.files and all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--no_store", action="store_true", help="keep no row of results")
    parser.add_argument("--quick", action="store_true", help="show that it runs: two rounds, no row of results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.pause)
        return
    if options.quick:
        options.rounds, options.no_store = 2, True
    faults = options.faults.split(",")
    base = Path(tempfile.mkdtemp(prefix="darel-faults-"))
    if "full-disk" in faults:
        (base / "mount").mkdir()
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(base / "mount")], check=False)
        if tried.returncode:
            print("full-disk is left out: no right to mount a tmpfs")
            faults.remove("full-disk")
        else:
            subprocess.run(["umount", str(base / "mount")], check=True)
    if start(base / "straight", options.processes).wait(300):
        raise SystemExit((base / "straight" / "errors.txt").read_text())
    chance = random.Random(options.seed)
    lost = []
    for number in range(options.rounds):
        fault, folder = faults[number % len(faults)], base / f"round-{number}"
        clear, what = one_round(fault, folder, options.processes, chance)
        finished = start(folder, options.processes).wait(300) == 0
        good = clear and finished and same(base / "straight", folder)
        if not good:
            lost.append(number)
            print((folder / "errors.txt").read_text(encoding="utf-8")[-2000:])
        print(f"round {number}: {fault} ({what}): {'bit for bit' if good else 'LOST'}", flush=True)
    print(f"{options.rounds} rounds, lost {len(lost)}")
    if not options.no_store:
        from common import store

        settings = {"rounds": options.rounds, "seed": options.seed, "processes": options.processes, "faults": faults}
        store("faults", settings, {"lost": lost})
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
