"""The coordinators that are open in this process: what a fork and its exit mean for them, which opening each one is."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import Counter
from typing import Protocol

__all__ = ["count_opening", "forget", "remember"]


class _Hooked(Protocol):
    def forget_in_child(self) -> None: ...
    def abandon_at_exit(self) -> None: ...
    def park_at_exit(self) -> None: ...


_open: weakref.WeakSet[_Hooked] = weakref.WeakSet()
_openings: weakref.WeakKeyDictionary[object, Counter[str]] = weakref.WeakKeyDictionary()
"""How often each run was opened over a process group; gone with the group, as are the names that it is needed for."""
_is_registered = False


def remember(coordinator: _Hooked) -> None:
    """From now on the coordinator hears of forks and of the interpreter's exit."""
    global _is_registered  # one of the three process-wide things: hooks cannot be taken back
    _open.add(coordinator)
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(after_in_child=_after_fork)
        # Before threads are joined, unlike atexit: a thread of the program that waits for a save could else never end.
        threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
        atexit.register(_at_end)


def count_opening(group: object, run: str) -> int:
    """Return how many openings of a run over this very group came before; called once for each, in one thread."""
    before = _openings.setdefault(group, Counter())
    before[run] += 1
    return before[run] - 1


def forget(coordinator: _Hooked) -> None:
    """The coordinator is closed."""
    _open.discard(coordinator)


def _after_fork() -> None:
    for coordinator in list(_open):
        coordinator.forget_in_child()
    _open.clear()


def _at_exit() -> None:
    for coordinator in list(_open):
        coordinator.abandon_at_exit()


def _at_end() -> None:
    for coordinator in list(_open):
        coordinator.park_at_exit()
