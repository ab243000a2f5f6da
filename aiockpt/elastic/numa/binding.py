"""Which CPUs each local rank is bound to: decided from facts, without touching the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar, assert_never

from aiockpt.elastic.numa.facts import Facts
from aiockpt.elastic.numa.options import AffinityMode, NumaOptions
from aiockpt.elastic.numa.ranges import format_ranges
from aiockpt.errors import ConfigError

__all__ = ["binding", "bindings"]

_T = TypeVar("_T")

_UNBOUND = "or set should_fall_back_if_binding_fails to run unbound"


def bindings(options: NumaOptions, nprocs: int, facts: Facts, allowed: Collection[int]) -> dict[int, frozenset[int]]:
    """Return the CPUs of each local rank, never none.

    Args:
        options: What was asked for; its fall-back is the caller's to follow.
        nprocs: Number of ranks on this host.
        facts: Topology of the host; with ``cpus_by_rank`` nothing of it is used.
        allowed: CPUs that this process may use.

    Raises:
        ConfigError: The CPUs of a rank cannot be told, or none of them is allowed.
    """
    options.check_ranks(nprocs)
    return {rank: binding(options, rank, facts, allowed) for rank in range(nprocs)}


def binding(options: NumaOptions, rank: int, facts: Facts, allowed: Collection[int]) -> frozenset[int]:
    """Return the CPUs of one local rank, never none; arguments and errors as in ``bindings``."""
    may_use = frozenset(allowed)
    if options.cpus_by_rank is not None:
        cpus = frozenset(options.cpus_by_rank[rank])
        return _not_empty(cpus & may_use, f"the CPUs {format_ranges(cpus)} of cpus_by_rank", rank, may_use)
    homes = _homes(options, rank, facts)
    node = homes[rank]
    if node not in facts.nodes:
        raise _refuse(
            rank, f"NUMA node {node} is not online or has no CPUs, unlike {sorted(facts.nodes)}", "give nodes_by_rank"
        )
    cpus = facts.nodes[node] & may_use
    # Those that share the node with it, in order of their indices: its GPUs, or the ranks of an explicit map.
    sharers = [index for index, home in sorted(homes.items()) if home == node]
    place = sharers.index(rank)
    match options.affinity_mode:
        case AffinityMode.NODE:
            return _not_empty(cpus, f"NUMA node {node}", rank, may_use)
        case AffinityMode.SOCKET:
            return _not_empty(_socket(node, rank, facts) & may_use, f"the socket of NUMA node {node}", rank, may_use)
        case AffinityMode.EXCLUSIVE:
            return _share(_not_empty(cpus, f"NUMA node {node}", rank, may_use), node, rank, place, len(sharers), facts)
        case AffinityMode.CORE_COMPLEX:
            return _complex(_not_empty(cpus, f"NUMA node {node}", rank, may_use), rank, place, facts)
        case None:
            raise AssertionError("NumaOptions has a mode or cpus_by_rank")
        case _ as unreachable:
            assert_never(unreachable)


def _homes(options: NumaOptions, rank: int, facts: Facts) -> Mapping[int, int]:
    """Return the node of each GPU by its index, or of each rank of an explicit map."""
    if options.nodes_by_rank is not None:
        return options.nodes_by_rank
    if rank >= len(facts.gpus):
        count = len(facts.gpus)
        raise _refuse(
            rank,
            f"a rank goes by the GPU of its index, and this host has {count or 'no'} NVIDIA GPU{'s' * (count != 1)}",
            "say where ranks belong with nodes_by_rank or cpus_by_rank, start fewer ranks",
        )
    return {index: gpu.node for index, gpu in enumerate(facts.gpus)}


def _socket(node: int, rank: int, facts: Facts) -> frozenset[int]:
    """Return the CPUs of all nodes that share a socket with this one."""
    # By all CPUs of a node and not by those allowed: a node that we may not use at all is on a socket too.
    sockets = {_known(facts.packages, cpu, rank, "socket") for cpu in facts.nodes[node]}
    found = frozenset[int]()
    for cpus in facts.nodes.values():
        if any(facts.packages.get(cpu) in sockets for cpu in cpus):
            found |= cpus
    return found


def _share(cpus: frozenset[int], node: int, rank: int, place: int, count: int, facts: Facts) -> frozenset[int]:
    """Return one of ``count`` shares of the cores; what does not divide goes to the first, one each."""
    cores = _grouped(cpus, lambda cpu: min(_known(facts.siblings, cpu, rank, "core")))
    whole, rest = divmod(len(cores), count)
    if whole < 1:
        raise _refuse(
            rank,
            f"NUMA node {node} has {len(cores)} allowed cores for {count} GPUs or ranks",
            "choose AffinityMode.NODE, allow more CPUs",
        )
    start = place * whole + min(place, rest)
    chosen = sorted(cores)[start : start + whole + (place < rest)]
    return frozenset[int]().union(*(cores[core] for core in chosen))


def _complex(cpus: frozenset[int], rank: int, place: int, facts: Facts) -> frozenset[int]:
    """Return one group of CPUs under one cache: the largest groups first, then again from the front."""
    groups = _grouped(cpus, lambda cpu: min(_known(facts.caches, cpu, rank, "caches")))
    order = sorted(groups, key=lambda first: (-len(groups[first]), first))
    return groups[order[place % len(order)]]


def _grouped(cpus: frozenset[int], key: Callable[[int], int]) -> dict[int, frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for cpu in cpus:
        groups.setdefault(key(cpu), set()).add(cpu)
    return {first: frozenset(group) for first, group in groups.items()}


def _known(facts: Mapping[int, _T], cpu: int, rank: int, what: str) -> _T:
    if cpu not in facts:
        raise _refuse(rank, f"sysfs does not tell the {what} of CPU {cpu}", "choose AffinityMode.NODE")
    return facts[cpu]


def _not_empty(cpus: frozenset[int], what: str, rank: int, allowed: frozenset[int]) -> frozenset[int]:
    if not cpus:
        raise _refuse(
            rank,
            f"none of {what} is among the CPUs that this process may use, {format_ranges(allowed)}",
            "allow it those CPUs (taskset, cpuset)",
        )
    return cpus


def _refuse(rank: int, why: str, next: str) -> ConfigError:
    return ConfigError(
        f"rank {rank} cannot be bound to CPUs", why=why, next=f"{next}, {_UNBOUND}", argument="numa_options"
    )
