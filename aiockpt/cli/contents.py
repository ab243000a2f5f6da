"""What a checkpoint holds, by name, as the commands show it; no torch, and of the files headers at most."""

from __future__ import annotations

from typing import Any

import msgspec

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import MANIFEST_NAME, Segments, dotted
from aiockpt.format.ranks import is_cut, manifest_for
from aiockpt.format.tree import Node, value_number, walk
from aiockpt.restoring.selection import Selection
from aiockpt.storage.readers import OpenCheckpoint, open_checkpoint

__all__ = [
    "Tensor",
    "Value",
    "form_of",
    "leaves_of",
    "nbytes_of_entry",
    "open_of_rank_0",
    "place_of",
    "refuse_idle",
    "tensors_of",
    "values_of",
]

_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""The codes of the files as people know them."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A name under which a tensor stands, or bytes that are stored as one."""

    name: str
    kind: str
    """``tensor``, or ``ndarray``, ``bytes``, ``BytesIO``."""
    dtype: str
    """As torch calls it."""
    shape: tuple[int, ...]
    nbytes: int
    file: str
    """Relative to the checkpoint. A tensor that is cut over the files of several ranks begins there."""
    start: int
    """Where it, or its first part, lies in the file, ``[start, stop)`` in bytes."""
    stop: int
    same_as: str | None
    """The name under which the same bytes stand already, as for tied weights."""


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A value that is no tensor."""

    name: str
    value: Any
    """As the file format encodes it."""


def open_of_rank_0(path: str) -> OpenCheckpoint:
    """Open a checkpoint as ``open_checkpoint``; where each rank has something for itself it shows that of rank 0."""
    checkpoint = open_checkpoint(path)
    try:
        if checkpoint.manifest.own_plans:
            checkpoint.manifest = manifest_for(checkpoint.manifest, 0)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def leaves_of(manifest: Manifest, names: Selection) -> list[tuple[Segments, Node]]:
    """Return (path, leaf) of all that is selected, in the order of the state."""
    leaves = walk(manifest.plan.tree)
    return list(leaves) if names.everything else [leaf for leaf in leaves if names.takes(dotted(leaf[0]))]


def refuse_idle(names: Selection, *manifests: Manifest) -> None:
    """Check that each pattern fits a name.

    Raises:
        ConfigError: One does not.
    """
    if names.everything:
        return
    known = [dotted(path) for manifest in manifests for path, _ in walk(manifest.plan.tree)]
    names.refuse_idle(known, argument="--tensors")


def form_of(manifest: Manifest, entry: int) -> tuple[str, tuple[int, ...]]:
    """Return (dtype, shape) of an entry's tensor as torch has them; the file's may be others."""
    code, shape, mark = manifest.plan.classes[manifest.plan.entry_classes[entry]]
    if mark:
        return "complex128", tuple(shape[:-1])
    if code == "F4":  # two elements in a byte: torch counts bytes
        return _TORCH_NAMES[code], (*shape[:-1], shape[-1] // 2) if shape else ()
    return _TORCH_NAMES[code], tuple(shape)


def nbytes_of_entry(manifest: Manifest, entry: int) -> int:
    """Return the size of an entry."""
    code, shape, _ = manifest.plan.classes[manifest.plan.entry_classes[entry]]
    return nbytes_of(code, shape)


def tensors_of(checkpoint: OpenCheckpoint, names: Selection) -> list[Tensor]:
    """Return the selected tensors in the order of the state. Reads the headers of their files.

    Raises:
        CheckpointCorruptError: A header is not the one that was written, or says something else than the manifest.
        StorageError: A header cannot be read.
    """
    manifest = checkpoint.manifest
    first: dict[int, str] = {}
    found = []
    for path, leaf in leaves_of(manifest, names):
        kind, entry = (leaf[0], leaf[1]) if isinstance(leaf, list) else ("tensor", leaf)
        if entry < 0:
            continue
        name = dotted(path)
        dtype, shape = form_of(manifest, entry)
        file, start, stop = place_of(checkpoint, entry)
        tensor = Tensor(
            name=name,
            kind=kind,
            dtype=dtype,
            shape=shape,
            nbytes=nbytes_of_entry(manifest, entry),
            file=manifest.files[file].path,
            start=start,
            stop=stop,
            same_as=first.get(entry),
        )
        first.setdefault(entry, name)
        found.append(tensor)
    return found


def values_of(manifest: Manifest, names: Selection) -> list[Value]:
    """Return the selected values in the order of the state."""
    return [
        Value(name=dotted(path), value=manifest.values[value_number(leaf)])
        for path, leaf in leaves_of(manifest, names)
        if isinstance(leaf, int) and leaf < 0
    ]


def place_of(checkpoint: OpenCheckpoint, entry: int) -> tuple[int, int, int]:
    """Return (number of the file, start, stop) of an entry, or of its first part. Reads the header of the file.

    Raises:
        CheckpointCorruptError: It is not the one that was written, or says something else than the manifest.
        StorageError: It cannot be read.
    """
    plan = checkpoint.manifest.plan
    index = plan.entry_files[entry]
    code, shape, _ = plan.classes[plan.entry_classes[entry]]
    stored = checkpoint.header(index).tensors.get(plan.names[entry])
    if stored is None or stored.dtype != code or (stored.shape != tuple(shape) and not is_cut(plan, entry)):
        path = checkpoint.manifest.files[index].path
        raise CheckpointCorruptError(
            f"{checkpoint.path} contradicts itself",
            why=f"the header of {path} does not have {plan.names[entry]!r} as {code} {list(shape)}",
            next="look at another step",
            step=checkpoint.manifest.head.step,
            file=f"{checkpoint.path}/{MANIFEST_NAME}",
        )
    return index, stored.start, stored.stop
