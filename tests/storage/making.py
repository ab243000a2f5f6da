"""Runs and checkpoints made by the storage room itself, without a worker."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import xxhash

from aiockpt.format.image import BLOCK_NBYTES, TensorSpec, fill_sums, lay_out, round_up
from aiockpt.format.manifest import FileRecord, Head, Plan, encode_manifest
from aiockpt.format.names import attempt_name
from aiockpt.storage.commit import make_attempt, publish, remove_tree, write_manifest
from aiockpt.storage.direct import FileWriter
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.storage.file_reader import AlignedBuffer
from aiockpt.storage.run_directory import Committed

TENSORS = "model/model-00001-of-00001.safetensors"
PLAIN = "model/config.json"
PLAIN_CONTENT = b'{"kind": "small"}'


def content(seed: int, nbytes: int) -> bytes:
    """Return bytes that differ from place to place and from seed to seed."""
    block = b"".join((seed * 7919 + i).to_bytes(8, "little") for i in range(1024))
    return (block * (nbytes // len(block) + 1))[:nbytes]


def save_id(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def make_image(data: bytes) -> tuple[AlignedBuffer, int, int]:
    """Return a file's padded image with its sums, its size, and where its data begins."""
    image = lay_out([TensorSpec("w", "U8", (len(data),))])
    buffer = AlignedBuffer(image.nbytes)
    buffer.view[image.data_start : image.nbytes] = data
    sums = [xxhash.xxh3_64_intdigest(data[i : i + BLOCK_NBYTES]) for i in range(0, len(data), BLOCK_NBYTES)]
    header = bytearray(image.header)
    fill_sums(header, image.sums_at, sums)
    buffer.view[: image.data_start] = bytes(header)
    return buffer, image.nbytes, image.data_start


def make_attempt_files(
    run_fd: int,
    name: str,
    *,
    step: int,
    number: int,
    term: int,
    ordinal: int,
    nbytes: int = 5000,
    own_id: str = "",
    faults: Faults = NO_FAULTS,
) -> None:
    """Write a whole attempt, manifest included; its content, and without ``own_id`` its save id, is by ``number``."""
    data = content(number, nbytes)
    buffer, file_nbytes, data_start = make_image(data)
    fd = make_attempt(run_fd, name, ["model"], faults=faults)
    try:
        writer = FileWriter.create(fd, TENSORS, file_nbytes, faults=faults)
        try:
            for start in (*range(data_start, file_nbytes, BLOCK_NBYTES), 0):  # the header last
                stop = min(start + BLOCK_NBYTES, file_nbytes) if start else data_start
                writer.write(buffer.view[start : round_up(stop)], start)
            writer.finish()
        finally:
            writer.abort()
        plain = FileWriter.create(fd, PLAIN, len(PLAIN_CONTENT), faults=faults)
        padded = AlignedBuffer(len(PLAIN_CONTENT))
        padded.view[: len(PLAIN_CONTENT)] = PLAIN_CONTENT
        try:
            plain.write(padded.view, 0)
            plain.finish()
        finally:
            plain.abort()
        write_manifest(
            fd,
            encode_manifest(
                Head(
                    step=step,
                    term=term,
                    ordinal=ordinal,
                    save_id=own_id or save_id(number),
                    world_size=1,
                    nbytes=file_nbytes,
                    created="2026-01-01T00:00:00+00:00",
                    package="0",
                ),
                [
                    FileRecord(
                        path=TENSORS,
                        nbytes=file_nbytes,
                        data_start=data_start,
                        sum=xxhash.xxh3_128_hexdigest(bytes(buffer.view[:data_start])),
                    ),
                    FileRecord(
                        path=PLAIN,
                        nbytes=len(PLAIN_CONTENT),
                        data_start=0,
                        sum=xxhash.xxh3_128_hexdigest(PLAIN_CONTENT),
                    ),
                ],
                values=b"[]",
                metadata=b"{}",
                plan=msgspec.json.encode(
                    Plan(
                        classes=[("U8", [nbytes], "")],
                        names=["w"],
                        entry_classes=[0],
                        entry_files=[0],
                        tree={"model": {"w": 0}},
                    )
                ),
            ),
            ["model"],
            faults=faults,
        )
    finally:
        os.close(fd)


def commit(
    run: Path,
    step: int,
    *,
    number: int = 0,
    term: int = 1,
    ordinal: int = 0,
    nbytes: int = 5000,
    overwrite: bool = False,
    attempt: int = 0,
    faults: Faults = NO_FAULTS,
) -> Committed:
    """Do what a worker does: attempt, files, manifest, publication, removal of what was replaced."""
    run_fd = opened(run)
    try:
        name = attempt_name(step, save_id(number), attempt)
        make_attempt_files(
            run_fd,
            name,
            step=step,
            number=number,
            term=term,
            ordinal=ordinal or number,
            nbytes=nbytes,
            faults=faults,
        )
        committed, old = publish(
            run_fd,
            name,
            run=str(run),
            step=step,
            save_id=save_id(number),
            term=term,
            overwrite=overwrite,
            faults=faults,
        )
        for gone in old:
            remove_tree(run_fd, gone, faults=faults)
        return committed
    finally:
        os.close(run_fd)


def content_of(path: Path) -> bytes:
    """Return the tensor bytes of a checkpoint."""
    data = (path / TENSORS).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def write_head(run: Path, step: int, *, term: int = 1, ordinal: int = 0, name: str = "", number: int = 0) -> None:
    """Make a directory with nothing but a manifest, for scans."""
    directory = run / (name or f"step-{step}")
    directory.mkdir()
    head = Head(
        step=step,
        term=term,
        ordinal=ordinal,
        save_id=save_id(number),
        world_size=1,
        nbytes=1 << 30,
        created="2026-01-01T00:00:00+00:00",
        package="0",
    )
    plan = Plan(classes=[], names=[], entry_classes=[], entry_files=[], tree={})
    data = encode_manifest(head, [], values=b"[]", metadata=b"{}", plan=msgspec.json.encode(plan))
    (directory / "manifest.json").write_bytes(data)
