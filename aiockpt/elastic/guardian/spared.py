"""Who is spared for a while when all is ended: a checkpoint worker with a staged save in hand.

It connects to the guardian's socket and says for how many seconds it may stay; it is spared as long as it keeps that
connection. Who it is, the kernel says.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

__all__ = ["DEFAULT_SECONDS", "Spared"]

DEFAULT_SECONDS = 60.0
_CREDENTIALS = struct.Struct("3i")
_LONGEST_WORD = 64


class Spared:
    """One connection: the pid behind it, and for how long it asks to be spared."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self._uid, _ = _CREDENTIALS.unpack(credentials)
        self.seconds = DEFAULT_SECONDS

    @property
    def is_ours(self) -> bool:
        """Whether it runs for our user."""
        return self._uid in (os.geteuid(), 0)

    def read(self) -> bool:
        """Take what it says, a number of seconds in ASCII; return False where it has hung up."""
        try:
            said = self.connection.recv(_LONGEST_WORD)
        except BlockingIOError:
            return True
        except OSError:
            return False
        with contextlib.suppress(ValueError):
            seconds = float(said.decode("ascii", "replace"))
            if seconds >= 0:  # "inf" is an answer, and "nan" none
                self.seconds = seconds
        return bool(said)
