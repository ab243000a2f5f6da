"""What ``aiockpt inspect`` shows: a head and a tree, or a table of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiockpt.cli.contents import Tensor
from aiockpt.cli.outline import Row, draw, outline
from aiockpt.cli.screen import counted, local_time, printable, size_text
from aiockpt.cli.table import Cell, Column, table
from aiockpt.cli.value_text import items_of, value_text
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import INDEX_NAME

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_tensors", "show_tree"]

_MOST_METADATA = 20
_METADATA_ROOM = 100
_TREE_NAMES = 45
"""Columns of the screen that names and sizes take in most trees."""
_LEAST_ROOM = 24
_MOST_ROOM = 60
_TREE = (Column("", cut="middle"), Column("", cut="end"), Column("", right=True, rank=1))
_HEAD = (Column(""), Column("", cut="end"))
_TENSORS = (
    Column("tensor", cut="middle", least=44),
    Column("dtype", rank=1),
    Column("shape", cut="end"),
    Column("size", right=True),
    Column("offset", right=True, rank=2),
    Column("", cut="middle", rank=3),
)


def show_tree(screen: Console, manifest: Manifest, run: str, *, newer: int, count: int) -> None:
    """Print all but the tensors' bytes.

    Args:
        screen: Where.
        manifest: Of the checkpoint.
        run: Its run directory.
        newer: Checkpoints of the run that are newer.
        count: Of the run's checkpoints.
    """
    head = manifest.head
    parts = outline(manifest, min(max(screen.width - _TREE_NAMES, _LEAST_ROOM), _MOST_ROOM))
    drawing = draw(parts)
    place = "the newest" if not newer else f"{newer} newer"
    screen.print(f"step {head.step}", style="bold", end="")
    screen.print(f" of {printable(run)}, {place}{f' of {count}' if count > 1 else ''}", soft_wrap=True)
    screen.print(table(_HEAD, list(_head_rows(manifest)), screen.width), soft_wrap=True)
    if parts:
        screen.print()
        screen.print(table(_TREE, [_tree_row(row) for row in drawing.rows], screen.width), soft_wrap=True)
    hints = []
    if drawing.folded:
        hints.append("folded (…): --tensors '*' lists every tensor")
    if any(row.part.shortened for row in drawing.rows):
        hints.append("shortened values: --json has them whole")
    if hints:
        screen.print("\n" + "; ".join(hints), style="dim")


def show_tensors(screen: Console, tensors: list[Tensor]) -> None:
    """Print each tensor, and where it lies, by files."""
    files: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    rows: list[list[Cell | str]] = []
    for file, members in files.items():
        rows.append([Cell(printable(file), "bold"), "", "", "", "", ""])
        rows += [_tensor_row(tensor) for tensor in members]
    screen.print(table(_TENSORS, rows, screen.width), soft_wrap=True)
    total = size_text(sum(tensor.nbytes for tensor in tensors if tensor.same_as is None))
    screen.print(f"{counted(len(tensors), 'tensor')}, {total}")


def _head_rows(manifest: Manifest) -> Iterator[list[Cell | str]]:
    head, files = manifest.head, manifest.files
    tensors = counted(len(manifest.plan.names), "tensor")
    tensor_files = [record for record in files if record.data_start]
    yield from _labelled("saved", [f"{local_time(head.created)}, by aiockpt {printable(head.package)}"])
    yield from _labelled("save", [f"{head.ordinal} of the run, in term {head.term}, id {head.save_id}"])
    if manifest.metadata is not None:
        yield from _labelled("metadata", _metadata(manifest))
    yield from _labelled("size", [f"{size_text(head.nbytes)}, {tensors} in {counted(len(tensor_files), 'file')}"])
    others = [printable(r.path) for r in files if not r.data_start and not r.path.endswith(f"/{INDEX_NAME}")]
    if others:
        yield from _labelled("beside", [", ".join(others)])


def _labelled(label: str, texts: list[str]) -> Iterator[list[Cell | str]]:
    for index, text in enumerate(texts):
        yield [Cell(label if index == 0 else "", "dim"), text]


def _metadata(manifest: Manifest) -> list[str]:
    """Return a line for each item of a mapping that is too long for one."""
    text = value_text(manifest.metadata, _METADATA_ROOM)
    items = items_of(manifest.metadata)
    if items is None or (len(text) <= _METADATA_ROOM and "… " not in text):
        return [text]
    lines = [f"{key}: {value_text(item)}" for key, item in items[:_MOST_METADATA]]
    return lines if len(items) == len(lines) else [*lines, f"… {len(items) - len(lines)} more"]


def _tree_row(row: Row) -> list[Cell | str]:
    part = row.part
    lines = ""
    if len(row.lines) > 1:  # what stands at the top has none
        lines = "".join("│  " if line else "   " for line in row.lines[1:-1]) + ("├─ " if row.lines[-1] else "└─ ")
    inside = bool(part.children)
    name = Cell(f"{lines}{part.name}{part.tail}", "bold" if inside else "", len(lines))
    size = size_text(part.nbytes / part.count) if part.tensors else ""
    if size and row.times > 1:
        size = f"{row.times} \N{MULTIPLICATION SIGN} {size}"
    return [name, Cell(_what(row), "dim" if inside else "cyan"), size]


def _what(row: Row) -> str:
    part = row.part
    if not part.children:
        return part.what
    words = [part.what] if part.what else []
    if part.count > 1:
        words.append(f"{part.count} alike")
    if part.tensors:
        words.append(counted(part.tensors * row.times // part.count, "tensor"))
    return ", ".join(words) + (" …" if row.is_folded else "")


def _tensor_row(tensor: Tensor) -> list[Cell | str]:
    kind = tensor.dtype if tensor.kind == "tensor" else f"{tensor.dtype} ({tensor.kind})"
    note = "" if tensor.same_as is None else f"tied to {printable(tensor.same_as)}"
    return [
        Cell(f"  {printable(tensor.name)}"),
        Cell(kind, "cyan"),
        str(list(tensor.shape)),
        size_text(tensor.nbytes),
        str(tensor.start),
        Cell(note, "dim"),
    ]
