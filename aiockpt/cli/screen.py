"""What the commands print with: rich for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["MissingExtraError", "console", "print_json", "printable", "size_text"]


class MissingExtraError(Exception):
    """A command was run without the extra that it needs; the text says what to install."""


def console(*, stderr: bool = False) -> Console:
    """Return the console to print on.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as exc:
        raise MissingExtraError("the screen needs rich: pip install 'aiockpt[cli]' (--json works without it)") from exc
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False)


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


def printable(text: str) -> str:
    """Return text without what a terminal would act on: a checkpoint's names and values are not ours."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
