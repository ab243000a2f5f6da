"""Tables that fit the terminal: columns that matter less go first, then names are cut in the middle.

rich's own tables wrap cells, cut them at the end, and take seconds for 10,000 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Cell", "Column", "table"]

_GAP = 2


class Column(NamedTuple):
    """How a column behaves."""

    title: str
    right: bool = False
    """Numbers stand to the right."""
    cut: str = ""
    """``middle`` or ``end``, where it may be cut."""
    rank: int = 0
    """The highest goes first where the terminal is narrow, and any where it is empty; 0 never goes."""
    least: int = 16
    """Columns of the screen that it keeps, if cut, as long as others can go."""


class Cell(NamedTuple):
    """Text of one style."""

    text: str
    style: str = ""
    kept: int = 0
    """Characters at the start that are never cut, such as the lines of a tree, which are dim."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]], width: int) -> Text:
    """Return the lines of a table, titles first.

    Args:
        columns: From left to right.
        rows: A cell for each column, in one line; one with nothing behind its first cell has the whole line for it.
        width: Of the terminal.
    """
    from rich.cells import cell_len
    from rich.text import Text

    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    sizes = [[cell_len(cell.text) for cell in row] for row in cells]
    full = [row for row in sizes if len(columns) == 1 or any(row[1:])]
    natural = [max((cell_len(c.title), *(row[i] for row in full))) for i, c in enumerate(columns)]
    filled = [i for i, c in enumerate(columns) if not c.rank or any(row[i] for row in sizes)]
    shown = _shown(columns, natural, filled, width)
    widths = _widths(columns, natural, shown, width)
    lines = []
    if any(column.title for column in columns):
        titles = [Cell(column.title, "bold") for column in columns]
        lines.append(_line(columns, shown, widths, titles, [cell_len(column.title) for column in columns]))
    alone = [width, *widths[1:]]
    for row, size in zip(cells, sizes, strict=True):
        lines.append(_line(columns, shown, widths if any(size[1:]) else alone, row, size))
    return Text("\n").join(lines)


def _shown(columns: Sequence[Column], natural: list[int], filled: list[int], width: int) -> list[int]:
    """Return which of the columns that have something in them there is room for."""
    least = [min(size, column.least) if column.cut else size for column, size in zip(columns, natural, strict=True)]
    shown = list(filled)
    while sum(least[i] + _GAP for i in shown) - _GAP > width:
        last = max(shown, key=lambda i: columns[i].rank)
        if not columns[last].rank:
            break
        shown.remove(last)
    return shown


def _widths(columns: Sequence[Column], natural: list[int], shown: list[int], width: int) -> list[int]:
    """Return the width of each column; the widest of those that may be cut gives way until all fit."""
    widths = list(natural)
    excess = sum(widths[i] + _GAP for i in shown) - _GAP - width
    while excess > 0 and (wide := [i for i in shown if columns[i].cut and widths[i] > 1]):
        widths[max(wide, key=widths.__getitem__)] -= 1
        excess -= 1
    return widths


def _line(
    columns: Sequence[Column], shown: list[int], widths: list[int], cells: Sequence[Cell], sizes: Sequence[int]
) -> Text:
    from rich.text import Text

    line = Text()
    behind = 0  # spaces between what stands there and the next cell; none at the end of a line
    for i in shown:
        cell, size = cells[i], sizes[i]
        text = cell.text
        if size > widths[i]:
            text, size = _cut(cell, columns[i].cut, widths[i])
        space = widths[i] - size
        before = behind + (space if columns[i].right else 0)
        if text:
            line.append(" " * before)
            if cell.kept:
                line.append(text[: cell.kept], "dim")
            line.append(text[cell.kept :], cell.style or None)
            behind = _GAP + (0 if columns[i].right else space)
        else:
            behind += widths[i] + _GAP
    return line


def _cut(cell: Cell, how: str, width: int) -> tuple[str, int]:
    """Return a text in at most ``width`` columns, and its width."""
    from rich.cells import cell_len, set_cell_size

    kept, text = cell.text[: cell.kept], cell.text[cell.kept :]
    room = max(width - cell_len(kept) - 1, 0)
    end = 2 * room // 3 if how == "middle" else 0  # of a dotted name the end says more than the beginning
    tail = text[len(text) - end :]
    while cell_len(tail) > end:
        tail = tail[1:]
    head = set_cell_size(text, room - cell_len(tail)).rstrip()
    cut = f"{kept}{head}…{tail}"
    return cut, cell_len(cut)
