"""Deletes in the background what was renamed out of the way."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import anyio.to_thread

from aiockpt.format.names import trash_name
from aiockpt.storage.commit import remove_tree
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.worker.activity import Activity
from aiockpt.worker.run import Run

__all__ = ["PATIENCE_SECONDS", "Sweeper"]

_log = logging.getLogger("aiockpt.worker")

PATIENCE_SECONDS = 5.0
"""How long a removal stands back for an open save; a run that saves without pause must be swept too."""


class Sweeper:
    """Removes one directory after the other.

    What this run's retention removed goes at once, as room is needed for the next checkpoint; what former jobs left
    stands back while a save is open.
    """

    def __init__(self, run: Run, activity: Activity, faults: Faults = NO_FAULTS) -> None:
        self._run = run
        self._activity = activity
        self._faults = faults
        self._limiter = anyio.CapacityLimiter(1)
        self._at_once: deque[str] = deque()
        self._left_over: deque[str] = deque()
        self._is_working = True  # until run() has looked
        self._open_saves = 0
        self._is_awaited = False
        self._changed = anyio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to remove."""
        return not (self._is_working or self._at_once or self._left_over)

    def add(self, name: str) -> None:
        """Remove a name in the run soon."""
        self._at_once.append(name)
        self._notify()

    @contextmanager
    def standing_back(self) -> Iterator[None]:
        """While this lasts, what former jobs left waits, up to ``PATIENCE_SECONDS`` each."""
        self._open_saves += 1
        try:
            yield
        finally:
            self._open_saves -= 1
            self._notify()

    async def wait_idle(self) -> None:
        """Wait until nothing is left; nothing stands back meanwhile."""
        self._is_awaited = True
        self._notify()
        try:
            while not self.is_idle:
                await self._changed.wait()
        finally:
            self._is_awaited = False

    async def run(self) -> None:
        """Remove until cancelled."""
        self._left_over.extend(await anyio.to_thread.run_sync(self._list, limiter=self._limiter))
        while True:
            if self._at_once:
                await self._remove(self._at_once.popleft())
            elif self._left_over:
                with anyio.move_on_after(PATIENCE_SECONDS):
                    while self._open_saves and not self._at_once and not self._is_awaited:
                        await self._changed.wait()
                if not self._at_once:
                    await self._remove(self._left_over.popleft())
            else:
                self._is_working = False
                self._notify()
                await self._changed.wait()

    async def _remove(self, name: str) -> None:
        self._is_working = True
        try:
            await anyio.to_thread.run_sync(self._remove_now, name, limiter=self._limiter)
        except OSError as exc:  # a StorageError is one
            _log.warning("%s is left in the run\n%s", name, exc)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # ---- in a thread

    def _remove_now(self, name: str) -> None:
        with self._activity.operation(f"remove {name}"):
            remove_tree(self._run.fd, name, faults=self._faults)

    def _list(self) -> list[str]:
        try:
            with os.scandir(self._run.fd) as entries:
                return sorted(entry.name for entry in entries if entry.name.startswith(trash_name("")))
        except OSError as exc:
            _log.warning("what former jobs left in %s was not looked for: %s", self._run.path, exc)
            return []
