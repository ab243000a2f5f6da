"""A decoded manifest as matching and building need it on one rank."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import Header
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import Segments, dotted
from aiockpt.format.placings import ShardingRecord
from aiockpt.format.ranks import plan_for
from aiockpt.format.tree import Node, children, is_blob, key_text, value_number, walk
from aiockpt.format.values import FACTORIES, MAX_DEPTH
from aiockpt.planning.placings import sharding_of
from aiockpt.planning.sharding import Sharding
from aiockpt.state.dtypes import COMPLEX128, PACKED_F4, live_form
from aiockpt.state.values import blob_value, decode_all, decode_key

__all__ = ["CheckpointView", "Child", "folder_of"]

_MAX_NUMEL = 1 << 56
_MAX_LEVELS = 2 * MAX_DEPTH + 8
"""Containers of the user's, then those in the state of an object among them."""
_MAPPINGS = {"dict", "OrderedDict", "defaultdict", *(f"defaultdict:{name}" for name in FACTORIES)}


class Child(NamedTuple):
    """A part of a container."""

    key: Any
    """As it stands in the tree: text, or an encoded key."""
    segment: str
    node: Node


def folder_of(path: str) -> str:
    """Return the folder of a file of a checkpoint."""
    return path.rpartition("/")[0]


class CheckpointView:
    """Answers what stands where in a checkpoint; decodes each value once, when it is asked for.

    Args:
        manifest: Decoded, with columns and numbers that fit each other.
        file: Path of the manifest, for errors.
        rank: Whose own values and tensors stand where each rank has its own.

    Raises:
        CheckpointCorruptError: An entry has a form that no tensor has, or is larger than its file.
    """

    def __init__(self, manifest: Manifest, file: str, *, rank: int = 0) -> None:
        self.manifest = manifest
        self.file = file
        self.rank = rank
        for tree in (manifest.plan.tree, *(plan.tree for plan in manifest.own_plans)):
            self._refuse_deep(tree)
        own = plan_for(manifest, rank)
        self.plan = plan = own.plan
        """As this rank sees it; numbers of entries and values are those of this plan."""
        self.absent = own.missing
        """Places that are each rank's own, and have nothing for this one."""
        self._encoded = own.values
        self._forms = [self._form(code, tuple(shape), mark) for code, shape, mark in plan.classes]
        try:
            sizes = [nbytes_of(code, shape) for code, shape, _ in plan.classes]
        except ValueError as exc:
            raise self.corrupt(str(exc)) from exc
        self._sharded = self._read_shardings()
        rooms = [record.nbytes - record.data_start if record.data_start else -1 for record in manifest.files]
        folder_rooms = self._folder_rooms() if self._sharded else {}
        for entry, (kind, number) in enumerate(zip(plan.entry_classes, plan.entry_files, strict=True)):
            room = rooms[number]
            if sizes[kind] <= room:
                continue
            path = manifest.files[number].path
            if room < 0 or entry not in self._sharded or sizes[kind] > folder_rooms[folder_of(path)]:
                raise self.corrupt(f"{plan.names[entry]!r} of {sizes[kind]} bytes is not in {path}")
        self._shapes: dict[str, int] | None = None
        self._needed: set[int] = set()
        self._values: dict[int, Any] = {}

    def corrupt(self, why: str) -> CheckpointCorruptError:
        """Return the error for a manifest that contradicts itself."""
        return CheckpointCorruptError(
            f"{self.file} is no usable manifest", why=why, next="restore another step", file=self.file
        )

    # ---- entries

    def form(self, entry: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return (dtype, shape) of the tensor."""
        return self._forms[self.plan.entry_classes[entry]]

    def stored_form(self, entry: int) -> tuple[str, tuple[int, ...], str]:
        """Return (dtype, shape of the whole tensor, mark) as files have them."""
        code, shape, mark = self.plan.classes[self.plan.entry_classes[entry]]
        return code, tuple(shape), mark

    def file_of(self, entry: int) -> int:
        """Return the index of the file that holds the entry, or its first part."""
        return self.plan.entry_files[entry]

    def sharding_of(self, entry: int) -> Sharding | None:
        """Return how the entry is cut over files; None where it stands in one."""
        return self._sharded.get(entry)

    def _read_shardings(self) -> dict[int, Sharding]:
        plan = self.plan
        cut = {
            number: sharding_of(record)
            for number, record in enumerate(plan.placings)
            if isinstance(record, ShardingRecord) and record.cuts
        }
        if not cut:
            return {}
        found = {}
        for entry, (placing, kind) in enumerate(zip(plan.entry_placings, plan.entry_classes, strict=True)):
            sharding = cut.get(placing)
            if sharding is None:
                continue
            code, shape, mark = plan.classes[kind]
            last = len(shape) - 1
            if (code == PACKED_F4 or mark == COMPLEX128) and any(part.dim == last for part in sharding.cuts):
                raise self.corrupt(f"{plan.names[entry]!r} is cut inside of its elements")
            if math.prod(shape):
                found[entry] = sharding
        return found

    def _folder_rooms(self) -> dict[str, int]:
        rooms: dict[str, int] = defaultdict(int)
        for record in self.manifest.files:
            if record.data_start:
                rooms[folder_of(record.path)] += record.nbytes - record.data_start
        return rooms

    def span(self, entry: int, header: Header) -> tuple[int, int]:
        """Return the bytes of the entry in its file, half-open.

        Raises:
            CheckpointCorruptError: The file's header says something else than the manifest.
        """
        code, shape, _ = self.stored_form(entry)
        name = self.plan.names[entry]
        stored = header.tensors.get(name)
        if stored is None or stored.dtype != code or stored.shape != shape:
            found = "is not there" if stored is None else f"is {stored.dtype} {list(stored.shape)} there"
            path = self.manifest.files[self.file_of(entry)].path
            raise self.corrupt(f"{name!r} should be {code} {list(shape)} in {path}, and {found}")
        return stored.start, stored.stop

    def entries_below(self, node: Node) -> Iterator[tuple[int, bool]]:
        """Yield (entry, whether it is the content of a value that is no tensor)."""
        for _, leaf in walk(node):
            if isinstance(leaf, list):
                yield leaf[1], True
            elif leaf >= 0:
                yield leaf, False

    # ---- the tree

    def mapping(self, node: Node) -> list[Child] | None:
        """Return the children of a mapping's or module's node; None where it is neither."""
        if isinstance(node, dict):
            return [Child(key, key, child) for key, child in node.items()]
        if isinstance(node, list) and node[0] == "module":
            return [Child(key, key, child) for key, child in node[1].items()]
        if isinstance(node, list) and node[0] in _MAPPINGS:
            return [Child(key, key_text(key), child) for key, child in node[1]]
        return None

    def key(self, child: Child) -> Any:
        """Return the key of a mapping's child as it was in the state."""
        return child.key if isinstance(child.key, str) else decode_key(child.key, self.file)

    def sequence(self, node: Node, tag: str) -> list[Child] | None:
        """Return the children of a ``list`` or ``tuple`` node; None where it is something else."""
        if not isinstance(node, list) or node[0] != tag:
            return None
        return [Child(str(index), str(index), child) for index, child in enumerate(node[1])]

    def plain(self, node: Node) -> Any:
        """Return the value of a node that is one, else None; every call gives a value of its own."""
        return copy.deepcopy(self.value(value_number(node))) if isinstance(node, int) and node < 0 else None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of the tensor with this dotted name; None where there is none."""
        if self._shapes is None:
            leaves = walk(self.plan.tree)
            self._shapes = {dotted(path): leaf for path, leaf in leaves if isinstance(leaf, int) and leaf >= 0}
        entry = self._shapes.get(name)
        return None if entry is None else self.form(entry)[1]

    def names_below(self, node: Node, path: Segments) -> list[str]:
        """Return the dotted names of all tensors and values below a node that stands at ``path``."""
        return [dotted(segments) for segments, _ in walk(node, path)]

    def what(self, node: Node) -> str:
        """Return what a node is, in a word for people."""
        if isinstance(node, int):
            return "a tensor" if node >= 0 else "a value"
        tag = "dict" if isinstance(node, dict) else str(node[0])
        return {"module": "a module", "ndarray": "a numpy array"}.get(tag, f"a {tag.partition(':')[0]}")

    # ---- values

    def need_values(self, node: Node) -> None:
        """Decode the values below ``node`` soon: a bad one must be found before anything live changes."""
        self._needed.update(value_number(leaf) for _, leaf in walk(node) if isinstance(leaf, int) and leaf < 0)

    def decode_needed(self) -> None:
        """Decode what ``need_values`` was told of.

        Raises:
            CheckpointCorruptError: A value is not readable.
        """
        for number in sorted(self._needed):
            self.value(number)

    def value(self, number: int) -> Any:
        """Return a value, decoded at the first call."""
        if number not in self._values:
            (self._values[number],) = decode_all([self._encoded[number]], self.file)
        return self._values[number]

    def metadata(self) -> Any:
        """Return the user's metadata, fresh.

        Raises:
            CheckpointCorruptError: It is not readable.
        """
        return decode_all([self.manifest.metadata], self.file)[0]

    def build(self, node: Node, tensors: Mapping[int, Any]) -> Any:
        """Return the objects that ``node`` stands for.

        Args:
            node: Any node; of a module comes a dict.
            tensors: By entry number, all that are below it.

        Raises:
            CheckpointCorruptError: It is no node that a save makes.
        """
        try:
            return self._build(node, tensors)
        except RecursionError as exc:
            raise self.corrupt("its tree is nested too deep for this program's stack") from exc

    def _build(self, node: Node, tensors: Mapping[int, Any]) -> Any:
        if isinstance(node, int):
            return tensors[node] if node >= 0 else self.value(value_number(node))
        if isinstance(node, dict):
            return {key: self._build(child, tensors) for key, child in node.items()}
        tag = node[0]
        if is_blob(node):
            try:
                return blob_value(node, tensors[node[1]])
            except (ValueError, TypeError) as exc:
                raise self.corrupt(str(exc)) from exc
        if tag in ("list", "tuple"):
            items = [self._build(child, tensors) for child in node[1]]
            return items if tag == "list" else tuple(items)
        if tag == "module":
            return self._build(node[1], tensors)
        if tag not in _MAPPINGS:
            raise self.corrupt(f"its tree has an unknown container {str(tag)[:40]!r}")
        return self._build_mapping(tag, node[1], tensors)

    def _build_mapping(self, tag: str, pairs: list[Any], tensors: Mapping[int, Any]) -> Any:
        items = [(decode_key(key, self.file), self._build(child, tensors)) for key, child in pairs]
        kind, _, factory = tag.partition(":")
        try:
            if kind == "OrderedDict":
                return OrderedDict(items)
            return defaultdict(FACTORIES.get(factory), items) if kind == "defaultdict" else dict(items)
        except TypeError as exc:  # an unhashable key
            raise self.corrupt(str(exc)) from exc

    def _refuse_deep(self, tree: Node) -> None:
        """Refuse what no save makes and what would overflow the stack of all that walks the tree."""
        level = [tree]
        for _ in range(_MAX_LEVELS):
            level = [
                child
                for node in level
                if not isinstance(node, int) and not is_blob(node)
                for _, child in children(node)
            ]
            if not level:
                return
        raise self.corrupt(f"its tree is nested deeper than {_MAX_LEVELS}")

    def _form(self, code: str, shape: tuple[int, ...], mark: str) -> tuple[torch.dtype, tuple[int, ...]]:
        bad = (
            mark not in ("", COMPLEX128)
            or (mark == COMPLEX128 and (code != "F64" or shape[-1:] != (2,)))
            or (code == PACKED_F4 and (not shape or shape[-1] % 2))
            or math.prod(max(size, 1) for size in shape) > _MAX_NUMEL  # empty tensors have strides too
        )
        if bad:
            raise self.corrupt(f"no tensor is {code} {list(shape)} {mark}")
        return live_form(code, shape, mark)
