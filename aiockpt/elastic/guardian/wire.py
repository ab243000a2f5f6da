"""The frames between supervisor and guardian: a little-endian u32 length, then JSON.

Supervisor to guardian, by ``do``:

- ``launch``: rank, executable, argv, env, cpus (or null), cpus_optional; with two or more descriptors: the child's
  stdout and stderr, and those that it inherits, whose numbers its environment has under the names in ``inherits``
- ``signal``: ranks, signum, leader_only: to the process groups of these ranks, or to their leaders alone
- ``kill``: SIGKILL to every descendant, but for those that are spared
- ``end``: the same, then leave, when the spared ones have ended too

Guardian to supervisor, by ``event``:

- ``launched``: rank, pid, unbound (why its processors were not set, or null); ``refused``: rank, errno
- ``exited``: rank, status (negative: the signal), at_ns (``CLOCK_MONOTONIC``)
- ``killed``: SIGKILL was sent to all that were alive at ``kill``
- ``emptied``: spared, a list of pids: nothing else is alive after ``kill``
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["LONGEST_FRAME", "MOST_DESCRIPTORS", "Frames", "encode"]

LONGEST_FRAME = 16 << 20
"""Bytes; arguments and environment of one child are at most 6 MiB (Linux: three quarters of ``_STK_LIM``)."""
MOST_DESCRIPTORS = 8

_LENGTH = struct.Struct("<I")


def encode(message: dict[str, Any]) -> bytes:
    """Return the frame of one message; file names that are no UTF-8 travel as lone surrogates."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Puts messages together again from bytes as they come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield every message that ``data`` completes.

        Raises:
            ValueError: A frame that is too long, or is no JSON object.
        """
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (nbytes,) = _LENGTH.unpack_from(self._bytes)
            if nbytes > LONGEST_FRAME:
                raise ValueError(f"a frame of {nbytes} bytes; the longest may be {LONGEST_FRAME}")
            end = _LENGTH.size + nbytes
            if len(self._bytes) < end:
                return
            message = json.loads(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            if not isinstance(message, dict):
                raise ValueError("a frame that is no JSON object")
            yield message
