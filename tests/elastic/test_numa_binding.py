"""Which CPUs each rank is bound to: by node, socket, share of cores, cache, or as the user says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.elastic.numa import AffinityMode, NumaOptions, compute_bindings
from aiockpt.elastic.numa.binding import bindings
from aiockpt.elastic.numa.facts import Facts, Gpu
from aiockpt.errors import ConfigError
from tests.elastic.sysfs import Sysfs

NODE, SOCKET = NumaOptions(AffinityMode.NODE), NumaOptions(AffinityMode.SOCKET)
EXCLUSIVE, CORE_COMPLEX = NumaOptions(AffinityMode.EXCLUSIVE), NumaOptions(AffinityMode.CORE_COMPLEX)
MODES = [NODE, SOCKET, EXCLUSIVE, CORE_COMPLEX]


def host(
    *, nodes: int = 2, cores: int = 4, threads: int = 2, cache: int = 2, sockets: int = 2, gpus: list[int] | None = None
) -> Facts:
    """A host of ``cores`` a node and ``cache`` cores a cache; thread t of core c is CPU ``t * nodes * cores + c``."""
    total = nodes * cores
    every = range(total * threads)
    by_node = {n: frozenset(cpu for cpu in every if cpu % total // cores == n) for n in range(nodes)}
    caches = {cpu: frozenset(c for c in every if c % total // cache == cpu % total // cache) for cpu in every}
    return Facts(
        nodes=by_node,
        packages={cpu: cpu % total // cores * sockets // nodes for cpu in every},
        siblings={cpu: frozenset(range(cpu % total, total * threads, total)) for cpu in every},
        caches=caches,
        gpus=tuple(Gpu(f"0000:{index:02x}:00.0", node) for index, node in enumerate([0, 1] if gpus is None else gpus)),
    )


def everything(facts: Facts) -> frozenset[int]:
    return frozenset().union(*facts.nodes.values())


def refused(call: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    assert all((caught.value.what, caught.value.why, caught.value.next))
    assert caught.value.argument == "numa_options"
    return caught.value


def test_modes_have_torchs_names() -> None:
    """The modes are written as on torch's command line (R-NU-1)."""
    assert [str(mode) for mode in AffinityMode] == ["node", "socket", "exclusive", "core-complex"]
    assert AffinityMode("core-complex") is AffinityMode.CORE_COMPLEX


def test_options_are_frozen() -> None:
    """Options cannot be changed, can be hashed, and do not fall back unless asked (R-NU-1)."""
    options = NumaOptions(AffinityMode.NODE, nodes_by_rank={0: 0})
    assert not options.should_fall_back_if_binding_fails
    assert hash(options) == hash(NumaOptions(AffinityMode.NODE, nodes_by_rank={0: 0}))
    assert NumaOptions(AffinityMode.NODE, True).should_fall_back_if_binding_fails
    with pytest.raises(AttributeError):
        options.affinity_mode = AffinityMode.SOCKET  # type: ignore[misc]  # what is tested


BAD: list[dict[str, Any]] = [
    *({}, {"affinity_mode": "node"}, {"affinity_mode": 1}, {"nodes_by_rank": {0: 0}}),
    {"affinity_mode": AffinityMode.NODE, "cpus_by_rank": {0: {0}}},
    {"nodes_by_rank": {0: 0}, "cpus_by_rank": {0: {0}}},
    *({"affinity_mode": AffinityMode.NODE, "nodes_by_rank": given} for given in ({0: -1}, {"0": 0}, {0: True})),
    *({"cpus_by_rank": given} for given in ({0: "0-3"}, {0: {-1}}, {-1: {0}}, {0: {"0"}})),
]


@pytest.mark.parametrize("arguments", BAD, ids=ascii)
def test_bad_options(arguments: dict[str, Any]) -> None:
    """Options that say nothing, or two things, are refused when they are made (R-NU-1, R-NU-15)."""
    refused(lambda: NumaOptions(**arguments))


def test_node() -> None:
    """A rank gets all allowed CPUs of the node of the GPU of its index (R-NU-2)."""
    facts = host(gpus=[1, 0])
    assert bindings(NODE, 2, facts, everything(facts)) == {0: facts.nodes[1], 1: facts.nodes[0]}
    assert bindings(NODE, 1, facts, {0, 1, 4, 5}) == {0: {4, 5}}


def test_socket() -> None:
    """A rank gets all allowed CPUs of all nodes of its socket (R-NU-3)."""
    facts = host(nodes=4, gpus=[0, 1, 2, 3])
    first, second = facts.nodes[0] | facts.nodes[1], facts.nodes[2] | facts.nodes[3]
    assert bindings(SOCKET, 4, facts, everything(facts)) == {0: first, 1: first, 2: second, 3: second}
    assert bindings(SOCKET, 1, facts, {0, 4, 8}) == {0: {0, 4}}


