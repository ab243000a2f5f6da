"""The table on standard output: plain text, the floors first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.results import Report
from bench.sizes import seconds_text, size_text

__all__ = ["DESCRIPTORS", "MEMORY", "SYSTEM", "Column", "number", "render", "seconds", "seconds_between", "size"]


class Column(NamedTuple):
    """One column of a table."""

    title: str
    text: Callable[[dict[str, Any]], str]
    is_name: bool = False
    """Names stand left, figures right."""


def seconds(title: str, name: str) -> Column:
    """Return a column of durations."""
    return Column(title, lambda row: seconds_text(row[name]))


def seconds_between(name: str) -> Column:
    """Return a column with the extremes of a duration."""
    return Column(
        "(min - max)", lambda row: f"({seconds_text(row[f'{name}_min'])} - {seconds_text(row[f'{name}_max'])})"
    )


def number(title: str, name: str, form: str = ".3g") -> Column:
    """Return a column of figures."""
    return Column(title, lambda row: "-" if row[name] is None else format(row[name], form))


def size(title: str, name: str) -> Column:
    """Return a column of bytes."""
    return Column(title, lambda row: "-" if row[name] is None else size_text(row[name]))


SYSTEM = (
    Column("system", lambda row: str(row["system"]), is_name=True),
    Column("case", lambda row: str(row["case"]), is_name=True),
)
MEMORY = size("peak memory", "peak_pss_bytes")
DESCRIPTORS = number("descriptors", "open_fds", "d")


def render(report: Report, columns: Sequence[Column]) -> str:
    """Return the report as text."""
    floors = report.floors
    lines = [
        _machine_line(report.machine),
        *(
            ["floors: " + ", ".join(f"{name} {floors.median(name):.3g} GB/s" for name in floors.samples)]
            if floors.samples
            else []
        ),
        "",
        *_lines(report.rows, columns),
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


def _lines(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    cells = [[column.title for column in columns], *([column.text(row) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        "  ".join(
            text.ljust(width) if column.is_name else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
