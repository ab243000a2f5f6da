"""Probes: a few elements of tensors that are declared to be the same on several ranks, taken on each of these.

One rank writes such a tensor, so nobody ever compares the whole. A replica that drifted as a whole differs in whatever
elements are looked at: at each save an eighth of the tensors is probed, so one is found within eight.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch
import xxhash

from aiockpt.errors import SaveTimeoutError
from aiockpt.format.names import dotted
from aiockpt.planning.local import LocalPlan
from aiockpt.planning.sharding import Sharding
from aiockpt.staging.copy_cuda import DeviceSide
from aiockpt.staging.layout import plain
from aiockpt.state.collect import Collected

__all__ = ["PROBED_ELEMENTS", "PROBE_TURNS", "Probe", "Prober", "group_of"]

PROBE_TURNS = 8
"""Saves in which every tensor is probed once."""
PROBED_ELEMENTS = 64
"""Of each tensor, evenly spread; a smaller one is looked at whole."""
_POLL_SECONDS = 0.001


class _Probed(NamedTuple):
    """A tensor that is to be probed."""

    entry: int
    group: str
    name: str


class _Batch(NamedTuple):
    """Tensors of one dtype whose turn it is at the same save."""

    probed: list[_Probed]
    combs: list[tuple[tuple[int], tuple[int]]]
    """Of each: how many elements are taken, and at what distance; arguments of ``as_strided``."""


class _Sample(NamedTuple):
    """Elements of some tensors of one device and dtype, one tensor's behind the other's."""

    probed: list[_Probed]
    counts: list[int]
    """Elements of each."""
    values: torch.Tensor


class Probe:
    """What was taken at one call of ``save``; in memory when ``result`` returns.

    Args:
        step: For messages.
        samples: On the CPU, or on their way there.
        sides: Of the devices that they come from.
    """

    def __init__(self, step: int, samples: Sequence[_Sample], sides: Sequence[DeviceSide]) -> None:
        self._step = step
        self._samples = samples
        self._sides = sides

    def result(self, timeout: float | None = None) -> dict[str, dict[str, str]]:
        """Return, by group of ranks that must agree, the hash of each probed tensor by dotted name.

        To be called on the copy thread, once the snapshot is staged: what was enqueued at the call has then arrived on
        every device that has a part of it. Makes no CUDA call.

        Args:
            timeout: Seconds that a device may take which had nothing else to copy; None is no limit.

        Raises:
            SaveTimeoutError: A device did not get to it.
        """
        for side in self._sides:
            _await(side, self._step, timeout)
        found: dict[str, dict[str, str]] = {}
        for probed, counts, values in self._samples:
            data = ctypes.string_at(values.data_ptr(), values.nbytes)
            itemsize = values.element_size()
            at = 0
            for (_, group, name), count in zip(probed, counts, strict=True):
                stop = at + count * itemsize
                found.setdefault(group, {})[name] = xxhash.xxh3_64_hexdigest(data[at:stop])
                at = stop
        return found


class Prober:
    """Takes the probes of one Checkpointer.

    Args:
        rank: Of this process among those that save together.

    One probe is in use at a time: the next ``take``, and ``close``, end the one before.

    Thread-safety: ``take`` from one thread at a time.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._plan: LocalPlan | None = None
        self._turns: list[list[_Batch]] = []
        self._sides: dict[torch.device, DeviceSide] = {}
        self._on_device: dict[torch.device, list[torch.Tensor]] = {}
        """What the last probe copies from; its memory may go only after that."""
        self._late: list[tuple[DeviceSide, list[torch.Tensor]]] = []
        """Of devices that did not get to their last probe."""

    def prepare(self, plan: LocalPlan, collected: Collected) -> None:
        """Make once what every probe of this plan needs, so that the first save does not pay for it."""
        self._plan_turns(plan, collected)
        probed = {probed.entry for batches in self._turns for batch in batches for probed in batch.probed}
        for device in {collected.tensors[entry].device for entry in probed if collected.tensors[entry].is_cuda}:
            self._free_side(device)

    def take(self, plan: LocalPlan, collected: Collected, number: int, *, step: int) -> Probe:
        """Take the elements of the tensors whose turn it is; to be called before ``save()`` returns, without waiting.

        Args:
            plan: Of ``collected``.
            collected: The live tensors.
            number: How many saves were called before this one; the same on all ranks.
            step: For messages.
        """
        self._plan_turns(plan, collected)
        samples: list[_Sample] = []
        with torch.inference_mode(False), torch.no_grad():
            for batch in self._turns[number % PROBE_TURNS]:
                samples += _sampled(batch, collected.tensors, number // PROBE_TURNS)
            devices = {sample.values.device for sample in samples if sample.values.is_cuda}
            for device in devices:
                mine = [at for at, sample in enumerate(samples) if sample.values.device == device]
                arriving = self._bring(device, [samples[at].values for at in mine])
                for at, values in zip(mine, arriving, strict=True):
                    samples[at] = samples[at]._replace(values=values)
        return Probe(step, samples, [self._sides[device] for device in devices])

    def _plan_turns(self, plan: LocalPlan, collected: Collected) -> None:
        if plan is not self._plan:
            self._turns = self._turns_of(collected)
            self._plan = plan

    def _turns_of(self, collected: Collected) -> list[list[_Batch]]:
        """Return the tensors of each turn: those of a group go round by name, so that its ranks take the same ones."""
        groups: dict[str, list[tuple[str, int]]] = {}
        known: dict[int, str | None] = {}
        for number, (entry, tensor) in enumerate(zip(collected.entries, collected.tensors, strict=True)):
            placing = entry.placing
            if not isinstance(placing, Sharding) or not tensor.numel():
                continue
            if id(placing) not in known:
                known[id(placing)] = group_of(placing, self._rank)
            group = known[id(placing)]
            if group is not None:
                groups.setdefault(group, []).append((dotted(entry.segments), number))
        turns: list[dict[torch.dtype, _Batch]] = [{} for _ in range(PROBE_TURNS)]
        for group, members in groups.items():
            for at, (name, number) in enumerate(sorted(members)):
                tensor = collected.tensors[number]
                batch = turns[at % PROBE_TURNS].setdefault(tensor.dtype, _Batch([], []))
                batch.probed.append(_Probed(number, group, name))
                batch.combs.append(_comb(plain(tensor).numel()))
        return [list(batches.values()) for batches in turns]

    def _bring(self, device: torch.device, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Enqueue, behind the caller's current stream, copies into pinned memory; return the memory."""
        side = self._free_side(device)
        side.reset()
        self._on_device[device] = values
        on_host = side.room_like(values)
        side.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side.stream):
            for kept, there in zip(on_host, values, strict=True):
                kept.copy_(there, non_blocking=True)
            side.tell(1)
        return on_host

    def _free_side(self, device: torch.device) -> DeviceSide:
        """Return what copies from a device, and copies nothing now."""
        side = self._sides.get(device)
        if side is not None and device in self._on_device and not side.finished():
            self._late.append((side, self._on_device[device]))
            side = None
        if side is None:
            side = self._sides[device] = DeviceSide(device)
        return side

    def close(self) -> None:
        """Give the pinned memory back, but for that of devices that may still write there; idempotent."""
        for device, side in self._sides.items():
            if device in self._on_device:
                self._late.append((side, self._on_device[device]))
            else:
                side.close()
        self._sides.clear()
        self._on_device.clear()
        late, self._late = self._late, []
        for side, values in late:
            if side.finished():
                side.close()
            else:
                self._late.append((side, values))

    def forget_in_child(self) -> None:
        """In a forked child: close the inherited descriptors."""
        for side in (*self._sides.values(), *(side for side, _ in self._late)):
            side.forget_in_child()


def group_of(sharding: Sharding, rank: int) -> str | None:
    """Return a text that is the same on the ranks that hold the same as ``rank`` does; None where none else does."""
    coordinate = sharding.coordinate(rank)
    if coordinate is None or sharding.replicas < 2:
        return None
    ranks = xxhash.xxh3_64_hexdigest(msgspec.json.encode(sharding.ranks))
    places = [f"{dim}={coordinate[dim]}" for dim in sorted({cut.mesh_dim for cut in sharding.cuts})]
    return " ".join(["x".join(map(str, sharding.mesh)), ranks, *places])


def _comb(numel: int) -> tuple[tuple[int], tuple[int]]:
    taken = min(numel, PROBED_ELEMENTS)
    distance = numel // taken
    # An even distance would meet the same few columns of most matrices.
    return (taken,), (distance - (distance > 1 and distance % 2 == 0),)


def _sampled(batch: _Batch, live: Sequence[torch.Tensor], turn: int) -> list[_Sample]:
    """Read the elements of a batch; each turn begins at another one."""
    tensors = [live[entry] for entry, _, _ in batch.probed]
    if plain(tensors[0]) is not tensors[0]:
        tensors = [plain(tensor) for tensor in tensors]
    if all([tensor.is_contiguous() for tensor in tensors]):  # noqa: C419  # a list is faster than a generator
        elements = [
            tensor.as_strided(size, stride, tensor.storage_offset() + turn % stride[0])
            for tensor, (size, stride) in zip(tensors, batch.combs, strict=True)
        ]
    else:
        elements = [_gathered(tensor, *comb, turn) for tensor, comb in zip(tensors, batch.combs, strict=True)]
    if all([tensor.is_cpu for tensor in tensors]):  # noqa: C419
        return [_Sample(batch.probed, [size for (size,), _ in batch.combs], torch.cat(elements))]
    by_device: dict[torch.device, list[int]] = {}
    for at, some in enumerate(elements):
        by_device.setdefault(some.device, []).append(at)
    return [
        _Sample(
            [batch.probed[at] for at in members],
            [batch.combs[at][0][0] for at in members],
            torch.cat([elements[at] for at in members]),
        )
        for members in by_device.values()
    ]


def _gathered(tensor: torch.Tensor, size: tuple[int], stride: tuple[int], turn: int) -> torch.Tensor:
    """Return the elements that these are in row-major order, whatever the tensor's strides."""
    first = turn % stride[0]
    left = torch.arange(first, first + size[0] * stride[0], stride[0], device=tensor.device)
    offsets = torch.zeros_like(left)
    span = 1
    for length, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offsets += left % length * step
        left //= length
        span += (length - 1) * step
    return tensor.as_strided((span,), (1,), tensor.storage_offset())[offsets]


def _await(side: DeviceSide, step: int, timeout: float | None) -> None:
    until = None if timeout is None else time.monotonic() + timeout
    pause = threading.Event()
    while not side.finished():
        if until is not None and time.monotonic() > until:
            raise SaveTimeoutError(
                f"step {step} not saved: {side.device} did not send the elements by which replicas are compared",
                why=f"it did not get to it within {timeout} s",
                next="look for a kernel or a collective that hangs; stall_timeout= is the limit",
                step=step,
                timeout=timeout,
                phase="STAGING",
            )
        pause.wait(_POLL_SECONDS)
