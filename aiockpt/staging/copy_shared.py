"""Copying before ``stage`` returns, by the calling thread with the copy thread's help.

Both take the next unit until none is left, so a thread that the machine does not run delays nothing but its last unit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from aiockpt.staging.copy_cpu import Unit
from aiockpt.staging.progress import Progress

__all__ = ["SharedCopy"]


class SharedCopy:
    """The units of one save, copied by up to two threads.

    Args:
        units: In file order.
        progress: Told by the calling thread, in file order.
    """

    def __init__(self, units: Sequence[Unit], progress: Progress) -> None:
        self._units = units
        self._progress = progress
        self._left = deque(range(len(units)))
        self._finished: deque[int] = deque()
        self._early: set[int] = set()
        self._told = 0
        self._helper_error: BaseException | None = None
        self._over = False
        self._helping = threading.Lock()

    def run(self) -> None:
        """Copy until all is copied; on the calling thread. Raises what a copy raised, in either thread."""
        try:
            while (at := self._take()) is not None:
                self._units[at].copy()
                self._finished.append(at)
                self._tell()
        finally:
            self._left.clear()
            with self._helping:  # its last unit must be over: the tensors may change from here on
                self._over = True
        if self._helper_error is not None:
            raise self._helper_error
        self._tell()
        self._units = ()  # lets the tensors go, also where the help comes too late

    def help(self, between: Callable[[], None]) -> None:
        """Copy while units are left; on the copy thread.

        Args:
            between: Called after each unit: what this thread has to do beside.
        """
        while True:
            with self._helping:
                at = None if self._over else self._take()
                if at is None:
                    return
                try:
                    self._units[at].copy()
                except BaseException as exc:  # noqa: BLE001  # raised by run()
                    self._helper_error = exc
                    self._left.clear()
                    return
                self._finished.append(at)
            between()

    def _take(self) -> int | None:
        try:
            return self._left.popleft()
        except IndexError:
            return None

    def _tell(self) -> None:
        while self._finished:
            self._early.add(self._finished.popleft())
        while self._told in self._early:
            self._early.remove(self._told)
            unit = self._units[self._told]
            if unit.upto:
                self._progress.partly(unit.positions[0], unit.upto)
            else:
                self._progress.copied(unit.positions)
            self._told += 1
