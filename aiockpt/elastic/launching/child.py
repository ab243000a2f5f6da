"""The process of a function: what runs between ``exec`` and the user's code.

Environment, output, processors and session are as they are to be before this module is imported. It takes the function
over a socket, so that an import that fails is recorded like any other error, and sends back what it returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing.spawn
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from typing import Any

from aiockpt.elastic.failures.error_file import get_error_handler

__all__ = ["LENGTH", "STACKS_SIGNAL", "VALUE_FD", "main"]

LENGTH = struct.Struct("<Q")
"""Before each of: what prepares the main module, function with arguments; and before the value on the way back."""
VALUE_FD, STACKS_FD = "AIOCKPT_VALUE_FD", "AIOCKPT_STACKS_FD"
STACKS_SIGNAL = signal.SIGRTMAX - 1
"""Asks for the stacks of all threads; one that programs leave alone."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the function that comes over the inherited socket, and end as it ends."""
    # Should the guardian be killed itself; it has one thread, so the signal follows that one.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = socket.socket(fileno=_take(VALUE_FD))
    faulthandler.register(STACKS_SIGNAL, file=_take(STACKS_FD), all_threads=True, chain=False)
    handler = get_error_handler()
    handler.initialize()
    try:
        value = _run(channel)
        reply = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except SystemExit:
        raise
    except BaseException as exc:  # noqa: BLE001 - all of them end here: an interrupt is a failure of this rank too
        with contextlib.suppress(Exception):
            handler.record_exception(exc)
        traceback.print_exc()
        sys.exit(1)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the supervisor wants it no more
        channel.sendall(LENGTH.pack(len(reply)))
        channel.sendall(reply)
    channel.close()


def _run(channel: socket.socket) -> Any:
    with channel.makefile("rb") as file:
        preparation = pickle.loads(_read(file))
        multiprocessing.spawn.prepare(preparation)
        function, args = pickle.loads(_read(file))
    try:
        return function(*args)
    except SystemExit as exc:
        if exc.code not in (None, 0):
            raise
        return None


def _read(file: Any) -> bytes:
    (nbytes,) = LENGTH.unpack(file.read(LENGTH.size))
    body: bytes = file.read(nbytes)
    return body


def _take(name: str) -> int:
    """Return an inherited descriptor and keep it from children of our own: they are to find neither."""
    descriptor = int(os.environ.pop(name))
    os.set_inheritable(descriptor, False)
    return descriptor
