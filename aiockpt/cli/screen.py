"""What the commands print with: rich for people, JSON for programs."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "MissingExtraError",
    "console",
    "counted",
    "in_old_encoding",
    "local_time",
    "print_json",
    "printable",
    "reading_bar",
    "size_text",
]

_WIDE = 70
"""Columns of a terminal that has room for more than what is needed."""
_ENDLESS = 1 << 20
"""Columns of a pipe or a file: nothing is cut there, and rich pads nothing to it."""


class MissingExtraError(Exception):
    """A command was run without the extra that it needs; the text says what to install."""


def console(*, stderr: bool = False) -> Console:
    """Return the console to print on: a terminal in its width, anything else as wide as the text is.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as exc:
        raise MissingExtraError("the screen needs rich: pip install 'aiockpt[cli]' (--json works without it)") from exc
    made = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _ENDLESS
    return made


@contextmanager
def reading_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes read on standard error, where that is a terminal, until the block ends.

    Args:
        what: Is read.
        total: Bytes; None where that is not known.

    Yields:
        A function that moves the bar on by a number of bytes, from any thread.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """In the units of all sizes here; rich's has others."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{size_text(speed)}/s" if speed else "", style="progress.data.speed")

    screen = console(stderr=True)
    screen.width -= len("^C")  # which the terminal shows there: in a line that is full it would begin another one
    disable = not screen.is_terminal or screen.is_dumb_terminal
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(binary_units=True)]
    if screen.width >= _WIDE:
        columns += [Rate(), TimeRemainingColumn()]
    with Progress(*columns, console=screen, transient=True, expand=True, disable=disable) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def print_json(value: Any) -> None:
    """Print a record or a plain value as indented JSON."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def size_text(nbytes: float) -> str:
    """Return bytes as people read them."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1000 or unit == "TiB":
            break
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def local_time(created: str | None) -> str:
    """Return a time of a manifest as this machine's clock shows it; as it stands where it is no such time."""
    if created is None:
        return "-"
    try:
        return datetime.datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return printable(created)


def counted(count: int, what: str) -> str:
    """Return ``1 tensor``, ``2 tensors``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Return text without what a terminal would act on: a checkpoint's names and values are not ours."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_PLAIN = {"…": "...", "→": "->", "\N{MULTIPLICATION SIGN}": "x", "│": "|", "├": "|", "└": "`", "─": "-"}


def in_old_encoding(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding does not have; an error handler for ``codecs.register_error``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _PLAIN.get(error.object[error.start], "?"), error.start + 1