def test_socket_with_a_node_that_is_not_allowed() -> None:
    """A node of which nothing is allowed is still on its socket (E-108)."""
    facts = host(nodes=4, gpus=[0, 2])
    allowed = facts.nodes[1] | facts.nodes[3]
    assert bindings(SOCKET, 2, facts, allowed) == {0: facts.nodes[1], 1: facts.nodes[3]}


def test_exclusive() -> None:
    """The cores of a node are shared among its GPUs in order, both threads together (R-NU-4)."""
    facts = host(nodes=2, cores=4, gpus=[0, 1, 0, 1])
    assert bindings(EXCLUSIVE, 4, facts, everything(facts)) == {
        0: {0, 1, 8, 9},
        1: {4, 5, 12, 13},
        2: {2, 3, 10, 11},
        3: {6, 7, 14, 15},
    }


def test_exclusive_with_a_remainder() -> None:
    """What does not divide goes to the lowest, a core each; GPUs without a rank keep their share (R-NU-4)."""
    facts = host(nodes=1, cores=8, threads=1, gpus=[0, 0, 0])
    shares = {0: {0, 1, 2}, 1: {3, 4, 5}, 2: {6, 7}}
    assert bindings(EXCLUSIVE, 3, facts, everything(facts)) == shares
    assert bindings(EXCLUSIVE, 1, facts, everything(facts)) == {0: shares[0]}


def test_exclusive_with_half_a_core() -> None:
    """A core of which one thread is allowed is a core, with that thread (R-NU-4)."""
    facts = host(nodes=1, cores=2, gpus=[0, 0])
    assert bindings(EXCLUSIVE, 2, facts, {0, 3}) == {0: {0}, 1: {3}}


def test_exclusive_with_fewer_cores() -> None:
    """Fewer cores than GPUs are an error that counts them (R-NU-4)."""
    facts = host(nodes=1, cores=2, gpus=[0, 0, 0])
    error = refused(lambda: bindings(EXCLUSIVE, 1, facts, everything(facts)))
    assert "2 allowed cores for 3 GPUs" in error.why


def test_core_complex() -> None:
    """Caches with the most allowed CPUs go first, then the lowest, then again from the front (R-NU-5)."""
    facts = host(nodes=1, cores=6, threads=1, cache=2, gpus=[0] * 5)
    assert bindings(CORE_COMPLEX, 5, facts, {0, 2, 3, 4, 5}) == {0: {2, 3}, 1: {4, 5}, 2: {0}, 3: {2, 3}, 4: {4, 5}}


def test_core_complex_counts_by_node() -> None:
    """The first GPU of each node has the node's first cache (R-NU-5)."""
    facts = host(nodes=2, cores=4, threads=1, cache=2, gpus=[1, 0, 1])
    assert bindings(CORE_COMPLEX, 3, facts, everything(facts)) == {0: {4, 5}, 1: {0, 1}, 2: {6, 7}}


@pytest.mark.parametrize("options", MODES, ids=lambda options: str(options.affinity_mode))
@pytest.mark.parametrize("gpus", [[], [0, 1]], ids=["none", "two"])
def test_fewer_gpus_than_ranks(options: NumaOptions, gpus: list[int]) -> None:
    """A rank without a GPU is an error that counts them and says what to do (R-NU-9)."""
    facts = host(gpus=gpus)
    error = refused(lambda: bindings(options, 3, facts, everything(facts)))
    assert error.what == f"rank {len(gpus)} cannot be bound to CPUs"
    assert ("2 NVIDIA GPUs" if gpus else "no NVIDIA GPUs") in error.why
    for way in ("nodes_by_rank", "cpus_by_rank", "fewer ranks", "should_fall_back_if_binding_fails"):
        assert way in error.next


@pytest.mark.parametrize("options", MODES, ids=lambda options: str(options.affinity_mode))
def test_nothing_allowed(options: NumaOptions) -> None:
    """No CPU is an error and never an empty binding (E-108, R-NU-9)."""
    error = refused(lambda: bindings(options, 1, host(), frozenset()))
    assert "none of" in error.why


def test_gpu_at_a_node_without_cpus() -> None:
    """A GPU at a node of memory alone, or one that is offline, is an error that names the nodes (R-NU-13)."""
    error = refused(lambda: bindings(NODE, 1, host(gpus=[7]), {0}))
    assert "NUMA node 7" in error.why
    assert "[0, 1]" in error.why


@pytest.mark.parametrize(("options", "what"), [(SOCKET, "socket"), (EXCLUSIVE, "core"), (CORE_COMPLEX, "caches")])
def test_topology_that_is_not_told(options: NumaOptions, what: str) -> None:
    """A mode that needs what sysfs does not tell is an error; by node still works (R-NU-9)."""
    facts = Facts(nodes={0: frozenset({0, 1})}, packages={}, siblings={}, caches={}, gpus=(Gpu("0000:01:00.0", 0),))
    assert f"the {what} of CPU" in refused(lambda: bindings(options, 1, facts, {0, 1})).why
    assert bindings(NODE, 1, facts, {0, 1}) == {0: {0, 1}}


