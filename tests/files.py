"""What tests do to directories and files: small disks, flipped bits, names by their beginning."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Make a directory that is a file system of this size (``4m``), until the block ends."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount(2) is not permitted here (CAP_SYS_ADMIN)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def make_read_only(disk: Path) -> None:
    """Mount a small disk anew, so that nobody writes to it, root neither."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit of a file over."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def names(directory: Path, *prefixes: str) -> list[str]:
    """Return what in a directory begins so."""
    return sorted(name for name in os.listdir(directory) if name.startswith(prefixes))
