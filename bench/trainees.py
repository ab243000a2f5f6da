"""What the supervised processes of ``bench processes`` run: they say that they are there, wait at a gate, and end.

Both sides launch the same. The module is small, since the processes of functions import it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["LINE_NBYTES", "Work", "announce", "line_of", "work_of"]

LINE_NBYTES = 64
"""Of a printed line, with its newline."""
_WRITE_NBYTES = 8192
"""Printed at once: as much as Python's own buffer takes where stdout is no terminal."""

_SHELL = 'echo "$0" >"$1"; : <"$2"'
_PRINTER = f"""
import os, sys
rank, count, door, gate = sys.argv[1:]
text = "".join((f"{{rank}} {{n:08d}} ").ljust({LINE_NBYTES - 1}, ".") + "\\n" for n in range(int(count))).encode()
with open(door, "w") as file:
    file.write(rank + "\\n")
os.close(os.open(gate, os.O_RDONLY))
for at in range(0, len(text), {_WRITE_NBYTES}):
    os.write(1, text[at : at + {_WRITE_NBYTES}])
"""


class Work(NamedTuple):
    """What is given to ``start_processes``."""

    entrypoint: str | Callable[..., Any]
    args: dict[int, tuple[Any, ...]]


def work_of(what: str, children: int, door: str, gate: str, lines: int) -> Work:
    """Return the work of a kind, for so many children.

    Args:
        what: ``programs`` are shells, ``printers`` are interpreters that print once the gate is open, ``functions`` are
            ``announce``, and ``torch functions`` the same in a module that imports torch.
        children: Their number.
        door: The named pipe at which each says its rank.
        gate: The named pipe that they open for reading, which waits until somebody opens it for writing.
        lines: How many each printer prints.
    """
    ranks = range(children)
    match what:
        case "programs":
            return Work("/bin/sh", {rank: ("-c", _SHELL, str(rank), door, gate) for rank in ranks})
        case "printers":
            flags = ("-I", "-S", "-c", _PRINTER)
            return Work(sys.executable, {rank: (*flags, str(rank), str(lines), door, gate) for rank in ranks})
        case "functions":
            return Work(announce, {rank: (rank, door, gate) for rank in ranks})
        case "torch functions":
            from bench import trainees_torch

            return Work(trainees_torch.announce, {rank: (rank, door, gate) for rank in ranks})
    raise ValueError(what)


def announce(rank: int, door: str, gate: str) -> None:
    """Say at the door that this process is there, then wait until somebody opens the gate."""
    with open(door, "w") as file:
        file.write(f"{rank}\n")
    os.close(os.open(gate, os.O_RDONLY))


def line_of(rank: int, n: int) -> bytes:
    """Return what a printer prints as its line number ``n``, without the newline."""
    return f"{rank} {n:08d} ".ljust(LINE_NBYTES - 1, ".").encode()
