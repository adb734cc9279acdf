"""
Kill a run wherever it writes or deletes a file of a checkpoint, go on with it, and compare with one that was not.

    python kill_script.py FOLDER PROCESSES

What a process does to files while it saves is counted (opened to write, renamed, removed); the run that nothing
happens to tells how much there is. Each kill is one fork of a process that has imported everything; the results are
lines of JSON: the place, and what became of the run.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import safetensors.torch
import torch
from helpers import BOTH, PadCollator, arguments, tiny_lora, token_data
from transformers.trainer_utils import get_last_checkpoint

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.training.checkpoints import all_in, problem

STEP, LIMIT = 6, 2  # the checkpoint that is killed, and how many there are to be: one is deleted after it
DAREL = {**BOTH, "track": True}


class Places:
    """Count what is done to files while a checkpoint is saved; at one of these places, kill the process."""

    def __init__(self, kill=None, cut=False):
        self.kill, self.cut = kill, cut
        self.seen, self.on, self.written = [], False, None

    def at(self, what, path):
        if not self.on:
            return
        again = what == "write" and path == self.written
        if again or (what == "os.mkdir" and os.path.isdir(path)):
            return
        self.on = False  # what is done below is not counted
        if len(self.seen) == self.kill:
            if self.cut and self.written is not None:  # in the middle of the file that was written last
                os.truncate(self.written, os.path.getsize(self.written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        written = what == "write"
        self.seen.append([what, Path(path).name, written])
        self.written = path if written else None
        self.on = True

    def audit(self, event, args):
        if event == "open" and self.on:
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR))
            if isinstance(path, (str, os.PathLike)) and writes:
                self.at("write", path)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.at(event, args[0])

    def listen(self):
        """Also hear of files that are written by other languages."""
        sys.addaudithook(self.audit)
        save, serialize = torch.save, safetensors.torch.serialize_file

        def torch_save(what, path, *args, **kwargs):
            self.at("write", path)
            self.on, on = False, self.on
            save(what, path, *args, **kwargs)
            self.on = on

        def serialize_file(what, path, *args, **kwargs):
            self.at("write", path)
            serialize(what, path, *args, **kwargs)

        torch.save, safetensors.torch.serialize_file = torch_save, serialize_file


def train(folder, places, resume):
    """Train in this process."""

    class Saving(DarelTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            places.on = self.state.global_step == STEP
            places.at("begin", "save")
            super()._save_checkpoint(*args, **kwargs)
            places.at("end", "save")
            places.on = False

    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": LIMIT, "max_steps": STEP + 2}
    trainer = Saving(
        model=tiny_lora(dropout=0.1),
        args=arguments(folder / "run", per_device_train_batch_size=2, **settings),
        train_dataset=token_data(30),
        data_collator=PadCollator(),
        darel=DarelConfig(**DAREL),
    )
    places.listen()
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    state = {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}
    np.savez(folder / f"end-{rank}.npz", **state, **trainer.report.ledger.state_dict(), kept=trainer.report.kept)
    (folder / f"places-{rank}.json").write_text(json.dumps(places.seen))


def start(folder, processes, rank, port, places, resume=None):
    """Fork a process that trains; what it says goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(folder / f"said-{rank}.txt", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        if processes > 1:
            several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {k: str(v) for k, v in several.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        train(folder, places, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(folder, processes, places=None, killed=0, resume=None):
    """Run all processes to their ends; those that only wait for one that was killed are stopped, as launchers do."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {}
    for rank in range(processes):
        own = places if places is not None and rank == killed else Places()
        ranks[start(folder, processes, rank, port, own, resume)] = rank
    codes, limit = {}, time.monotonic() + 60
    while len(codes) < processes:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            if codes[ranks[child]]:
                limit = min(limit, time.monotonic() + 3)
        elif time.monotonic() > limit:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.005)
    return codes


def outcome(folder, straight, processes, killed, places, newest):
    """Kill a run, go on with it, and say what became of it."""
    codes = run(folder, processes, places, killed)
    if codes[killed] != -signal.SIGKILL:
        return f"was not killed: {codes}"
    resume = get_last_checkpoint(str(folder / "run")) if newest else True
    codes = run(folder, processes, resume=resume)
    if any(codes.values()):
        return "failed: " + (folder / "said-0.txt").read_text().strip().splitlines()[-1]
    for rank in range(processes):
        one, other = np.load(straight / f"end-{rank}.npz"), np.load(folder / f"end-{rank}.npz")
        different = [name for name in one.files if not np.array_equal(one[name], other[name], equal_nan=True)]
        if different:
            return f"other {different[:3]}"
    left = {path.name: problem(path) for path in all_in(folder / "run")}
    if len(left) != LIMIT or any(left.values()):
        return f"left {left}"
    return "exact"


def main():
    base, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    straight = base / "straight"
    codes = run(straight, processes)
    assert not any(codes.values()), (straight / "said-0.txt").read_text()
    for rank in range(processes):
        places = json.loads((straight / f"places-{rank}.json").read_text())
        cases = [(k, cut) for k in range(len(places)) for cut in (False, True) if not cut or (k and places[k - 1][2])]
        if processes > 1 and rank == 0:  # one process has shown them all
            cases = cases[:: len(cases) // 7]
        for number, (k, cut) in enumerate(cases):
            what = f"rank {rank}, {'inside ' + places[k - 1][1] if cut else 'before ' + ' '.join(places[k][:2])}"
            folder = base / f"rank{rank}-{number}"
            found = outcome(folder, straight, processes, rank, Places(k, cut), newest=number % 2)
            print(json.dumps([what, found]), flush=True)


if __name__ == "__main__":
    main()
