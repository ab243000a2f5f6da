"""Tensors that are a private mapping of a checkpoint's files: nothing is read before it is used."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import xxhash

from aiockpt.errors import StepNotFoundError
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["FileMaps"]


class FileMaps:
    """Maps each file once. Writing to a tensor changes this process's memory, never the file.

    The mappings live as long as their tensors, also when the checkpoint is removed meanwhile.
    """

    def __init__(self, checkpoint: OpenCheckpoint, view: CheckpointView) -> None:
        self._checkpoint = checkpoint
        self._view = view
        self._storages: dict[int, torch.UntypedStorage] = {}

    def tensor(self, entry: int) -> torch.Tensor:
        """Return the tensor of an entry; header checked, data not.

        Raises:
            CheckpointCorruptError: The file's header is not the one that was written.
            StepNotFoundError: The checkpoint was replaced while it was being opened.
            StorageError: The file cannot be mapped.
        """
        dtype, shape = self._view.form(entry)
        file = self._view.file_of(entry)
        start, stop = self._view.span(entry, self._checkpoint.header(file))
        if start == stop:
            return torch.empty(shape, dtype=dtype, device="cpu")
        storage = self._storages.get(file)
        if storage is None:
            storage = self._storages[file] = self._map(file)
        if start % dtype.itemsize == 0:
            return _view(storage, dtype, start // dtype.itemsize, shape)
        # complex128 behind an odd number of float64
        return _view(storage, torch.uint8, start, (stop - start,)).clone().view(dtype).reshape(shape)

    def _map(self, file: int) -> torch.UntypedStorage:
        record = self._checkpoint.manifest.files[file]
        path = f"{self._checkpoint.path}/{record.path}"
        with storage_errors("a file was not mapped", path):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as exc:
                raise self._gone("it was removed while it was being opened") from exc
            try:
                header = os.pread(fd, record.data_start, 0)
                # By name it may be another one's file by now; headers hold the checksums of all bytes.
                if os.fstat(fd).st_size != record.nbytes or xxhash.xxh3_128_hexdigest(header) != record.sum:
                    raise self._gone("it was replaced while it was being opened")
                storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", False, record.nbytes)
                return storage  # type: ignore[no-any-return]  # torch's stub names its base class
            finally:
                os.close(fd)

    def _gone(self, why: str) -> StepNotFoundError:
        return StepNotFoundError(
            f"there is no checkpoint {self._checkpoint.path} any more",
            why=why,
            next="load again",
            step=self._checkpoint.manifest.head.step,
            path=self._checkpoint.path,
        )


def _view(storage: Any, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, (math.prod(shape),), (1,))
    return flat.view(shape)
