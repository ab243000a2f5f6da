"""The machine as a benchmark needs it: what it is, and its page cache."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Any

__all__ = ["drop_page_cache", "facts"]

_PACKAGES = (
    "aiockpt",
    "torch",
    "safetensors",
    "torch_checkpointing",
    "torchsnapshot",
    "anyio",
    "uvloop",
    "msgspec",
    "xxhash",
)


def facts(directory: Path) -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, kernel, file system, versions."""
    device, filesystem = _mount_of(directory)
    return {
        "cpu": _first(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int((_first(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) * 1024,
        "kernel": platform.release(),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "filesystem": filesystem,
        "device": device,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def drop_page_cache() -> str | None:
    """Write out and forget what the kernel has cached of files; return None, or why that could not be done."""
    os.sync()  # dirty pages would stay
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as exc:
        return f"the page cache could not be dropped ({exc.strerror}), reads may come from memory"
    return None


def _version(name: str) -> str | None:
    if name == "aiockpt":
        import aiockpt

        return aiockpt.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first(path: Path, field: str) -> str | None:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _mount_of(directory: Path) -> tuple[str, str]:
    """Return device and type of the mount that a directory lies on."""
    wanted, best = directory.resolve(), ("", "unknown", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind, *_ = line.split()
        if wanted.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, device, kind)
    return best[1], best[2]
