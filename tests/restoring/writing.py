"""A small writer for these tests: a state → a step's directory, in plain memory and without a worker."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from aiockpt.format.image import BLOCK_NBYTES, fill_sums
from aiockpt.format.manifest import FileRecord, Head, Plan, decode_manifest, encode_manifest
from aiockpt.format.names import RUN_RECORD_NAME
from aiockpt.planning.local import LocalPlan, plan_local
from aiockpt.protocol.messages import FileImage
from aiockpt.state.collect import collect
from aiockpt.state.values import encode_metadata, encode_values
from aiockpt.storage.run_record import make_record

_ORDINALS: dict[Path, int] = {}


def write_step(
    run: Path,
    step: int,
    state: Mapping[Any, Any],
    *,
    term: int = 1,
    ordinal: int | None = None,
    metadata: object = None,
) -> Path:
    """Write ``state`` as a committed checkpoint; ordinals grow by themselves."""
    collected = collect(state)
    plan = plan_local(collected.entries, collected.tree, collected.plain_files)
    arena = filled(plan, collected.tensors)
    directory = run / f"step-{step}"
    if ordinal is None:
        ordinal = _ORDINALS[run] = _ORDINALS.get(run, -1) + 1
    head = Head(
        step=step,
        term=term,
        ordinal=ordinal,
        save_id=str(uuid.uuid4()),
        world_size=1,
        nbytes=sum(file.nbytes for file in plan.files),
        created="2024-01-01T00:00:00Z",
        package="0",
    )
    records = [write_file(directory, file, arena) for file in plan.files]
    body = bytes(arena[plan.body_offset : plan.body_offset + plan.body_nbytes])
    manifest = encode_manifest(
        head, records, values=encode_values(collected.values), metadata=encode_metadata(metadata), plan=body
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_bytes(manifest)
    make_run_record(run)
    return directory


def make_run_record(run: Path) -> None:
    if not (run / RUN_RECORD_NAME).exists():
        fd = os.open(run, os.O_RDONLY)
        try:
            make_record(fd)
        finally:
            os.close(fd)


def filled(plan: LocalPlan, tensors: list[torch.Tensor]) -> bytearray:
    """Return the arena's bytes."""
    arena = bytearray(plan.arena_nbytes)
    for offset, text in plan.texts:
        arena[offset : offset + len(text)] = text
    for tensor, offset, nbytes in zip(tensors, plan.offsets, plan.sizes, strict=True):
        if nbytes:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            arena[offset : offset + nbytes] = flat.numpy().tobytes()
    return arena


def write_file(directory: Path, file: FileImage, arena: bytearray) -> FileRecord:
    """Write one file with its sums."""
    image = arena[file.offset : file.offset + file.nbytes]
    if file.data_start:
        header, data = image[: file.data_start], image[file.data_start :]
        blocks = [data[start : start + BLOCK_NBYTES] for start in range(0, len(data), BLOCK_NBYTES)]
        fill_sums(header, file.sums_at, [xxhash.xxh3_64_intdigest(bytes(block)) for block in blocks])
        digest, image = xxhash.xxh3_128_hexdigest(bytes(header)), header + data
    else:
        digest = xxhash.xxh3_128_hexdigest(bytes(image))
    path = directory / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return FileRecord(path=file.path, nbytes=file.nbytes, data_start=file.data_start, sum=digest)


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """Change parts of a manifest and give it right checksums again: hostile, not damaged.

    ``head``, ``plan``: dicts of fields; ``files``: a list of records; ``values``, ``metadata``: JSON values.
    """
    path = directory / "manifest.json"
    manifest = decode_manifest(path.read_bytes(), file=str(path))
    plan = msgspec.to_builtins(manifest.plan) | changes.get("plan", {})
    path.write_bytes(
        encode_manifest(
            msgspec.structs.replace(manifest.head, **changes.get("head", {})),
            changes.get("files", manifest.files),
            values=msgspec.json.encode(changes.get("values", manifest.values)),
            metadata=msgspec.json.encode(changes.get("metadata", manifest.metadata)),
            plan=msgspec.json.encode(plan),
        )
    )


def plan_of(directory: Path) -> Plan:
    """Return the plan in a manifest."""
    path = directory / "manifest.json"
    return decode_manifest(path.read_bytes(), file=str(path)).plan