def test_nodes_by_rank() -> None:
    """Without GPUs a map says the node of each rank, in every mode; sharers are then the ranks (R-NU-15)."""
    facts = host(nodes=2, cores=4, threads=1, gpus=[])
    every, nodes = everything(facts), {0: 1, 1: 0, 2: 1}

    def found(mode: AffinityMode) -> dict[int, frozenset[int]]:
        return bindings(NumaOptions(mode, nodes_by_rank=nodes), 3, facts, every)

    assert found(AffinityMode.NODE) == {0: {4, 5, 6, 7}, 1: {0, 1, 2, 3}, 2: {4, 5, 6, 7}}
    assert found(AffinityMode.SOCKET) == found(AffinityMode.NODE)
    assert found(AffinityMode.EXCLUSIVE) == {0: {4, 5}, 1: {0, 1, 2, 3}, 2: {6, 7}}
    assert found(AffinityMode.CORE_COMPLEX) == {0: {4, 5}, 1: {0, 1}, 2: {6, 7}}


def test_cpus_by_rank() -> None:
    """A map may say the CPUs themselves; of those the allowed ones count, and none is an error (R-NU-15)."""
    options = NumaOptions(cpus_by_rank={0: {0, 1}, 1: [1, 2, 9]})
    facts = host(gpus=[])
    assert bindings(options, 2, facts, {0, 1, 2}) == {0: {0, 1}, 1: {1, 2}}
    error = refused(lambda: bindings(options, 2, facts, {0}))
    assert error.what.startswith("rank 1")
    assert "1-2,9 of cpus_by_rank" in error.why


@pytest.mark.parametrize("fall_back", [False, True])
@pytest.mark.parametrize("ranks", [[0], [0, 1, 2], []], ids=repr)
def test_map_that_does_not_name_the_ranks(ranks: list[int], fall_back: bool) -> None:
    """A map with a rank too few or too many is a slip, and refused with the fall-back too (R-NU-15)."""
    for options in (
        NumaOptions(AffinityMode.NODE, fall_back, nodes_by_rank=dict.fromkeys(ranks, 0)),
        NumaOptions(None, fall_back, cpus_by_rank=dict.fromkeys(ranks, (0,))),
    ):
        error = refused(lambda options=options: compute_bindings(options, 2))  # type: ignore[misc]
        assert "0 to 1" in error.why


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Facts, frozenset[int]]:
    """A host of any shape, and some of its CPUs that are allowed, on each node at least one."""
    nodes = draw(st.integers(1, 4))
    cores = draw(st.integers(1, 8))
    facts = host(
        nodes=nodes,
        cores=cores,
        threads=draw(st.integers(1, 2)),
        cache=draw(st.integers(1, cores)),
        sockets=draw(st.integers(1, nodes)),
        gpus=draw(st.lists(st.integers(0, nodes - 1), min_size=1, max_size=8)),
    )
    allowed = frozenset[int]()
    for cpus in facts.nodes.values():
        allowed |= draw(st.frozensets(st.sampled_from(sorted(cpus)), min_size=1))
    return facts, allowed


@settings(deadline=None)
@given(hosts(), st.sampled_from(MODES))
def test_bindings_are_of_use(drawn: tuple[Facts, frozenset[int]], options: NumaOptions) -> None:
    """Each rank has CPUs, all of them allowed, of its node or with that mode its socket (R-NU-2, R-NU-9)."""
    facts, allowed = drawn
    try:
        found = bindings(options, len(facts.gpus), facts, allowed)
    except ConfigError:
        assert options is EXCLUSIVE
        return
    assert list(found) == list(range(len(facts.gpus)))
    for rank, cpus in found.items():
        own = facts.nodes[facts.gpus[rank].node] & allowed
        assert cpus
        assert cpus <= allowed
        assert {facts.packages[cpu] for cpu in cpus} == {facts.packages[cpu] for cpu in own}
        assert cpus >= own if options is SOCKET else cpus <= own


