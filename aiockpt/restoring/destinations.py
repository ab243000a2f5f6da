"""Where the bytes of a tensor go: live or fresh memory, on whatever device and with whatever strides."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Protocol

import torch

from aiockpt.restoring.boxes import Transfer
from aiockpt.state.checks import PLAIN_TYPES
from aiockpt.state.pinned import pin, unpin

__all__ = ["Bounce", "Destination", "destination_for", "unfit_memory"]


_SMALL_NBYTES = 64 << 10
"""Shorter copies keep the GIL: letting it go for microseconds makes the reading threads wait for each other."""
_copy_small = ctypes.PyDLL(None).memmove
_copy_small.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_copy_small.restype = ctypes.c_void_p
_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what many runs are copied as."""


class Bounce:
    """One reading thread's view of the aligned buffer that a block was read into.

    Args:
        address: Of the buffer; it stays alive longer than this object.
        nbytes: Of the buffer.
        device: One of the CUDA devices that it feeds, None where there is none: it is pinned until this is closed.
    """

    def __init__(self, address: int, nbytes: int, *, device: torch.device | None) -> None:
        self.address = address
        # Where CUDA refuses, copies are slower, and as right.
        self._pinned_by = device if device is not None and pin(address, nbytes, device) is None else None
        self.bytes = torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy_to_cuda(self, target: torch.Tensor, part: Transfer) -> None:
        """Enqueue the copy of a transfer into ``target``, which is all bytes, on a stream of this thread's own."""
        stream = self._streams.get(target.device)
        if stream is None:
            stream = self._streams[target.device] = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            if part.counts:
                _copy_runs(target, self.bytes, part)
            else:
                target = target[part.target : part.target + part.nbytes]
                target.copy_(self.bytes[part.source : part.source + part.nbytes], non_blocking=True)

    def wait(self) -> None:
        """Return when no copy reads the buffer any more."""
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Give the pages free; the buffer itself belongs to the caller."""
        self.wait()
        if self._pinned_by is not None:
            unpin(self.address, self._pinned_by)
            self._pinned_by = None


class Destination(Protocol):
    """Takes a tensor's bytes, in row-major order, in pieces that may come from several threads."""

    def write(self, part: Transfer, bounce: Bounce) -> None:
        """Take bytes of the tensor from ``bounce``; no byte is taken twice."""
        ...


def unfit_memory(tensor: torch.Tensor) -> str | None:
    """Return why a live tensor cannot be overwritten, or None where it can."""
    if type(tensor) not in PLAIN_TYPES:
        return f"the live tensor is of an unknown subclass, {type(tensor).__qualname__}"
    if tensor.layout is not torch.strided:
        return f"the live tensor has layout {tensor.layout}"
    if tensor.is_meta:
        return "the live tensor is on the meta device and has no memory"
    if tensor.is_quantized or tensor.is_nested or torch._is_zerotensor(tensor):
        return "the live tensor has no plain memory"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return f"the live tensor is expanded (strides {list(tensor.stride())}), its elements share memory"
    return None


def destination_for(tensor: torch.Tensor) -> Destination:
    """Return the fastest way into ``tensor``, which ``unfit_memory`` has nothing against."""
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        if tensor.device.type == "cpu":
            return _Memory(tensor)
        if tensor.device.type == "cuda":
            return _Cuda(tensor)
    return _Gathered(tensor)


class _Memory:
    """Contiguous memory of this process."""

    __slots__ = ("_address", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor  # keeps the memory
        self._address = tensor.data_ptr()

    def write(self, part: Transfer, bounce: Bounce) -> None:
        if part.counts:
            with _writing(self._tensor):
                _copy_runs(_as_bytes(self._tensor), bounce.bytes, part)
        else:
            _copy(self._address + part.target, bounce.address + part.source, part.nbytes)


class _Cuda:
    """Contiguous memory of a CUDA device."""

    __slots__ = ("_bytes",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = _as_bytes(tensor)

    def write(self, part: Transfer, bounce: Bounce) -> None:
        with _writing(self._bytes):
            bounce.copy_to_cuda(self._bytes, part)


class _Gathered:
    """Any other tensor: its bytes are gathered in plain memory and copied by torch when the last one is there."""

    __slots__ = ("_lock", "_missing", "_staged", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._missing = tensor.numel() * tensor.element_size()
        self._staged: torch.Tensor | None = None
        self._lock = threading.Lock()

    def write(self, part: Transfer, bounce: Bounce) -> None:
        with self._lock:
            if self._staged is None:  # not before: thousands of these need not be in memory at once
                self._staged = torch.empty(self._tensor.shape, dtype=self._tensor.dtype, device="cpu")
            staged = self._staged
        if part.counts:
            with _writing(staged):
                _copy_runs(_as_bytes(staged), bounce.bytes, part)
        else:
            _copy(staged.data_ptr() + part.target, bounce.address + part.source, part.nbytes)
        with self._lock:
            self._missing -= part.total
            if self._missing:
                return
            self._staged = None
        self._finish(staged)

    def _finish(self, staged: torch.Tensor) -> None:
        live = self._tensor
        if live.element_size() == 1 and live.dtype is not torch.bool:
            live, staged = live.view(torch.uint8), staged.view(torch.uint8)  # fp8 and fp4 have few kernels
        with _writing(live):
            live.copy_(staged)


def _copy(to: int, start: int, nbytes: int) -> None:
    (_copy_small if nbytes < _SMALL_NBYTES else ctypes.memmove)(to, start, nbytes)


def _copy_runs(target: torch.Tensor, source: torch.Tensor, part: Transfer) -> None:
    """Copy many runs at once, in elements as wide as all distances allow; both tensors are bytes."""
    numbers = (part.source, part.target, part.nbytes, *part.source_strides, *part.target_strides)
    width = math.gcd(*numbers, 8, target.data_ptr(), source.data_ptr(), target.storage_offset())
    shape = (*part.counts, part.nbytes // width)
    views = []
    for flat, start, strides in (
        (target, part.target, part.target_strides),
        (source, part.source, part.source_strides),
    ):
        usable = flat[: flat.numel() // width * width].view(_WIDE[width])
        steps = (*(stride // width for stride in strides), 1)
        views.append(usable.as_strided(shape, steps, usable.storage_offset() + start // width))
    views[0].copy_(views[1], non_blocking=True)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    with _writing(tensor):
        flat = tensor.detach().view(-1)
        return flat if flat.dtype is torch.uint8 else flat.view(torch.uint8)


def _writing(tensor: torch.Tensor) -> torch.inference_mode | torch.no_grad:
    """Inference tensors may be written in inference mode alone; all others are written without a gradient."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()
