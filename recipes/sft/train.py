"""
Supervised fine-tuning with trl and DAREL: text, prompt-completion or conversational data from a JSON-lines file.

    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/sft/train.py --train_file data.jsonl --model_name_or_path MODEL --output_dir outputs/sft \
        --num_train_epochs 3 --offline_keep 0.8 --online_keep 0.5

Every option of trl's SFTConfig and of DarelConfig is one of the command line; a YAML file may come first. Needs
`pip install '.[trl]'`. The output folder ends with the adapter and what DAREL did (darel/report.html).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig

from darel_hf import DarelConfig, DarelSFTTrainer
from darel_hf.config import require
from darel_hf.files import write_json
from darel_hf.jobs import claim_folder, parse_settings, train_once
from darel_hf.nlg.tables import read


@dataclass
class ModelArguments:
    """What is trained on what."""

    train_file: str | None = field(default=None, metadata={"help": "JSON lines with text, or prompt and completion"})
    model_name_or_path: str = field(default="gpt2", metadata={"help": "hub name or folder"})
    lora_r: int = field(default=8, metadata={"help": "rank of LoRA; 0: full fine-tuning"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})


def main() -> None:
    task, darel, training = parse_settings((ModelArguments, DarelConfig, SFTConfig))
    exists = task.train_file is not None and Path(task.train_file).is_file()
    require(exists, "train_file", task.train_file, "no such file; name a file of JSON lines")
    folder = claim_folder(training, task.resume)
    set_seed(training.seed)  # adapters begin at random
    trainer = DarelSFTTrainer(
        model=task.model_name_or_path,
        args=training,
        train_dataset=Dataset.from_list(read(task.train_file, "train_file").rows),
        peft_config=LoraConfig(r=task.lora_r, task_type="CAUSAL_LM") if task.lora_r > 0 else None,
        darel=darel,
    )
    results = train_once(trainer, folder, task.resume)
    if trainer.is_world_process_zero():
        write_json(folder / "results.json", results)
        print(trainer.report)


if __name__ == "__main__":
    main()
