"""Fault layers for questions that a plan cannot ask; loaded by the worker by name."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading

from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.testing.faults import from_json


class Reporting(Faults):
    """Writes the names of the imported modules to a file, at the start and after a save."""

    def __init__(self, path: str) -> None:
        self._path = path

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point in (FaultPoint.WORKER_STARTED, FaultPoint.WORKER_BEFORE_REPORT):
            with open(f"{self._path}.{point}", "w", encoding="utf-8") as file:
                file.write("\n".join(sys.modules))


class Switched(Faults):
    """Follows the plan that stands in a file now, so that one worker meets one fault after the other."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._text = ""
        self._layer: Faults = Faults()
        self._lock = threading.Lock()

    def _now(self) -> Faults:
        with self._lock, open(self._path, encoding="utf-8") as file:
            text = file.read()
            if text != self._text:
                self._text, self._layer = text, from_json(text)
            return self._layer

    def at(self, point: FaultPoint, path: str = "") -> None:
        self._now().at(point, path)

    def clip(self, path: str, offset: int, nbytes: int) -> int:
        return self._now().clip(path, offset, nbytes)


class StoppedBeforeRename(Faults):
    """Stops the process once, and at once: a signal to the process as a whole may reach another thread first."""

    where = FaultPoint.WORKER_BEFORE_RENAME

    def __init__(self, text: str) -> None:
        self._left = 1

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is self.where and self._left:
            self._left -= 1
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


class StoppedWhenMade(StoppedBeforeRename):
    """Stops where the attempt's directories stand and are empty."""

    where = FaultPoint.WORKER_ATTEMPT_MADE


class StoppedWhileAllocating(StoppedBeforeRename):
    """Stops behind the look at the limits."""

    where = FaultPoint.WORKER_ALLOCATING


class Bug(Faults):
    """Fails as no operating system does, once."""

    def __init__(self, text: str) -> None:
        self._left = 1

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is FaultPoint.WORKER_BLOCK_WRITE and self._left:
            self._left -= 1
            raise RuntimeError("a bug of ours")


class Chatty(Faults):
    """Writes more to stderr than its pipe holds."""

    def __init__(self, text: str) -> None:
        pass

    def at(self, point: FaultPoint, path: str = "") -> None:
        for _ in range(100):
            print("x" * 10_000, file=sys.stderr)  # noqa: T201


class Throttled(Faults):
    """Lets every block wait a little, in steps that a beat can see."""

    def __init__(self, text: str) -> None:
        self._seconds = float(text)

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is FaultPoint.WORKER_BLOCK_WRITE:
            threading.Event().wait(self._seconds)


class Fails(Faults):
    """Fails to load."""

    def __init__(self, text: str) -> None:
        raise OSError(errno.EIO, "no fault layer today")


class Mad(Faults):
    """Says what nobody understands, in the middle of a save."""

    def __init__(self, text: str) -> None:
        self._left = 1

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is FaultPoint.WORKER_BLOCK_WRITE and self._left:
            self._left -= 1
            os.write(int(sys.argv[1]), b"\x04\x00\x00\x00what")  # the worker's end of the socket
