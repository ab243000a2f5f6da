"""The bindings of this host's trainers: facts read, decided, and the fall-back followed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from aiockpt.elastic.numa.binding import binding
from aiockpt.elastic.numa.facts import Facts, read_facts
from aiockpt.elastic.numa.options import NumaOptions
from aiockpt.elastic.numa.ranges import format_ranges
from aiockpt.errors import ConfigError

__all__ = ["compute_bindings"]

_log = logging.getLogger("aiockpt.elastic")

_NOTHING = Facts(nodes={}, packages={}, siblings={}, caches={}, gpus=())


def compute_bindings(
    options: NumaOptions, nprocs: int, *, sysfs: Path = Path("/sys")
) -> dict[int, frozenset[int] | None]:
    """Return the CPUs for ``os.sched_setaffinity`` of each local rank; None for one that runs unbound.

    The outcome is logged in one line, with what it was decided from: as a warning where a rank runs unbound.
    It blocks, for as long as reading some files of sysfs takes.

    Args:
        options: What was asked for.
        nprocs: Number of ranks on this host.
        sysfs: Where sysfs is mounted.

    Raises:
        ConfigError: The CPUs of a rank cannot be told, or none of them is allowed, and no fall-back was asked for; or
            an explicit map does not name the ranks. A note says what it was decided from.
    """
    options.check_ranks(nprocs)
    allowed = os.sched_getaffinity(os.getpid())  # the main thread's: ours may be one of a pool with a mask of its own
    facts = _NOTHING
    found: dict[int, frozenset[int] | None] = {}
    failures: dict[int, ConfigError] = {}
    try:
        if options.cpus_by_rank is None:
            facts = read_facts(sysfs)
        for rank in range(nprocs):
            try:
                found[rank] = binding(options, rank, facts, allowed)
            except ConfigError as exc:
                if not options.should_fall_back_if_binding_fails:
                    raise
                found[rank], failures[rank] = None, exc
    except ConfigError as exc:
        if not options.should_fall_back_if_binding_fails:
            exc.add_note(f"decided from: {_inputs(options, nprocs, facts, allowed)}")
            raise
        found, failures = dict.fromkeys(range(nprocs)), {0: exc}
    _log_outcome(found, failures, _inputs(options, nprocs, facts, allowed))
    return found


def _log_outcome(found: dict[int, frozenset[int] | None], failures: dict[int, ConfigError], inputs: str) -> None:
    bound = {rank: format_ranges(cpus) for rank, cpus in found.items() if cpus is not None}
    unbound = format_ranges(rank for rank, cpus in found.items() if cpus is None)
    if unbound:
        first = failures[min(failures)]
        _log.warning(
            "ranks %s run unbound: %s (%s); bound: %s; decided from: %s", unbound, first.what, first.why, bound, inputs
        )
    else:
        _log.info("ranks are bound to CPUs: %s; decided from: %s", bound, inputs)


def _inputs(options: NumaOptions, nprocs: int, facts: Facts, allowed: set[int]) -> str:
    nodes = {node: format_ranges(cpus) for node, cpus in facts.nodes.items()}
    gpus = [(gpu.address, gpu.node) for gpu in facts.gpus]
    return f"{options}, {nprocs} ranks, CPUs allowed {format_ranges(allowed)}, NUMA nodes {nodes}, GPUs {gpus}"
