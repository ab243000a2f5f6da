"""A ``torch.save`` file of a checkpoint that ``torch.load(weights_only=True)`` takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import torch

from aiockpt.errors import CheckpointError
from aiockpt.format.names import MANIFEST_NAME, Segments, dotted
from aiockpt.format.tree import Node, is_blob, walk
from aiockpt.interchange.convert import Converting
from aiockpt.interchange.mapped import MappedFile
from aiockpt.interchange.pick import find_part
from aiockpt.interchange.verified import VerifiedBytes
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.load import read_entry, selected
from aiockpt.restoring.selection import Selection
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.readers import FileReader, OpenCheckpoint

__all__ = ["Content", "read_content", "write_content"]

OnProgress = Callable[[int], None]


class Content:
    """What goes into the file."""

    def __init__(self, value: Any, converted: dict[str, str], entries: list[int]) -> None:
        self.value = value
        self.converted = converted
        """By dotted name: what became of a value of a type that is not permitted there."""
        self.entries = entries
        """Of the tensors, each once."""


def read_content(checkpoint: OpenCheckpoint, selection: Selection, part: str | None) -> Content:
    """Return the nested state with mapped tensors; their bytes are not verified yet.

    Raises:
        ConfigError: A pattern fits no name, or there is no such part.
        UnsupportedValueError: A value has no permitted form; names its key.
        CheckpointCorruptError: The manifest contradicts itself, or a header is not the one that was written.
        StorageError: A file cannot be mapped.
    """
    view = CheckpointView(checkpoint.manifest, f"{checkpoint.path}/{MANIFEST_NAME}")
    tree = selected(view, selection)
    path: Segments = ()
    if part is not None:
        path, tree = find_part(tree, part, step=checkpoint.manifest.head.step)
    entries = sorted({entry for entry, _ in view.entries_below(tree)})
    converting = Converting()
    converting.converted |= {
        dotted((*path, *below)): "a numpy array as a tensor" for below, leaf in walk(tree) if _is_array(leaf)
    }
    built = view.build(_with_arrays_as_tensors(tree), _mapped(checkpoint, view, entries))
    return Content(converting.convert(built, path), converting.converted, entries)


def _is_array(node: Node) -> bool:
    return isinstance(node, list) and node[0] == "ndarray"


def _with_arrays_as_tensors(node: Node) -> Node:
    """Return the tree with the tensor that holds each numpy array in the array's place."""
    if isinstance(node, int):
        return node
    if isinstance(node, dict):
        return {key: _with_arrays_as_tensors(child) for key, child in node.items()}
    tag = node[0]
    if _is_array(node):
        return node[1]
    if is_blob(node):
        return node
    if tag in ("list", "tuple"):
        return [tag, [_with_arrays_as_tensors(child) for child in node[1]]]
    if tag == "module":
        return [tag, _with_arrays_as_tensors(node[1]), node[2]]
    return [tag, [[key, _with_arrays_as_tensors(child)] for key, child in node[1]]]


def _mapped(checkpoint: OpenCheckpoint, view: CheckpointView, entries: list[int]) -> dict[int, torch.Tensor]:
    source = VerifiedBytes(checkpoint, lambda nbytes: None)
    maps: dict[int, MappedFile] = {}
    tensors = {}
    for entry in entries:
        if source.is_cut(entry):
            tensors[entry] = read_entry(checkpoint, view, entry)
            continue
        code, shape, mark = view.stored_form(entry)
        span = source.span(entry)
        if span.file not in maps:
            maps[span.file] = _map(checkpoint.file(span.file))
        tensors[entry] = maps[span.file].tensor(code, shape, mark, span.start, span.stop)
    return tensors


def _map(reader: FileReader) -> MappedFile:
    with storage_errors("a file was not mapped", reader.path):
        return MappedFile(reader.fileno())


def write_content(dir_fd: int, name: str, content: Content, source: VerifiedBytes, on_progress: OnProgress) -> None:
    """Verify every byte of the tensors, write the file, and load it as others will; durable when it returns.

    Args:
        dir_fd: Of the directory.
        name: Of the file in it.
        content: From ``read_content``.
        source: Of the same checkpoint.
        on_progress: Called with the bytes that were written since the last call.

    Raises:
        CheckpointCorruptError: A block is not the one that was written.
        StorageError: Something cannot be read or written.
        CheckpointError: ``torch.load`` does not take the file.
    """
    for span in sorted(source.span(entry) for entry in content.entries if not source.is_cut(entry)):
        for _ in source.pieces(span):
            pass  # handed out, so it is good
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)
    with os.fdopen(fd, "wb") as file:
        output = _Counted(file, on_progress)
        try:
            torch.save(content.value, output)  # type: ignore[arg-type]  # it has what torch calls
        except Exception:
            if output.failure is not None:
                raise output.failure from None  # torch says of it that its archive is invalid
            raise
        file.flush()
        os.fdatasync(fd)
    try:
        torch.load(f"/proc/self/fd/{dir_fd}/{name}", map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:
        raise CheckpointError(
            f"{name} was not written",
            why=f"torch.load(weights_only=True) would not take it: {str(exc).splitlines()[0]}",
            next="export a part of the state, or to safetensors",
        ) from exc


class _Counted:
    """A file for torch, which counts what is written and keeps what failed."""

    def __init__(self, file: IO[bytes], on_progress: OnProgress) -> None:
        self.failure: OSError | None = None
        self._file = file
        self._on_progress = on_progress

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        try:
            written = self._file.write(data)
        except OSError as exc:
            self.failure = exc
            raise
        self._on_progress(written)
        return written

    def flush(self) -> None:
        """Do nothing: the end of the file is time enough."""
