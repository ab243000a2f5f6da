"""What the worker's threads do at the disk, for its beats."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Activity"]


class Activity:
    """Counts finished file operations and knows those under way. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved = 0
        self._next = 0
        self._under_way: dict[int, str] = {}  # in the order in which they began

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Say that one file operation is under way; its end counts as progress, also when it fails."""
        with self._lock:
            number = self._next
            self._next += 1
            self._under_way[number] = name
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[number]
                self._moved += 1

    def look(self) -> tuple[int, str]:
        """Return how many operations have ended, and the name of the oldest under way (empty where none is)."""
        with self._lock:
            return self._moved, next(iter(self._under_way.values()), "")
