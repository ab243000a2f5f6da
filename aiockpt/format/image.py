"""The image of one safetensors file: where its header, tensors and block checksums lie.

The arena holds such images, so that writing is ``pwrite(fd, image[a:b], a)``. The data section begins at a multiple
of 4096 bytes (safetensors allows a header to be padded with spaces) and has no holes; tensors stand with the largest
item size first, so that each is aligned to its dtype.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.dtypes import BITS, nbytes_of

__all__ = [
    "ALIGN",
    "BLOCK_NBYTES",
    "BLOCKS_KEY",
    "MAX_BLOCK_NBYTES",
    "MAX_HEADER_NBYTES",
    "METADATA_KEY",
    "MOST_HEADER_NBYTES",
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
MAX_BLOCK_NBYTES = 256 << 20
"""Of a file that is read: bounds the buffer that a reader makes for a block."""
MAX_HEADER_NBYTES = 32 << 20
"""What a planner keeps the headers of its files below."""
MOST_HEADER_NBYTES = 100_000_000
"""safetensors reads no longer one."""
METADATA_KEY = "__metadata__"
"""No tensor can have this name."""
BLOCKS_KEY = "aiockpt.blocks"

_SUM_DIGITS = 16  # xxh3-64 in hexadecimal
_SUMS = re.compile(r"xxh3-64:([1-9][0-9]{0,11}):([0-9a-f]*)")
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
    """Offset of the first checksum digit; fixed width. 0 where the file carries none."""
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
    """0 where the file carries no checksums of ours; else a multiple of 4096."""
    sums: tuple[int, ...]


def round_up(value: int, unit: int = ALIGN) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


def block_count(data_nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> int:
    """Return how many checksums a data section has."""
    return -(-data_nbytes // block_nbytes)


def lay_out(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, *, with_sums: bool = True
) -> ImageLayout:
    """Decide where each tensor of one file lies.

    Args:
        tensors: With distinct names; any order, the file's order follows from item size and name.
        metadata: More text for ``__metadata__``, which always has ``format: pt``.
        with_sums: Whether it has room for block checksums, as every file of a checkpoint does.

    Raises:
        ValueError: A name stands twice or is ``__metadata__``, a dtype or shape is none, a key of ``metadata`` is
            ours, text is no UTF-8, or no reader would take so long a header.
    """
    sizes = [nbytes_of(dtype, shape) for _, dtype, shape in tensors]
    order = sorted(range(len(tensors)), key=lambda i: (-BITS[tensors[i].dtype], tensors[i].name.encode("utf-8")))
    spans: dict[str, Any] = {}
    starts = [0] * len(tensors)
    position = 0
    for i in order:
        name, dtype, shape = tensors[i]
        stop = position + sizes[i]
        spans[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, stop)}
        starts[i] = position
        position = stop
    if len(spans) < len(tensors) or METADATA_KEY in spans:
        raise ValueError(f"a tensor's name stands twice, or is {METADATA_KEY}")
    if metadata and not metadata.keys().isdisjoint(("format", BLOCKS_KEY)):
        raise ValueError(f"the keys format and {BLOCKS_KEY} of the metadata are not the caller's")
    blocks = block_count(position)
    if blocks * _SUM_DIGITS > MOST_HEADER_NBYTES // 2:
        raise ValueError(f"a file of {position} bytes has more checksums than a header takes")
    # The checksums are the last text, so that their place is known whatever stands in front.
    texts = {"format": "pt", **(metadata or {})}
    if with_sums:
        texts[BLOCKS_KEY] = f"xxh3-64:{BLOCK_NBYTES}:" + "0" * (_SUM_DIGITS * blocks)
    head = b'{"%b":%b' % (METADATA_KEY.encode(), msgspec.json.encode(texts))
    sums_at = _LENGTH.size + len(head) - len('"}') - _SUM_DIGITS * blocks if with_sums else 0
    body = msgspec.json.encode(spans)[1:]
    text = head + (b"," if spans else b"") + body
    data_start = round_up(_LENGTH.size + len(text))
    if data_start > MOST_HEADER_NBYTES:
        raise ValueError(f"a header of {data_start} bytes is longer than readers take")
    header = _LENGTH.pack(data_start - _LENGTH.size) + text.ljust(data_start - _LENGTH.size)
    offsets = tuple(data_start + start for start in starts)
    return ImageLayout(header, data_start, data_start + position, sums_at, tuple(order), offsets)


def fill_sums(header: bytearray, sums_at: int, sums: Sequence[int]) -> None:
    """Write the block checksums into a header that ``lay_out`` made.

    Raises:
        ValueError: There are more or fewer of them than the header has room for; it is unchanged.
    """
    digits = "".join(f"{value:016x}" for value in sums).encode()
    stop = sums_at + len(digits)
    place = bytes(header[sums_at - 1 : stop + 1])
    if place[:1] + place[-1:] != b':"' or (sums and not place[1:-1].isalnum()):
        raise ValueError(f"{len(sums)} checksums do not fill their place in the header")
    header[sums_at:stop] = digits


class _Claim(msgspec.Struct, frozen=True, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_metadata = msgspec.json.Decoder(dict[str, str])
_claim = msgspec.json.Decoder(_Claim)


class _FalseClaimError(Exception):
    def __init__(self, why: str, offset: int = 0) -> None:
        super().__init__(why)
        self.offset = offset


def parse_header(data: bytes, *, file: str, file_nbytes: int) -> Header:
    """Read a header and check all that it claims; nothing is allocated by what it claims.

    Args:
        data: At least the first ``8 + length`` bytes of the file; what follows is ignored.
        file: Path, for the error.
        file_nbytes: Size of the whole file.

    Raises:
        CheckpointCorruptError: Says which claim is false.
    """
    try:
        text = _header_text(data, file_nbytes)
        metadata, claims = _decode(text)
        data_start = _LENGTH.size + len(text)
        tensors = _place(claims, data_start, file_nbytes)
        block_nbytes, sums = _parse_sums(metadata.get(BLOCKS_KEY, ""), file_nbytes - data_start)
    except _FalseClaimError as refused:
        raise CheckpointCorruptError(
            f"the header of {file} is not usable",
            why=str(refused),
            next="restore another step",
            file=file,
            offset=refused.offset,
        ) from refused.__cause__
    return Header(tensors, metadata, data_start, block_nbytes, sums)


def _header_text(data: bytes, file_nbytes: int) -> bytes:
    if len(data) < _LENGTH.size:
        raise _FalseClaimError(f"the file has {len(data)} bytes, less than the {_LENGTH.size} of the header's length")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(len(data), file_nbytes) - _LENGTH.size or length > MOST_HEADER_NBYTES:
        raise _FalseClaimError(f"it claims {length} bytes of header, the file has {file_nbytes}")
    return bytes(data[_LENGTH.size : _LENGTH.size + length])


def _decode(text: bytes) -> tuple[dict[str, str], dict[str, _Claim]]:
    """Return metadata and what is claimed of each tensor."""
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        members = _members.decode(text)
        metadata = _metadata.decode(members.pop(METADATA_KEY, b"{}"))
        claims = {name: _claim.decode(raw) for name, raw in members.items()}
        # A header that is what an encoder makes of its content has no key twice. Any other goes through a slower
        # parser that looks: of two claims each reader would believe another one.
        if msgspec.json.encode({METADATA_KEY: metadata, **claims}) != text.rstrip(b" "):
            json.loads(text, object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as exc:  # msgspec's and Unicode's errors are ValueErrors
        raise _FalseClaimError(f"it is no safetensors header: {exc}", _LENGTH.size) from exc
    return metadata, claims


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands in it twice")


def _place(claims: Mapping[str, _Claim], data_start: int, file_nbytes: int) -> dict[str, Stored]:
    """Return where the tensors lie, in the order of the file; they fill its data section."""
    tensors: dict[str, Stored] = {}
    position = 0
    for name, claim in sorted(claims.items(), key=lambda item: item[1].data_offsets):
        start, stop = claim.data_offsets
        if start != position:
            raise _FalseClaimError(
                f"tensor {name!r:.200} begins at {start}, the one before ends at {position}", data_start + position
            )
        try:
            expected = nbytes_of(claim.dtype, claim.shape)
        except ValueError as exc:
            raise _FalseClaimError(f"tensor {name!r:.200}: {exc}", data_start + start) from exc
        if stop - start != expected:
            raise _FalseClaimError(
                f"tensor {name!r:.200} has {stop - start} bytes, its dtype and shape need {expected}",
                data_start + start,
            )
        tensors[name] = Stored(claim.dtype, claim.shape, data_start + start, data_start + stop)
        position = stop
    if data_start + position != file_nbytes:
        raise _FalseClaimError(
            f"its tensors end at {data_start + position}, the file at {file_nbytes}", data_start + position
        )
    return tensors


def _parse_sums(text: str, data_nbytes: int) -> tuple[int, tuple[int, ...]]:
    if not text:
        return 0, ()
    match = _SUMS.fullmatch(text)
    block_nbytes = int(match[1]) if match else 0
    if match is None or block_nbytes % ALIGN or block_nbytes > MAX_BLOCK_NBYTES:
        raise _FalseClaimError(f"its checksums are of an unknown kind {text[:40]!r}", _LENGTH.size)
    digits = match[2]
    if len(digits) != _SUM_DIGITS * block_count(data_nbytes, block_nbytes):
        raise _FalseClaimError(
            f"it has {len(digits)} digits of checksums for {data_nbytes} bytes of data", _LENGTH.size
        )
    return block_nbytes, tuple(int(digits[i : i + _SUM_DIGITS], 16) for i in range(0, len(digits), _SUM_DIGITS))
