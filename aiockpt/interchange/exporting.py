"""A checkpoint → files that other programs read."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.names import MANIFEST_NAME, dotted, shard_name
from aiockpt.format.ranks import manifest_for
from aiockpt.format.tree import walk
from aiockpt.interchange.appearing import appears, check_target
from aiockpt.interchange.pick import Picked, pick, plain_files
from aiockpt.interchange.verified import VerifiedBytes
from aiockpt.interchange.write_safetensors import SINGLE_NAME, TensorFile, cut, write_index, write_tensors
from aiockpt.restoring.selection import Patterns, Selection
from aiockpt.storage.direct import write_small
from aiockpt.storage.readers import OpenCheckpoint, open_checkpoint

if TYPE_CHECKING:
    from aiockpt.interchange.write_torch import Content

__all__ = ["MAX_SHARD_NBYTES", "Exported", "export_checkpoint"]

MAX_SHARD_NBYTES = 50 * 10**9
"""As ``save_pretrained`` of transformers 5 has it."""
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SINGLE_SUFFIX = ".safetensors"

OnTotal = Callable[[int], None]


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    step: int
    source: str
    """Path of the checkpoint."""
    path: str
    """What was made, absolute."""
    kind: str
    """``safetensors`` or ``torch.save``."""
    files: list[str]
    """Names in ``path`` where that is a directory, else its own."""
    tensors: int
    nbytes: int
    """Of the tensors."""
    values_left_out: int
    """Safetensors holds none."""
    tied: dict[str, str]
    """Further names of tensors that safetensors holds once, with the name that it has."""
    converted: dict[str, str]
    """By name: what stands in the files in another type than in the state."""


def export_checkpoint(
    checkpoint_path: str,
    to: str,
    *,
    part: str | None = None,
    tensors: Patterns = None,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    on_total: OnTotal = lambda nbytes: None,
    on_progress: Callable[[int], None] = lambda nbytes: None,
) -> Exported:
    """Write a checkpoint's tensors, and for torch its values, for other programs; every checksum is verified.

    It appears whole or not at all, durably. Memory: a few blocks of 16 MiB, whatever the size. For ``torch.save`` the
    tensors are mapped, and bytes that are no tensors are held. A tensor that is cut over the files of several ranks is
    held while it is written; for ``torch.save`` all of these. Of what each rank has for itself that of rank 0 goes out.

    Args:
        checkpoint_path: Of one step's directory.
        to: ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``: a ``torch.save`` file. ``.safetensors``: that one file. Anything
            else: a directory with ``model.safetensors``, or shards and their index.
        part: Dotted name of what alone is exported, under names without it: ``model`` gives the keys of the module.
        tensors: Patterns of full dotted names, see ``Selection``; for ``torch.save`` of values, too.
        max_shard_nbytes: Of the tensors of a shard.
        on_total: Called once with the bytes that ``on_progress`` will count.
        on_progress: Called with bytes since the last call.

    Raises:
        ConfigError: The target exists or cannot be, a pattern fits nothing, there is no such part.
        UnsupportedValueError: A value that such a file cannot hold.
        StepNotFoundError: There is no such checkpoint.
        CheckpointCorruptError: Bytes are not those that were written.
        StorageError: Something cannot be read or written.
    """
    target = check_target(to)
    selection = Selection(tensors)
    with open_checkpoint(checkpoint_path) as checkpoint:
        try:
            export = _Export(checkpoint, target, selection, part, on_total, on_progress)
            selection.refuse_idle(export.names(), argument="tensors")
            if target.endswith(_TORCH_SUFFIXES) and not to.endswith("/"):
                return export.to_torch()
            if target.endswith(_SINGLE_SUFFIX) and not to.endswith("/"):
                return export.to_file()
            return export.to_directory(max_shard_nbytes)
        except RecursionError as exc:
            file = f"{checkpoint.path}/{MANIFEST_NAME}"
            raise CheckpointCorruptError(
                f"{file} is no usable manifest", why="its tree is deeper than any that is written", file=file
            ) from exc


class _Export:
    """One export of an open checkpoint."""

    def __init__(
        self,
        checkpoint: OpenCheckpoint,
        target: str,
        selection: Selection,
        part: str | None,
        on_total: OnTotal,
        on_progress: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._manifest = manifest_for(checkpoint.manifest, 0)
        self._target = target
        self._selection = selection
        self._part = part
        self._on_total = on_total
        self._on_progress = on_progress
        self._source = VerifiedBytes(checkpoint, on_progress)

    def names(self) -> list[str]:
        """Return the dotted names of all tensors and values."""
        return [dotted(path) for path, _ in walk(self._manifest.plan.tree)]

    def to_torch(self) -> Exported:
        """Write a ``torch.save`` file."""
        from aiockpt.interchange.write_torch import read_content, write_content

        content = read_content(self._checkpoint, self._selection, self._part)
        nbytes = self._nbytes(content.entries)
        self._on_total(2 * nbytes)
        name = os.path.basename(self._target)
        with appears(self._target, is_directory=False) as dir_fd:
            write_content(dir_fd, name, content, self._source, self._on_progress)
        return self._exported_to_torch(content, name, nbytes)

    def to_file(self) -> Exported:
        """Write one safetensors file."""
        picked = pick(self._manifest, self._selection, self._part)
        (file,) = cut(self._manifest, picked, max_nbytes=None)
        self._on_total(file.nbytes)
        name = os.path.basename(self._target)
        with appears(self._target, is_directory=False) as dir_fd:
            write_tensors(dir_fd, name, file, self._source, aliases=picked.aliases, label=self._target)
        return self._exported(picked, [name], file.nbytes)

    def to_directory(self, max_shard_nbytes: int) -> Exported:
        """Write a safetensors set."""
        picked = pick(self._manifest, self._selection, self._part)
        files = cut(self._manifest, picked, max_nbytes=max_shard_nbytes)
        nbytes = sum(file.nbytes for file in files)
        self._on_total(nbytes)
        names = _file_names(files)
        plain = plain_files(self._manifest, self._part)
        with appears(self._target, is_directory=True) as dir_fd:
            for name, file in zip(names, files, strict=True):
                label = f"{self._target}/{name}"
                write_tensors(dir_fd, name, file, self._source, aliases=picked.aliases, label=label)
            if len(files) > 1:
                names.append(write_index(dir_fd, files))
            for name, number in plain.items():
                write_small(dir_fd, name, self._source.plain(number))
        return self._exported(picked, [*names, *plain], nbytes)

    def _nbytes(self, entries: list[int]) -> int:
        plan = self._manifest.plan
        forms = [plan.classes[plan.entry_classes[entry]] for entry in entries]
        return sum(nbytes_of(dtype, shape) for dtype, shape, _ in forms)

    def _exported(self, picked: Picked, files: list[str], nbytes: int) -> Exported:
        plan = self._manifest.plan
        converted = {
            name: "complex128 as float64 with a last dimension of 2"
            for name, entry in picked.tensors
            if plan.classes[plan.entry_classes[entry]][2]
        }
        return Exported(
            step=self._manifest.head.step,
            source=self._checkpoint.path,
            path=self._target,
            kind="safetensors",
            files=files,
            tensors=len(picked.tensors),
            nbytes=nbytes,
            values_left_out=picked.value_count,
            tied=picked.aliases,
            converted=converted,
        )

    def _exported_to_torch(self, content: Content, name: str, nbytes: int) -> Exported:
        return Exported(
            step=self._manifest.head.step,
            source=self._checkpoint.path,
            path=self._target,
            kind="torch.save",
            files=[name],
            tensors=len(content.entries),
            nbytes=nbytes,
            values_left_out=0,
            tied={},
            converted=content.converted,
        )


def _file_names(files: list[TensorFile]) -> list[str]:
    if len(files) == 1:
        return [SINGLE_NAME]
    return [shard_name(index, len(files)) for index in range(len(files))]
