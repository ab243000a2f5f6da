"""Safetensors of others as mapped tensors: one file, or a directory as ``save_pretrained`` makes it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
import torch

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import MOST_HEADER_NBYTES, Header, parse_header
from aiockpt.format.names import MANIFEST_NAME, RUN_RECORD_NAME
from aiockpt.interchange.foreign_file import ForeignFile, refused
from aiockpt.interchange.mapped import MappedFile
from aiockpt.interchange.write_safetensors import SINGLE_NAME
from aiockpt.storage.failures import storage_errors

__all__ = ["TensorSet", "open_directory", "open_file"]

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_CONFIG_NAMES = ("config.json", "generation_config.json")
_MAX_JSON_NBYTES = 256 << 20
_LENGTH = struct.Struct("<Q")
_SHARDED_KEY = "DCP_SHARDING_INFO"
"""In the header of files of torch's ``HuggingFaceStorageWriter``: where each tensor lies in the whole one."""


class TensorSet:
    """Tensors of one or more files; nothing of their data is read before ``read_through``."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        """A tied tensor that a header names (``safetensors.torch.save_model``) stands under each of its names."""
        self.configs: dict[str, str] = {}
        """Text of ``config.json`` and ``generation_config.json``, where they stand beside the files."""
        self.nbytes = 0
        """What ``read_through`` reads."""
        self._files: list[tuple[ForeignFile, Header]] = []

    def add(self, file: ForeignFile) -> Header:
        """Take the tensors of a file; returns its header.

        Raises:
            ConfigError: It is no file of whole tensors, or has one that stands in another file already.
            StorageError: It cannot be read.
        """
        header = _read_header(file)
        if _has_offsets(header):
            raise refused(
                file.path,
                "its tensors are parts of larger ones, cut by torch.distributed.checkpoint",
                "put them together first, as its HuggingFaceStorageWriter does with enable_consolidation=True",
            )
        mapped = MappedFile(file.fd)
        for name, stored in header.tensors.items():
            if name in self.tensors:
                raise refused(file.path, f"its tensor {name!r:.200} stands in another file of the set, too")
            if stored.dtype == "F4" and (not stored.shape or stored.shape[-1] % 2):
                raise refused(file.path, f"its tensor {name!r:.200} of F4 {list(stored.shape)} has half a byte")
            try:
                self.tensors[name] = mapped.tensor(stored.dtype, stored.shape, "", stored.start, stored.stop)
            except (RuntimeError, ValueError) as exc:  # strides beyond 64 bits; a file that became shorter
                raise refused(file.path, f"torch has no tensor like its {name!r:.200}: {exc}") from exc
        for alias, name in header.metadata.items():
            if alias != "format" and name in header.tensors:
                self.tensors.setdefault(alias, self.tensors[name])
        self.nbytes += file.nbytes - header.data_start
        self._files.append((file, header))
        return header

    def read_through(self, on_progress: Callable[[int], None]) -> None:
        """Read all data, and compare it with the checksums of files that we wrote.

        Raises:
            ConfigError: It is not what was written.
            StorageError: It cannot be read.
        """
        for file, header in self._files:
            file.read_through(on_progress, start=header.data_start, block_nbytes=header.block_nbytes, sums=header.sums)


def _has_offsets(header: Header) -> bool:
    """Tell whether a tensor is said to begin elsewhere than at the beginning of the whole one."""
    text = header.metadata.get(_SHARDED_KEY)
    if text is None:
        return False
    try:
        places = msgspec.json.decode(text, type=dict[str, _Place])
    except (msgspec.DecodeError, RecursionError):
        return True  # nobody knows what it says
    return any(any(place.saved_offsets) for place in places.values())


def open_file(file: ForeignFile) -> TensorSet:
    """Return the tensors of one file; errors as ``TensorSet.add``."""
    found = TensorSet()
    header = found.add(file)
    if _SHARDED_KEY in header.metadata and os.path.basename(file.path).startswith("shard-"):
        raise refused(file.path, "its tensors may go on in other files", "give the directory that it is in")
    return found


def open_directory(path: str, stack: ExitStack) -> TensorSet:
    """Return the tensors of a directory: of the files that its index names, else of ``model.safetensors``, else of all.

    Args:
        path: Absolute.
        stack: Closes the files.

    Raises:
        ConfigError: It has no such files, or they do not fit the index or each other.
        StorageError: Something cannot be read.
    """
    with storage_errors("a directory was not listed", path):
        names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    weights: dict[str, str] = {}
    if len(indices) == 1:
        weights = _read_index(f"{path}/{indices[0]}", stack)
        files = sorted(set(weights.values()))
    elif SINGLE_NAME in names:
        files = [SINGLE_NAME]
    elif indices:
        raise refused(path, f"it has several indices: {', '.join(indices[:3])}", "give one of its files")
    else:
        files = [name for name in names if name.endswith(_SUFFIX)]
    if not files:
        raise refused(path, "it has no safetensors file", _advice(path, names))
    found = TensorSet()
    for name in files:
        header = found.add(stack.enter_context(ForeignFile(f"{path}/{name}")))
        lacking = [tensor for tensor, home in weights.items() if home == name and tensor not in header.tensors]
        if lacking:
            raise refused(f"{path}/{name}", f"it has no tensor {lacking[0]!r:.200}, which the index says is there")
    for name in _CONFIG_NAMES:
        if name in names:
            found.configs[name] = _read_text(f"{path}/{name}", stack)
    return found


def _advice(path: str, names: list[str]) -> str:
    if RUN_RECORD_NAME in names:
        return f"it is a run: restore from it, or give a folder of one of its steps, as in {path}/step-0/model"
    if MANIFEST_NAME in names:
        return f"it is a checkpoint: give a folder of it, as in {path}/model"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "give its torch.save file itself"
    return "give a file, or a directory of safetensors files"


class _Place(msgspec.Struct, frozen=True):
    saved_offsets: list[int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def _read_index(path: str, stack: ExitStack) -> dict[str, str]:
    try:
        weights = msgspec.json.decode(_read_text(path, stack), type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError) as exc:
        raise refused(path, f"it is no index of safetensors files: {exc}") from exc
    for file in weights.values():
        if "\0" in file or file.startswith("/") or any(part in ("", ".", "..") for part in file.split("/")):
            raise refused(path, f"it names the file {file!r:.200}, which leads out of its directory")
    return weights


def _read_text(path: str, stack: ExitStack) -> str:
    file = stack.enter_context(ForeignFile(path))
    if file.nbytes > _MAX_JSON_NBYTES:
        raise refused(path, f"it has {file.nbytes} bytes")
    try:
        return file.read(file.nbytes).decode()
    except UnicodeDecodeError as exc:
        raise refused(path, "it is no UTF-8 text") from exc


def _read_header(file: ForeignFile) -> Header:
    start = file.read(_LENGTH.size)
    length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
    # What cannot be true is for the parser to say; nothing is allocated for it.
    data = file.read(_LENGTH.size + length) if length <= MOST_HEADER_NBYTES else start
    try:
        return parse_header(data, file=file.path, file_nbytes=file.nbytes)
    except CheckpointCorruptError as exc:
        raise refused(file.path, exc.why, "take another copy of it") from exc
