"""aLoRA from where completions begin: the invocation tokens that all prompts end with, found in a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import nn

from ..files import require
from .reader import IGNORE


def completion_lora(config: LoraConfig, dataset: Any, tokenizer: Any = None) -> LoraConfig:
    """
    Return a configuration whose LoRA acts from the end of prompts on: PEFT's aLoRA, by the tokens that all end with.

    Prompts stay the base's, as with [`ReaderLoraConfig`], and completions read them as the base does. PEFT finds the
    invocation tokens in every row by itself, in training and in generation; any PEFT loads it.

    Args:
        config (`LoraConfig`): rank, targets and the like.
        dataset: items with `input_ids` and `labels` (-100 at prompts), one sequence each.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): to say in messages what tokens mean.

    Raises:
        ValueError: if the prompts do not end alike, or a completion has the same tokens again, at which PEFT would
            take it to begin anew.

    Example:

    ```python
    model = get_peft_model(base, completion_lora(LoraConfig(r=8, task_type="CAUSAL_LM"), train_dataset, tokenizer))
    ```
    """

    def text(tokens: Sequence[int]) -> str:
        return repr(tokenizer.decode(tokens)) if tokenizer is not None else str(list(tokens))

    rows = [(list(item["input_ids"]), list(item["labels"])) for item in dataset]
    require(bool(rows), "dataset", len(rows), "give the rows that are trained on")
    suffix: list[int] | None = None
    starts = [next((i for i, label in enumerate(labels) if label != IGNORE), len(labels)) for _, labels in rows]
    for number, ((tokens, _), start) in enumerate(zip(rows, starts, strict=True)):
        prompt = tokens[:start]
        if suffix is None:
            suffix = prompt
        same = 0
        while same < min(len(suffix), len(prompt)) and suffix[-1 - same] == prompt[-1 - same]:
            same += 1
        if not same:
            raise ValueError(
                f"dataset: the prompt of row {number} ends with {text(prompt[-3:])}, others with {text(suffix[-3:])}: "
                "prompts have no last token in common; end each with the same words, such as ' Answer:', or use "
                "ReaderLoraConfig, which needs none"
            )
        suffix = suffix[len(suffix) - same :]
    for number, ((tokens, _), start) in enumerate(zip(rows, starts, strict=True)):
        again = any(tokens[i : i + len(suffix)] == suffix for i in range(start - len(suffix) + 1, len(tokens)))
        if again:
            raise ValueError(
                f"dataset: the completion of row {number} has {text(suffix)} again, which ends all prompts: PEFT "
                "would take that for the end of its prompt; end prompts with words that occur nowhere else"
            )
    return dataclasses.replace(config, alora_invocation_tokens=suffix)


def invoked(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor | None:
    """
    Return from where on the aLoRA of a model acts, bool `[B, L]`; `None` if its active adapter is none.

    Raises:
        ValueError: for a row without invocation tokens, in which nothing would be trained.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "alora_invocation_tokens", None) is None:
        return None
    offsets = calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids)
    if None in offsets:
        row = offsets.index(None)
        raise ValueError(
            f"alora_invocation_tokens={config.alora_invocation_tokens}: row {row} of a batch does not have them (cut "
            "at the maximal length?), so no adapter acts on it; leave such rows out"
        )
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return columns >= input_ids.shape[1] - torch.tensor(offsets, device=input_ids.device)[:, None]
