"""The image of one safetensors file: where its header, tensors and block checksums lie.

The arena holds such images, so that writing is ``pwrite(fd, image[a:b], a)``. The data section begins at a multiple
of 4096 bytes (safetensors allows a header to be padded with spaces) and has no holes; tensors stand with the largest
item size first, so that each is aligned to its dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import msgspec

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.dtypes import BITS, nbytes_of

__all__ = [
    "ALIGN",
    "BLOCK_NBYTES",
    "BLOCKS_KEY",
    "MAX_HEADER_NBYTES",
    "Header",
    "ImageLayout",
    "Stored",
    "TensorSpec",
    "block_count",
    "fill_sums",
    "lay_out",
    "parse_header",
    "round_up",
]

ALIGN = 4096
"""Bytes; the largest logical block size of today's disks, and the page size."""
BLOCK_NBYTES = 16 << 20
"""Unit of checksums and of direct I/O. Smaller blocks measured slower to write, larger ones delay the first write."""
MAX_HEADER_NBYTES = 32 << 20
"""safetensors refuses 100 MB; ours start another file long before."""
BLOCKS_KEY = "aiockpt.blocks"

_SUM_DIGITS = 16  # xxh3-64 in hexadecimal
_LENGTH = struct.Struct("<Q")


class TensorSpec(NamedTuple):
    """What a header says of a tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where everything lies in one file."""

    header: bytes
    """First ``data_start`` bytes of the file, checksums as zeros."""
    data_start: int
    nbytes: int
    """Exact size of the file."""
    sums_at: int
    """Offset of the first checksum digit; fixed width."""
    order: tuple[int, ...]
    """Indices of the tensors as they lie in the file."""
    offsets: tuple[int, ...]
    """Byte offset in the file of each tensor, by its index."""


class Stored(NamedTuple):
    """A tensor as it lies in a file: ``[start, stop)`` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read and checked: no overlap, no hole, sizes that fit."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data_start: int
    block_nbytes: int
    """0 where the file carries no checksums of ours."""
    sums: tuple[int, ...]


def round_up(value: int, unit: int = ALIGN) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


def block_count(data_nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """Return how many checksums a data section has."""
    return -(-data_nbytes // block_nbytes)


def lay_out(tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> ImageLayout:
    """Decide where each tensor of one file lies.

    Args:
        tensors: With distinct names; any order, the file's order follows from item size and name.
        metadata: More text for ``__metadata__``, which always has ``format: pt``.
    """
    order = sorted(range(len(tensors)), key=lambda i: (-BITS[tensors[i].dtype], tensors[i].name.encode("utf-8")))
    spans: dict[str, Any] = {}
    starts = [0] * len(tensors)
    position = 0
    for i in order:
        name, dtype, shape = tensors[i]
        stop = position + nbytes_of(dtype, shape)
        spans[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, stop)}
        starts[i] = position
        position = stop
    blocks = block_count(position)
    texts = {"format": "pt", **(metadata or {}), BLOCKS_KEY: f"xxh3-64:{BLOCK_NBYTES}:" + "0" * (_SUM_DIGITS * blocks)}
    head = b'{"__metadata__":' + msgspec.json.encode(texts)
    sums_at = _LENGTH.size + len(head) - len('"}') - _SUM_DIGITS * blocks
    body = msgspec.json.encode(spans)[1:]
    text = head + (b"," if spans else b"") + body
    data_start = round_up(_LENGTH.size + len(text))
    header = _LENGTH.pack(data_start - _LENGTH.size) + text.ljust(data_start - _LENGTH.size)
    offsets = tuple(data_start + start for start in starts)
    return ImageLayout(header, data_start, data_start + position, sums_at, tuple(order), offsets)


def fill_sums(header: bytearray, sums_at: int, sums: Sequence[int]) -> None:
    """Write the block checksums into a header that ``lay_out`` made."""
    digits = "".join(f"{value:016x}" for value in sums).encode()
    header[sums_at : sums_at + len(digits)] = digits


class _HeaderTensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def parse_header(data: bytes, *, file: str, file_nbytes: int) -> Header:
    """Read a header and check all that it claims; nothing is allocated by what it claims.

    Args:
        data: At least the first ``8 + length`` bytes of the file; what follows is ignored.
        file: Path, for the error.
        file_nbytes: Size of the whole file.

    Raises:
        CheckpointCorruptError: Says which claim is false.
    """

    def refuse(why: str, offset: int = 0) -> NoReturn:
        raise CheckpointCorruptError(
            f"the header of {file} is not usable", why=why, next="restore another step", file=file, offset=offset
        )

    if len(data) < _LENGTH.size:
        refuse(f"the file has {len(data)} bytes, less than the 8 of the header's length")
    (length,) = _LENGTH.unpack_from(data)
    data_start = _LENGTH.size + length
    if data_start > min(file_nbytes, len(data)) or length > 100_000_000:
        refuse(f"it claims {length} bytes of header, the file has {file_nbytes}")
    try:
        parts = msgspec.json.decode(data[_LENGTH.size : data_start], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(parts.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        claims = {name: msgspec.json.decode(raw, type=_HeaderTensor) for name, raw in parts.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        refuse(f"it is no safetensors header: {exc}", _LENGTH.size)
    tensors: dict[str, Stored] = {}
    position = 0
    for name, claim in sorted(claims.items(), key=lambda item: item[1].data_offsets):
        start, stop = claim.data_offsets
        if start != position:
            refuse(f"tensor {name!r} begins at {start}, the one before ends at {position}", data_start + position)
        try:
            expected = nbytes_of(claim.dtype, claim.shape)
        except ValueError as exc:
            refuse(f"tensor {name!r}: {exc}")
        if stop - start != expected:
            refuse(f"tensor {name!r} has {stop - start} bytes, its dtype and shape need {expected}", data_start + start)
        tensors[name] = Stored(claim.dtype, tuple(claim.shape), data_start + start, data_start + stop)
        position = stop
    if data_start + position != file_nbytes:
        refuse(f"its tensors end at {data_start + position}, the file at {file_nbytes}", data_start + position)
    block_nbytes, sums = _parse_sums(metadata.get(BLOCKS_KEY, ""), position, refuse)
    return Header(tensors, metadata, data_start, block_nbytes, sums)


def _parse_sums(text: str, data_nbytes: int, refuse: Any) -> tuple[int, tuple[int, ...]]:
    if not text:
        return 0, ()
    kind, _, rest = text.partition(":")
    size, _, digits = rest.partition(":")
    if kind != "xxh3-64" or not (size.isascii() and size.isdigit()) or not 0 < int(size) <= 1 << 40:
        refuse(f"its checksums are of an unknown kind {text[:40]!r}")
    block_nbytes = int(size)
    if len(digits) != _SUM_DIGITS * block_count(data_nbytes, block_nbytes):
        refuse(f"it has {len(digits)} digits of checksums for {data_nbytes} bytes of data")
    try:
        sums = tuple(int(digits[i : i + _SUM_DIGITS], 16) for i in range(0, len(digits), _SUM_DIGITS))
    except ValueError:
        refuse("its checksums are not hexadecimal")
    return block_nbytes, sums
