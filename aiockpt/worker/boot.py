"""The worker's main function."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import json
import logging
import os
import resource
import signal

import anyio

from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.worker import stderr
from aiockpt.worker.exits import ExitStatus
from aiockpt.worker.service import serve

__all__ = ["main"]

_log = logging.getLogger("aiockpt.worker")

NICE = 10
"""The training step has the cores first."""

_PR_SET_NAME = 15


def main(arguments: list[str]) -> None:
    """Serve one trainer, then end the process; does not return.

    Args:
        arguments: Descriptor of the socket, of the trainer's pidfd, and the options of ``launch.command`` as JSON.
    """
    status = ExitStatus.INTERNAL
    try:
        _settle_in()
        socket_fd, pidfd = int(arguments[0]), int(arguments[1])
        os.set_inheritable(pidfd, False)
        faults = _load_faults(json.loads(arguments[2]).get("faults"))
        faults.at(FaultPoint.WORKER_STARTED)
        body = functools.partial(serve, socket_fd, pidfd, faults=faults, end=_end)
        status = anyio.run(body, backend="asyncio", backend_options={"use_uvloop": True})
    except BaseException:
        _log.exception("the worker ends by an error that it does not know")
        raise
    finally:
        _end(status)


def _end(status: ExitStatus) -> None:
    """End at once: a thread that hangs on a dead disk must not keep the process, and nothing is left to flush."""
    os._exit(status)


def _settle_in() -> None:
    """Make the process what a worker is: quiet, polite, and deaf to signals that are meant for its trainer."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that started us may have blocked some
    stderr.install()
    faulthandler.enable(2)
    _stand_back()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"aiockpt-worker", 0, 0, 0)  # for top and ps


def _stand_back() -> None:
    nice = max(NICE, os.getpriority(os.PRIO_PROCESS, 0))
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    if os.getsid(0) == os.getpid():
        # Outside of cpu cgroups Linux shares the cores out among sessions first, and a process's nice value counts
        # within its own only: there the worker got as much as the trainer, and steps took 1.3 times as long instead of
        # 1.1. The kernel may lack this file, and it refuses two such changes within 100 ms.
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))


def _load_faults(wanted: list[str] | None) -> Faults:
    if wanted is None:
        return NO_FAULTS
    where, text = wanted
    module, _, function = where.partition(":")
    faults = getattr(importlib.import_module(module), function)(text)
    if not isinstance(faults, Faults):
        raise TypeError(f"{where} gave no fault layer but {faults!r}")
    return faults
