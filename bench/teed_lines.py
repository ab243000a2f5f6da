"""Lines that a supervisor tees: when the last one is in its file and on the console, and whether all are."""

from __future__ import annotations

import contextlib
import os
import select
import time

from bench.process import EntrantFailedError
from bench.supervised import Group, Supervisor
from bench.trainees import LINE_NBYTES, line_of

__all__ = ["tee"]

_PATIENCE_SECONDS = 120.0
_READ_NBYTES = 1 << 20
_LOOK_SECONDS = 0.001


def tee(supervisor: Supervisor, group: Group, children: int, lines: int) -> dict[str, float]:
    """Have a group of printers print so many lines each.

    Returns:
        ``lines_per_s``, from the opening of the gate until the last line has come out of both ends, and ``lines_lost``
        of those that are missing or garbled at either.

    Raises:
        EntrantFailedError: That took too long.
    """
    expected = {b"[trainee%d]:" % rank + line_of(rank, n) for rank in range(children) for n in range(lines)}
    files_nbytes = LINE_NBYTES * children * lines
    files = list(group.log_dir.rglob("stdout.log"))
    opened_ns = group.open_gate()
    shown, ended_ns = _drain(supervisor, sum(map(len, expected)) + len(expected))
    while sum(file.stat().st_size for file in files) < files_nbytes:
        is_over = bool(select.select([supervisor.process], [], [], _LOOK_SECONDS)[0])
        ended_ns = time.monotonic_ns()
        if is_over:
            break
    group.end()
    in_files = {line for file in files for line in file.read_bytes().splitlines()}
    lost = len(expected - set(shown.splitlines()))
    lost += sum(line_of(rank, n) not in in_files for rank in range(children) for n in range(lines))
    return {"lines_per_s": len(expected) / (ended_ns - opened_ns) * 1e9, "lines_lost": lost}


def _drain(supervisor: Supervisor, nbytes: int) -> tuple[bytes, int]:
    """Return what comes on the console until it is all, or the group is over and nothing more comes; and when."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    pieces, last_ns = [], time.monotonic_ns()
    while nbytes > 0:
        ready, _, _ = select.select([supervisor.console, supervisor.process], [], [], deadline - time.monotonic())
        if not ready:
            raise EntrantFailedError(f"its lines were not shown within {_PATIENCE_SECONDS:.0f} s")
        if supervisor.console not in ready:
            break
        pieces.append(os.read(supervisor.console, _READ_NBYTES))
        last_ns = time.monotonic_ns()
        nbytes -= len(pieces[-1])
    with contextlib.suppress(BlockingIOError):  # more than was expected, if ever
        while data := os.read(supervisor.console, _READ_NBYTES):
            pieces.append(data)
    return b"".join(pieces), last_ns
