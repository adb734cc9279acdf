"""
Write predictions for a test set with any causal language model, with or without an adapter.

A fine-tuned adapter on its base, test set of the challenge in FOLDER (without --data_dir: from the hub):
    python recipes/e2e_nlg/generate.py --adapter outputs/e2e_gpt2_small --model_name_or_path gpt2 \
        --data_dir FOLDER --output predictions.txt

A call that was stopped goes on where it was. Then score them:
    darel eval --predictions predictions.txt --references FOLDER/testset_w_refs.csv
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from darel_hf.config import require
from darel_hf.jobs import parse_settings
from darel_hf.nlg.task import NLGArguments, generate, held_out, load_for_generation, load_pairs


@dataclass
class GenerateArguments:
    """What to write, and with what, beside `NLGArguments`."""

    output: str = field(default="predictions.txt", metadata={"help": "file for the predictions, one a line"})
    adapter: str | None = field(default=None, metadata={"help": "folder of a PEFT adapter; default: the bare model"})
    force: bool = field(default=False, metadata={"help": "overwrite the output"})


if __name__ == "__main__":
    task, files = parse_settings((NLGArguments, GenerateArguments))
    remedy = "exists; name another file, or say --force"
    require(files.force or not Path(files.output).exists(), "output", files.output, remedy)
    groups = held_out(load_pairs(task, ["test"])["test"], task)
    model, tokenizer = load_for_generation(files.adapter or task.model_name_or_path, task.model_name_or_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    predictions = generate(model, tokenizer, list(groups), task, files.output)
    print(f"{len(predictions)} predictions in {files.output}")
