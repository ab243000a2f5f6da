"""The local plan: a rank's entries → folders, files, and places in the arena.

A plan depends on names, dtypes, shapes and the tree alone, so a training loop makes it once: ``PlanCache`` gives the
last one again while nothing of these changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import MAX_HEADER_NBYTES, METADATA_KEY, ImageLayout, TensorSpec, lay_out, round_up
from aiockpt.format.manifest import Plan
from aiockpt.format.names import INDEX_NAME, Segments, dotted, file_name, shard_name, sort_key
from aiockpt.format.tree import Node, renumber
from aiockpt.protocol.messages import FileImage

__all__ = ["MAX_DATA_NBYTES", "MAX_FILE_ENTRIES", "MAX_NAME_LENGTH", "Entry", "LocalPlan", "PlanCache", "plan_local"]

MAX_DATA_NBYTES = 32 << 40
"""Of all tensors of a rank. No host has that much memory, but an expanded tensor of one element may claim it."""
MAX_FILE_ENTRIES = 100_000
"""Tensors in one file: a reader that wants one of them parses the header of all."""
MAX_NAME_LENGTH = 16 << 10
"""Characters of an entry's dotted name; some hundred are usual, and a header holds all names of its file."""

TOP_FOLDER = "state"
"""Holds the tensors that stand at the very top of the state."""


class Entry(NamedTuple):
    """One tensor to be saved."""

    segments: Segments
    dtype: str
    """Code in the file, a key of ``format.dtypes.BITS``."""
    shape: tuple[int, ...]
    """Shape in the file."""
    mark: str = ""
    """``C128`` where the file's dtype and shape are not the tensor's."""


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """Where everything of one rank lies. Entries are numbered as they were given."""

    files: tuple[FileImage, ...]
    texts: tuple[tuple[int, bytes], ...]
    """(arena offset, bytes) that are the same in each save: headers, plain files, the plan's body."""
    offsets: tuple[int, ...]
    """Arena byte offset of each entry."""
    sizes: tuple[int, ...]
    """Bytes of each entry."""
    entry_files: tuple[int, ...]
    """Index into ``files`` of each entry."""
    order: tuple[int, ...]
    """Entry numbers as they lie in the arena."""
    body_offset: int
    body_nbytes: int
    arena_nbytes: int
    """Bytes of the slot, a multiple of 4096."""
    data_nbytes: int
    """Bytes of all tensors."""
    digest: str
    """Of names, dtypes, shapes and tree; equal on ranks with equal plans."""


def plan_local(
    entries: Sequence[Entry],
    tree: Node,
    plain_files: Mapping[str, bytes] | None = None,
    *,
    max_file_entries: int = MAX_FILE_ENTRIES,
    max_header_nbytes: int = MAX_HEADER_NBYTES,
) -> LocalPlan:
    """Lay out one rank's entries.

    Args:
        entries: In any order; their positions are the entry numbers in ``tree``.
        tree: See ``format.tree``.
        plain_files: Further files by (encoded) path, such as ``model/config.json``.
        max_file_entries: Tensors of a file; a folder with more has several files.
        max_header_nbytes: Of a file, likewise.

    Raises:
        UnsupportedValueError: Two entries have the same dotted name (names both), a name cannot stand in a
            safetensors file, the tensors take more than ``MAX_DATA_NBYTES`` (names the largest), or the tree is
            nested too deep.
        ValueError: An entry's dtype and shape are none, or a plain file has the path of another file.
    """
    canonical = sorted(range(len(entries)), key=lambda i: sort_key(entries[i].segments))
    _check_names(entries, canonical)
    folders = _group_by_folder(entries, canonical)
    builder = _Builder(entries)
    _check_sizes(entries, builder.sizes)
    for folder in sorted(folders):
        builder.add_folder(folder, list(builder.cut(folders[folder], max_file_entries, max_header_nbytes)))
    for path, content in sorted((plain_files or {}).items()):
        builder.add_plain(path, content)
    body = _encode_body(entries, canonical, builder.names, builder.entry_files, tree)
    return builder.finish(body)


