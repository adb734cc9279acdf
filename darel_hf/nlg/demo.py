"""The demo: a generated corpus, a small GPT-2 warmed up in another domain, and LoRA fine-tuning four ways."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import DarelConfig
from ..files import refuse_used_folder, write_json

VOCABULARY = 1024


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

    representations: int = 560
    warm_up_representations: int = 1200
    warm_up_epochs: int = 3
    width: int = 128
    layers: int = 3
    epochs: int = 3
    learning_rate: float = 4e-3
    lora_r: int = 8
    batch_size: int = 16
    test_representations: int = 70
    seed: int = 0


def arms() -> dict[str, DarelConfig]:
    """Return the four ways to fine-tune; the random subset takes as many steps as the offline selection."""
    return {
        "full data": DarelConfig(),
        "random subset": DarelConfig(offline_keep=0.7, offline_rule="random"),
        "DAREL offline": DarelConfig(offline_keep=0.7, group_column="mr"),
        "DAREL offline + online": DarelConfig(offline_keep=0.8, online_keep=0.5, group_column="mr"),
    }


def run_demo(
    output_dir: str, settings: DemoSettings | None = None, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """
    Run the demo and write its results.

    `output_dir` gets `data/` and `model/` (usable with the recipe's `--data_dir` and `--model_name_or_path`), a folder
    an arm, `results.json`, `losses.png` (the loss distribution with the kept part marked) and `quality_time.png`.

    Args:
        output_dir (`str`): a new folder.
        settings ([`DemoSettings`], *optional*): sizes.
        progress (`Callable`): is told what is finished.

    Returns:
        One dict an arm, as in `results.json`.

    Raises:
        ValueError: if `output_dir` is not empty.
    """
    from .corpus import make_corpus
    from .task import NLGArguments, run

    settings = settings or DemoSettings()
    folder = Path(output_dir)
    refuse_used_folder(folder, "something", "name a new folder")
    pairs = make_corpus(folder / "data", settings.representations, settings.seed)
    with _quiet():
        seconds = warm_up(folder / "model", settings, texts=[pair["ref"] for pair in pairs["train"]])
    progress(f"model warmed up in another domain in {seconds:.0f} s")
    results = []
    for name, darel in arms().items():
        arm = folder / name.replace(" + ", "_").replace(" ", "_").lower()
        training = _training_arguments(
            arm,
            settings.seed,
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            warmup_steps=0.02,
        )
        task = NLGArguments(
            model_name_or_path=str(folder / "model"),
            data_dir=str(folder / "data"),
            lora_r=settings.lora_r,
            lora_alpha=4 * settings.lora_r,
            lora_dropout=0.05,
            max_test_samples=settings.test_representations,
            num_beams=2,
            generation_batch_size=35,
        )
        with _quiet():
            result = run(task, darel, training)
        result |= {"arm": name, "noisy_dropped": _noisy_dropped(arm, pairs["train"])}
        results.append(result)
        progress(f"{name}: {result['seconds']:.0f} s of training, BLEU {result['bleu']:.1f}")
    plain = results[0]["seconds"]
    for result in results:
        result["measured_time"] = result["seconds"] / plain
    write_json(folder / "results.json", {"settings": asdict(settings), "arms": results})
    shutil.copy(folder / "darel_offline" / "losses.png", folder)
    plot_quality_time(results, folder / "quality_time.png")
    return results


def _training_arguments(folder: Path, seed: int, **settings: Any) -> Any:
    """Return `TrainingArguments` that save and report nothing by themselves."""
    from transformers import TrainingArguments

    quiet = {"save_strategy": "no", "report_to": "none", "logging_steps": 1000, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), seed=seed, dataloader_pin_memory=False, **quiet, **settings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress and advice of the libraries out of the demo's one table, for as long as it runs."""
    import datasets
    import transformers

    ours, level = logging.getLogger("darel_hf"), logging.getLogger("darel_hf").level
    verbosity = transformers.utils.logging.get_verbosity()
    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Trainer's log lines
            yield
    finally:
        ours.setLevel(level)
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
        Trainer,
        set_seed,
    )

    from .corpus import MARKETS, make_pairs
    from .task import prompt_of, tokenize_pairs

    started = time.perf_counter()
    pairs = make_pairs(MARKETS, settings.warm_up_representations, (3, 4), random.Random(settings.seed + 1))
    bpe = ByteLevelBPETokenizer()
    lines = [f"{prompt_of(str(pair['mr']))} {pair['ref']}" for pair in pairs]
    bpe.train_from_iterator([*lines, *texts], vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=end)
    set_seed(settings.seed)
    width = settings.width
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    shape = {"n_layer": settings.layers, "n_embd": width, "n_head": max(width // 64, 1), "n_positions": 256}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **ends, **dropout)
    trainer = Trainer(
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
    )
    trainer.train()
    trainer.save_model(str(folder))
    return time.perf_counter() - started


def _noisy_dropped(arm: Path, pairs: list[dict]) -> float | None:
    """Return which fraction of the noisy references the offline stage dropped; chance is the dropped fraction."""
    import pyarrow.parquet as pq

    if not (arm / "darel" / "samples.parquet").exists():
        return None
    kept = pq.read_table(arm / "darel" / "samples.parquet")["kept"].to_numpy(zero_copy_only=False)
    noisy = [keep for keep, pair in zip(kept, pairs, strict=True) if pair["noisy"]]
    return 1 - sum(noisy) / max(len(noisy), 1)


def table(results: list[dict[str, Any]]) -> Any:
    """Return the results as a `rich` table."""
    from rich import box
    from rich.table import Column, Table

    titles = ("\nBLEU", "\ntime", "of it\nscoring", "\nsamples", "label\ntokens", "saving\npredicted")
    titles += ("saving\nmeasured", "noise\ndropped")
    columns = [Column("", no_wrap=True), *(Column(title, justify="right", no_wrap=True) for title in titles)]
    title = "LoRA fine-tuning four ways (one seed: a demonstration, no evidence)"
    grid = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for result in results:
        dropped = result["noisy_dropped"]
        grid.add_row(
            result["arm"],
            f"{result['bleu']:.1f}",
            f"{result['seconds']:.1f} s",
            f"{result['scoring_seconds']:.1f} s",
            f"{result['rows_backpropagated']:,}",
            f"{result['tokens_backpropagated']:,}",
            f"{1 - result['predicted_time']:.0%}",
            f"{1 - result['measured_time']:.0%}",
            "-" if dropped is None else f"{dropped:.0%}",
        )
    return grid


def plot_quality_time(results: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against time, scoring counted, one point an arm."""
    from ..report import chart

    texts = {"xlabel": "seconds of training, scoring counted", "ylabel": "BLEU (13a, lower-cased)"}
    with chart(path, title="quality against time", **texts) as axes:
        for result, colour in zip(results, ("#333333", "#9a9a9a", "#2a6f97", "#e07a5f"), strict=True):
            axes.scatter(result["seconds"], result["bleu"], s=70, color=colour, label=result["arm"], zorder=3)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
