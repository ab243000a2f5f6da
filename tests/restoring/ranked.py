"""A small writer of checkpoints of several ranks, in plain memory and without workers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist

from aiockpt.format.image import MAX_HEADER_NBYTES
from aiockpt.format.manifest import FileRecord, Head, encode_manifest, encode_own
from aiockpt.format.names import INDEX_NAME, dotted
from aiockpt.format.tree import PER_RANK as PER_RANK_TAG
from aiockpt.planning.global_plan import merge
from aiockpt.planning.local import MAX_FILE_ENTRIES, LocalPlan, plan_local
from aiockpt.planning.placings import PER_RANK, Placing, replicated
from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.protocol.messages import FileImage
from aiockpt.state.collect import Collected, collect
from aiockpt.state.ranks import Ranks
from aiockpt.state.values import encode_metadata, encode_values
from tests.restoring.writing import filled, make_run_record, write_file

__all__ = ["Staged", "as_rank", "by_dim", "commit", "cut_by", "save_together", "stage", "write_ranks"]

PlacingOf = Callable[[str, tuple[int, ...]], Placing]
"""Dotted name and whole shape → placing."""


def by_dim(dim: int, world: int) -> PlacingOf:
    """Cut every tensor that has the dimension over all ranks; others are the same on all."""

    def placing(name: str, shape: tuple[int, ...]) -> Placing:
        cuts = (Cut(0, dim),) if len(shape) > dim else ()
        return Sharding((world,), tuple(range(world)), cuts)

    return placing


def cut_by(mesh: tuple[int, ...], *cuts: Cut) -> PlacingOf:
    """Cut every tensor that has all of the dimensions; others are the same on all."""

    def placing(name: str, shape: tuple[int, ...]) -> Placing:
        ranks = tuple(range(torch.Size(mesh).numel()))
        if all(cut.dim < len(shape) for cut in cuts):
            return Sharding(mesh, ranks, cuts)
        return replicated(len(ranks))

    return placing


class Staged(NamedTuple):
    """What one rank brings to a save."""

    plan: LocalPlan
    records: list[FileRecord]
    common: bytes
    own: bytes


def write_ranks(
    run: Path,
    states: Sequence[Mapping[Any, Any]],
    placing_of: PlacingOf,
    *,
    step: int = 1,
    own: Sequence[str] = (),
    file_entries: int = MAX_FILE_ENTRIES,
) -> Path:
    """Write a committed checkpoint of ``len(states)`` ranks, whose states hold whole tensors.

    Args:
        run: Its directory.
        states: By rank.
        placing_of: How tensors are cut; of numpy arrays and values nothing is asked.
        step: Its number.
        own: Top-level keys that are each rank's own.
        file_entries: Most tensors of a file.
    """
    world = len(states)
    directory = run / f"step-{step}"
    staged = []
    for rank, state in enumerate(states):
        collected = as_rank(state, placing_of, rank, own)
        staged.append(stage(directory, collected, rank, world, file_entries))
    commit(run, directory, staged, file_entries)
    return directory


def as_rank(state: Mapping[Any, Any], placing_of: PlacingOf, rank: int, own: Sequence[str] = ()) -> Collected:
    """Collect a state of whole tensors as one of several ranks would that hold their parts."""
    collected = collect(state)
    for number, entry in enumerate(collected.entries):
        mine = entry.segments[0] in own
        placing = PER_RANK if mine else placing_of(dotted(entry.segments), entry.shape)
        collected.entries[number] = entry._replace(placing=placing)
        if isinstance(placing, Sharding):
            collected.tensors[number] = local_part(collected.tensors[number], placing, rank)
    for key in own:
        node = collected.tree.get(key)
        if node is not None and not (isinstance(node, list) and node[0] == PER_RANK_TAG):  # as an RNG is by itself
            collected.tree[key] = [PER_RANK_TAG, node]
    return collected


def local_part(tensor: torch.Tensor, sharding: Sharding, rank: int) -> torch.Tensor:
    """Return what a rank of a job holds of a whole tensor; of what another rank alone has to say, all."""
    coordinate = sharding.coordinate(rank)
    if coordinate is None:
        return tensor
    shape = tuple(tensor.shape)
    local = torch.zeros(sharding.local_shape(shape, coordinate), dtype=tensor.dtype)
    for chunk in sharding.chunks(shape, coordinate):
        local[_box(chunk.local_offsets, chunk.shape)] = tensor[_box(chunk.offsets, chunk.shape)]
    return local


def stage(directory: Path, collected: Collected, rank: int, world: int, file_entries: int = MAX_FILE_ENTRIES) -> Staged:
    """Write the files of one rank; ``collected.tensors`` are its local tensors."""
    plan = plan_local(
        collected.entries, collected.tree, collected.plain_files, rank=rank, world=world, max_file_entries=file_entries
    )
    blocks = [
        collected.tensors[part.entry][_box(part.local_offsets, part.shape)] if size else torch.empty(0)
        for part, size in zip(plan.parts, plan.sizes, strict=True)
    ]
    arena = filled(plan, blocks)
    records = [_written(directory, file, arena, rank) for file in plan.files]
    common = [collected.values[number] for number in plan.common_values]
    own = [collected.values[number] for number in plan.own_values]
    return Staged(plan, records, encode_values(common), encode_values(own))


def commit(run: Path, directory: Path, staged: Sequence[Staged], file_entries: int = MAX_FILE_ENTRIES) -> None:
    """Write the manifest, as rank 0 does when all files are durable."""
    plans = [one.plan for one in staged]
    ranks_of: dict[str, list[int]] = {}
    for rank, plan in enumerate(plans):
        ranks_of.setdefault(plan.digest, []).append(rank)
    bodies = {plan.digest: dict(plan.texts)[plan.body_offset] for plan in plans}
    merged = merge(bodies, ranks_of, world=len(plans), limits=(file_entries, MAX_HEADER_NBYTES))
    records = []
    for rank, one in enumerate(staged):
        for number, record in enumerate(one.records):
            folder = record.path.rpartition("/")[0]
            if number in one.plan.extra_files and not merged.writes_extra(rank, folder):
                (directory / record.path).unlink()
            else:
                records.append(record)
    for folder in merged.folders:
        (directory / folder / INDEX_NAME).write_bytes(merged.index_json(folder, records))
    step = int(directory.name.removeprefix("step-"))
    head = Head(
        step=step,
        term=1,
        ordinal=step,
        save_id=str(uuid.uuid4()),
        world_size=len(plans),
        nbytes=sum(record.nbytes for record in records if record.data_start),
        created="2024-01-01T00:00:00Z",
        package="0",
    )
    manifest = encode_manifest(
        head,
        records,
        values=merged.merge_values({one.plan.digest: one.common for one in reversed(staged)}),
        metadata=encode_metadata(None),
        plan=merged.encode(records),
        own=encode_own([plan.own for plan in plans], [one.own for one in staged]),
    )
    (directory / "manifest.json").write_bytes(manifest)
    make_run_record(run)


def save_together(run: Path, state: Mapping[Any, Any], *, step: int = 1, **options: Any) -> LocalPlan:
    """Write a checkpoint on real ranks, which all call this; ``options`` are those of ``collect``.

    Returns:
        This rank's plan.
    """
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), tuple(range(dist.get_world_size())))
    directory = run / f"step-{step}"
    mine = stage(directory, collect(state, ranks=ranks, **options), ranks.rank, ranks.world)
    staged: list[Any] = [None] * ranks.world
    dist.all_gather_object(staged, mine)
    if ranks.rank == 0:
        commit(run, directory, staged)
    dist.barrier()
    return mine.plan


def _written(directory: Path, file: FileImage, arena: bytearray, rank: int) -> FileRecord:
    return msgspec.structs.replace(write_file(directory, file, arena), rank=rank)


def _box(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, shape, strict=True))
