"""A user's script, launched by the journeys: tiny GPT-2 with LoRA, settings from a JSON file, results to a folder."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import PadCollator, arguments, tiny_lora, token_data, with_prompts
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import FastLora, LastBlock, fast_lora, last_block
from darel_hf.training.checkpoints import all_in, problem

READERS = {False: LoraConfig, True: ReaderLoraConfig}


class Items(torch.utils.data.Dataset):
    """Data that are no table; counts how often each item was read until training begins."""

    def __init__(self, rows):
        self.rows, self.reads, self.counts = list(rows), np.zeros(len(rows), int), True

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads[index] += self.counts
        return self.rows[index]


class Begun(TrainerCallback):
    def __init__(self, items):
        self.items = items

    def on_train_begin(self, args, state, control, **kwargs):
        self.items.counts = False


class Heartbeat(TrainerCallback):
    """Write the step to a file, slowly enough that a parent can aim between steps."""

    def __init__(self, path, pause):
        self.path, self.pause = path, pause

    def on_step_end(self, args, state, control, **kwargs):
        self.path.write_text(str(state.global_step))
        time.sleep(self.pause)


def main():
    torch.set_num_threads(1)
    fast_lora.SMALL, last_block.LARGEST_SHARE = 0, 1.0  # so small a model has nothing to gain
    FastLora.most = LastBlock.most = float("inf")
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(settings["folder"])
    run = folder / "run"
    data = token_data(settings.get("samples", 37))
    if "share_prompts" in settings["darel"]:
        data = with_prompts(data)
    if settings.get("stream"):
        data = data.add_column("number", list(range(len(data)))).to_iterable_dataset()
    if settings.get("items"):
        data = Items([{**row, "number": 1000 + i} for i, row in enumerate(data)])
    trainer = DarelTrainer(
        model=tiny_lora(settings.get("dropout", 0.0), config_class=READERS[settings.get("reader", False)]),
        args=arguments(run, **settings["arguments"]),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(**settings["darel"]),
    )
    rows = []
    choose = trainer.get_batch_samples

    def remember(*args):
        batches, count = choose(*args)
        rows.extend(batch["input_ids"].shape[0] for batch in batches)
        return batches, count

    trainer.get_batch_samples = remember
    if settings.get("items"):
        trainer.add_callback(Begun(data))
    if settings.get("pause"):
        trainer.add_callback(Heartbeat(folder / "step", settings["pause"]))
    resume = any(problem(path) is None for path in all_in(run))
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    state = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    save_file(state, folder / f"weights-{rank}.safetensors")
    ledger = trainer.report.ledger if trainer.report is not None else None
    kept = trainer.report.kept if trainer.report is not None else np.ones(0, bool)
    arrays = ledger.state_dict() if ledger is not None else {}
    if settings.get("items"):
        arrays["reads"] = data.reads
    np.savez(folder / f"ledger-{rank}.npz", **arrays, kept=kept, rows=np.array(rows))


if __name__ == "__main__":
    main()
