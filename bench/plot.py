"""One figure of a run: a bar for each row, its dark part over its light one, and a line to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.entrants import OURS

__all__ = ["Figure", "draw"]

_OURS, _PEER, _LINE, _LIGHT_ALPHA = "#1b6ca8", "#6b6b6b", "#c0392b", 0.35


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What to draw."""

    title: str
    axis: str
    rows: Sequence[dict[str, Any]]
    dark: Callable[[dict[str, Any]], float]
    """Length of a row's dark part."""
    light: Callable[[dict[str, Any]], float]
    """Length of a row's whole bar."""
    text: Callable[[dict[str, Any]], str]
    """What stands behind a row's bar."""
    line: float
    line_label: str


def draw(figure: Figure, file: Path) -> None:
    """Write the figure, the shortest bar on top; the format follows the file's suffix."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot

    rows = sorted(figure.rows, key=figure.light, reverse=True)
    canvas, axes = pyplot.subplots(figsize=(9, 1.2 + 0.48 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        color = _OURS if row["system"] == OURS else _PEER
        axes.barh(place, figure.light(row), color=color, alpha=_LIGHT_ALPHA)
        axes.barh(place, figure.dark(row), color=color)
        axes.annotate(f" {figure.text(row)}", (figure.light(row), place), va="center", fontsize=8)
    axes.axvline(figure.line, color=_LINE, linestyle="--", linewidth=1.2, label=figure.line_label)
    axes.set_yticks(range(len(rows)), [f"{row['system']}\n{row['case']}" for row in rows], fontsize=8)
    axes.set_xlim(0, 1.5 * max(figure.light(row) for row in rows))
    axes.set_xlabel(figure.axis)
    axes.set_title(figure.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=8)
    canvas.savefig(file, dpi=150)
    pyplot.close(canvas)
