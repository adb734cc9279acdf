"""Where what the base makes of prompts is kept: nowhere, in memory, or in a file."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from . import row_attention
from .frozen_base import FrozenBase

logger = logging.getLogger(__name__)
Prompt = tuple[int, ...]


class Recompute:
    """Keep nothing: the distinct prompts of a batch are run in every step, without gradient."""

    full = True  # whether further prompts are computed whenever they are needed

    def get(
        self, base: FrozenBase, prompts: Sequence[Prompt], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
        """
        Return what is kept of some prompts, that of a beginning which they have in common once.

        Args:
            base ([`FrozenBase`]): computes what is not known.
            prompts (`Sequence[tuple]`): token ids of each, distinct, none of them empty.
            device (`torch.device`): where it is needed.

        Returns:
            `[N, width]`; the positions, int64 `[N]`, that [`FrozenBase.keys_and_values`] takes with it; and where
            those of each prompt are among them, int64 `[n]`, ascending.
        """
        kept, places = base.record(prompts) if prompts else (torch.empty(0, 0, device=device), [])
        return kept, torch.arange(len(kept), device=device), places

    def close(self) -> None:
        """Let go of what is open."""


class Kept(Recompute):
    """
    Keep prompts from when they are first needed; beginnings that several have in common once.

    On a CPU each is computed alone, and so is each beginning, so that what is kept does not depend on the batch in
    which it came first: a run that is resumed ends bit for bit as one that was not stopped. On a GPU, where a prompt
    alone takes as long as many, those of a batch are computed together, and differ by rounding.

    Args:
        beginnings (`Sequence[tuple]`): what prompts begin with, shorter ones first; one may go on from another.
            Prompts that have none are kept whole.
    """

    full = False

    def __init__(self, beginnings: Sequence[Prompt] = ()):
        self.beginnings = beginnings

    @abstractmethod
    def knows(self, prompt: Prompt) -> bool:
        """Whether a prompt is kept."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many prompts are kept."""

    @abstractmethod
    def _find(self, base: FrozenBase, prompt: Prompt, start: int) -> torch.Tensor | None:
        """Return what is kept of a prompt from a position on, `[len(prompt) - start, width]`, or `None`."""

    @abstractmethod
    def _keep(self, prompt: Prompt, start: int, made: torch.Tensor) -> torch.Tensor:
        """Keep that, if there is room, and return it."""

    def parts(self, prompt: Prompt) -> list[Prompt]:
        """Return the beginnings of a prompt, the prompt itself last; each is kept from where the one before ends."""
        likely = [b for b in self.beginnings if len(b) <= len(prompt) and b[-1] == prompt[len(b) - 1]]
        found = [b for b in likely if b == prompt[: len(b)]]  # their last token tells most of them apart
        return found if prompt in found[-1:] else [*found, prompt]

    def get(
        self, base: FrozenBase, prompts: Sequence[Prompt], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
        """Return what is kept of some prompts, as [`Recompute.get`] does."""
        if not prompts:
            return torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device), []
        chains = [self.parts(prompt) for prompt in prompts]
        starts = {part: len(before) for chain in chains for before, part in zip([(), *chain], chain, strict=False)}
        # What precedes comes first: shorter beginnings, longer ones, prompts.
        asked = sorted(starts, key=lambda part: len(part) if part in self.beginnings else math.inf)
        ends = np.cumsum([len(part) - starts[part] for part in asked])
        where = {part: np.arange(end - len(part) + starts[part], end) for part, end in zip(asked, ends, strict=True)}
        places = [np.concatenate([where[part] for part in chain]) for chain in chains]
        known = {part: self._find(base, part, starts[part]) for part in asked}
        missing = [part for part in asked if known[part] is None]
        groups = [[part] for part in missing] if row_attention.on_cpu(device) else [missing] if missing else []
        with base.alone() if len(groups) > 1 else contextlib.nullcontext():
            for group in groups:
                made, rows = base.record(group)
                for part, row in zip(group, rows, strict=True):
                    taken = torch.from_numpy(row[starts[part] :]).to(device)
                    known[part] = self._keep(part, starts[part], made.index_select(0, taken))
        kept = torch.cat([known[part].to(device, non_blocking=True) for part in asked])
        base.reach(max(prompts, key=len))
        return kept, torch.cat([torch.arange(starts[part], len(part)) for part in asked]).to(device), places


