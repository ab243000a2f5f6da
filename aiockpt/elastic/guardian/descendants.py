"""Who descends from a process, and ending them: by ``/proc``, since groups and sessions can be left.

A descendant's pid may be reused between looking and signalling, as its parent reaps it. So it is held by a pidfd, and
looked at again behind that: a pid that has changed hands by then has another parent, and a pidfd of the former owner
signals nobody.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["children", "descendants", "kill", "marked"]

PROC = "/proc"


def children(pid: int, *, proc: str | Path = PROC) -> set[int]:
    """Return the direct children of a process, zombies included; none where it is gone."""
    found: set[int] = set()
    try:
        for task in os.listdir(f"{proc}/{pid}/task"):
            with contextlib.suppress(ProcessLookupError), open(f"{proc}/{pid}/task/{task}/children") as file:
                found |= {int(child) for child in file.read().split()}
    except FileNotFoundError:
        if os.path.exists(f"{proc}/{pid}/task"):
            return _children_by_parent(pid, proc=proc)  # a kernel without CONFIG_PROC_CHILDREN
    except ProcessLookupError:
        pass
    return found


def descendants(pid: int, *, proc: str | Path = PROC) -> dict[int, int]:
    """Return every living descendant of a process, and its parent; parents come before their children."""
    found: dict[int, int] = {}
    above = [pid]
    while above:
        parent = above.pop(0)
        for child in children(parent, proc=proc):
            if child not in found:
                found[child] = parent
                above.append(child)
    return {child: parent for child, parent in found.items() if not _has_ended(child, proc)}


def kill(pid: int, parent: int) -> None:
    """Send SIGKILL to a process if it is still the child of ``parent``; harmless where it is gone."""
    try:
        held = os.pidfd_open(pid)
    except OSError:
        return
    try:
        stat = _stat(pid, PROC)
        # An orphan was adopted by us in between: that one is ours as well.
        if stat is not None and stat[1] in (parent, os.getpid()):
            signal.pidfd_send_signal(held, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(held)


def marked(name: str, value: str, *, proc: str | Path = PROC) -> dict[int, int]:
    """Return the processes of this user that were started with a variable in their environment, and their parents."""
    wanted = f"{name}={value}".encode()
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir(proc))):
        try:
            with open(f"{proc}/{pid}/environ", "rb") as file:
                environment = file.read()
        except OSError:  # gone, or another user's
            continue
        stat = _stat(pid, proc)
        if stat is not None and wanted in environment.split(b"\0"):
            found[pid] = stat[1]
    return found


def _has_ended(pid: int, proc: str | Path) -> bool:
    """Return whether a process is gone, or a zombie."""
    stat = _stat(pid, proc)
    return stat is None or stat[0] in "ZX"


def _stat(pid: int, proc: str | Path) -> tuple[str, int] | None:
    """Return the state and the parent of a process."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name may hold anything, ")" too
    except (OSError, ValueError):
        return None
    return state.decode("ascii"), int(parent)


def _children_by_parent(pid: int, *, proc: str | Path) -> set[int]:
    found = set()
    for name in os.listdir(proc):
        if name.isdigit():
            stat = _stat(int(name), proc)
            if stat is not None and stat[1] == pid:
                found.add(int(name))
    return found
