"""The trainer's own mapping of the arena: shared memory that the worker made.

The mapping is made by ctypes: Python's ``mmap`` keeps a hidden duplicate of the descriptor (a forked child then keeps
all pages alive), and its ``madvise`` holds the GIL for the whole call (measured: 748 ms over 1 GiB).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from aiockpt.errors import StorageError, UsageError
from aiockpt.state.pinned import pin, unpin

__all__ = ["ArenaView"]

_log = logging.getLogger("aiockpt.staging")

_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_MADV_DONTFORK, _MADV_POPULATE_WRITE = 10, 23
_PAGE_NBYTES = 4096
_POPULATE_NBYTES = 64 << 20
"""Bytes populated by one call: about 20 ms, so that ``stop`` is asked often enough."""

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class ArenaView:
    """Shared memory, mapped for writing; tensors made from it alias it.

    Tensors of ``bytes_at`` and ``typed`` must not be used after ``close``. A copy in flight keeps the mapping by
    ``held``; the last holder unmaps it.

    Args:
        fd: Descriptor of the memory, at least ``nbytes`` long. Owned from here on, closed also when this raises.
        nbytes: A multiple of 4096.

    Raises:
        StorageError: The kernel refused the mapping (ENOMEM: RLIMIT_AS, or too many mappings).
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._cuda_device: torch.device | None = None
        self._cuda_refused = False
        self._lock = threading.Lock()
        self._holders = 0
        self._closed = False
        address = _mmap(None, nbytes, _PROT_READ | _PROT_WRITE, _MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            os.close(fd)
            raise _refused("the arena was not mapped", code, nbytes, 0)
        self.address: int = address
        # A forked child that wrote here, or kept the pages alive, would be a bug that no test of ours could see.
        if _madvise(address, nbytes, _MADV_DONTFORK) != 0:
            code = ctypes.get_errno()
            _munmap(address, nbytes)
            os.close(fd)
            raise _refused("the arena was not kept from forked children", code, nbytes, 0)
        with torch.inference_mode(False):  # an inference tensor could not be written to later on
            self._bytes = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
        self._whole: dict[torch.dtype, torch.Tensor] = {}

    def populate(self, stop: Callable[[], bool] | None = None) -> bool:
        """Make every page present and writable, so that copying into it takes no page fault; bytes stay as they are.

        Args:
            stop: Asked every 64 MiB; True ends the work.

        Returns:
            Whether all is populated.

        Raises:
            StorageError: The kernel has no pages for it; says how far it came.
        """
        with self.held():
            for start in range(0, self.nbytes, _POPULATE_NBYTES):
                if stop is not None and stop():
                    return False
                self._populate_piece(start, min(_POPULATE_NBYTES, self.nbytes - start))
        return True

    def _populate_piece(self, start: int, nbytes: int) -> None:
        while _madvise(self.address + start, nbytes, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINTR, errno.EAGAIN):
                continue
            if code != errno.EINVAL:
                raise _refused("the arena was not made ready", code, self.nbytes, start)
            # Linux before 5.14. A write that changes nothing faults the page in; torch releases the GIL for it.
            self._bytes[start : start + nbytes : _PAGE_NBYTES].bitwise_or_(0)
            return

    @property
    def cuda_registered(self) -> bool:
        """Whether CUDA's copy engines write into it directly."""
        return self._cuda_device is not None

    def register_cuda(self, device: torch.device) -> None:
        """Pin the memory for the copy engines of every CUDA device; asks only once.

        Where CUDA refuses, a warning says so: its driver then copies through a buffer of its own, and every copy holds
        the thread that asks for it.

        Args:
            device: One that is in use.
        """
        if self._cuda_device is not None or self._cuda_refused:
            return
        why = pin(self.address, self.nbytes, device)
        if why is None:
            self._cuda_device = device
            return
        self._cuda_refused = True
        _log.warning(
            "%s bytes of shared memory were not pinned: save() waits for copies from %s, and they are slower\n"
            "why: cudaHostRegister says %s\n"
            "next: look at the limits of locked memory (ulimit -l, the container, the driver's lines in dmesg)",
            f"{self.nbytes:,}",
            device,
            why,
        )

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at byte ``offset``."""
        self._check_range(offset, len(data))
        ctypes.memmove(self.address + offset, data, len(data))

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` bytes from ``offset`` on as a uint8 tensor that aliases the arena."""
        self._check_range(offset, nbytes)
        return self._bytes[offset : offset + nbytes]

    def typed(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Return a contiguous tensor that aliases the arena from byte ``offset`` on, a multiple of the item size."""
        itemsize = dtype.itemsize
        strides = []
        numel = 1
        for size in reversed(shape):
            strides.append(numel)
            numel *= size
        self._check_range(offset, numel * itemsize)
        if offset % itemsize:
            raise ValueError(f"{dtype} cannot lie at byte {offset}")
        whole = self._whole.get(dtype)
        if whole is None:
            with torch.inference_mode(False):
                whole = self._whole[dtype] = self._bytes[: self.nbytes - self.nbytes % itemsize].view(dtype)
        # One call on a view of the whole arena: measured 1.6 us against 5.5 us for slice, view, view.
        return whole.as_strided(tuple(shape), strides[::-1], offset // itemsize)

    def _check_range(self, offset: int, nbytes: int) -> None:
        if self._closed:
            raise UsageError("the arena is closed", next="make another one")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} do not lie in an arena of {self.nbytes}")

    def hold(self) -> None:
        """Keep the mapping until ``release``, also over a ``close``."""
        with self._lock:
            if self._closed:
                raise UsageError("the arena is closed", next="make another one")
            self._holders += 1

    def release(self) -> None:
        """End one ``hold``."""
        with self._lock:
            self._holders -= 1
            last = self._closed and self._holders == 0
        if last:
            self._unmap()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the mapping over a block."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Close the descriptor, unmap the memory when nothing holds it; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = self._holders == 0
        os.close(self.fd)
        if last:
            self._unmap()

    def _unmap(self) -> None:
        if self._cuda_device is not None and not unpin(self.address, self._cuda_device):
            _log.warning("%s bytes of shared memory stay mapped: CUDA did not let go of them", f"{self.nbytes:,}")
            return
        _munmap(self.address, self.nbytes)

    def forget_in_child(self) -> None:
        """In a forked child: close the inherited descriptor; the mapping is not there (MADV_DONTFORK)."""
        self._lock = threading.Lock()  # the parent's may have been held by a thread that does not exist here
        if not self._closed:
            self._closed = True
            os.close(self.fd)


def _refused(what: str, code: int, nbytes: int, done: int) -> StorageError:
    return StorageError(
        f"{what}: {nbytes:,} bytes of shared memory, of which {done:,} were ready",
        why=f"{os.strerror(code)}; {_available()}",
        next="free memory, raise the limit of the cgroup, or save less (capacity= is the most that is asked for)",
        errno=code,
    )


def _available() -> str:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return f"MemAvailable is {int(line.split()[1]) * 1024:,} bytes"
    except (OSError, ValueError):
        pass
    return "MemAvailable is not known"