class PlanCache:
    """Gives the last plan again while entries, tree and plain files stay equal.

    Equal when encoded: Python's ``==`` takes ``True`` for ``1``, and a list that was changed is still equal to itself.
    """

    def __init__(self) -> None:
        self._key = b""
        self._plan: LocalPlan | None = None
        self.misses = 0

    def plan(self, entries: Sequence[Entry], tree: Node, plain_files: Mapping[str, bytes]) -> LocalPlan:
        """Return the plan, as ``plan_local`` makes it."""
        try:
            key = msgspec.msgpack.encode((entries, tree, plain_files))
        except (UnicodeEncodeError, RecursionError):
            return plan_local(entries, tree, plain_files)  # which says what is wrong with it
        if self._plan is None or self._key != key:
            self._plan = plan_local(entries, tree, plain_files)
            self._key = key
            self.misses += 1
        return self._plan


def _check_names(entries: Sequence[Entry], canonical: Sequence[int]) -> None:
    seen: dict[str, Segments] = {}
    for i in canonical:
        segments = entries[i].segments
        name = dotted(segments)
        if name in seen:
            raise UnsupportedValueError(
                f"two tensors have the name {name!r}",
                why=f"{list(seen[name])} and {list(segments)} read the same when joined by dots",
                next="rename one of the keys",
                key=repr(list(seen[name])),
                other_key=repr(list(segments)),
            )
        seen[name] = segments
        if name.endswith(METADATA_KEY) and _name_in_file(segments) == METADATA_KEY:
            raise _unfit(name, f"safetensors has {METADATA_KEY} for itself")
        if len(name) > MAX_NAME_LENGTH:
            raise _unfit(f"{name[:80]}…", f"its name has {len(name)} characters, a header holds all names of a file")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise _unfit(name, "its name has lone surrogates, and no UTF-8")


def _check_sizes(entries: Sequence[Entry], sizes: Sequence[int]) -> None:
    if sum(sizes) > MAX_DATA_NBYTES:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        why = f"all tensors take {sum(sizes):,} bytes, this one {sizes[largest]:,}; is it expanded?"
        raise _unfit(dotted(entries[largest].segments), why, "save the tensor that it was expanded from")


def _unfit(key: str, why: str, next: str = "rename or rearrange its keys") -> UnsupportedValueError:
    return UnsupportedValueError(f"{key!r} cannot be saved", why=why, next=next, key=key)


def _name_in_file(segments: Segments) -> str:
    return dotted(segments[1:] or segments)


def _group_by_folder(entries: Sequence[Entry], canonical: Sequence[int]) -> dict[str, list[int]]:
    keys = {entries[i].segments[0] for i in canonical if len(entries[i].segments) > 1}
    # "%state" is the name of no key: an encoded name has two hexadecimal digits behind each "%".
    top = TOP_FOLDER if TOP_FOLDER not in keys else "%" + TOP_FOLDER
    folders: dict[str, list[int]] = {}
    for i in canonical:
        segments = entries[i].segments
        folders.setdefault(file_name(segments[0]) if len(segments) > 1 else top, []).append(i)
    return folders


