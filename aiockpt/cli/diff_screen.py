"""What ``aiockpt diff`` shows: what came and went, how far tensors moved, which values differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aiockpt.cli.compare import Difference, ValueChange
from aiockpt.cli.screen import counted, printable
from aiockpt.cli.table import Cell, Column, table
from aiockpt.cli.value_text import items_of, value_text

if TYPE_CHECKING:
    from rich.console import Console

    from aiockpt.cli.diff import Report

__all__ = ["show"]

_SHOWN = 20
"""Rows of each table, where nothing else was asked for."""
_VALUE_ROOM = 40
_FORMS = (Column("", cut="middle"), Column("", cut="end"))
_MOVED = (
    Column("tensor", cut="middle", least=44),
    Column("shape", cut="end", rank=3),
    Column("max |a-b|", right=True),
    Column("|a-b|/|a|", right=True, rank=1),
    Column("unequal", right=True, rank=2),
    Column("NaN", right=True, rank=1),
)
_VALUES = (Column("value", cut="middle", least=24), Column("a", cut="end"), Column("b", cut="end"), Column("", rank=1))


def show(screen: Console, report: Report, limit: int | None) -> None:
    """Print all that differs.

    Args:
        screen: Where.
        report: What was found.
        limit: Rows of each table; None for the usual number.
    """
    most = limit or _SHOWN
    screen.print(f"step {report.a} → step {report.b}", style="bold", end="")
    screen.print(f" of {printable(report.run)}", soft_wrap=True)
    screen.print(_summary(report))
    _show_forms(screen, report, most)
    scalars = [item for item in report.tensors if item.elements == 1 and item.kind == "tensor"]
    moved = [item for item in report.tensors if item.elements != 1 or item.kind != "tensor"]
    _show_table(screen, _MOVED, [_moved_row(item) for item in moved], most)
    values = [_value_row(change, "") for change in report.values]
    values += _scalar_rows(scalars)
    values += [_value_row(change, "metadata: ") for change in report.metadata]
    _show_table(screen, _VALUES, values, most)


def _summary(report: Report) -> str:
    equal = f"{counted(report.equal_tensors, 'tensor')} and {counted(report.equal_values, 'value')} equal"
    parts = [
        f"{len(items):,} {what}"
        for items, what in ((report.added, "added"), (report.removed, "removed"), (report.changed, "of another form"))
        if items
    ]
    if report.tensors:
        parts.append(f"{counted(len(report.tensors), 'tensor')} moved")
    if changes := len(report.values) + len(report.metadata):
        parts.append(f"{counted(changes, 'value')} changed")
    return ", ".join((*parts, equal)) if parts else f"nothing differs: {equal}"


def _show_forms(screen: Console, report: Report, most: int) -> None:
    rows: list[list[Cell | str]] = [
        [Cell(f"~ {printable(item.name)}", "yellow"), f"{item.a} → {item.b}"] for item in report.changed
    ]
    rows += [[Cell(f"- {printable(item.name)}", "red"), item.form] for item in report.removed]
    rows += [[Cell(f"+ {printable(item.name)}", "green"), item.form] for item in report.added]
    _show_table(screen, _FORMS, rows, most)


def _show_table(screen: Console, columns: Sequence[Column], rows: list[list[Cell | str]], most: int) -> None:
    if not rows:
        return
    screen.print()
    screen.print(table(columns, rows[:most], screen.width), soft_wrap=True)
    if len(rows) > most:
        screen.print(f"… {len(rows) - most:,} more: --limit {len(rows)} shows them", style="dim", soft_wrap=True)


def _moved_row(item: Difference) -> list[Cell | str]:
    name = printable(item.name)
    if item.kind in ("bytes", "BytesIO"):
        return [name, item.kind, "", "", _percent(item), ""]
    if not item.unequal:
        return [name, f"{list(item.shape)}", Cell("only bits", "dim"), "", "0 %", ""]
    nan = f"{item.nan_a:,} → {item.nan_b:,}" if item.nan_a or item.nan_b else ""
    new_nan = "bold red" if item.nan_a != item.nan_b else ""
    return [
        name,
        f"{list(item.shape)}",
        _number(item.max_abs),
        _number(item.relative),
        _percent(item),
        Cell(nan, new_nan),
    ]


def _percent(item: Difference) -> str:
    share = 100 * item.unequal / item.elements
    return f"{share:.0f} %" if share >= 1 else "< 1 %"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "inf"


def _scalar_rows(scalars: list[Difference]) -> list[list[Cell | str]]:
    """Return a row for each change that tensors of one element made, such as step counters."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for item in scalars:
        last = item.name.rpartition(".")[2]
        groups.setdefault((last, str(item.a), str(item.b)), []).append(item.name)
    rows: list[list[Cell | str]] = []
    for (last, a, b), names in groups.items():
        first = names[0].partition(".")[0]
        name = names[0] if len(names) == 1 else f"{first}.*.{last}"
        rows.append([printable(name), a, b, Cell(f"{len(names)} alike" if len(names) > 1 else "", "dim")])
    return rows


def _value_row(change: ValueChange, prefix: str) -> list[Cell | str]:
    name = f"{prefix}{printable(change.name)}".strip()
    a, b = _text(change.a), _text(change.b)
    left, right = items_of(change.a), items_of(change.b)
    note = ""
    if a == b and left is not None and right is not None:
        apart = sum(x != y for x, y in zip(left, right, strict=False))
        note = f"{apart:,} of {len(left):,} items differ"
    return [name, a, b, Cell(note, "dim")]


def _text(encoded: Any) -> str:
    return "-" if encoded is msgspec.UNSET else value_text(encoded, _VALUE_ROOM)