class InMemory(Kept):
    """
    Keep prompts in memory.

    Args:
        beginnings (`Sequence[tuple]`): see [`Kept`].
        room (`int`): bytes of the memory of the model's device that may be filled first; then that of the machine is.
    """

    def __init__(self, beginnings: Sequence[Prompt] = (), room: int = 0):
        super().__init__(beginnings)
        self.known: dict[Prompt, torch.Tensor] = {}
        self.room = room

    def knows(self, prompt: Prompt) -> bool:
        return prompt in self.known or prompt in self.beginnings

    def __len__(self) -> int:
        return len(self.known)

    def _find(self, base: FrozenBase, prompt: Prompt, start: int) -> torch.Tensor | None:
        return self.known.get(prompt)

    def _keep(self, prompt: Prompt, start: int, made: torch.Tensor) -> torch.Tensor:
        if self.full:
            return made
        if made.nbytes <= self.room:
            self.room -= made.nbytes
        else:
            made = made.cpu()
        self.known[prompt] = made
        return made


class OnDisk(Kept):
    """
    Keep prompts in a file, which later runs on the same base use again; a run that is killed loses none.

    Beside the file `<key>-<rank>.bin` stands `<key>-<rank>.jsonl`, a line for each prompt with its tokens, place and
    checksum, written when the prompt is in the file. A prompt that is damaged is computed again; where the disk is
    full, no more prompts are kept.

    Args:
        folder (`Path`): where; it is made.
        key (`str`): names the base and the dtype; other bases have other files.
        rank (`int`): of the process: each has a file of its own.
        beginnings (`Sequence[tuple]`): see [`Kept`].
    """

    def __init__(self, folder: Path, key: str, rank: int = 0, beginnings: Sequence[Prompt] = ()):
        super().__init__(beginnings)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.listed = folder / f"{key}-{rank}.bin", folder / f"{key}-{rank}.jsonl"
        # By prompt, and from where on it is kept: where that begins, bytes, checksum.
        self.places: dict[tuple[Prompt, int], tuple[int, int, int]] = {}
        self._warned, self._files = False, None
        end = self._read_list()
        for path, length in ((self.path, end[0]), (self.listed, end[1])):
            if path.exists() and path.stat().st_size > length:  # a line, or a prompt, that a kill has cut off
                os.truncate(path, length)

    def _read_list(self) -> tuple[int, int]:
        """Read what the file holds; return where the last whole prompt and the last whole line end."""
        data = line_end = 0
        size = self.path.stat().st_size if self.path.exists() else 0
        if self.listed.exists():
            with open(self.listed, "rb") as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                        begin, length, checksum = entry["place"]
                        prompt = tuple(entry["tokens"]), entry["start"]
                    except (ValueError, KeyError, TypeError):
                        break
                    if not line.endswith(b"\n") or begin + length > size:
                        break
                    self.places[prompt] = begin, length, checksum
                    data, line_end = max(data, begin + length), line_end + len(line)
        return data, line_end

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._files is None:
            self._files = open(self.path, "a+b"), open(self.listed, "ab")  # noqa: SIM115 - open as long as the run
        return self._files

    def knows(self, prompt: Prompt) -> bool:
        *before, _ = [(), *self.parts(prompt)]
        return (prompt, len(before[-1])) in self.places or prompt in self.beginnings

    def __len__(self) -> int:
        return len(self.places)

    def _find(self, base: FrozenBase, prompt: Prompt, start: int) -> torch.Tensor | None:
        if (prompt, start) not in self.places:
            return None
        begin, length, checksum = self.places[prompt, start]
        data = bytearray(os.pread(self._open()[0].fileno(), length, begin))
        whole = (len(prompt) - start) * base.row_bytes
        if len(data) == length == whole and zlib.crc32(data) == checksum:
            return torch.frombuffer(data, dtype=base.dtype).reshape(len(prompt) - start, -1)
        del self.places[prompt, start]
        if not self._warned:
            logger.warning("%s is damaged; what is wrong in it is computed again", self.path)
        self._warned = True
        return None

    def _keep(self, prompt: Prompt, start: int, made: torch.Tensor) -> torch.Tensor:
        if not self.full:
            self._write(prompt, start, made.cpu())
        return made

    def _write(self, prompt: Prompt, start: int, kept: torch.Tensor) -> None:
        data = kept.contiguous().view(torch.uint8).numpy().tobytes()
        begin = self.path.stat().st_size if self.path.exists() else 0
        try:
            file, listed = self._open()
            file.write(data)
            file.flush()
            place = begin, len(data), zlib.crc32(data)
            listed.write(json.dumps({"tokens": prompt, "start": start, "place": place}).encode() + b"\n")
            listed.flush()
        except OSError as error:
            self.full = True
            self.close()
            logger.warning(
                "prompt_cache='disk': %s takes no more (%s); further prompts are computed when they are needed",
                self.path,
                error.strerror or error,
            )
            return
        self.places[prompt, start] = place

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            with contextlib.suppress(OSError):  # what it could not write on a full disk, it cannot write now
                file.close()
        self._files = None
