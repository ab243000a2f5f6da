"""What a process and its children hold: memory by PSS, descriptors; read from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import Self

__all__ = ["PeakSampler", "memory_of", "open_fds", "tree_of", "written_by"]

_EVERY_S = 0.02


class PeakSampler:
    """Samples a process tree while a block runs; reading smaps disturbs it, so nothing is timed meanwhile."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_pss_bytes = 0
        self.peak_fds = 0
        """Of the first process alone, the trainer's."""
        self.peak_child_bytes = 0
        """Most that one child held beside shared memory."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-memory")

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid in tree_of(self.pid):
            with contextlib.suppress(OSError):  # it has ended since it was listed
                pss, shared = memory_of(pid)
                total += pss
                if pid != self.pid:
                    self.peak_child_bytes = max(self.peak_child_bytes, pss - shared)
        self.peak_pss_bytes = max(self.peak_pss_bytes, total)
        with contextlib.suppress(OSError):
            self.peak_fds = max(self.peak_fds, open_fds(self.pid))


def tree_of(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found, queue = [], [pid]
    while queue:
        pid = queue.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                    queue += [int(child) for child in file.read().split()]
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """Return a process's proportional bytes, and those of them that are shared memory."""
    fields: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("Pss", "Pss_Shmem"):
                fields[name] = int(rest.split()[0]) * 1024
    return fields.get("Pss", 0), fields.get("Pss_Shmem", 0)


def open_fds(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def written_by(pid: int) -> int:
    """Return the bytes that a process has written to disks, or to the page cache above one."""
    with open(f"/proc/{pid}/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("write_bytes:"))
