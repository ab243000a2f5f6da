"""What is read of sysfs, from a tree of files and from that of this host."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.elastic.numa.facts import Gpu, read_facts
from aiockpt.elastic.numa.ranges import format_ranges, parse_ranges
from aiockpt.errors import ConfigError
from tests.elastic.sysfs import Sysfs


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0-2,4,6-7\n", {0, 1, 2, 4, 6, 7}),
        ("0\n", {0}),
        ("\n", set()),
        ("", set()),
        (" 1 , 3-4 ", {1, 3, 4}),
        ("5-5", {5}),
        ("3,1-3", {1, 2, 3}),
    ],
)
def test_ranges(text: str, numbers: set[int]) -> None:
    """A list of the kernel is read with its newline (R-NU-7)."""
    assert parse_ranges(text) == numbers


@pytest.mark.parametrize("text", ["a", "1-", "-1", "-", "3-1", "1-2-3", "0x1", "1.5", "1 2", "0-99999999999", "\u0661"])
def test_no_ranges(text: str) -> None:
    """What is no list is an error, and one without end fills no memory (R-NU-7)."""
    with pytest.raises(ValueError, match="range"):
        parse_ranges(text)


@settings(deadline=None)
@given(st.sets(st.integers(0, 1023)))
def test_ranges_both_ways(numbers: set[int]) -> None:
    """What is printed reads back, and is the shortest: no two parts touch (R-NU-7)."""
    text = format_ranges(numbers)
    assert parse_ranges(text) == numbers
    parts = [part.split("-") for part in text.split(",") if part]
    assert all(int(left[-1]) + 1 < int(right[0]) for left, right in pairwise(parts))


def test_topology(sysfs: Sysfs) -> None:
    """Nodes, sockets, cores and last caches are those of sysfs; instruction caches do not count (R-NU-6)."""
    sysfs.nodes({0: "0-1,4-5", 1: "2-3,6-7"})
    for core in range(4):
        sysfs.cpus(
            (core, core + 4),
            package=core // 2,
            siblings=f"{core},{core + 4}",
            last_cache="0-1,4-5" if core < 2 else "2-3,6-7",
        )
    facts = read_facts(sysfs.root)
    assert facts.nodes == {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
    assert facts.packages == {cpu: cpu % 4 // 2 for cpu in range(8)}
    assert facts.siblings == {cpu: {cpu % 4, cpu % 4 + 4} for cpu in range(8)}
    assert facts.caches == {cpu: facts.nodes[cpu % 4 // 2] for cpu in range(8)}
    assert facts.gpus == ()


def test_nodes_that_count(sysfs: Sysfs) -> None:
    """Nodes of memory alone, and nodes that are possible and not online, are left out (E-108, R-NU-13)."""
    sysfs.nodes({0: "0-1", 1: "", 2: "2-3", 3: "4-5"}, online="0-2")
    sysfs.write("devices/system/node/possible", "0-7")
    assert read_facts(sysfs.root).nodes == {0: {0, 1}, 2: {2, 3}}


def test_cpus_without_topology(sysfs: Sysfs) -> None:
    """What a guest is not told is left out, and is no error by itself (R-NU-6)."""
    sysfs.nodes({0: "0-1"})
    facts = read_facts(sysfs.root)
    assert facts.nodes == {0: {0, 1}}
    assert not any((facts.packages, facts.siblings, facts.caches))


def test_gpus(sysfs: Sysfs) -> None:
    """NVIDIA's VGA and 3D controllers are GPUs, in the order of their addresses as numbers (R-NU-6)."""
    sysfs.nodes({0: "0", 1: "1"})
    sysfs.pci("10000:01:00.0", kind="0x030200", node=1)
    sysfs.pci("0000:dc:00.0", kind="0x030200", node=1)
    sysfs.pci("0000:1a:00.0", kind="0x030000", node=0)
    sysfs.pci("0000:1a:00.1", kind="0x040300", node=0)  # its sound
    sysfs.pci("0000:05:00.0", kind="0x068000", node=0)  # a switch between GPUs
    sysfs.pci("0000:03:00.0", kind="0x030000", node=0, vendor="0x1a03")  # the console of the board
    sysfs.pci("0000:9b:00.0", kind="0x030200", node=1)
    assert read_facts(sysfs.root).gpus == (
        Gpu("0000:1a:00.0", 0),
        Gpu("0000:9b:00.0", 1),
        Gpu("0000:dc:00.0", 1),
        Gpu("10000:01:00.0", 1),
    )


def test_gpu_without_node(sysfs: Sysfs) -> None:
    """A GPU whose node is -1 is at node 0 (R-NU-6)."""
    sysfs.nodes({0: "0"})
    sysfs.pci("0000:00:05.0", kind="0x030200", node=-1)
    assert read_facts(sysfs.root).gpus == (Gpu("0000:00:05.0", 0),)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("devices/system/node/online", "all"),
        ("devices/system/node/node0/cpulist", "3-1"),
        ("devices/system/cpu/cpu0/topology/thread_siblings_list", "\u0661"),
        ("devices/system/cpu/cpu0/topology/physical_package_id", ""),
        ("devices/system/cpu/cpu0/cache/index2/level", "high"),
        ("bus/pci/devices/0000:00:05.0/numa_node", "none"),
    ],
)
def test_broken_file(sysfs: Sysfs, path: str, text: str) -> None:
    """A file that holds what it should not is an error with its path (R-NU-9)."""
    sysfs.nodes({0: "0"})
    sysfs.cpus([0], siblings="0", last_cache="0")
    sysfs.pci("0000:00:05.0", kind="0x030200", node=0)
    sysfs.write(path, text)
    with pytest.raises(ConfigError) as caught:
        read_facts(sysfs.root)
    assert caught.value.path == str(sysfs.root / path)
    assert str(sysfs.root / path) in caught.value.why
    assert "numa_options" in caught.value.next


def test_kernel_without_nodes(tmp_path: Path) -> None:
    """A host that tells no nodes is an error that says what else there is (R-NU-9)."""
    with pytest.raises(ConfigError, match="No such file") as caught:
        read_facts(tmp_path)
    assert "cpus_by_rank" in caught.value.next


@pytest.mark.skipif(not os.path.exists("/sys/devices/system/node/online"), reason="this kernel tells no NUMA nodes")
def test_this_host() -> None:
    """On a real host nodes share no CPU, and each CPU is in its own core and cache (R-NU-6)."""
    facts = read_facts(Path("/sys"))
    cpus = [cpu for node in facts.nodes.values() for cpu in node]
    assert len(cpus) == len(set(cpus))
    assert os.sched_getaffinity(0) <= set(cpus)
    for groups in (facts.siblings, facts.caches):
        assert all(cpu in group for cpu, group in groups.items())
