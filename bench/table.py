"""The table on standard output: plain text, the floors first."""

from __future__ import annotations

from typing import Any

from bench.results import Report
from bench.sizes import seconds_text, size_text

__all__ = ["render"]

_TEXT_COLUMNS = 2


def render(report: Report) -> str:
    """Return the report as text."""
    floors = report.floors
    lines = [
        _machine_line(report.machine),
        "floors: " + ", ".join(f"{name} {floors.median(name):.3g} GB/s" for name in floors.samples),
        "",
        *_columns(_cells(report)),
    ]
    lines += [f"skipped: {entry['system']} ({entry['case']}): {entry['why']}" for entry in report.skipped]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _machine_line(machine: dict[str, Any]) -> str:
    packages = machine["packages"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {size_text(machine['memory_bytes'])}, {machine['filesystem']}, "
        f"Linux {machine['kernel']}, Python {machine['python']}, torch {packages.get('torch')}"
    )


def _cells(report: Report) -> list[list[str]]:
    save = report.question == "save"
    head = ["system", "case", "size"]
    head += ["blocked", "(min - max)", "may change", "durable", "(min - max)"] if save else ["restored", "(min - max)"]
    head += ["GB/s", "x floor", "peak memory", "descriptors", "rounds"]
    cells = [head]
    for row in report.rows:
        line = [row["system"], row["case"], size_text(row["nbytes"])]
        for name in ("blocked_s", "staged_s", "durable_s") if save else ("blocked_s",):
            line.append(seconds_text(row[name]))
            if name != "staged_s":
                line.append(f"({seconds_text(row[f'{name}_min'])} - {seconds_text(row[f'{name}_max'])})")
        line += [f"{row['gbps']:.3g}", f"{row['ratio_to_floor']:.2f}"]
        line.append(size_text(row["peak_pss_bytes"]) if row["peak_pss_bytes"] else "-")
        line += ["-" if row["open_fds"] is None else str(row["open_fds"]), str(row["rounds"])]
        cells.append(line)
    return cells


def _columns(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    return [
        "  ".join(
            text.ljust(width) if index < _TEXT_COLUMNS else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