@settings(deadline=None)
@given(hosts())
def test_shares_are_exclusive(drawn: tuple[Facts, frozenset[int]]) -> None:
    """Shares have no core in common, leave none out, and differ by one core at most, the lowest first (R-NU-4)."""
    facts, allowed = drawn
    try:
        found = bindings(EXCLUSIVE, len(facts.gpus), facts, allowed)
    except ConfigError:
        counts = {n: len({facts.siblings[cpu] for cpu in cpus & allowed}) for n, cpus in facts.nodes.items()}
        assert any(counts[n] < sum(gpu.node == n for gpu in facts.gpus) for n in counts)
        return
    for node, cpus in facts.nodes.items():
        shares = [found[rank] for rank, gpu in enumerate(facts.gpus) if gpu.node == node]
        cores = [{facts.siblings[cpu] for cpu in share} for share in shares]
        if shares:
            assert sum(map(len, shares)) == len(cpus & allowed)
            assert frozenset().union(*shares) == cpus & allowed
            assert sum(map(len, cores)) == len(frozenset().union(*cores))
        sizes = [len(share) for share in cores]
        assert sizes == sorted(sizes, reverse=True)
        assert not sizes or sizes[0] - sizes[-1] <= 1


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """A host with the CPUs of this one, on a node of their own each, and a GPU at the first."""
    tree = Sysfs(tmp_path / "sys")
    allowed = sorted(os.sched_getaffinity(0))
    tree.nodes({0: str(allowed[0]), 1: ",".join(map(str, allowed[1:]))})
    for cpu in allowed:
        tree.cpus([cpu], siblings=str(cpu), last_cache=str(cpu))
    tree.pci("0000:1a:00.0", kind="0x030200", node=0)
    return tree


@pytest.mark.parametrize("options", MODES, ids=lambda options: str(options.affinity_mode))
def test_from_sysfs(sysfs: Sysfs, options: NumaOptions, caplog: pytest.LogCaptureFixture) -> None:
    """Facts are read and the outcome is logged in one line, with what it was decided from (R-NU-6, R-NU-15)."""
    allowed = os.sched_getaffinity(0)
    with caplog.at_level(logging.INFO, "aiockpt.elastic"):
        found = compute_bindings(options, 1, sysfs=sysfs.root)
    assert found == {0: frozenset(allowed if options is SOCKET else {min(allowed)})}
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "0000:1a:00.0" in record.getMessage()


def test_what_was_decided_can_be_applied(sysfs: Sysfs) -> None:
    """The kernel takes a binding in a child, with no other program in reach (E-107, E-109, R-NU-10)."""
    found = compute_bindings(NODE, 1, sysfs=sysfs.root)
    code = "import os, sys; os.sched_setaffinity(0, eval(sys.argv[1])); print(os.sched_getaffinity(0))"
    cpus = set(found[0] or ())
    done = subprocess.run(
        [sys.executable, "-c", code, repr(cpus)], capture_output=True, text=True, check=True, env={"PATH": ""}
    )
    assert done.stdout.strip() == repr(cpus)


def test_no_program_is_needed(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """No numactl is looked for: there is none to find, and the CPUs are told (E-107, R-NU-10)."""
    monkeypatch.setenv("PATH", "")
    assert compute_bindings(NODE, 1, sysfs=sysfs.root)[0]


def test_ranks_that_run_unbound(sysfs: Sysfs, caplog: pytest.LogCaptureFixture) -> None:
    """With the fall-back, ranks whose CPUs cannot be told run unbound, with one warning; others are bound (R-NU-9)."""
    with caplog.at_level(logging.INFO, "aiockpt.elastic"):
        found = compute_bindings(NumaOptions(AffinityMode.NODE, True), 3, sysfs=sysfs.root)
    assert found == {0: {min(os.sched_getaffinity(0))}, 1: None, 2: None}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("ranks 1-2 run unbound: rank 1 cannot be bound to CPUs")
    assert "0000:1a:00.0" in text


def test_host_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the fall-back, all ranks of a host that tells nothing run unbound, with one warning (R-NU-9)."""
    found = compute_bindings(NumaOptions(AffinityMode.NODE, True), 2, sysfs=tmp_path)
    assert found == {0: None, 1: None}
    (record,) = caplog.records
    assert "ranks 0-1 run unbound: the NUMA topology of this host cannot be read" in record.getMessage()
    error = refused(lambda: compute_bindings(NODE, 2, sysfs=tmp_path))
    assert any("NumaOptions" in note for note in error.__notes__)


def test_error_says_its_inputs(sysfs: Sysfs, caplog: pytest.LogCaptureFixture) -> None:
    """Without the fall-back the error carries what it was decided from, and nothing is logged besides (R-NU-9)."""
    error = refused(lambda: compute_bindings(NODE, 2, sysfs=sysfs.root))
    (note,) = error.__notes__
    assert "0000:1a:00.0" in note
    assert "CPUs allowed" in note
    assert caplog.records == []


def test_cpus_by_rank_ask_no_sysfs(tmp_path: Path) -> None:
    """CPUs that are said need no topology (R-NU-15)."""
    cpu = min(os.sched_getaffinity(0))
    assert compute_bindings(NumaOptions(cpus_by_rank={0: [cpu]}), 1, sysfs=tmp_path) == {0: frozenset({cpu})}
