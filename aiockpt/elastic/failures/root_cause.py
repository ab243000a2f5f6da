"""Which of several failures is the cause, and which are its consequences: pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

from aiockpt.elastic.failures.error_data import SECTION
from aiockpt.elastic.failures.process_failure import Cause, ProcessFailure

__all__ = ["by_cause", "is_peer_error", "rule_used"]

_PEER_TYPES = frozenset({"ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError", "PeerFailedError"})

_PEER_TEXT = re.compile(
    "|".join(
        (
            r"connection (was )?(reset|closed|aborted) by (remote )?peer",  # the kernel, gloo, NCCL
            r"application timeout caused pair closure",  # gloo
            r"timed out waiting \d+ ?ms for (recv|send) operation",  # gloo
            r"connection was likely closed",  # TCPStore
            r"wait timeout after \d+ ?ms, keys",  # TCPStore
            r"failed to pass monitoredBarrier",
            r"collective operation timeout",  # the watchdog of ProcessGroupNCCL
            r"some NCCL operations have failed or timed out",
            r"NCCL communicator (was|has been|is) aborted",
            r"ncclRemoteError",
            r"remote process (exited|exiting)",  # what NCCL explains that one with
            r"broken pipe",
        )
    ),
    re.IGNORECASE,
)
"""What one says whose peer is gone; other errors of NCCL and gloo (two ranks on one GPU, a shape) are one's own."""

_EXCEPTION_LINES = 8
"""Lines of an exception's text: NCCL's has five; what is printed below it may be another stream."""
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
"""Put before each line of a traceback by the hook that torch.distributed installs."""
_TRACEBACK = "Traceback (most recent call last):\n"
_DEEPEST = 32


class _Kind(IntEnum):
    """Most likely the cause first."""

    OWN = 0
    PEER = 1
    GUARDIAN = 2
    STOPPED = 3


def by_cause(failures: Iterable[ProcessFailure]) -> list[ProcessFailure]:
    """Order failures, the root cause first.

    Own failures, and those that had failed before we stopped them, stand before those of a dead guardian, and these
    before those that we stopped. Among the own, errors that tell of a peer's end come last. Then the earliest comes
    first, by the monotonic clock: an error file says when the error was met, everything else is dated at its detection.
    """
    return sorted(failures, key=lambda failure: (_kind(failure), failure.failed_ns, failure.order))


def rule_used(ordered: Sequence[ProcessFailure]) -> str:
    """Say why the first of failures in order is the root cause, as a clause."""
    first, *others = ordered
    if not others:
        return "the only failure"
    kind = _kind(first)
    lesser = []
    for other_kind, what in (
        (_Kind.PEER, "met the end of a peer"),
        (_Kind.GUARDIAN, "died with the guardian"),
        (_Kind.STOPPED, "stopped by us"),
    ):
        count = sum(_kind(other) is other_kind for other in others)
        if other_kind > kind and count:
            lesser.append(f"{count} {what}")
    reasons = [f"of {len(others)} other{'s' * (len(others) > 1)}, {', '.join(lesser)}"] if lesser else []
    equals = [other for other in others if _kind(other) is kind]
    if equals:
        ahead_ns = equals[0].failed_ns - first.failed_ns
        when = f"{ahead_ns / 1e6:.3f} ms before the next" if ahead_ns else "noticed first of those at the same time"
        reasons.append(f"the earliest of {len(equals) + 1} alike by the monotonic clock, {when}")
    return "; ".join(reasons)


def is_peer_error(failure: ProcessFailure) -> bool:
    """Return whether what a process died of is that another one is gone or silent: the other is the cause.

    Known from the types and texts in the error file, causes included; where there is none, from the exception that its
    output ends with, and after SIGABRT from all of it, as NCCL's watchdog aborts the process.
    """
    if failure.has_own_error:
        message = failure.message if isinstance(failure.message, str) else failure.message.get("message")
        section = failure.error_file_data.get(SECTION)
        tree = section.get("exception") if isinstance(section, dict) else None
        if not isinstance(tree, dict):
            return isinstance(message, str) and _says_peer(message)
        # The texts in the tree are cut shorter than that of the whole.
        return _is_of_peer({**tree, "message": message}, 0)
    if failure.exitcode == -signal.SIGABRT:
        return _PEER_TEXT.search(failure.output_tail) is not None
    return failure.exitcode > 0 and _says_peer(_last_exception(failure.output_tail))


def _kind(failure: ProcessFailure) -> _Kind:
    if not failure.has_own_error:
        if failure.cause is Cause.STOPPED:
            return _Kind.STOPPED
        if failure.cause is Cause.GUARDIAN:
            return _Kind.GUARDIAN
    return _Kind.PEER if is_peer_error(failure) else _Kind.OWN


def _is_of_peer(tree: dict[str, Any], depth: int) -> bool:
    """Look through an exception as its file has it; the file is foreign, so nothing about it is taken for granted."""
    kind, message = tree.get("type"), tree.get("message")
    if isinstance(kind, str) and kind.rpartition(".")[2] in _PEER_TYPES:
        return True
    members = tree.get("exceptions")
    if isinstance(members, list) and members:  # a group is of a peer if each of its members is
        return depth < _DEEPEST and all(isinstance(one, dict) and _is_of_peer(one, depth + 1) for one in members)
    if isinstance(message, str) and _PEER_TEXT.search(message):
        return True
    cause = tree.get("cause")
    return isinstance(cause, dict) and depth < _DEEPEST and _is_of_peer(cause, depth + 1)


def _says_peer(text: str) -> bool:
    """Look at a text of the form ``Type: message``, the type perhaps with its module."""
    kind = text.partition(":")[0].strip().rpartition(".")[2]
    return kind in _PEER_TYPES or _PEER_TEXT.search(text) is not None


def _last_exception(output: str) -> str:
    """Return what follows the frames of the last traceback in an output: ``Type: message``, and what is below it."""
    _, found, below = _RANK_PREFIX.sub("", output).rpartition(_TRACEBACK)
    lines = below.split("\n") if found else []
    for index, line in enumerate(lines):
        if line and not line[0].isspace():
            return "\n".join(lines[index : index + _EXCEPTION_LINES])
    return ""