class _Builder:
    """Puts file after file into the arena."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._files: list[FileImage] = []
        self._texts: list[tuple[int, bytes]] = []
        self._order: list[int] = []
        self._offsets = [0] * len(entries)
        self._end = 0
        self.sizes = [nbytes_of(entry.dtype, entry.shape) for entry in entries]
        self.entry_files = [0] * len(entries)
        self.names = [_name_in_file(entry.segments) for entry in entries]

    def cut(self, members: Sequence[int], max_entries: int, max_header_nbytes: int) -> Iterator[list[int]]:
        """Yield the members of each file of a folder."""
        part: list[int] = []
        header_nbytes = 0
        for i in members:
            nbytes = self._header_nbytes(i)
            if part and (len(part) >= max_entries or header_nbytes + nbytes > max_header_nbytes):
                yield part
                part, header_nbytes = [], 0
            part.append(i)
            header_nbytes += nbytes
        yield part

    def _header_nbytes(self, i: int) -> int:
        """Return how much an entry adds to a header at most: name, claims, and 16 digits for each 16 MiB."""
        claims = (
            len('"":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]},') + 2 * 20 + 20 * len(self._entries[i].shape)
        )
        return len(msgspec.json.encode(self.names[i])) + claims + (self.sizes[i] >> 20)

    def add_folder(self, folder: str, parts: Sequence[list[int]]) -> None:
        weights: dict[str, str] = {}
        for index, part in enumerate(parts):
            name = shard_name(index, len(parts))
            weights |= {self.names[i]: name for i in part}
            self._add_image(f"{folder}/{name}", part)
        total = sum(self.sizes[i] for part in parts for i in part)
        index_json = {"metadata": {"total_size": total}, "weight_map": weights}
        self.add_plain(f"{folder}/{INDEX_NAME}", msgspec.json.encode(index_json))

    def _add_image(self, path: str, part: list[int]) -> None:
        entries = self._entries
        specs = [TensorSpec(self.names[i], entries[i].dtype, entries[i].shape) for i in part]
        image: ImageLayout = lay_out(specs)
        file = len(self._files)
        self._files.append(
            FileImage(
                path=path,
                offset=self._end,
                nbytes=image.nbytes,
                data_start=image.data_start,
                sums_at=image.sums_at,
            )
        )
        self._texts.append((self._end, image.header))
        for position in image.order:
            i = part[position]
            self._order.append(i)
            self._offsets[i] = self._end + image.offsets[position]
            self.entry_files[i] = file
        self._end += round_up(image.nbytes)

    def add_plain(self, path: str, content: bytes) -> None:
        self._files.append(FileImage(path=path, offset=self._end, nbytes=len(content), data_start=0, sums_at=0))
        self._texts.append((self._end, content))
        self._end += round_up(len(content))

    def finish(self, body: bytes) -> LocalPlan:
        if len({image.path for image in self._files}) < len(self._files):
            raise ValueError("a plain file has the path of another file")
        return LocalPlan(
            files=tuple(self._files),
            texts=(*self._texts, (self._end, body)),
            offsets=tuple(self._offsets),
            sizes=tuple(self.sizes),
            entry_files=tuple(self.entry_files),
            order=tuple(self._order),
            body_offset=self._end,
            body_nbytes=len(body),
            arena_nbytes=self._end + round_up(len(body)),
            data_nbytes=sum(self.sizes),
            digest=hashlib.blake2b(body, digest_size=16).hexdigest(),
        )


def _encode_body(
    entries: Sequence[Entry], canonical: Sequence[int], names: Sequence[str], files: Sequence[int], tree: Node
) -> bytes:
    classes: dict[tuple[str, tuple[int, ...], str], int] = {}
    numbers = [0] * len(entries)
    for number, i in enumerate(canonical):
        numbers[i] = number
        classes.setdefault((entries[i].dtype, entries[i].shape, entries[i].mark), len(classes))
    try:
        return msgspec.json.encode(
            Plan(
                classes=[(dtype, list(shape), mark) for dtype, shape, mark in classes],
                names=[names[i] for i in canonical],
                entry_classes=[classes[entries[i].dtype, entries[i].shape, entries[i].mark] for i in canonical],
                entry_files=[files[i] for i in canonical],
                tree=renumber(tree, numbers.__getitem__),
            )
        )
    except UnicodeEncodeError as exc:
        raise _unfit(exc.object, "text with lone surrogates has no UTF-8") from exc
    except RecursionError as exc:
        raise _unfit("state", "it is nested too deep for Python's stack") from exc
