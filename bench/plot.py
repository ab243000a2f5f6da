"""One figure of a run: each system's time as a bar, with what blocks training drawn dark, beside the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.results import Report
from bench.sizes import seconds_text, size_text

__all__ = ["draw"]

_OURS, _PEER, _LIGHT_ALPHA = "#1b6ca8", "#6b6b6b", 0.35


def draw(report: Report, file: Path) -> None:
    """Write the figure; the format follows the file's suffix."""
    import matplotlib as mpl

    mpl.use("Agg")  # no display
    from matplotlib import pyplot

    save = report.question == "save"
    rows = sorted(report.rows, key=lambda row: -_total(row, save))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.48 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        color = _OURS if row["system"] == "aiockpt" else _PEER
        total = _total(row, save)
        if save:
            axes.barh(place, total, color=color, alpha=_LIGHT_ALPHA)
        axes.barh(place, row["blocked_s"], color=color)
        text = (
            f"{seconds_text(row['blocked_s'])} blocked, {seconds_text(total)} durable" if save else seconds_text(total)
        )
        axes.annotate(f" {text}", (total, place), va="center", fontsize=8)
    nbytes = rows[0]["nbytes"]
    floor = nbytes / report.floors.median("write" if save else "read") / 1e9
    axes.axvline(
        floor, color="#c0392b", linestyle="--", linewidth=1.2, label=f"floor of the disk: {seconds_text(floor)}"
    )
    axes.set_yticks(range(len(rows)), [f"{row['system']}\n{row['case']}" for row in rows], fontsize=8)
    axes.set_xlim(0, 1.35 * max(_total(row, save) for row in rows))
    axes.set_xlabel(
        "seconds" + (" (dark: save() has not returned, light: not yet durable)" if save else ", cold cache")
    )
    axes.set_title(f"{'Saving' if save else 'Restoring'} {size_text(nbytes)}, medians", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _total(row: dict[str, Any], save: bool) -> float:
    seconds: float = row["durable_s"] if save else row["blocked_s"]
    return seconds
