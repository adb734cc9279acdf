"""The ground: the one form of our errors, and atomic writes (a file is the old one or the whole new one)."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def require(ok: bool, name: str, value: Any, remedy: str, error: type[Exception] = ValueError) -> None:
    """Raise the one form of error that this package gives for bad input: the field, its value, and the remedy."""
    if not ok:
        raise error(f"{name}={value!r}: {remedy}")


def refuse_used_folder(path: str | os.PathLike, what: str, remedy: str) -> None:
    """Raise `ValueError` if an output folder holds anything: it holds `what`, and `remedy` says what to do."""
    held = sorted(entry.name for entry in Path(path).iterdir()) if Path(path).is_dir() else []
    require(not held, "output_dir", str(path), f"holds {what} ({', '.join(held[:5])}); {remedy}")


def refuse_overwrite(path: Path, force: bool, name: str = "output") -> None:
    """Raise `ValueError` if a file would be overwritten without being asked to; devices and pipes never are."""
    require(not path.is_dir(), name, str(path), "is a folder; name a file")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    require(existing.is_dir(), name, str(path), f"{existing} is a file, no folder; name another place")
    free = force or not path.exists() or not path.is_file()
    require(free, name, str(path), "exists; name another file, or say --force")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`, else removed.

    A link is followed: the file that it names is replaced, the link stays. A device or a pipe is written into.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / ("written" + path.suffix)
            temporary.touch()
            yield temporary
            with open(path, "wb") as target:
                target.write(temporary.read_bytes())
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # that of any new file; what safetensors puts in its place is for its owner only
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Write `text` as UTF-8, atomically; `errors`: what to do with halves of characters, as `str.encode` has it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    # Of a path or a command line that is no UTF-8 there are halves of characters, whose escapes are those of JSON.
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")
