"""Charts: one form for all of them, written atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..files import atomic_path


@contextlib.contextmanager
def figure_at(path: str | os.PathLike, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a matplotlib figure of `size` inches; on success it is written to `path`, as PNG or by the suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


@contextlib.contextmanager
def chart(path: str | os.PathLike, size: tuple[float, float] = (7, 4), **texts: str) -> Iterator[Any]:
    """
    Yield the axes of a chart that is written to `path`, see [`figure_at`].

    Args:
        path: file to write.
        size (`tuple[float, float]`): inches.
        **texts: `xlabel`, `ylabel`, `title`. There is a legend if what is drawn has labels.
    """
    with figure_at(path, size) as figure:
        axes = figure.subplots()
        axes.set(**texts)
        yield axes
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
