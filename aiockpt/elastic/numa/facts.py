"""What sysfs says about the host: NUMA nodes, cores, caches and GPUs. No CUDA, so no context is made by asking."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiockpt.elastic.numa.ranges import parse_ranges
from aiockpt.errors import ConfigError

__all__ = ["Facts", "Gpu", "read_facts"]

_T = TypeVar("_T")

_ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_NVIDIA = 0x10DE
_DISPLAYS = (0x0300, 0x0302)
"""Class and subclass of VGA and 3D controllers; an NVIDIA card's bridges and sound have others."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    address: str
    """PCI address, as in ``0000:dc:00.0``."""
    node: int
    """NUMA node it is attached to."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Topology of a host. CPUs are logical ones, as the kernel numbers them; what it does not say is not there."""

    nodes: Mapping[int, frozenset[int]]
    """CPUs by NUMA node: the nodes that are online and have any. Nodes of memory alone (HBM, CXL) are left out."""
    packages: Mapping[int, int]
    """Socket by CPU."""
    siblings: Mapping[int, frozenset[int]]
    """CPUs of the same physical core, by CPU, itself among them."""
    caches: Mapping[int, frozenset[int]]
    """CPUs that share its highest data or unified cache, by CPU, itself among them."""
    gpus: tuple[Gpu, ...]
    """NVIDIA GPUs in the order of their PCI addresses. CUDA numbers them so where they are of one kind, or where
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` is set; ``CUDA_VISIBLE_DEVICES`` is not considered."""


def read_facts(sysfs: Path) -> Facts:
    """Read the topology of the host.

    Args:
        sysfs: Where sysfs is mounted.

    Raises:
        ConfigError: The kernel tells no NUMA nodes, or a file there holds what it should not.
    """
    system = sysfs / "devices" / "system"
    online = _read(system / "node" / "online", parse_ranges)
    nodes = {node: _read(system / "node" / f"node{node}" / "cpulist", parse_ranges) for node in sorted(online)}
    nodes = {node: cpus for node, cpus in nodes.items() if cpus}
    packages: dict[int, int] = {}
    siblings: dict[int, frozenset[int]] = {}
    caches: dict[int, frozenset[int]] = {}
    for cpu in sorted(frozenset[int]().union(*nodes.values())):
        home = system / "cpu" / f"cpu{cpu}"
        topology = home / "topology"
        if (topology / "physical_package_id").exists():
            packages[cpu] = _read(topology / "physical_package_id", int)
        # Whoever shares with this one need not be asked again: large hosts have thousands of these files.
        if cpu not in siblings and (topology / "thread_siblings_list").exists():
            _share(siblings, cpu, _read(topology / "thread_siblings_list", parse_ranges))
        if cpu not in caches:
            _share(caches, cpu, _last_cache(home / "cache"))
    return Facts(nodes=nodes, packages=packages, siblings=siblings, caches=caches, gpus=_gpus(sysfs))


def _share(found: dict[int, frozenset[int]], cpu: int, group: frozenset[int]) -> None:
    if cpu in group:
        found.update(dict.fromkeys(group, group))


def _last_cache(directory: Path) -> frozenset[int]:
    """Return the CPUs that share the highest data or unified cache; empty where nothing is said."""
    highest, found = 0, frozenset[int]()
    for cache in _entries(directory):
        if not cache.name.startswith("index") or _read(cache / "type", str.strip) not in ("Data", "Unified"):
            continue
        level = _read(cache / "level", int)
        if level > highest:
            highest, found = level, _read(cache / "shared_cpu_list", parse_ranges)
    return found


def _gpus(sysfs: Path) -> tuple[Gpu, ...]:
    found = []
    for device in _entries(sysfs / "bus" / "pci" / "devices"):
        match = _ADDRESS.fullmatch(device.name)
        if match is None or _read(device / "vendor", _hexadecimal) != _NVIDIA:
            continue
        if _read(device / "class", _hexadecimal) >> 8 not in _DISPLAYS:
            continue
        order = tuple(int(part, 16) for part in match.groups())
        # -1 is how a host with one node says that there is nothing to say.
        found.append((order, Gpu(address=device.name, node=max(0, _read(device / "numa_node", int)))))
    return tuple(gpu for _, gpu in sorted(found, key=lambda item: item[0]))


def _hexadecimal(text: str) -> int:
    return int(text, 16)


def _entries(directory: Path) -> Iterable[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # hosts without PCI, and guests whose caches are not told
        return ()


def _read(path: Path, parse: Callable[[str], _T]) -> _T:
    try:
        return parse(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as exc:
        why = f"{path}: {exc.strerror if isinstance(exc, OSError) else exc}"
        raise ConfigError(
            "the NUMA topology of this host cannot be read",
            why=why,
            next="leave numa_options out, give cpus_by_rank, or set should_fall_back_if_binding_fails",
            argument="numa_options",
            path=str(path),
        ) from exc
