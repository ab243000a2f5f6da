"""How far two tensors of one form are apart, in float64, a part at a time: memory does not grow with the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import torch

from aiockpt.cli.compare import Difference, Pair
from aiockpt.cli.contents import form_of, nbytes_of_entry, place_of
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.format.names import MANIFEST_NAME
from aiockpt.format.ranks import is_cut
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.load import read_entry
from aiockpt.storage.readers import AlignedBuffer, OpenCheckpoint

__all__ = ["Reader", "difference"]

_PART_NBYTES = 1 << 20
"""Of both tensors at a time; in float64 an fp8 takes eight times that, and some copies of it are alive at once."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of float4_e2m1, by the lower three bits."""


class Reader:
    """Reads a checkpoint's tensors front to back; holds one block, and verifies each before its bytes are used.

    Of a tensor that is cut over the files of several ranks it holds the whole.
    """

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._memory = bytearray(_PART_NBYTES)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        """What was read last, from the front."""
        self._buffer = AlignedBuffer(BLOCK_NBYTES)
        self._at: tuple[int, int] | None = None
        self._block = memoryview(b"")
        self._held = -1, self.bytes

    def read(self, entry: int, start: int, stop: int) -> None:
        """Read ``[start, stop)`` of the bytes of a tensor, at most ``_PART_NBYTES``.

        Raises:
            CheckpointCorruptError: The bytes are not those that were written.
            StorageError: They cannot be read.
        """
        if is_cut(self.checkpoint.manifest.plan, entry):
            self.bytes[: stop - start] = self._assembled(entry)[start:stop]
        else:
            file, begin, _ = place_of(self.checkpoint, entry)
            self._read(file, begin + start, begin + stop)

    def _assembled(self, entry: int) -> torch.Tensor:
        number, data = self._held
        if number != entry:
            view = CheckpointView(self.checkpoint.manifest, f"{self.checkpoint.path}/{MANIFEST_NAME}")
            data = read_entry(self.checkpoint, view, entry).reshape(-1).view(torch.uint8)
            self._held = entry, data
        return data

    def _read(self, file: int, start: int, stop: int) -> None:
        reader = self.checkpoint.file(file)
        header = reader.header()
        position = start
        while position < stop:
            index = (position - header.data_start) // header.block_nbytes
            block_start, block_stop = reader.block_range(index)
            if self._at != (file, index):
                if self._buffer.nbytes < block_stop - block_start:
                    self._buffer = AlignedBuffer(block_stop - block_start)
                self._at = None  # the buffer is overwritten, whatever the read comes to
                self._block = reader.read_block(index, self._buffer)
                self._at = file, index
            end = min(stop, block_stop)
            self._memory[position - start : end - start] = self._block[position - block_start : end - block_start]
            position = end


class _Sums:
    """What is gathered over the parts."""

    def __init__(self) -> None:
        self.same_bytes = True
        self.unequal = 0
        self.max_abs = 0.0
        self.squares = 0.0
        """Of the differences."""
        self.squares_a = 0.0
        self.nan_a = 0
        self.nan_b = 0

    def add(self, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
        """Take in a part: the bytes of some elements of each."""
        x = _wide(a, dtype)
        if torch.equal(a, b):
            self.nan_a += (nan := int(x.isnan().sum()))
            self.nan_b += nan
            self.squares_a += _squares(x)
            return
        self.same_bytes = False
        y = _wide(b, dtype)
        distance = (_integer_distance(a, b, dtype) if dtype in (torch.int64, torch.uint64) else x - y).abs()
        largest = float(distance.max())
        if math.isfinite(largest):  # so both are finite everywhere
            self.unequal += int(distance.count_nonzero())
            self.max_abs = max(self.max_abs, largest)
            self.squares += _squares(distance)
            self.squares_a += _squares(x)
        else:
            self._add_odd(x, y, distance)

    def _add_odd(self, x: torch.Tensor, y: torch.Tensor, distance: torch.Tensor) -> None:
        """Take in a part with NaN or infinities."""
        nan_x, nan_y = x.isnan(), y.isnan()
        self.nan_a += int(nan_x.sum())
        self.nan_b += int(nan_y.sum())
        unequal = (x != y) & ~(nan_x & nan_y)
        self.unequal += int(unequal.sum())
        known = distance[unequal & ~nan_x & ~nan_y]
        if known.numel():
            self.max_abs = max(self.max_abs, float(known.nan_to_num(math.inf, math.inf).max()))
        finite = x.isfinite() & y.isfinite()
        self.squares += _squares(distance[finite])
        self.squares_a += _squares(x[finite])


def difference(
    pair: Pair, a: Reader, b: Reader, pool: Executor, advance: Callable[[int], None] | None
) -> Difference | None:
    """Return how far a tensor moved from ``a`` to ``b``; None where it has the same bytes in both.

    Args:
        pair: The tensor.
        a: Of the checkpoint that it is measured from.
        b: Of the other.
        pool: Reads one side while this thread reads the other.
        advance: Called with the bytes that were read, of both.

    Raises:
        CheckpointCorruptError: Bytes are not those that were written.
        StorageError: They cannot be read.
    """
    name, shape = form_of(a.checkpoint.manifest, pair.a)
    dtype: torch.dtype = getattr(torch, name)
    nbytes = nbytes_of_entry(a.checkpoint.manifest, pair.a)
    sums = _Sums()
    for start in range(0, nbytes, _PART_NBYTES):
        count = min(_PART_NBYTES, nbytes - start)
        other = pool.submit(b.read, pair.b, start, start + count)
        a.read(pair.a, start, start + count)
        other.result()
        sums.add(a.bytes[:count], b.bytes[:count], dtype)
        if advance is not None:
            advance(2 * count)
    if sums.same_bytes:
        return None
    elements = math.prod(shape) * (2 if dtype is torch.float4_e2m1fn_x2 else 1)
    return Difference(
        name=pair.name,
        kind=pair.kind,
        dtype=name,
        shape=shape,
        elements=elements,
        unequal=sums.unequal,
        max_abs=sums.max_abs,
        relative=_ratio(math.sqrt(sums.squares), math.sqrt(sums.squares_a)),
        nan_a=sums.nan_a,
        nan_b=sums.nan_b,
        a=_element(a.bytes[:nbytes], dtype) if elements == 1 else None,
        b=_element(b.bytes[:nbytes], dtype) if elements == 1 else None,
    )


def _wide(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as the float64 (or complex128) that their elements are; of large integers the nearest."""
    if dtype is torch.float4_e2m1fn_x2:
        table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.float64)
        return table[torch.cat((data & 15, data >> 4)).long()]
    elements = data.view(torch.uint8 if dtype is torch.bool else dtype)
    return elements.to(torch.complex128 if dtype.is_complex else torch.float64)


def _integer_distance(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a - b of 64-bit integers to the precision of float64; 0 where they are equal, and only there."""
    x, y = a.view(torch.int64), b.view(torch.int64)
    high = (x >> 32) - (y >> 32) if dtype is torch.int64 else (x >> 32 & 0xFFFFFFFF) - (y >> 32 & 0xFFFFFFFF)
    return high.double() * 2.0**32 + ((x & 0xFFFFFFFF) - (y & 0xFFFFFFFF)).double()


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2 if values.numel() else 0.0


def _ratio(part: float, whole: float) -> float:
    if math.isinf(whole) or not whole:
        return math.inf if part else 0.0
    return part / whole


def _element(data: torch.Tensor, dtype: torch.dtype) -> Any:
    value = data.view(dtype).item() if dtype is not torch.float4_e2m1fn_x2 else None
    return str(value) if isinstance(value, complex) else value
