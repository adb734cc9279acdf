"""The demo: a generated corpus, a small GPT-2 warmed up in another domain, and LoRA fine-tuning six ways."""

from __future__ import annotations

import contextlib
import io
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import DarelConfig
from ..files import refuse_used_folder, write_json

VOCABULARY = 1024
PLAIN, FEWER, READER = "plain", "fewer epochs", "reader, fast=True"
PLAIN_COLOUR, OURS_COLOUR = "#9a9a9a", "#2a6f97"


NOTE = (
    "Times count everything: trying out, measuring, training. One run of each, with one seed, is no evidence of\n"
    "quality: `darel compare` finds that, on your data."
)


@dataclass(frozen=True)
class DemoSettings:
    """
    Sizes of the demo, so that a test can run a smaller one.

    Attributes:
        representations (`int`): meaning representations of the training set; about four references each.
        warm_up_representations (`int`), warm_up_epochs (`int`): of the other domain.
        width, layers (`int`): of the GPT-2.
        epochs (`int`): of fine-tuning.
        learning_rate (`float`), lora_r (`int`), batch_size (`int`): of fine-tuning.
        test_representations (`int`): how many the quality is measured on.
        seed (`int`): of everything.
    """

    representations: int = 240
    warm_up_representations: int = 360
    warm_up_epochs: int = 3
    width: int = 192
    layers: int = 4
    epochs: int = 3
    learning_rate: float = 4e-3
    lora_r: int = 8
    batch_size: int = 16
    test_representations: int = 70
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """
    One way to fine-tune.

    Attributes:
        says (`str`): what it is, in plain words; of `epochs`.
        darel (`dict`): settings of [`DarelConfig`].
        lora_on (`str`): see [`NLGArguments`].
    """

    says: str
    darel: dict[str, Any] = field(default_factory=dict)
    lora_on: str = "all"


#: By name, in the order of the table.
ARMS = {
    PLAIN: Arm("Trainer, LoRA everywhere, {epochs:g} epochs"),
    FEWER: Arm("plain, {epochs:.2f} epochs: the reader's time"),
    "fast=True": Arm("plain's gradients in less time", {"fast": True}),
    READER: Arm("prompts stay frozen, computed once", {"fast": True}, "reader"),
    "reader, finished": Arm("its last epoch everywhere: stock LoRA", {"fast": True, "finish_epochs": 1}, "reader"),
    "reader, budget": Arm("told to take 0.25 of plain's time", {"fast": True, "budget_time": 0.25}, "reader"),
}


