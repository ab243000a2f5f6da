"""A sysfs tree in files, with just what is read of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

NVIDIA = "0x10de"


class Sysfs:
    """Files under a directory, named as the kernel names them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def nodes(self, cpulists: Mapping[int, str], *, online: str | None = None) -> None:
        """NUMA nodes by index, with their CPUs as the kernel lists them."""
        self.write("devices/system/node/online", online or ",".join(map(str, cpulists)))
        for node, cpus in cpulists.items():
            self.write(f"devices/system/node/node{node}/cpulist", cpus)

    def cpus(self, cpus: Iterable[int], *, package: int = 0, siblings: str, last_cache: str) -> None:
        """CPUs of one core, with an instruction cache of a higher level than any to fall for."""
        for cpu in cpus:
            home = f"devices/system/cpu/cpu{cpu}"
            self.write(f"{home}/topology/physical_package_id", str(package))
            self.write(f"{home}/topology/thread_siblings_list", siblings)
            for index, (level, kind, shared) in enumerate(
                [
                    (1, "Data", siblings),
                    (4, "Instruction", siblings),
                    (3, "Unified", last_cache),
                    (2, "Unified", siblings),
                ]
            ):
                self.write(f"{home}/cache/index{index}/level", str(level))
                self.write(f"{home}/cache/index{index}/type", kind)
                self.write(f"{home}/cache/index{index}/shared_cpu_list", shared)
            self.write(f"{home}/cache/uevent", "")

    def pci(self, address: str, *, kind: str, node: int, vendor: str = NVIDIA) -> None:
        """A PCI device; ``kind`` is its class as the kernel writes it."""
        for name, text in (("class", kind), ("vendor", vendor), ("numa_node", str(node))):
            self.write(f"bus/pci/devices/{address}/{name}", text)
