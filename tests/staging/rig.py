"""A Stager with an arena of its own, and a gate that holds its copy thread."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from aiockpt.format.names import dotted
from aiockpt.planning.local import LocalPlan, PlanCache
from aiockpt.staging.arena import ArenaView
from aiockpt.staging.snapshot import Staging
from aiockpt.staging.stager import Stager, Thresholds
from aiockpt.state.collect import Collected, collect

PATIENCE_SECONDS = 30.0
SMALL = Thresholds(lazy_nbytes=1024, lazy_total_nbytes=0, piece_nbytes=4096, canary_nbytes=1024, block_nbytes=8192)
"""So that tensors of 1 KiB are lazy, and a few KiB are many pieces."""


def make_arena(nbytes: int) -> ArenaView:
    """Make shared memory as a worker does, and map it."""
    fd = os.memfd_create("aiockpt-test")
    os.ftruncate(fd, nbytes)
    return ArenaView(fd, nbytes)


class Rig:
    """Stages snapshots of one state and compares what arrived."""

    def __init__(
        self,
        *,
        snapshot: Any = "guarded",
        stall_timeout: float | None = PATIENCE_SECONDS,
        thresholds: Any = SMALL,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stager = Stager(snapshot=snapshot, stall_timeout=stall_timeout, thresholds=thresholds)
        self.plans = PlanCache(rank=rank, world=world)
        self.plan: LocalPlan | None = None
        self.arena: ArenaView | None = None
        self.steps = 0
        self.progress: list[tuple[int, int]] = []
        self.answers: list[BaseException | None] = []

    def stage(self, state: Mapping[str, Any], **options: Any) -> Staging:
        """Stage a snapshot as the coordinator would."""
        return self.stage_collected(collect(state), **options)

    def stage_collected(self, collected: Collected, **options: Any) -> Staging:
        plan = self.plans.plan(collected.entries, collected.tree, collected.plain_files)
        same = plan is self.plan
        if not same:
            if self.arena is not None:
                self.arena.close()
            self.plan, self.arena = plan, make_arena(plan.arena_nbytes)
        assert self.arena is not None
        self.progress.clear()
        self.answers.clear()
        self.steps += 1
        options = {
            "write_texts": not same,
            "step": self.steps,
            "on_begin": lambda: None,
            "on_progress": lambda file, upto: self.progress.append((file, upto)),
            "on_done": self.answers.append,
        } | options
        return self.stager.stage(plan, collected, self.arena, **options)

    def save(self, state: Mapping[str, Any]) -> Staging:
        """Stage and wait; fails unless it is staged."""
        staging = self.stage(state)
        assert staging.wait(PATIENCE_SECONDS), staging.error
        return staging

    def staged(self, state: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the arena's bytes by dotted name; ``state`` has the structure that was staged."""
        assert self.plan is not None
        assert self.arena is not None
        names = [dotted(entry.segments) for entry in collect(state).entries]
        return {
            name: raw(self.arena.bytes_at(self.plan.offsets[i], self.plan.sizes[i])) for i, name in enumerate(names)
        }

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Hold the copy thread before whatever is staged next, until the event is set or the block ends."""
        gate = threading.Event()

        def wait() -> None:
            gate.wait(PATIENCE_SECONDS)

        self.stager._thread.post(wait)
        try:
            yield gate
        finally:
            gate.set()

    def close(self) -> None:
        """Close both."""
        self.stager.close()
        if self.arena is not None:
            self.arena.close()


def live(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the bytes of all tensors of a state, as they are now, by dotted name."""
    collected = collect(state)
    return {
        dotted(entry.segments): raw(tensor) for entry, tensor in zip(collected.entries, collected.tensors, strict=True)
    }


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes, from whatever device."""
    whole = tensor.detach().cpu().contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.nbytes)  # .numpy() needs numpy, which may be missing