def run_demo(
    output_dir: str, settings: DemoSettings | None = None, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """
    Run the demo and write its results.

    `output_dir` gets `data/` and `model/` (usable with the recipe's `--data_dir` and `--model_name_or_path`), a folder
    an arm, `results.json` and `quality_time.png`.

    Args:
        output_dir (`str`): a new folder.
        settings ([`DemoSettings`], *optional*): sizes.
        progress (`Callable`): is told what is finished.

    Returns:
        One dict an arm, as in `results.json`.

    Raises:
        ValueError: if `output_dir` is not empty.
    """
    from .corpus import TASK, make_corpus

    settings = settings or DemoSettings()
    folder = Path(output_dir)
    refuse_used_folder(folder, "something", "name a new folder")
    pairs = make_corpus(folder / "data", settings.representations, settings.seed, TASK)
    with _quiet():
        seconds = warm_up(folder / "model", settings, texts=[str(pair["ref"]) for pair in pairs["train"]])
    progress(f"model warmed up in another domain in {seconds:.0f} s")
    results: dict[str, dict[str, Any]] = {}
    for name in [*(name for name in ARMS if name != FEWER), FEWER]:
        share = min(results[READER]["measured_time"], 1.0) if name == FEWER else 1.0
        result = run_arm(folder, name, settings, share * settings.epochs)
        result["measured_time"] = result["seconds"] / results.get(PLAIN, result)["seconds"]
        results[name] = result
        took = f"; it took {', '.join(result['factors'])}" if result["factors"] else ""
        progress(f"{name}: {result['seconds']:.0f} s of training, BLEU {result['bleu']:.1f}{took}")
    ordered = [results[name] for name in ARMS]
    write_json(folder / "results.json", {"settings": asdict(settings), "arms": ordered})
    plot(ordered, folder / "quality_time.png")
    return ordered


def run_arm(folder: Path, name: str, settings: DemoSettings, epochs: float) -> dict[str, Any]:
    """
    Fine-tune one way on what is in the demo's folder.

    Returns:
        The task's results, and `arm`, its `folder`, `says`, `epochs`, `factors` (by accelerator that was taken), and
        `interval` (of BLEU over the test set, 95 %).
    """
    from .task import NLGArguments, run

    arm, target = ARMS[name], folder / name.replace(", ", "_").replace(" ", "_").replace("=", "_").lower()
    training = _training_arguments(
        target,
        settings.seed,
        learning_rate=settings.learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=0.02,
    )
    task = NLGArguments(
        model_name_or_path=str(folder / "model"),
        data_dir=str(folder / "data"),
        lora_on=arm.lora_on,
        lora_r=settings.lora_r,
        lora_alpha=4 * settings.lora_r,
        lora_dropout=0.0,
        lora_target_modules="c_attn,c_proj,c_fc",
        max_test_samples=settings.test_representations,
        num_beams=2,
        generation_batch_size=35,
        wordnet="none",  # nothing is downloaded
    )
    with _quiet():
        result = run(task, DarelConfig(**arm.darel), training)
    report = target / "darel" / "report.json"
    factors = _read(report)["plan"]["costs"]["factors"] if report.exists() else {}
    interval = _read(target / "scores.json")["intervals"]["bleu"]
    told = {"arm": name, "folder": target.name, "says": arm.says.format(epochs=epochs), "epochs": epochs}
    return result | told | {"factors": factors, "interval": interval}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _training_arguments(folder: Path, seed: int, **settings: Any) -> Any:
    """Return `TrainingArguments` that save and report nothing by themselves."""
    from transformers import TrainingArguments

    quiet = {"save_strategy": "no", "report_to": "none", "logging_steps": 1000, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), seed=seed, dataloader_pin_memory=False, **quiet, **settings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress and advice of other libraries out of the demo, for as long as it runs; our own warnings stay."""
    import datasets
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # Trainer's log lines; plans
            for module in ("transformers", "peft", "torch", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.utils.logging.enable_progress_bar()


def warm_up(folder: Path, settings: DemoSettings, texts: list[str]) -> float:
    """
    Train a tokenizer, and a small GPT-2 on the markets, into `folder`: the "pre-trained" model of the demo.

    Args:
        folder (`Path`): where to save both.
        settings ([`DemoSettings`]): sizes.
        texts (`list[str]`): more text for the tokenizer, so that it knows the words of the other domain as well.

    Returns:
        Seconds.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        DataCollatorForSeq2Seq,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        set_seed,
    )

    from ..training import DarelTrainer
    from .corpus import MARKETS, TASK, make_pairs
    from .task import prompt_of, tokenize_pairs

    started = time.perf_counter()
    generator = random.Random(settings.seed + 1)
    pairs = make_pairs(MARKETS, settings.warm_up_representations, (3, 4), generator, TASK)
    bpe = ByteLevelBPETokenizer()
    lines = [f"{prompt_of(str(pair['mr']))} {pair['ref']}" for pair in pairs]
    end = "<|endoftext|>"
    bpe.train_from_iterator([*lines, *texts], vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=end)
    set_seed(settings.seed)
    width = settings.width
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    shape = {"n_layer": settings.layers, "n_embd": width, "n_head": max(width // 64, 1), "n_positions": 256}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **ends, **dropout)
    trainer = DarelTrainer(
        model=GPT2LMHeadModel(config),
        args=_training_arguments(
            folder,
            settings.seed,
            learning_rate=2e-3,
            num_train_epochs=settings.warm_up_epochs,
            per_device_train_batch_size=16,
            warmup_steps=0.1,
        ),
        train_dataset=tokenize_pairs([{"mr": p["mr"], "ref": p["ref"]} for p in pairs], tokenizer, 256),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        darel=DarelConfig(share_prompts=1),  # the same training, sooner; `fast` would choose by the clock
    )
    trainer.train()
    trainer.save_model(str(folder))
    return time.perf_counter() - started


def table(results: list[dict[str, Any]]) -> Any:
    """Return the results as a `rich` table."""
    from rich import box
    from rich.table import Column, Table

    titles = ("samples\ntrained", "\ntime", "of\nplain", "\nBLEU")
    columns = [Column("", no_wrap=True), Column("\nwhat it is", ratio=1)]
    columns += [Column(title, justify="right", no_wrap=True) for title in titles]
    title = "LoRA fine-tuning six ways (one run of each: a demonstration, no evidence of quality)"
    grid = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    for result in results:
        grid.add_row(
            result["arm"],
            result["says"],
            f"{result['rows_backpropagated']:,}",
            f"{result['seconds']:.1f} s",
            f"{result['measured_time']:.2f}",
            f"{result['bleu']:.1f}",
        )
    return grid


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of each arm as a bar, and beside it its BLEU with the interval over the test set."""
    from ..report import figure_at

    rows = range(len(results))[::-1]
    with figure_at(path, (9, 3.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
        for row, result in zip(rows, results, strict=True):
            colour = PLAIN_COLOUR if result["arm"] in (PLAIN, FEWER) else OURS_COLOUR
            left.barh(row, result["seconds"], color=colour)
            left.text(result["seconds"], row, f" {result['measured_time']:.2f}", va="center")
            low, high = result["interval"]
            right.plot((low, high), (row, row), color=colour, linewidth=2)
            right.plot(result["bleu"], row, "o", color=colour)
        left.set_yticks(rows, [result["arm"] for result in results])
        left.set(title="time: seconds, and of plain training", xlabel="seconds, everything counted")
        left.margins(x=0.12)
        right.set(title="quality: BLEU, one run", xlabel="BLEU; lines: 95 %, over test outputs")
        right.grid(axis="x", alpha=0.3)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
