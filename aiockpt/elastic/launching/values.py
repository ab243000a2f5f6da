"""The socket to the process of a function: its payload goes out, its value comes back."""

from __future__ import annotations

import os
import socket

import anyio

from aiockpt.elastic.launching.child import LENGTH

__all__ = ["ValueChannel"]

_READ_NBYTES = 1 << 20


class ValueChannel:
    """Our end of one child's socket, and the memory that takes its stacks.

    The child's end is closed here once it is launched, so that its death is our end-of-file. Descriptors: two, until
    ``close``.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._stacks = os.memfd_create("aiockpt-stacks", os.MFD_CLOEXEC)
        try:
            self._socket, self._theirs = socket.socketpair()
        except OSError:
            os.close(self._stacks)
            raise
        self._socket.setblocking(False)
        self._received = bytearray()
        self._is_over = False

    def descriptors(self) -> tuple[int, int]:
        """Return what the child inherits: its end of the socket, and where its stacks go."""
        return self._theirs.fileno(), self._stacks

    def release(self) -> None:
        """Close the child's end here: it is launched."""
        self._theirs.close()

    async def run(self) -> None:
        """Send the payload, then receive until the value is there or the child has hung up."""
        data, self._payload = memoryview(self._payload), b""
        while data and not self._is_over:
            try:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError:  # it died before it had all of it
                break
        while not self._is_over:
            await anyio.wait_readable(self._socket)
            self._receive_once()

    def drain(self) -> None:
        """Take in what a dead child has left in the socket; a grandchild may hold its end, so wait for nothing."""
        while not self._is_over and self._receive_once():
            pass
        self._is_over = True

    @property
    def value(self) -> bytearray | None:
        """The pickled value, if all of it came."""
        if len(self._received) < LENGTH.size:
            return None
        body = self._received[LENGTH.size :]
        return body if len(body) == LENGTH.unpack_from(self._received)[0] else None

    def stacks(self) -> str:
        """Return the stacks of its threads, if it wrote them."""
        nbytes = os.fstat(self._stacks).st_size
        return os.pread(self._stacks, nbytes, 0).decode("utf-8", "replace")

    def close(self) -> None:
        """Close what is ours."""
        self._is_over = True
        self._socket.close()
        self._theirs.close()
        if self._stacks >= 0:
            os.close(self._stacks)
            self._stacks = -1

    def _receive_once(self) -> bool:
        """Return whether there may be more to receive at once."""
        try:
            data = self._socket.recv(_READ_NBYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._received += data
        self._is_over = not data
        return bool(data)
