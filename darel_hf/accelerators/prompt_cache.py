"""The prompt cache: what the frozen base computes of prompts is computed once, and completions read it."""

from __future__ import annotations

import contextlib
import logging
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
from ..data import common_beginnings, count_prompts, is_stream, prompt_tokens, read_items
from ..scoring import IGNORE, base_model, is_sharded, model_fingerprint
from . import unpad
from .base import register_accelerator
from .frozen_base import FrozenBase
from .prompt_attention import ATTENTION, Step
from .prompt_store import InMemory, OnDisk, Recompute
from .row_attention import autocast_dtype, on_cpu, rows_of_places

logger = logging.getLogger(__name__)

#: Rotary embeddings that depend on how long a row is: a prompt alone has others than with its completion.
BY_LENGTH = ("dynamic", "longrope")
#: A prompt that is read fewer times in a run is not worth keeping: computed alone it takes longer than with others.
AGAIN = 1.25
#: Tokens that so many prompts must have in common to be kept once, and so many rows say what they are.
LEAST_PREFIX, FEW, LOOKED_AT = 16, 4, 256
#: Where more than this part of prompts is new after an epoch, of so many at least, prompts change.
CHANGED, WATCHED = 0.25, 16
#: Seconds in which prompts are counted; where there are more, those that were read stand for all.
COUNTING = 2.0


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
        self._in_loop, self._rows, self._settled = False, 0, 0  # rows so far, and after how many all have been seen
        self._before = 0  # prompts that were kept before
        self._asked = self._missed = 0  # prompts since then, and those of them that were not kept
        self._base_seen: list[tuple[str, nn.Parameter, int]] = []  # weights of the base, as the first step found them
        self._timed: list[tuple[float, float]] = []  # steps that store prompts, and the same again, in seconds
        self.precision: torch.dtype | None = None  # in which what is stored was computed

    @property
    def reading(self) -> bool:
        """Whether prompts are frozen at this time."""
        reader = find_reader(self.trainer.model)
        if reader is None:
            return self.invocation is not None
        # By what adapters are for, also where they are switched off for a while: what is kept is the same.
        return not all(reader.peft_config[name].everywhere for name in reader.active_adapters)

    @property
    def keeps(self) -> bool:
        """Whether scores before training are read off its rows: what they ask for of prompts, steps ask for again."""
        return self.reading

    @property
    def own_plain(self) -> bool:
        """Whether steps without it are a reader's own, two forward passes, where plain ones are of LoRA everywhere."""
        return find_reader(self.trainer.model) is not None

    @property
    def invocation(self) -> list[int] | None:
        """The tokens from which on an aLoRA acts."""
        return getattr(getattr(self.trainer.model, "active_peft_config", None), "alora_invocation_tokens", None)

    def why_not(self, few_rows: Callable[[], Mapping[str, Any]] | None) -> str | None:
        """Return what is in the way: the adapters, the model, the arguments, or what a few samples show."""
        model, args = self.trainer.model, self.trainer.args
        if not self.reading:
            return "adapters act on prompts, too, so what a prompt gives changes with every step; use ReaderLoraConfig"
        trained = self._trained(base_model(model))
        if trained is not None:
            return trained
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
        """Return the seconds of a step, of a mean one while prompts are stored."""
        if not self.reading:
            return seconds(lambda: self.transform(inputs))
        first, later = (super(PromptCache, self).measure(seconds, inputs) for _ in range(2))
        self._timed.append((first, later))
        firsts, laters = (sum(times) for times in zip(*(self._timed[1:] or self._timed), strict=True))  # one warms up
        self.first_epoch = max(firsts / laters, 1.0)
        # Prompts are new in the first epoch only, if at all.
        return later + max(first - later, 0.0) / max(self.trainer.args.num_train_epochs, 1)

    def phases(self) -> list[tuple[float, Callable[[], contextlib.AbstractContextManager]]]:
        """Return reading, and the last epochs, in which adapters act everywhere."""
        share = self.trainer.darel.finish_epochs / self.trainer.args.num_train_epochs
        return [(1 - share, contextlib.nullcontext), (share, self.plain)] if share else []

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

    @property
    def stored(self) -> int:
        """Positions of the prompts that the row in progress reads."""
        return len(self.base.step.positions)

    def _trained(self, model: nn.Module) -> str | None:
        """Return which weight besides adapters is trained, in a sentence, or `None`."""
        for name, parameter in model.base_model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                return self._named(f"{name} is trained, on which what a prompt gives may depend")
        return None

    def _watch_base(self) -> None:
        """Notice a base that somebody (a callback, say) trains or changes while training lasts."""
        if not self._in_loop:
            return
        if not self._base_seen:
            named = self.base.model.base_model.named_parameters()
            self._base_seen = [(name, p, p._version) for name, p in named if "lora_" not in name]
        if any(p.requires_grad for _, p, _ in self._base_seen):
            self.refuse(self._trained(self.base.model))
        changed = next((name for name, p, version in self._base_seen if p._version != version), None)
        if changed is not None and type(self.store) is not Recompute:
            self.store.close()
            self.store = Recompute()
            logger.warning(
                "prompt_cache=%r: %s was changed while training lasts, so what was kept of prompts is not used again; "
                "they are computed in every step from now on",
                self.value,
                changed,
            )

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
        self._watch_base()

    def _prepare(self, prompts: list[tuple[int, ...]], rest: torch.Tensor) -> torch.Tensor:
        """
        Make the step of a batch, of what is kept of its distinct prompts.

        Returns:
            int64 `[1, 1, B, L]`, for [`attend`]: where each row finds its prompt, and then itself.
        """
        distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt]
        self._watch(len(prompts), distinct)
        kept, positions, places = self.store.get(self.base, distinct, rest.device)
        more = unpad.missing(len(positions)) if len(positions) and self.is_narrow(rest.device) else 0
        if more:  # some that nobody reads
            kept = torch.cat([kept, kept[-1:].expand(more, -1)])
            positions = torch.cat([positions, positions[-1:].expand(more)])
        widths = [sum(layer.widths) for layer in self.base.layers]
        parts = zip(self.base.layers, kept.split(widths, dim=-1), strict=True) if distinct else ()
        self.base.step = Step({layer.module: part for layer, part in parts}, positions)
        where = dict(zip(distinct, places, strict=True)) | {(): np.empty(0, np.int64)}
        lengths = rest.sum(1).tolist()
        ends = (len(positions) + np.cumsum(lengths)).tolist()
        rows = [
            np.concatenate([where[prompt], np.arange(end - length, end)])
            for prompt, length, end in zip(prompts, lengths, ends, strict=True)
        ]
        return rows_of_places(rows, ends[-1]).to(rest.device)

    def _watch(self, rows: int, distinct: list[tuple[int, ...]]) -> None:
        """Notice prompts that change from epoch to epoch, say so once, and keep no more of them."""
        store, dataset = self.store, self.trainer.train_dataset
        if not self._in_loop or store.full or dataset is None or is_stream(dataset):
            return
        # Of a run that begins, all rows have been seen after one epoch; from within an epoch on, after two.
        if not self._rows:
            self._settled = len(dataset) * (2 if self.trainer.state.global_step else 1)
        self._rows += rows
        whole = self.trainer.args.world_size == 1 and self.trainer.darel.online_keep == 1  # every row, every epoch
        if whole and self._rows > self._settled:
            self._asked += len(distinct)
            self._missed += sum(not store.knows(prompt) for prompt in distinct)
        often = self._asked >= WATCHED and self._missed > CHANGED * self._asked
        if often or len(store) - self._before > len(dataset) + len(store.beginnings):
            store.full = True
            logger.warning(
                "prompt_cache=%r: prompts change from epoch to epoch (%d of the last %d were new, %d are kept of %d "
                "rows), by a collator or the data set, so what is kept is not used again; no more is kept. Set "
                "'recompute', or let prompts be as they were",
                self.value,
                self._missed,
                self._asked,
                len(store),
                len(dataset),
            )

    def _make_store(self, few: list[tuple[int, ...]]) -> Recompute:
        """Make where prompts are kept; `few`: those of a few rows."""
        trainer, way = self.trainer, self.value
        folder = Path(trainer.args.output_dir) / "_prompts"  # Trainer does not push what begins like this
        looked_at = [] if way == "recompute" else self._look()  # where nothing is kept no row is read for it
        beginnings = common_beginnings(looked_at, LEAST_PREFIX, min(FEW, len(looked_at)))
        if way in ("auto", "disk"):
            once = [(own, begin_so / len(looked_at)) for own, begin_so in beginnings.values()]
            way = self._choose(few, folder, once)
        if way == "disk":
            kind = "x" if self.base.adapted else "kv"
            form = f"{kind}-{self.base.row_bytes}-{self.base.layout}-{_name(self.base.dtype)}"
            if self.precision is not None:  # keys can be kept in float32 though they were computed in less
                form += f"-{_name(self.precision)}"
            key = f"{model_fingerprint(trainer.model, without_adapters=True)}-{form}"
            return OnDisk(folder, key, trainer.args.process_index, list(beginnings))
        room = self._room_on_device() if way == "device" else 0
        return Recompute() if way == "recompute" else InMemory(list(beginnings), room)

    def _room_on_device(self) -> int:
        """Return how many bytes of a GPU's memory prompts may take: a quarter, the step needs it first."""
        device = self.trainer.args.device
        if device.type != "cuda":
            return 0
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 4

    def _look(self) -> list[tuple[int, ...]]:
        """Return the different prompts of some rows spread over the data set, the same in every run."""
        dataset = self.trainer.train_dataset
        if dataset is None or is_stream(dataset) or not len(dataset):
            return []
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int).tolist()
        try:
            return sorted({tuple(prompt_tokens(item).tolist()) for item in read_items(dataset, chosen)})
        except (ValueError, KeyError, TypeError):  # a collator of the user's makes labels
            return []

    def _choose(self, few: list[tuple[int, ...]], folder: Path, once: list[tuple[int, float]]) -> str:
        """
        Choose where prompts are kept, by how often each is read, how much that is, and what it takes; say so.

        Args:
            few (`list[tuple]`): prompts of a few rows.
            folder (`Path`): where on disk.
            once (`list[tuple]`): so many tokens are kept once for such a part of the prompts.
        """
        world, dataset = self.trainer.args.world_size, self.trainer.train_dataset
        # Every process keeps what it sees; a quarter of what is free, for a run needs memory for more than prompts.
        room = psutil.virtual_memory().available / 4 / world
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2 / world
        if dataset is None or is_stream(dataset):
            way, why = "recompute", "the data are a stream, of which nobody knows how much there is"
        else:
            prompts, tokens, why = self._count(few)
            saved = sum(length * max(part * prompts - 1, 0.0) for length, part in once)
            size, reads = (tokens - saved) * self.base.row_bytes, self._rows_read() / max(prompts, 1)
            why += f" less about {saved:.0f} in beginnings that are kept once," if saved else ""
            why += f" are {size / 2**30:.2f} GiB, and each is read about {reads:.1f} times"
            if reads < AGAIN:
                way = "recompute"
            else:
                rooms = {"device": self._room_on_device(), "ram": room, "disk": free}
                way = next((where for where, most in rooms.items() if size <= most and most), "recompute")
                on_device = f"{rooms['device'] / 2**30:.2f} GiB of the GPU's memory, " if rooms["device"] else ""
                why += (
                    f"; {on_device}{room / 2**30:.2f} GiB of memory and {free / 2**30:.2f} GiB of {folder} may be used"
                )
        alone = on_cpu(self.trainer.args.device)  # each prompt is computed alone there, and memory is where it is read
        if self.value == "auto" and (way == "disk" or (way == "ram" and not alone)):
            together = [prompt for prompt in dict.fromkeys(few) if prompt] or [(0,)]
            if alone:
                together = [max(together, key=len)]
            computing, loading = self._time(together, existing if way == "disk" else None)
            way = way if loading < computing else "recompute"
            said = "a prompt is" if len(together) == 1 else f"{len(together)} prompts are"
            why += f"; {said} computed in {computing * 1e3:.1f} ms, stored and loaded in {loading * 1e3:.1f} ms"
        is_way = f" is {way!r}" if self.value == "auto" else ""
        self.trainer.accelerator.print(f"prompt_cache={self.value!r}{is_way}: {why}")
        return way if self.value == "auto" else self.value

    def _count(self, few: list[tuple[int, ...]]) -> tuple[int, int, str]:
        """Return how many distinct prompts there are, at most, of how many tokens together, and a clause about it."""
        dataset = self.trainer.train_dataset
        n = len(dataset)
        try:
            found = count_prompts(dataset, COUNTING)
        except (ValueError, KeyError, TypeError):  # a collator of the user's makes labels
            length = sum(map(len, few)) / len(few)
            return n, round(n * length), f"{n} prompts of about {length:.0f} tokens, if all rows have others,"
        prompts, tokens = (round(count * n / found.read) for count in (found.distinct, found.tokens))
        most = "" if found.read == n else f"at most (those of {found.read} rows were counted) "
        return prompts, tokens, f"{most}{prompts} different prompts of {n} rows, {tokens} tokens together,"

    def _rows_read(self) -> float:
        """Return how many rows read their prompt in a run, those that are scored, too, once more."""
        args, settings, n = self.trainer.args, self.trainer.darel, len(self.trainer.train_dataset)
        rows = n * max(args.num_train_epochs - settings.finish_epochs, 0.0)
        if args.max_steps > 0:
            rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        scored = [stage for stage in ("offline", "online") if getattr(settings, f"{stage}_keep") < 1]
        scored = [stage for stage in scored if settings.rule(stage).reads_losses]
        rows *= 2 if "online" in scored else 1
        return rows + (n if "offline" in scored and settings.scores is None else 0)

    def _time(self, prompts: list[tuple[int, ...]], folder: Path | None) -> tuple[float, float]:
        """Return the seconds to compute prompts, and to keep them in memory, or a file of a folder, and read them."""
        device = self.trainer.args.device
        if device.type != "cpu":
            self.base.record(prompts)  # warms up
        started = time.perf_counter()
        made = self.base.record(prompts)[0].cpu()
        computed = time.perf_counter()
        if folder is not None:
            data = made.view(torch.uint8).numpy().tobytes()
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                file.read()
        made.to(device).sum().item()  # waits for a GPU
        return computed - started, time.perf_counter() - computed

    def attach(self) -> None:
        """Begin to look whether prompts stay as they are."""
        self._in_loop, self._rows, self._base_seen = True, 0, []
        self._before = 0 if self.store is None or self.store.full else len(self.store)

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
