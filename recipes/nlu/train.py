"""
Fine-tune a text classifier on CSV files as GLUE has them, with LoRA and DAREL.

    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/nlu/train.py recipes/nlu/sst2.yaml --train_file train.csv --validation_file dev.csv

The files have one or two columns of text and a column of labels (any values). The output folder ends with the adapter,
results.json (accuracy, time, everything counted), and what DAREL did: darel/report.html, darel/samples.parquet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from darel_hf import DarelConfig, DarelTrainer
from darel_hf.config import require
from darel_hf.files import write_json
from darel_hf.jobs import accuracy, claim_folder, parse_settings, require_hub, train_once
from darel_hf.nlg.tables import read


@dataclass
class TextArguments:
    """What is trained on what."""

    train_file: str | None = field(default=None, metadata={"help": "CSV to train on"})
    validation_file: str | None = field(default=None, metadata={"help": "CSV to evaluate on"})
    text_columns: list[str] = field(default_factory=lambda: ["sentence"], metadata={"help": "one or two columns"})
    label_column: str = field(default="label", metadata={"help": "column of labels"})
    model_name_or_path: str = field(default="roberta-base", metadata={"help": "hub name or folder"})
    max_length: int = field(default=128, metadata={"help": "tokens of a sample at most"})
    lora_r: int = field(default=8, metadata={"help": "rank of LoRA; 0: full fine-tuning"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})


def main() -> None:
    task, darel, training = parse_settings((TextArguments, DarelConfig, TrainingArguments))
    files = {"train": task.train_file, "validation": task.validation_file}
    for split, path in files.items():
        require(path is not None and Path(path).is_file(), f"{split}_file", path, "no such file; name a CSV file")
    if not Path(task.model_name_or_path).exists():
        require_hub(task.model_name_or_path, "model", "model_name_or_path")
    folder = claim_folder(training, task.resume)

    data = DatasetDict()
    for split, path in files.items():
        table = read(path, f"{split}_file")
        columns = {name: table.texts(name, "text_columns") for name in task.text_columns}
        columns[task.label_column] = list(map(str, table.column(task.label_column, "label_column")))
        data[split] = Dataset.from_dict(columns)
    names = sorted(set(map(str, data["train"][task.label_column])))
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(map(str, data["validation"][task.label_column])) - set(names))
    require(not unknown, "label_column", unknown, f"in {task.validation_file} but not in {task.train_file}")

    set_seed(training.seed)  # the head and the adapters begin at random
    tokenizer = AutoTokenizer.from_pretrained(task.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        task.model_name_or_path, num_labels=len(names), id2label=dict(enumerate(names)), label2id=number
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if task.lora_r > 0:
        model = get_peft_model(model, LoraConfig(r=task.lora_r, lora_alpha=task.lora_alpha, task_type="SEQ_CLS"))

    def prepare(rows: dict) -> dict:
        encoded = tokenizer(*(rows[name] for name in task.text_columns), truncation=True, max_length=task.max_length)
        return {**encoded, "labels": [number[str(value)] for value in rows[task.label_column]]}

    with training.main_process_first():
        data = data.map(prepare, batched=True, remove_columns=[task.label_column])
    trainer = DarelTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        darel=darel,
    )
    results = train_once(trainer, folder, task.resume)
    results["accuracy"] = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        write_json(folder / "results.json", results)
        for key, value in results.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
