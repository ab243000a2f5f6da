"""How often the kernel killed for want of memory here: counted by the cgroup, since an exit status does not say."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["OomCounter"]


class OomCounter:
    """Reads the count of out-of-memory kills among the processes that are accounted where this one is.

    A child killed by SIGKILL while the count rose was killed for memory. The count comes from the nearest cgroup, from
    our own up to where our view ends, that has the memory controller. Those above it would count the neighbours' kills
    too. Where no cgroup counts (the root of cgroup v2, none mounted), it is that of the whole host. Files are read at
    each call: do it in a thread, or before and after.

    Args:
        root: Directory below which ``proc`` and ``sys`` are looked for.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._source = self._find()

    def kills(self) -> int:
        """Return the kills so far; 0 where the kernel does not tell."""
        return (self._source and _field(self._source, "oom_kill")) or 0

    def _find(self) -> Path | None:
        """Return the nearest file that counts."""
        for file_name, directory, top in self._hierarchies():
            while True:
                file = directory / file_name
                if _field(file, "oom_kill") is not None:
                    return file
                if directory == top:
                    break
                directory = directory.parent
        host = self._root / "proc/vmstat"
        return host if _field(host, "oom_kill") is not None else None

    def _hierarchies(self) -> list[tuple[str, Path, Path]]:
        """Return name of the file, our cgroup, and the mount point, of v1's memory hierarchy and of v2's."""
        ours = {}
        for line in _lines(self._root / "proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            if not controllers:
                ours["cgroup2"] = path
            elif "memory" in controllers.split(","):
                ours["cgroup"] = path
        found = []
        for line in _lines(self._root / "proc/self/mountinfo"):
            mount, _, about = line.partition(" - ")
            kind, _, options = about.split(" ", 2)
            _, _, _, top, point, *_ = mount.split(" ")
            if kind not in ours or (kind == "cgroup" and "memory" not in options.split(" ")[-1].split(",")):
                continue
            at = self._root / _unescaped(point).lstrip("/")
            within = PurePosixPath(ours[kind])
            # A container may see its cgroup's path on the host, and only a part of the tree mounted.
            if within.is_relative_to(_unescaped(top)):
                within = within.relative_to(_unescaped(top))
            if ".." in within.parts:  # moved out of what this namespace shows
                within = PurePosixPath()
            name = "memory.events" if kind == "cgroup2" else "memory.oom_control"
            found.append((name, at / str(within).lstrip("/"), at))
        return sorted(found)[::-1]  # v1's memory first: where it is mounted, v2 has no memory controller


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _field(path: Path, name: str) -> int | None:
    """Return a number from lines of ``name number``."""
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return None


def _unescaped(text: str) -> str:
    """Undo what the kernel does to blanks in a path of mountinfo."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
