"""A save that answers with a future."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["FuturePending"]


def _at_once() -> None:
    pass


class FuturePending:
    """A save under way, known by the future of its end.

    Args:
        future: Of the end.
        wait_staged: Returns when the state may change; by default it may when the call has returned.
    """

    def __init__(self, future: Future[Any], wait_staged: Callable[[], None] = _at_once) -> None:
        self._future = future
        self._wait_staged = wait_staged

    def wait_staged(self) -> None:
        """Return when the state may be changed."""
        self._wait_staged()

    def wait(self) -> None:
        """Return when the future is done; raises what the save raised."""
        self._future.result()
