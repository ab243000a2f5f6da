"""How the tensors of a state lie over the ranks of a job, as its objects and its owner say it.

Declared to be the same on several ranks are what a DTensor's mesh replicates, the parameters of a module that is
wrapped by DistributedDataParallel with their optimizer's state, and names that the Checkpointer was told. The rest of
the plain tensors is *undeclared*: every rank stages all of it, and contents are compared.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from aiockpt.errors import ConfigError, UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.planning.entries import Entry
from aiockpt.planning.mismatch import ranks_text
from aiockpt.planning.placings import UNDECLARED, Placing, only_of, replicated
from aiockpt.planning.sharding import Sharding
from aiockpt.planning.widening import widen
from aiockpt.state.checks import is_plain
from aiockpt.state.patterns import compile_patterns, pattern_texts
from aiockpt.state.ranks import Ranks
from aiockpt.state.sharded import read_sharded, refuse_dtensor

__all__ = ["ModulePlacings", "Placer", "placer_for"]

_MOST_RULES = 1_000
"""Remembered shardings; a job has some ten."""
_EXAMPLES = 3
"""Names that an error shows."""


class ModulePlacings(NamedTuple):
    """What DistributedDataParallel keeps equal in a module."""

    by_address: dict[int, Placing]
    """Of parameters and buffers, by where their memory begins."""
    by_parameter: dict[int, Placing]
    """By ``id`` of the parameter, for its optimizer's state."""


_NOTHING = ModulePlacings({}, {})


@functools.lru_cache(maxsize=8)
def placer_for(ranks: Ranks, patterns: tuple[str, ...]) -> Placer:
    """Return the one that knows what was worked out for earlier saves of this job."""
    return Placer(ranks, patterns)


