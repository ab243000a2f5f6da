"""A bar for work that says how much it is when it has begun."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from aiockpt.cli.screen import console, reading_bar

__all__ = ["LateBar"]


class LateBar:
    """A bar on standard error, where that is a terminal, from ``begin`` on; a context manager.

    Args:
        what: Is done.
        is_shown: False shows nothing, and needs no rich.
    """

    def __init__(self, what: str, *, is_shown: bool) -> None:
        self._what = what
        self._is_shown = is_shown
        self._stack = ExitStack()
        self.advance: Callable[[int], None] = _ignore
        """Moves the bar on by bytes."""

    def begin(self, total: int) -> None:
        """Show the bar."""
        if self._is_shown:
            self.advance = self._stack.enter_context(reading_bar(self._what, total))

    def wait(self, what: str) -> None:
        """Show that something else is done, for which there is no bar."""
        self._stack.close()
        self.advance = _ignore
        if self._is_shown and (screen := console(stderr=True)).is_terminal:
            self._stack.enter_context(screen.status(what))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _ignore(nbytes: int) -> None:
    """Take what no bar shows."""
