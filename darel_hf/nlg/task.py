"""Data-to-text fine-tuning with LoRA: what the E2E-NLG recipe and the demo share, from CSV files to predictions."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import is_progress_bar_enabled

from ..accelerators import share_rows
from ..adapters import ReaderLoraConfig
from ..config import DarelConfig
from ..data import CarryIds, add_ids, code_fingerprint, read_column, sample_ids
from ..files import atomic_path, require, write_json, write_text
from ..jobs import claim_folder, require_hub, train_once
from ..scoring import BatchScorer, label_hashes, model_fingerprint, row_hashes, score_dataset
from ..selection import Scores
from ..training import DarelTrainer, checkpoints
from .metrics import NAMES, NLGMetrics
from .representations import parse
from .tables import Table, read

logger = logging.getLogger(__name__)

PROMPT_END = " ||"  # of all prompts: the tokens from which on lora_on="completion" acts
LORA_ON = {"all": LoraConfig, "reader": ReaderLoraConfig, "completion": LoraConfig}
FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
#: What the columns of pairs may be called, in a file.
PAIR_COLUMNS = {
    "mr": ("mr", "meaning_representation", "source", "src", "input"),
    "ref": ("ref", "human_reference", "reference", "target", "trg", "tgt"),
}
HUB_COLUMNS = {"meaning_representation": "mr", "human_reference": "ref", "mr": "mr", "ref": "ref"}


@dataclass
class NLGArguments:
    """
    Settings of the task, beside `DarelConfig` and `TrainingArguments`.

    Parameters that control **data and model**:

    Args:
        model_name_or_path (`str`): hub name or folder of a causal language model.
        data_dir (`str`, *optional*): folder with `trainset.csv`, `devset.csv` and `testset_w_refs.csv`, columns
            `mr,ref`. Without it the data come from the hub.
        dataset_name (`str`), dataset_revision (`str`): where they are there.
        max_train_samples, max_test_samples (`int`, *optional*): for quick runs, so many pairs of meaning
            representations drawn with `seed`; of the test set so many representations.
        max_length (`int`): tokens of prompt and reference together; longer ones are cut.

    Parameters that control **LoRA**: `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules` (`all-linear`, or
    names separated by commas; default: what peft takes for the model); 0 for `lora_r` trains all weights. `lora_on`:
    `"all"`; `"reader"` (on completions, which read frozen prompts through adapted keys and values, see
    [`ReaderLoraConfig`]); `"completion"` (PEFT's aLoRA: completions read prompts as the base does).

    Parameters that control **generation** (beam search as in the papers): `generate`, `num_beams`, `length_penalty`,
    `no_repeat_ngram_size` (within the output: the input's names may be repeated), `max_new_tokens`,
    `generation_batch_size`.

    Parameters that control **evaluation**: `wordnet` and `meteor_jar` of [`NLGMetrics`].

    Parameters that control **the run**: `resume` goes on with what is in `output_dir`.
    """

    model_name_or_path: str = field(default="gpt2", metadata={"help": "hub name or folder of a causal language model"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the challenge's CSV files"})
    dataset_name: str = field(default="tuetschek/e2e_nlg", metadata={"help": "data set on the hub"})
    dataset_revision: str | None = field(default="refs/convert/parquet", metadata={"help": "its revision"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many pairs"})
    max_test_samples: int | None = field(default=None, metadata={"help": "generate for so many representations"})
    max_length: int = field(default=256, metadata={"help": "tokens of prompt and reference together"})
    lora_r: int = field(default=4, metadata={"help": "rank of LoRA; 0 trains all weights"})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale times its rank"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout before the adapters"})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "all-linear, or names with commas between"}
    )
    lora_on: str = field(default="all", metadata={"help": "'all', 'reader' or 'completion'"})
    generate: bool = field(default=True, metadata={"help": "write predictions for the test set"})
    num_beams: int = field(default=10, metadata={"help": "beams"})
    length_penalty: float = field(default=0.8, metadata={"help": "exponent of the length in the beam score"})
    no_repeat_ngram_size: int = field(default=4, metadata={"help": "no n-gram of this size twice in an output"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest output"})
    generation_batch_size: int = field(default=16, metadata={"help": "prompts at a time; changes no output"})
    wordnet: str | None = field(default=None, metadata={"help": "folder with WordNet; none: exact and stems only"})
    meteor_jar: str | None = field(default=None, metadata={"help": "meteor-1.5.jar, run by Java"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})


# ---- Data ----


def read_pairs(path: str | os.PathLike) -> list[dict[str, str]]:
    """
    Read meaning representations and references from a CSV file with the columns `mr` and `ref` (or the hub's names).

    Raises:
        ValueError: if the file is missing or is not UTF-8, a column is missing, there are no rows, or one of them is
            broken or has an empty cell; names the line.
    """
    require(Path(path).exists(), "data_dir", str(path), "no such file; the folder needs " + ", ".join(FILES.values()))
    table = read(path, "data_dir")
    names = {re.sub(r"[ .-]+", "_", column.strip().lower()): column for column in reversed(table.columns)}
    cells = {}
    for name, known in PAIR_COLUMNS.items():
        column = next((names[one] for one in known if one in names), None)
        require(column is not None, "data_dir", str(path), f"no column {name!r}, only {table.columns}")
        cells[name] = table.texts(column, "data_dir")
    for row, (mr, ref) in enumerate(zip(cells["mr"], cells["ref"], strict=True)):
        for name, cell in (("mr", mr), ("ref", ref)):
            if not cell.strip():
                table.refuse(f"{table.place(row)} has an empty {name!r}")
    return [{"mr": mr, "ref": ref} for mr, ref in zip(cells["mr"], cells["ref"], strict=True)]


def load_pairs(args: NLGArguments, splits: Sequence[str] = tuple(FILES)) -> dict[str, list[dict[str, str]]]:
    """Return the pairs of the splits (`train`, `dev`, `test`), from `data_dir` or the hub."""
    if args.data_dir is not None:
        return {split: read_pairs(Path(args.data_dir) / FILES[split]) for split in splits}
    require_hub(args.dataset_name, "dataset", "data_dir")
    loaded = datasets.load_dataset(args.dataset_name, revision=args.dataset_revision)
    result = {}
    for split in splits:
        part = loaded["validation" if split == "dev" else split]
        renamed = part.rename_columns({k: v for k, v in HUB_COLUMNS.items() if k in part.column_names and k != v})
        result[split] = renamed.select_columns(["mr", "ref"]).to_list()
    return result


def prompt_of(mr: str) -> str:
    """
    Write a meaning representation as a prompt: `name[Blue Spice], area[riverside]` -> `name : Blue Spice | ...`.

    Any other text, also one with brackets in it, stays as it is.

    Example:

    ```python
    >>> prompt_of("name[Blue Spice], area[riverside]")
    'name : Blue Spice | area : riverside ||'
    ```
    """
    slots = parse(mr) if "[" in mr else None
    return mr if slots is None else " | ".join(f"{name} : {value}" for name, value in slots) + PROMPT_END


def tokenize_pairs(
    pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """
    Make training samples of pairs: prompt, reference and end-of-text token, with labels on the latter two only.

    Returns:
        `datasets.Dataset` with `input_ids`, `attention_mask`, `labels` and the texts `mr` and `ref`.
    """
    prompts = tokenizer([prompt_of(pair["mr"]) for pair in pairs], add_special_tokens=False)["input_ids"]
    targets = tokenizer([" " + pair["ref"] for pair in pairs], add_special_tokens=False)["input_ids"]
    rows = []
    for pair, prompt, target in zip(pairs, prompts, targets, strict=True):
        tokens = [*prompt, *target, tokenizer.eos_token_id][:max_length]
        labels = ([-100] * len(prompt) + tokens[len(prompt) :])[:max_length]
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels, **pair})
    return datasets.Dataset.from_list(rows)


def score_texts(
    table: datasets.Dataset,
    model_name_or_path: str,
    prompt_column: str | None,
    target_column: str,
    id_column: str | None,
    max_length: int,
) -> tuple[Scores, list[list[int]]]:
    """
    Score the texts of a table with a causal language model: the mean loss of each target given its prompt.

    Args:
        table (`datasets.Dataset`): one sample a row.
        model_name_or_path (`str`): hub name or folder.
        prompt_column (`str`, *optional*): text that is read but not scored; of the form `name[value], ...` it is
            written as the E2E recipe writes it.
        target_column (`str`): text that is scored, end-of-text token included.
        id_column (`str`, *optional*): integer ids; default: row numbers.
        max_length (`int`): tokens of both together.

    Returns:
        `tuple`: the scores, ids ascending, and the labels of each row of the table.

    Raises:
        ValueError: for missing columns, ids that are not unique, or losses that are NaN.
    """
    ids = sample_ids(table, id_column)
    targets = read_column(table, target_column, "target_column")
    prompts = [""] * len(ids) if prompt_column is None else read_column(table, prompt_column, "prompt_column")
    args = NLGArguments(model_name_or_path=model_name_or_path, lora_r=0)
    model, tokenizer = load_model(args)
    pairs = [{"mr": prompt, "ref": target} for prompt, target in zip(prompts, targets, strict=True)]
    data = tokenize_pairs(pairs, tokenizer, max_length).remove_columns(["mr", "ref"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = score_dataset(
        BatchScorer(model.to(device)),
        add_ids(data, ids),
        CarryIds(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)),
        lambda batch: {key: value.to(device) for key, value in batch.items()},
        origin={"model": model_fingerprint(model)},
        share=share_rows,
    )
    return scores, data["labels"][:]


def ids_of(table: Table, id_column: str | None) -> np.ndarray:
    """Return the id of every row, see [`darel_hf.data.sample_ids`]: int64 `[n]`, row numbers by default."""
    if id_column is None:
        return np.arange(len(table), dtype=np.int64)
    return sample_ids(datasets.Dataset.from_dict({id_column: table.numbers(id_column, "id_column")}), id_column)


def score_table(
    table: Table,
    model_name_or_path: str,
    prompt_column: str | None,
    target_column: str,
    id_column: str | None,
    max_length: int,
) -> tuple[Scores, dict[str, np.ndarray]]:
    """
    Score the texts of a file, see [`score_texts`].

    Returns:
        `tuple`: the scores, and by column the hashes that say what was scored, see
        [`darel_hf.scoring.check_rows`].

    Raises:
        ValueError: for cells that are no text, naming the line; see [`score_texts`].
    """
    names = [name for name in (prompt_column, target_column) if name is not None]
    purposes = dict(zip(names[::-1], ("target_column", "prompt_column"), strict=False))
    columns = {name: table.texts(name, purposes[name]) for name in names}
    ids = ids_of(table, id_column)
    order = np.argsort(ids, kind="stable")
    data = datasets.Dataset.from_dict({**columns, "sample id": ids})
    scores, labels = score_texts(data, model_name_or_path, prompt_column, target_column, "sample id", max_length)
    scores.origin.update({"prompt_column": prompt_column or "", "target_column": target_column})
    hashes = {"text_hash": row_hashes(*columns.values())[order], "label_hash": label_hashes(labels)[order]}
    return scores, hashes


def group_references(pairs: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return the references of each meaning representation, in the order of the file."""
    groups: dict[str, list[str]] = {}
    for pair in pairs:
        groups.setdefault(pair["mr"], []).append(pair["ref"])
    return groups


# ---- Model ----


def load_model(args: NLGArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the language model with LoRA adapters (`lora_r` 0: without) and its tokenizer."""
    if not Path(args.model_name_or_path).is_dir():
        require_hub(args.model_name_or_path, "model", "model_name_or_path")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    if args.lora_r == 0:
        return model, tokenizer
    targets: str | list[str] | None = args.lora_target_modules
    if targets is not None and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    require(args.lora_on in LORA_ON, "lora_on", args.lora_on, f"choose one of {tuple(LORA_ON)}")
    fan_in_fan_out = model.config.model_type == "gpt2"  # its projections store their weights transposed
    lora = LORA_ON[args.lora_on](
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=fan_in_fan_out,
    )
    if args.lora_on == "completion":
        lora.alora_invocation_tokens = tokenizer(PROMPT_END, add_special_tokens=False)["input_ids"]
    return get_peft_model(model, lora), tokenizer


def load_for_generation(path: str | os.PathLike, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a trained model and its tokenizer from a folder with an adapter (on `base`) or a whole model."""
    for name in (path, base):
        if name is not None and not Path(name).is_dir():
            require_hub(str(name), "model", "model_name_or_path")
    if not (Path(path) / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    if base is None:
        base = json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    return model, AutoTokenizer.from_pretrained(path)


# ---- Generation ----


class NoRepeatInOutput(NoRepeatNGramLogitsProcessor):
    """
    Forbid repeated n-grams within the output alone.

    transformers' own processor counts the prompt of a decoder-only model too, so that a name of n tokens could never
    be copied from the input; the papers' decoder counts the output only.
    """

    def __init__(self, size: int, prompt_width: int):
        super().__init__(size)
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return super().__call__(input_ids[:, self.prompt_width :], scores)


def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, mrs: Sequence[str], args: NLGArguments, path: str | os.PathLike
) -> list[str]:
    """
    Write one prediction a line for meaning representations, by beam search; resumable.

    What is finished stands in `<path>.partial.jsonl`; a call that was killed goes on from there if model, inputs and
    settings are the same. Padding is masked, so that the batch size changes no output.

    Args:
        model: causal language model, with or without adapters.
        tokenizer: its tokenizer.
        mrs (`Sequence[str]`): meaning representations.
        args ([`NLGArguments`]): the settings of generation.
        path: the file of predictions.

    Returns:
        `list[str]`: the predictions, in the order of `mrs`.
    """
    beam = {"num_beams": args.num_beams, "length_penalty": args.length_penalty, "max_new_tokens": args.max_new_tokens}
    origin = code_fingerprint(beam, args.no_repeat_ngram_size, list(mrs)) + model_fingerprint(model)
    partial = Path(f"{path}.partial.jsonl")
    done = _read_partial(partial, origin)
    model.eval()
    device = next(model.parameters()).device
    prompts = tokenizer([prompt_of(mr) for mr in mrs], add_special_tokens=False)["input_ids"]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    todo = sorted((i for i in range(len(mrs)) if i not in done), key=lambda i: (-len(prompts[i]), i))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps({"origin": origin}) + "\n")
        hidden = not is_progress_bar_enabled()
        progress = tqdm(total=len(mrs), initial=len(done), desc="generating", delay=2, leave=False, disable=hidden)
        for start in range(0, len(todo), args.generation_batch_size):
            batch = todo[start : start + args.generation_batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch], device=device)
            mask = torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device
            )
            size = args.no_repeat_ngram_size
            processors = LogitsProcessorList([NoRepeatInOutput(size, width)] if size > 0 else [])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    use_cache=True,
                    early_stopping=False,
                    pad_token_id=pad,
                    eos_token_id=tokenizer.eos_token_id,
                    logits_processor=processors,
                    **beam,
                )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                done[i] = " ".join(text.split())
                file.write(json.dumps({"index": i, "prediction": done[i]}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
        progress.close()
    predictions = [done[i] for i in range(len(mrs))]
    write_text(path, "".join(line + "\n" for line in predictions))
    partial.unlink()
    return predictions


def check_generation(args: NLGArguments, mrs: Sequence[str], model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for settings and inputs that generation would stop at, after all training."""
    for name in ("num_beams", "max_new_tokens", "generation_batch_size"):
        require(getattr(args, name) >= 1, name, getattr(args, name), "give a whole number, 1 or more")
    least = args.no_repeat_ngram_size >= 0
    require(least, "no_repeat_ngram_size", args.no_repeat_ngram_size, "give a size, or 0 for no limit")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        lengths = [len(ids) for ids in tokenizer([prompt_of(mr) for mr in mrs], add_special_tokens=False)["input_ids"]]
        longest = int(np.argmax(lengths))
        remedy = (
            f"the representation {mrs[longest][:60]!r} has {lengths[longest]} tokens, and the model {positions} "
            "positions for it and the output; shorten it, or lower max_new_tokens"
        )
        require(lengths[longest] + args.max_new_tokens <= positions, "max_new_tokens", args.max_new_tokens, remedy)


def _read_partial(path: Path, origin: str) -> dict[int, str]:
    """Read finished predictions; a line that was cut off is dropped, a file of another origin is put aside."""
    if not path.exists():
        return {}
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines or lines[0].get("origin") != origin:
        aside = path.with_name(f"{path.name}.{int(time.time())}.other")
        path.rename(aside)
        logger.warning("%s holds predictions of another model or other settings; moved to %s", path, aside)
        return {}
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {line["index"]: line["prediction"] for line in lines[1:]}


# ---- The whole job ----


def run(args: NLGArguments, darel: DarelConfig, training: TrainingArguments) -> dict[str, Any]:
    """
    Fine-tune, predict, and account for it.

    `training.output_dir` ends with the adapter, `predictions.txt`, `scores.json` (all metrics with signatures and
    intervals), `results.json`, and with DAREL `darel/report.json`, `darel/samples.parquet`, `losses.png` and
    `dropped.csv` (what the offline stage dropped, most extreme first).

    Returns:
        The content of `results.json`.

    Raises:
        ValueError, OSError: for bad input, before any compute.
    """
    folder = claim_folder(training, args.resume)
    metrics = None
    if training.process_index == 0 and args.generate:
        metrics = NLGMetrics(bootstrap=1000, wordnet=args.wordnet, meteor_jar=args.meteor_jar)
        for note in metrics.notes:
            logger.warning(note)
    pairs = load_pairs(args)
    pairs["train"] = training_pairs(pairs["train"], args, training.seed)
    set_seed(training.seed)  # adapters begin at random
    model, tokenizer = load_model(args)
    if args.generate:
        check_generation(args, list(held_out(pairs["test"], args)), model, tokenizer)
    data = {split: tokenize_pairs(part, tokenizer, args.max_length) for split, part in pairs.items()}
    multiple = 8 if training.bf16 or training.fp16 else None
    trainer = DarelTrainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, pad_to_multiple_of=multiple),
        darel=darel,
    )
    finished = folder / "trained.json"  # written when adapter and selection are: what is left is to predict
    if args.resume and finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        model, _ = load_for_generation(str(folder), args.model_name_or_path)
        model.to(training.device)
    else:
        results = train_once(trainer, folder, args.resume)
        results["tokens_backpropagated"] = _tokens_backpropagated(trainer, data["train"])
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            if trainer.report is not None:
                _write_selection(trainer, data["train"], folder)
            write_json(finished, results)
    if trainer.is_world_process_zero():
        results |= _predict(model, tokenizer, pairs["test"], args, metrics, folder)
        write_json(folder / "results.json", results)
        report = folder / checkpoints.FOLDER / "report.json"
        if report.exists() and args.generate:
            held = json.loads(report.read_text(encoding="utf-8"))
            write_json(report, held | {"scores": {name: results[name] for name in NAMES}})
    trainer.accelerator.wait_for_everyone()
    return results


def training_pairs(train: list[dict[str, str]], args: NLGArguments, seed: int) -> list[dict[str, str]]:
    """
    Return the pairs that are trained on, in their order: all, or `max_train_samples` of them.

    Meaning representations are drawn with the seed, each with all its references: the whole set in small.
    """
    if args.max_train_samples is None or args.max_train_samples >= len(train):
        return train
    rows: dict[str, list[int]] = {}
    for row, pair in enumerate(train):
        rows.setdefault(pair["mr"], []).append(row)
    drawn = [row for mr in random.Random(seed).sample(list(rows), len(rows)) for row in rows[mr]]
    return [train[row] for row in sorted(drawn[: args.max_train_samples])]


def _tokens_backpropagated(trainer: DarelTrainer, train: datasets.Dataset) -> int:
    label_tokens = np.array([sum(token != -100 for token in labels) for labels in train["labels"]])
    report = trainer.report
    times = np.full(len(train), trainer.state.epoch or 0) if report is None else report.times_trained
    return round(float((label_tokens * times).sum()))


def held_out(test: list[dict[str, str]], args: NLGArguments) -> dict[str, list[str]]:
    """Return the distinct representations of a test set with their references, all or `max_test_samples` of them."""
    groups = group_references(test)
    if args.max_test_samples is None or args.max_test_samples >= len(groups):
        return groups
    drawn = set(random.Random(0).sample(list(groups), args.max_test_samples))
    return {mr: references for mr, references in groups.items() if mr in drawn}


def _predict(
    model: Any, tokenizer: Any, test: list[dict], args: NLGArguments, metrics: NLGMetrics | None, folder: Path
) -> dict[str, Any]:
    """Write predictions for the distinct meaning representations of the test set, and score them."""
    if metrics is None:
        return {}
    groups = held_out(test, args)
    started = time.perf_counter()
    predictions = generate(model, tokenizer, list(groups), args, folder / "predictions.txt")
    seconds = time.perf_counter() - started
    mrs = list(groups) if all(parse(mr) for mr in groups) else None
    scores = metrics(predictions, list(groups.values()), mrs=mrs)
    write_json(folder / "scores.json", scores)
    counts = {"test_representations": len(groups), "generation_seconds": seconds}
    return {name: scores[name] for name in NAMES} | counts


def _write_selection(trainer: DarelTrainer, train: datasets.Dataset, folder: Path) -> None:
    """Write which references were dropped, most extreme first, so that a person can read what was thought useless."""
    report = trainer.report
    rows = {int(sample): row for row, sample in enumerate(sample_ids(train, report.config.id_column))}
    with atomic_path(folder / "dropped.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "loss", "n_tokens", "percentile", "why", "mr", "ref"])
        for sample in report.dropped():
            text = train[rows[sample["sample_id"]]]
            numbers = [f"{sample['loss']:.4f}", sample["n_tokens"], f"{sample['percentile']:.4f}", sample["why"]]
            writer.writerow([sample["sample_id"], *numbers, text["mr"], text["ref"]])
    if np.isfinite(report.offline_losses).sum() > 1:
        report.plot_losses(folder / "losses.png")
