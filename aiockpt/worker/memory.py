"""How much memory this process may still take: of the machine, and below every limit of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Room", "keep_free", "rooms", "tightest"]

_MIN_RESERVE = 32 << 20
_MAX_RESERVE = 1 << 30
_RESERVE_FRACTION = 20
"""A twentieth of the limit stays free, at least 32 MiB and at most 1 GiB: the trainer allocates while it trains, and
what breaks the limit is not refused but killed."""

_NO_LIMIT = 1 << 62
"""cgroup v1 writes "no limit" as the largest multiple of the page size in 63 bits."""


class Room(NamedTuple):
    """One limit and what is left below it, in bytes."""

    source: str
    """For people: ``MemAvailable``, or the file that sets the limit."""
    limit: int
    free: int


def rooms(root: str = "/") -> list[Room]:
    """Return every limit that an allocation of this process counts against.

    Args:
        root: Where ``proc`` and ``sys`` lie; tests give another.
    """
    machine = _machine(root)
    found = [] if machine is None else [machine]
    for directory, files in _memory_groups(root):
        found += _group_rooms(directory, files)
    return found


def keep_free(room: Room) -> int:
    """Return how many bytes below a limit the arena leaves to others."""
    return min(max(room.limit // _RESERVE_FRACTION, _MIN_RESERVE), _MAX_RESERVE)


def tightest(found: list[Room]) -> Room | None:
    """Return the limit that leaves the least, the reserve taken off; None where nothing is known."""
    return min(found, key=lambda room: room.free - keep_free(room), default=None)


class _Files(NamedTuple):
    """How a version of the memory controller names things."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    """Line of ``memory.stat``: file pages that the kernel drops before it kills. Includes groups below."""


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# memory.high kills nobody, but a group above it is throttled until training stands still.
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _machine(root: str) -> Room | None:
    values = _table(os.path.join(root, "proc/meminfo"))
    available = values.get("MemAvailable:")
    if available is None:
        return None
    return Room("MemAvailable", values.get("MemTotal:", available) << 10, available << 10)


def _group_rooms(directory: str, files: _Files) -> Iterator[Room]:
    usage = _number(os.path.join(directory, files.usage))
    if usage is None:  # the root of a hierarchy has none
        return
    reclaimable = _table(os.path.join(directory, "memory.stat")).get(files.reclaimable, 0)
    for name in files.limits:
        path = os.path.join(directory, name)
        limit = _number(path)
        if limit is not None and limit < _NO_LIMIT:
            yield Room(path, limit, limit - max(0, usage - reclaimable))


def _memory_groups(root: str) -> Iterator[tuple[str, _Files]]:
    """Yield the directory of this process's memory group and of every group above it that is mounted here."""
    paths = dict(_own_groups(root))
    for mount, mounted, controllers in _mounts(root):
        for kind, files in (("memory", _V1), ("", _V2)):
            if kind not in controllers or kind not in paths:
                continue
            below = os.path.relpath(paths[kind], mounted)
            # A group outside of what is mounted here (another namespace): the mount's top is all that can be seen.
            parts = [] if below.startswith("..") or below == "." else below.split("/")
            for depth in range(len(parts), -1, -1):
                yield os.path.join(mount, *parts[:depth]), files


def _own_groups(root: str) -> Iterator[tuple[str, str]]:
    """Yield (controller, path of our group in its hierarchy); the controller of version 2 is empty."""
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: str) -> Iterator[tuple[str, str, set[str]]]:
    """Yield (mount point, what of the hierarchy is mounted there, controllers) of each mounted hierarchy."""
    for line in _lines(os.path.join(root, "proc/self/mountinfo")):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = {""} if kind[0] == "cgroup2" else set(kind[2].split(","))
        yield os.path.join(root, _unescape(fields[4]).lstrip("/")), _unescape(fields[3]), controllers


def _unescape(text: str) -> str:
    """Undo mountinfo's escapes: octal digits behind a backslash, for a space for example."""
    return text.encode("latin-1", "replace").decode("unicode_escape")


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _table(path: str) -> dict[str, int]:
    """Read lines of ``name number …``."""
    found: dict[str, int] = {}
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _number(path: str) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None
