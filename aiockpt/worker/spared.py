"""Asking the guardian of the trainers to be spared, while a staged save is in hand.

Where ``aiockpt.elastic`` supervises the trainers, its guardian ends every process that descends from it when they end
or the supervisor is gone. A worker that is to finish a save has to say so before: it holds a connection to the
guardian's socket, whose path is in the environment, and its word is the number of seconds that it may take.
"""

from __future__ import annotations

import logging
import os
import socket

__all__ = ["GUARDIAN_VARIABLE", "Spared"]

_log = logging.getLogger("aiockpt.worker")

GUARDIAN_VARIABLE = "AIOCKPT_GUARDIAN"
"""Has the path of the guardian's socket."""


class Spared:
    """The connection, where there is a guardian.

    Args:
        seconds: Longest time from the end of the trainers; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._path = os.environ.get(GUARDIAN_VARIABLE)
        self._seconds = seconds
        self._connection: socket.socket | None = None
        self._has_warned = False

    def ask(self) -> None:
        """Ask to be spared from now on; does not wait."""
        if not self._path or self._connection is not None:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
            connection.send(b"inf" if self._seconds is None else str(self._seconds).encode("ascii"))
        except OSError as exc:
            connection.close()
            if not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "the supervisor's guardian does not know that a save is in hand\nwhy: %s at %s: %s\n"
                    "next: if it ends this process with the trainers, that save is lost; the one before it stands",
                    GUARDIAN_VARIABLE,
                    self._path,
                    exc,
                )
        else:
            self._connection = connection

    def let_go(self) -> None:
        """Ask for it no longer."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
