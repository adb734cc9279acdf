"""
Preference optimization with trl's DPOTrainer, in which the prompt of a pair is computed once.

    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/dpo/train.py --train_file pairs.jsonl --model_name_or_path MODEL --output_dir outputs/dpo \
        --num_train_epochs 1

The file has `prompt`, `chosen` and `rejected` in every line, texts or conversations. Every option of trl's DPOConfig
is one of the command line; a YAML file may come first. Needs `pip install '.[trl]'`. The output folder ends with the
adapter.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from darel_hf import shared_prefixes
from darel_hf.config import require
from darel_hf.jobs import claim_folder, parse_settings
from darel_hf.nlg.tables import read


@dataclass
class ModelArguments:
    """What is trained on what."""

    train_file: str | None = field(default=None, metadata={"help": "JSON lines with prompt, chosen and rejected"})
    model_name_or_path: str = field(default="gpt2", metadata={"help": "hub name or folder"})
    lora_r: int = field(default=8, metadata={"help": "rank of LoRA; 0: full fine-tuning"})
    share: bool = field(default=True, metadata={"help": "compute the prompt of a pair once"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})


def main() -> None:
    task, training = parse_settings((ModelArguments, DPOConfig))
    exists = task.train_file is not None and Path(task.train_file).is_file()
    require(exists, "train_file", task.train_file, "no such file; name a file of JSON lines")
    remedy = "its rows are flattened already; leave it out, or set share to False"
    require(not (task.share and training.padding_free), "padding_free", True, remedy)
    folder = claim_folder(training, task.resume)
    set_seed(training.seed)  # adapters begin at random
    trainer = DPOTrainer(
        model=task.model_name_or_path,
        args=training,
        train_dataset=Dataset.from_list(read(task.train_file, "train_file").rows),
        peft_config=LoraConfig(r=task.lora_r, task_type="CAUSAL_LM") if task.lora_r > 0 else None,
    )
    checkpoint = get_last_checkpoint(str(folder)) if task.resume and folder.is_dir() else None
    with shared_prefixes(trainer.model) if task.share else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
