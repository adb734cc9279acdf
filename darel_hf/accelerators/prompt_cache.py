"""The prompt cache: what the frozen base computes of prompts is computed once, and completions read it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from ..adapters import acting_everywhere, find_reader, invoked, prompt_positions
from ..config import ACCELERATOR_FACTS
from ..data import is_stream
from ..scoring import IGNORE, base_model, is_sharded, model_fingerprint
from . import unpad
from .base import register_accelerator
from .frozen_base import FrozenBase, autocast_dtype
from .prompt_attention import ATTENTION, Step
from .prompt_store import InMemory, OnDisk, Recompute
from .row_attention import rows_of_places

#: Rotary embeddings that depend on how long a row is: a prompt alone has others than with its completion.
BY_LENGTH = ("dynamic", "longrope")


@register_accelerator
class PromptCache(unpad.PaddingFree):
    """
    Compute completions only, for adapters that leave prompts alone; what the base makes of prompts is kept. Exact.

    For the reader ([`darel_hf.adapters.ReaderLoraConfig`]): what is kept of a prompt is what its layers read and what
    frozen layers made of it; a step makes adapted keys and values of that, and the completions of a batch, without
    padding, attend to them. Once adapters act everywhere, steps are those of [`PaddingFree`]. And for PEFT's aLoRA,
    whose completions, from the invocation tokens on, attend to the base's keys and values: these are kept.
    """

    facts = ACCELERATOR_FACTS["prompt_cache"]
    attention = ATTENTION

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.base: FrozenBase | None = None
        self.finish = unpad.PaddingFree(trainer)  # for when adapters act everywhere
        self.store: Recompute | None = None
        self.precision: torch.dtype | None = None  # in which what is stored was computed

    @property
    def reading(self) -> bool:
        """Whether prompts are frozen at this time."""
        reader = find_reader(self.trainer.model)
        return self.invocation is not None or (reader is not None and not reader.everywhere)

    @property
    def invocation(self) -> list[int] | None:
        """The tokens from which on an aLoRA acts."""
        return getattr(getattr(self.trainer.model, "active_peft_config", None), "alora_invocation_tokens", None)

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the adapters, the model, the arguments, or what a few samples show."""
        model, args = self.trainer.model, self.trainer.args
        if not self.reading:
            return "adapters act on prompts, too, so what a prompt gives changes with every step; use ReaderLoraConfig"
        for name, parameter in base_model(model).base_model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                return self._named(f"{name} is trained, on which what a prompt gives may depend")
        rope = getattr(base_model(model).config, "rope_parameters", None) or {}
        kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, Mapping)}
        if kinds & set(BY_LENGTH):
            return self._named(f"its rotary embeddings change with the length of a row ({sorted(kinds - {None})})")
        if args.torch_compile:
            return self._named("torch_compile=True")
        if is_sharded(model) or self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            return self._named("its weights are spread over processes")
        reason = None
        if self.trainer.darel.finish_epochs:
            with self.plain():
                reason = self.finish.why_not(few_rows)
        return super().why_not(few_rows) if reason is None else reason

    def plain(self) -> contextlib.AbstractContextManager:
        """Return a context in which adapters act everywhere, as LoRA does."""
        model = self.trainer.model
        return contextlib.nullcontext() if find_reader(model) is None else acting_everywhere(model)

    def measure(self, seconds: Callable[[Callable[[], Mapping]], float], inputs: Mapping[str, Any]) -> float:
        """Return the seconds of a step; of a mean one, where the last epochs are trained everywhere."""
        epochs = self.trainer.args.num_train_epochs
        share = self.trainer.darel.finish_epochs / epochs
        first, later = (super(PromptCache, self).measure(seconds, inputs) for _ in range(2))
        # Prompts are new in the first epoch only, if at all.
        reading = later + max(first - later, 0.0) / max(epochs, 1)
        if not share:
            return reading
        with self.plain():
            finishing = seconds(lambda: self.transform(inputs))
        return (1 - share) * reading + share * finishing

    def transform(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the completions of a batch, or all of it without padding where adapters act everywhere."""
        return super().transform(inputs) if self.reading else self.finish.transform(inputs)

    def flat(self, inputs: Mapping[str, Any], label_positions_only: bool) -> dict[str, Any]:
        """Return the completions of a batch without padding, and get ready what they read of their prompts."""
        ids, labels, used = inputs["input_ids"], inputs["labels"], unpad.used_positions(inputs)
        columns = used.cumsum(1) - 1  # positions in each row
        places = inputs.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        if (places != columns)[used].any():
            raise ValueError("position_ids: those of a row do not begin at 0; pad on the right, or give position_ids")
        rest = used & self._computed(ids, labels, used)
        last = used & (columns == columns.amax(1, keepdim=True))
        rest |= last & ~rest.any(1, keepdim=True)  # a row of a batch must be something
        rest[:, 0] |= ~used.any(1)
        start = columns.masked_fill(~rest, ids.shape[1]).amin(1, keepdim=True)
        prompts = [tuple(row) for row in _rows(ids, used & (columns < start))]
        parts = {"input_ids": ids, "position_ids": columns.clamp(min=0)}
        if label_positions_only:
            # What is last predicts nothing, and is read by nobody.
            rest = torch.where((rest & ~last).any(1, keepdim=True), rest & ~last, rest)
            row = {key: value[rest][None] for key, value in parts.items()}
            row |= unpad.at_labels(nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:][rest][None])
        else:
            masked = labels.masked_fill(~rest, IGNORE)
            row = unpad.flatten({**parts, "attention_mask": rest.long(), "labels": masked})
        with self.trainer.autocast():
            self._find_base(ids, used, prompts)
            row["attention_mask"] = self._prepare(prompts, rest)
        # Nothing in the row is prompt, and all of it is adapted.
        if self.invocation is not None:
            return {**row, "alora_offsets": [row["input_ids"].shape[1]]}
        return {**row, "prompt_lengths": torch.zeros(1, dtype=torch.int64, device=ids.device)}

    def _computed(self, ids: torch.Tensor, labels: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Return which positions are no prompt, bool `[B, L]`."""
        acts = invoked(self.trainer.model, ids) if self.invocation is not None else None
        if acts is None:
            return ~prompt_positions(used, labels)
        trained = ~acts[:, :-1] & labels[:, 1:].ne(IGNORE)
        if trained.any():
            raise ValueError(
                f"labels: row {int(trained.any(1).nonzero()[0])} has some where no adapter acts; set -100"
            )
        return acts

    def _find_base(self, ids: torch.Tensor, used: torch.Tensor, prompts: list[tuple[int, ...]]) -> None:
        """Explore the base with a first batch, and make where its prompts are kept."""
        model, precision = base_model(self.trainer.model), autocast_dtype(ids.device)
        if self.base is None or self.base.model is not model or self.base.precision != precision:
            self.close()  # Trainer may have made the model anew, or it computes in another precision from now on
            if self.precision != precision:
                self.store, self.precision = None, precision
            self.base = FrozenBase(model, max(_rows(ids, used), key=len), adapted=self.invocation is None)
            self.store = self.store or self._make_store(prompts)

    def _prepare(self, prompts: list[tuple[int, ...]], rest: torch.Tensor) -> torch.Tensor:
        """
        Make the step of a batch, of what is kept of its distinct prompts.

        Returns:
            int64 `[1, 1, B, L]`, for [`attend`]: where each row finds its prompt, and then itself.
        """
        distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt]
        kept, positions = self.store.get(self.base, distinct, rest.device)
        widths = [sum(layer.widths) for layer in self.base.layers]
        parts = zip(self.base.layers, kept.split(widths, dim=-1), strict=True) if distinct else ()
        self.base.step = Step({layer.module: part for layer, part in parts}, positions)
        starts = dict(zip(distinct, np.cumsum([0, *map(len, distinct)]).tolist(), strict=False)) | {(): 0}
        lengths = rest.sum(1).tolist()
        ends = (sum(map(len, distinct)) + np.cumsum(lengths)).tolist()
        rows = [
            [*range(starts[prompt], starts[prompt] + len(prompt)), *range(end - length, end)]
            for prompt, length, end in zip(prompts, lengths, ends, strict=True)
        ]
        return rows_of_places(rows, ends[-1]).to(rest.device)

    def _make_store(self, few: list[tuple[int, ...]]) -> Recompute:
        """Make where prompts are kept; `few`: those of a few rows, by which `"auto"` decides."""
        trainer, way = self.trainer, self.value
        folder = Path(trainer.args.output_dir) / "_prompts"  # Trainer does not push what begins like this
        if way == "auto":
            way = self._choose(few, folder)
        if way == "disk":
            kind = "x" if self.base.adapted else "kv"
            form = f"{kind}-{self.base.row_bytes}-{_name(self.base.dtype)}"
            if self.precision is not None:  # keys can be kept in float32 though they were computed in less
                form += f"-{_name(self.precision)}"
            key = f"{model_fingerprint(trainer.model, without_adapters=True)}-{form}"
            return OnDisk(folder, key, trainer.args.process_index)
        return InMemory() if way == "ram" else Recompute()

    def _choose(self, few: list[tuple[int, ...]], folder: Path) -> str:
        """Choose where prompts are kept, by how much that is at most, and what it takes to read; say so."""
        args, dataset = self.trainer.args, self.trainer.train_dataset
        length = sum(map(len, few)) / len(few)
        if is_stream(dataset):
            way, why = "recompute", "the data are a stream, of which nobody knows how much there is"
        else:
            size = len(dataset) * length * self.base.row_bytes
            # Every process keeps what it sees; a quarter of what is free, for the estimate is of few rows.
            room = psutil.virtual_memory().available / 4 / args.world_size
            existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(existing).free / 2 / args.world_size
            way = "ram" if size <= room else "disk" if size <= free else "recompute"
            why = f"{len(dataset)} prompts of about {length:.0f} tokens are at most {size / 2**30:.2f} GiB; "
            why += f"{room / 2**30:.2f} GiB of memory and {free / 2**30:.2f} GiB of {folder} may be used"
            if way == "disk":
                computing, loading = self._time(max(few, key=len), existing)
                way = "disk" if loading < computing else "recompute"
                why += (
                    f"; a prompt is computed in {computing * 1e3:.1f} ms, stored and loaded in {loading * 1e3:.1f} ms"
                )
        self.trainer.accelerator.print(f"prompt_cache='auto' is {way!r}: {why}")
        return way

    def _time(self, prompt: tuple[int, ...], folder: Path) -> tuple[float, float]:
        """Return the seconds to compute a prompt, and to write it to a disk and read it back."""
        started = time.perf_counter()
        data = self.base.record([prompt]).cpu().view(torch.uint8).numpy().tobytes()
        computed = time.perf_counter()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.read()
        return computed - started, time.perf_counter() - computed

    def close(self) -> None:
        if self.base is not None:
            self.base.close()
        if self.store is not None:
            self.store.close()
        self.base = None

    def detach(self) -> None:
        """Give the model its attention back, and take hooks off it."""
        super().detach()
        self.finish.detach()
        self.close()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(ids: torch.Tensor, taken: torch.Tensor) -> list[list[int]]:
    """Return the token ids at some positions, row by row."""
    return [row.tolist() for row in ids[taken].cpu().split(taken.sum(1).tolist())]
