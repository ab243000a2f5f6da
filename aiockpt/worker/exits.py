"""With which status a worker ends."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitStatus"]


class ExitStatus(IntEnum):
    """What the exit status of a worker says; 1 and 2 are Python's own."""

    CLOSED = 0
    """Told to close, and all that was staged is finished."""
    ORPHANED = 64
    """The trainer is gone; what it had staged is finished, all else removed."""
    PROTOCOL = 65
    """The trainer's bytes were no messages."""
    NOT_READY = 66
    """The run directory could not be used; ``Ready`` said why."""
    LINGERED = 67
    """The trainer is gone, and its last save did not end within ``linger_timeout``."""
    INTERNAL = 70
    """A bug: the traceback is on stderr."""
