"""How processes end: collecting them, saying it in words, and what the kernel says of one that does not."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from pathlib import Path

__all__ = ["collect", "collect_later", "describe_exit", "name_of_signal", "wait_channel"]


def collect(popen: subprocess.Popen[bytes], pidfd: int) -> int | None:
    """Reap a child that has ended, by its pidfd, and return its exit status: negative for a signal.

    Returns:
        None where the program ignores SIGCHLD, or has waited for the child itself.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        ended = None
    status = None if ended is None else _status(ended)
    popen.returncode = status or 0  # Popen must not wait for a pid that is no longer ours
    return status


def collect_later(popen: subprocess.Popen[bytes], pidfd: int) -> None:
    """Reap a child that is left to end alone, from a thread of its own, so that it is no zombie for ever.

    The pidfd becomes the thread's. The child is one that ends by itself.
    """

    def wait() -> None:
        end = select.poll()
        end.register(pidfd, select.POLLIN)
        end.poll()
        collect(popen, pidfd)
        os.close(pidfd)

    threading.Thread(target=wait, name="aiockpt-reaper", daemon=True).start()


def _status(ended: os.waitid_result) -> int:
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def describe_exit(status: int | None) -> str:
    """Return an exit status in words: negative for a signal, None where another took it."""
    if status is None:
        return "it ended, and the program's own SIGCHLD handling took its exit status"
    if status < 0:
        hint = ", as the kernel does when memory runs out" if status == -signal.SIGKILL else ""
        return f"it was ended by {name_of_signal(-status)}{hint}"
    return f"it exited with status {status}"


def name_of_signal(number: int) -> str:
    """Return ``"SIGKILL"`` for 9, and ``"signal 40"`` where the number has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def wait_channel(pid: int, *, proc: Path = Path("/proc")) -> str:
    """Return the function of the kernel that a process waits in, ``"unknown"`` where it does not say."""
    try:
        found = (proc / str(pid) / "wchan").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return "unknown"
    return found if found not in ("", "0") else "unknown"  # "0" to those who may not see it, and while it runs
