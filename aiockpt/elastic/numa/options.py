"""How a user asks for trainers to be bound to CPUs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from aiockpt.errors import ConfigError

__all__ = ["AffinityMode", "NumaOptions"]


class AffinityMode(StrEnum):
    """Which CPUs a trainer gets, by the NUMA node of its GPU."""

    NODE = "node"
    """All of that node. If in doubt, take this one."""

    SOCKET = "socket"
    """All of all nodes of the socket that the node is on."""

    EXCLUSIVE = "exclusive"
    """A share of the node's cores that no other trainer has; both threads of a core stay together."""

    CORE_COMPLEX = "core-complex"
    """Those of the node that share one last cache; another one for each trainer while there are enough."""


@dataclass(frozen=True)
class NumaOptions:
    """A binding of each local rank to CPUs.

    Raises:
        ConfigError: There is nothing to bind by, or there are two answers.
    """

    affinity_mode: AffinityMode | None = None
    """How the CPUs of a rank follow from its node; None only where ``cpus_by_rank`` says them."""

    should_fall_back_if_binding_fails: bool = False
    """Whether a rank whose CPUs cannot be told runs unbound, with a warning, where it would be an error."""

    nodes_by_rank: Mapping[int, int] | None = field(default=None, hash=False)
    """The NUMA node of each local rank, for hosts without GPUs; None takes that of the GPU whose index is the rank."""

    cpus_by_rank: Mapping[int, Collection[int]] | None = field(default=None, hash=False)
    """The CPUs of each local rank; the topology of the host is not asked then."""

    def __post_init__(self) -> None:
        if self.cpus_by_rank is not None:
            if self.affinity_mode is not None or self.nodes_by_rank is not None:
                raise _refuse(
                    "cpus_by_rank says the CPUs, and affinity_mode or nodes_by_rank would say others",
                    "give cpus_by_rank alone, or leave it out",
                )
        elif not isinstance(self.affinity_mode, AffinityMode):
            raise _refuse(
                f"{self.affinity_mode!r} is no AffinityMode",
                f"give one of {', '.join(f'AffinityMode.{mode.name}' for mode in AffinityMode)}, or cpus_by_rank",
            )
        for rank, node in (self.nodes_by_rank or {}).items():
            if not _is_index(rank) or not _is_index(node):
                raise _refuse(f"nodes_by_rank has {rank!r}: {node!r}", "give a NUMA node for each local rank, as ints")
        for rank, cpus in (self.cpus_by_rank or {}).items():
            if not _is_index(rank) or isinstance(cpus, str) or not all(_is_index(cpu) for cpu in cpus):
                raise _refuse(f"cpus_by_rank has {rank!r}: {cpus!r}", "give a set of CPUs for each local rank, as ints")

    def check_ranks(self, nprocs: int) -> None:
        """Refuse a map that leaves out a rank of ``range(nprocs)``, or names another.

        That is an error with the fall-back too: it is for hosts that are not as expected, not for slips.

        Raises:
            ConfigError: Names the ranks.
        """
        for name, given in (("nodes_by_rank", self.nodes_by_rank), ("cpus_by_rank", self.cpus_by_rank)):
            if given is not None and set(given) != set(range(nprocs)):
                raise _refuse(
                    f"{name} names the ranks {sorted(given)}, and there are the ranks 0 to {nprocs - 1}",
                    "name each rank of this host once",
                )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(why: str, next: str) -> ConfigError:
    return ConfigError("numa_options was refused", why=why, next=next, argument="numa_options")
