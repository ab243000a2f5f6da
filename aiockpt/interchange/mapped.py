"""Tensors that are a private mapping of a file: nothing is read before it is used, nothing is held in memory."""

from __future__ import annotations

import mmap

import torch

from aiockpt.state.dtypes import live_form

__all__ = ["MappedFile"]


class MappedFile:
    """One file, mapped; the mapping lives as long as its tensors.

    Each tensor has a storage of its own, so that whoever saves it saves its bytes alone, and not the whole file.

    Args:
        fd: Open for reading, not empty; the caller closes it.
    """

    def __init__(self, fd: int) -> None:
        # A private mapping that may be written to: torch warns of memory that it must not write.
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)

    def tensor(self, code: str, shape: tuple[int, ...], mark: str, start: int, stop: int) -> torch.Tensor:
        """Return the tensor that lies at ``[start, stop)`` in bytes of the file.

        Args:
            code: Dtype in the file.
            shape: Shape in the file.
            mark: As in the manifest's classes.
            start: First byte.
            stop: Behind the last byte; the size is what code and shape need.
        """
        dtype, live_shape = live_form(code, shape, mark)
        if start == stop:
            return torch.empty(live_shape, dtype=dtype, device="cpu")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=stop - start, offset=start)
        if start % dtype.itemsize:
            raw = raw.clone()  # files of others need not align; torch's kernels may count on it
        return raw.view(dtype).reshape(live_shape)
