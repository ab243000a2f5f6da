"""What the operating system must offer, asked before anything is opened."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

from aiockpt.errors import ConfigError

__all__ = ["check_system"]

_MISSING = {errno.ENOSYS, errno.EPERM, errno.EINVAL}
"""How a kernel says that it lacks a call, and a sandbox that it refuses one. A limit that is met says something else,
and is told by who needs what it limits."""


def check_system() -> None:
    """Try the system calls without which no worker can be watched, or given memory.

    Where one is missing, that would show much later, for some of them only at close.

    Raises:
        ConfigError: Names the call and what the kernel said.
    """
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        raise ConfigError(
            "aiockpt runs on Linux only",
            why="it needs memfd_create and pidfd_open",
            next="save on a Linux machine; what was saved can be read anywhere",
        )
    own = -1
    call = "pidfd_open"
    try:
        own = os.pidfd_open(os.getpid())
        call = "pidfd_send_signal"
        signal.pidfd_send_signal(own, 0)
        call = "waitid"
        with contextlib.suppress(ChildProcessError):  # nobody is a child of itself; the question was understood
            os.waitid(os.P_PIDFD, own, os.WEXITED | os.WNOHANG)
        call = "memfd_create"
        os.close(os.memfd_create("aiockpt-probe", os.MFD_CLOEXEC))
    except OSError as exc:
        if exc.errno in _MISSING:
            raise ConfigError(
                "aiockpt does not run here",
                why=f"{call}: {exc.strerror} (errno {exc.errno})",
                next="use Linux 5.4 or newer; in a container, a seccomp profile that permits this call",
            ) from exc
    finally:
        if own >= 0:
            os.close(own)
