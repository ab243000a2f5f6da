"""A job of several ranks without processes: every rank plans alone, stages its parts, and writes its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from aiockpt.format.dtypes import BITS
from aiockpt.format.manifest import FileRecord, Head, Manifest, decode_manifest, encode_manifest, encode_own
from aiockpt.format.names import INDEX_NAME
from aiockpt.format.tree import Node
from aiockpt.planning.global_plan import GlobalPlan, merge
from aiockpt.planning.local import Entry, LocalPlan, plan_local
from aiockpt.planning.placings import PER_RANK
from aiockpt.planning.sharding import Sharding
from tests.planning.files import arena_of, files_of, tree_of

__all__ = ["Job", "State", "body_of", "merged", "whole_array"]


@dataclass
class State:
    """What one rank wants to save."""

    entries: Sequence[Entry]
    tree: Node = None
    values: Sequence[Any] = ()
    plain_files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tree is None:
            self.tree = tree_of(self.entries)


def whole_array(entry: Entry, rank: int = 0) -> np.ndarray:
    """Return the content of a tensor as bytes with a last dimension of an element's; per rank another one."""
    own = rank + 1 if entry.placing == PER_RANK else 0
    seed = xxhash.xxh3_64_intdigest(f"{entry.segments} {own}".encode())
    shape = (*entry.shape, BITS[entry.dtype] // 8)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def body_of(plan: LocalPlan) -> bytes:
    """Return what a rank says of its plan."""
    return dict(plan.texts)[plan.body_offset]


def merged(plans: Sequence[LocalPlan], **options: Any) -> GlobalPlan:
    """Return the plan of all ranks, the bodies by digest as a hub has them."""
    ranks_of: dict[str, list[int]] = {}
    for rank, plan in enumerate(plans):
        ranks_of.setdefault(plan.digest, []).append(rank)
    bodies = {plan.digest: body_of(plan) for plan in plans}
    return merge(bodies, ranks_of, world=len(plans), **options)


class Job:
    """One save of a job; ``state_of`` gives the state of each rank."""

    def __init__(self, world: int, state_of: Callable[[int], State], **limits: int) -> None:
        self.world = world
        self.states = [state_of(rank) for rank in range(world)]
        self.plans = [
            plan_local(state.entries, state.tree, state.plain_files, rank=rank, world=world, **limits)
            for rank, state in enumerate(self.states)
        ]
        options = {"limits": (limits["max_file_entries"], 32 << 20)} if limits else {}
        self.plan = merged(self.plans, **options)
        self.files: dict[str, bytes] = {}
        self.records: list[FileRecord] = []
        for rank in range(world):
            self._write(rank)
        for folder in self.plan.folders:
            self.files[f"{folder}/{INDEX_NAME}"] = self.plan.index_json(folder, self.records)

    def staged(self, rank: int) -> list[bytes]:
        """Return the bytes of each part of a rank, taken out of its local tensors."""
        found = []
        for part in self.plans[rank].parts:
            local = self._local(self.states[rank].entries[part.entry], rank)
            box = tuple(slice(at, at + n) for at, n in zip(part.local_offsets, part.shape, strict=True))
            block = local[box] if math.prod(part.shape) else local[:0]
            assert not math.prod(part.shape) or block.shape[:-1] == part.shape
            found.append(block.tobytes())
        return found

    def _local(self, entry: Entry, rank: int) -> np.ndarray:
        whole = whole_array(entry, rank)
        if not isinstance(entry.placing, Sharding):
            return whole
        coordinate = entry.placing.coordinate(rank)
        assert coordinate is not None
        local = np.zeros((*entry.placing.local_shape(entry.shape, coordinate), whole.shape[-1]), dtype=np.uint8)
        for chunk in entry.placing.chunks(entry.shape, coordinate):
            here = tuple(slice(at, at + n) for at, n in zip(chunk.local_offsets, chunk.shape, strict=True))
            there = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.shape, strict=True))
            local[here] = whole[there]
        return local

    def _write(self, rank: int) -> None:
        plan = self.plans[rank]
        files = files_of(plan, arena_of(plan, self.staged(rank)))
        for number, image in enumerate(plan.files):
            folder = image.path.partition("/")[0]
            if number in plan.extra_files and not self.plan.writes_extra(rank, folder):
                continue
            content = files[image.path]
            self.files[image.path] = content
            self.records.append(
                FileRecord(
                    path=image.path,
                    nbytes=image.nbytes,
                    data_start=image.data_start,
                    sum=xxhash.xxh3_128_hexdigest(content[: image.data_start] or content),
                    rank=rank,
                )
            )

    def manifest_bytes(self) -> bytes:
        """Return the manifest as rank 0's worker writes it."""
        lists = [self._values(rank) for rank in range(self.world)]
        head = Head(
            step=1, term=1, ordinal=1, save_id="ab", world_size=self.world, nbytes=0, created="now", package="test"
        )
        return encode_manifest(
            head,
            self.records,
            values=self.plan.merge_values(
                {plan.digest: common for plan, (common, _) in zip(self.plans, lists, strict=True)}
            ),
            metadata=b"null",
            plan=self.plan.encode(self.records),
            own=encode_own([plan.own for plan in self.plans], [own for _, own in lists]),
        )

    def _values(self, rank: int) -> tuple[bytes, bytes]:
        plan, values = self.plans[rank], self.states[rank].values
        common = [values[number] for number in plan.common_values]
        return msgspec.json.encode(common), msgspec.json.encode([values[number] for number in plan.own_values])

    def manifest(self) -> Manifest:
        """Return the manifest as a reader finds it."""
        return decode_manifest(self.manifest_bytes(), file="m")

    def write(self, directory: Path) -> None:
        """Write all files."""
        for path, content in {**self.files, "manifest.json": self.manifest_bytes()}.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(content)