class Placer:
    """Knows one job, whatever the state.

    Args:
        ranks: Those that save together.
        patterns: Names of plain tensors that are declared to be the same on all ranks, as ``Selection`` has patterns.

    Raises:
        ConfigError: A pattern is no text, or is empty.

    Thread-safety: what it remembers is only added to, so any thread may use it.
    """

    def __init__(self, ranks: Ranks, patterns: tuple[str, ...]) -> None:
        self.ranks = ranks
        self._everywhere = replicated(ranks.world)
        self._texts = pattern_texts(patterns, "replicated")
        self._patterns = [compile_patterns([text]) for text in self._texts]
        self._named: dict[Segments, int] = {}
        """Bit ``n`` says that pattern ``n`` names it."""
        self._number = {member: rank for rank, member in enumerate(ranks.members)}
        self._in_group: dict[int, tuple[Sharding, Sharding]] = {}
        """By identity of a sharding by global ranks, which is kept: the same by ranks of the group."""
        self._rank_lists: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._widened: dict[tuple[int, ...], tuple[list[Sharding], list[Sharding]]] = {}
        """By identities of shardings, which are kept: what they are together."""
        self._groups: dict[tuple[int, ...], tuple[Sharding, Sharding]] = {}

    # ---- DTensors

    def local(self, tensor: Any, path: Segments) -> tuple[torch.Tensor, tuple[int, ...], Sharding | None]:
        """Return a DTensor's memory on this rank, the shape of the whole, and its placing.

        One whose mesh is this rank alone is a plain tensor, whose placing it does not say.

        Raises:
            UnsupportedValueError: As ``read_sharded``; or its mesh has a rank that does not save with this one.
        """
        local, shape, sharding, _ = read_sharded(tensor, path)
        if len(sharding.ranks) == 1:
            return local, shape, None
        known = self._in_group.get(id(sharding))
        if known is None:
            outside = [rank for rank in sharding.ranks if rank not in self._number]
            if outside:
                raise self._outside(tensor, path, outside)
            if len(self._in_group) >= _MOST_RULES:
                self._in_group.clear()
            known = self._in_group[id(sharding)] = sharding, sharding._replace(ranks=self._numbers(sharding.ranks))
        return local, shape, known[1]

    def _numbers(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Return the group's ranks of some global ones; shardings of one mesh share the tuple."""
        numbers = tuple(self._number[member] for member in members)
        return self._rank_lists.setdefault(numbers, numbers)

    def _outside(self, tensor: Any, path: Segments, outside: Sequence[int]) -> UnsupportedValueError:
        world = self.ranks.world
        saves = "this process saves alone" if world == 1 else f"the {world} ranks that save together are others"
        return refuse_dtensor(
            tensor,
            path,
            f"its mesh has {ranks_text(outside)}, and {saves}",
            "open the Checkpointer with the process_group that has all ranks of the mesh, on each of them",
        )

    def widen(self, shardings: Iterable[Sharding]) -> dict[int, Sharding]:
        """Return, by identity, the shardings that are slices of the mesh of another one, on that larger mesh."""
        found = list(shardings)
        if len(found) < 2:
            return {}
        key = tuple(map(id, found))
        known = self._widened.get(key)
        if known is None:
            if len(self._widened) >= _MOST_RULES:
                self._widened.clear()
            known = self._widened[key] = found, widen(found)
        return {id(one): wide for one, wide in zip(*known, strict=True) if one is not wide}

    # ---- modules

    def of_module(self, module: nn.Module, path: Segments) -> ModulePlacings:
        """Return what DistributedDataParallel keeps equal in ``module``, at whatever depth the wrapper is.

        Parameters are the same on all ranks of its process group. Buffers that it broadcasts are what its first rank
        has: the others get them at the beginning of the next forward pass, and until then theirs differ (the running
        statistics of a BatchNorm are of each rank's own batches). So they are that rank's alone to save.

        Raises:
            UnsupportedValueError: Its process group has a rank that does not save with this one.
        """
        home = sys.modules.get("torch.nn.parallel.distributed")
        if home is None:
            return _NOTHING
        found = ModulePlacings({}, {})
        for wrapper in module.modules():
            if isinstance(wrapper, home.DistributedDataParallel):
                self._add_replicas(found, wrapper, path)
        return found

    def _add_replicas(self, found: ModulePlacings, wrapper: Any, path: Segments) -> None:
        members = torch.distributed.get_process_group_ranks(wrapper.process_group)
        if len(members) == 1:
            return
        outside = [rank for rank in members if rank not in self._number]
        if outside:
            raise UnsupportedValueError(
                f"{dotted(path)!r} cannot be saved: rank {outside[0]} of its DistributedDataParallel saves elsewhere",
                why=f"its process group has {len(members)} ranks, the Checkpointer's {self.ranks.world}",
                next="open the Checkpointer with a process_group that has all of these ranks, on each of them",
                key=dotted(path),
                type_name="DistributedDataParallel",
            )
        ranks = self._numbers(tuple(members))
        placing, first = self._on_all(ranks)
        ignored = wrapper.parameters_to_ignore
        for parameter in _tensors(wrapper.module, "parameters", ignored):
            found.by_parameter[id(parameter)] = placing
            if is_plain(parameter):
                found.by_address[parameter.data_ptr()] = placing
        if wrapper.broadcast_buffers:
            for buffer in _tensors(wrapper.module, "buffers", ignored):
                if is_plain(buffer):
                    found.by_address[buffer.data_ptr()] = first

    def _on_all(self, ranks: tuple[int, ...]) -> tuple[Sharding, Sharding]:
        """Return the placings of what all of these ranks hold alike, and of what the first of them has to say."""
        known = self._groups.get(ranks)
        if known is None:
            everywhere = self._everywhere if ranks == self._everywhere.ranks else Sharding((len(ranks),), ranks, ())
            known = self._groups[ranks] = everywhere, only_of(ranks[0])
        return known

    # ---- names

    def declare(self, entries: list[Entry], others: Iterable[Segments] | None = None) -> None:
        """Give the plain tensors that a pattern names their placing, in place.

        Args:
            entries: Of a state, or of a part of one.
            others: All further names of the state; a pattern that fits one of them alone is not misspelt. None: this is
                a part, and nothing is refused.

        Raises:
            ConfigError: A pattern fits no name at all.
        """
        if not self._patterns:
            return
        if len(self._named) > 2 * len(entries) + _MOST_RULES:
            self._named.clear()
        met = 0
        for number, entry in enumerate(entries):
            fits = self._fits(entry.segments)
            met |= fits
            if fits and entry.placing is UNDECLARED and self.ranks.world > 1:
                entries[number] = Entry(*entry[:4], self._everywhere)
        if others is not None and met != (1 << len(self._patterns)) - 1:
            self._refuse_idle(met, entries, others)

    def _refuse_idle(self, met: int, entries: Sequence[Entry], others: Iterable[Segments]) -> None:
        for segments in others:
            met |= self._fits(segments)
        idle = [text for bit, text in enumerate(self._texts) if not met >> bit & 1]
        if idle:
            examples = [repr(dotted(entry.segments)) for entry in entries[:_EXAMPLES]]
            raise ConfigError(
                f"replicated was refused: nothing is named {', '.join(map(repr, idle))}",
                why="the state has no such name",
                next=f"names are dotted, as in {', '.join(examples)}" if examples else "the state has no tensors",
                argument="replicated",
            )

    def _fits(self, segments: Segments) -> int:
        fits = self._named.get(segments)
        if fits is None:
            name = dotted(segments)
            fits = sum(1 << bit for bit, pattern in enumerate(self._patterns) if pattern.match(name))
            self._named[segments] = fits
        return fits


def _tensors(
    module: nn.Module, kind: Literal["parameters", "buffers"], ignored: Collection[str]
) -> Iterator[torch.Tensor]:
    """Yield the parameters or buffers of a module but for those whose names are ignored."""
    if ignored:
        named = module.named_parameters if kind == "parameters" else module.named_buffers
        yield from (tensor for name, tensor in named(remove_duplicate=False) if name not in ignored)
        return
    for inner in module.modules():  # a fifth of the time
        yield from (tensor for tensor in inner.__dict__[f"_{kind}"].values() if tensor is not None)
