"""A process that does not end although it was killed: what the kernel says of it, and what is to be done."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from aiockpt.process_ends import wait_channel

__all__ = ["Unreaped", "look_at"]

_STATES = {
    "D": "in uninterruptible sleep",
    "Z": "a zombie that its parent does not collect",
    "R": "still at work in the kernel, as one that gives back much memory",
    "T": "stopped",
    "t": "stopped by a debugger",
}


class Unreaped(NamedTuple):
    """A process that was given up.

    Args:
        pid: Its process id.
        state: The letter of ``/proc/<pid>/stat``: ``"D"`` for uninterruptible sleep.
        wait_channel: The function of the kernel that it waits in; ``"unknown"`` where it does not say.
    """

    pid: int
    state: str
    wait_channel: str

    def __str__(self) -> str:
        state = f"it is {_STATES.get(self.state, 'alive')} (state {self.state})"
        where = "" if self.wait_channel == "unknown" else f", and waits in the kernel at {self.wait_channel}"
        advice = (
            "look at the disk, file system or device that it uses, and recycle this host; nothing else ends it"
            if self.state == "D"
            else "look at it again in a minute; if it is still there, recycle this host"
        )
        return (
            f"process {self.pid} did not end after SIGKILL and is left behind\n"
            f"why: {state}{where}\n"
            f"next: {advice}. Until then its GPU, memory, ports and locks may stay taken"
        )


def look_at(pid: int, *, proc: Path = Path("/proc")) -> Unreaped | None:
    """Return what the kernel says of a process, None where it is gone.

    Args:
        pid: Its process id.
        proc: Where the kernel's process table is mounted.
    """
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # "pid (name) state ...", and the name may hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return Unreaped(pid, fields[0] if fields else "?", wait_channel(pid, proc=proc))
