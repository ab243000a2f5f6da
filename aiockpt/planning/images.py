"""File images in the arena: the local plan, and what puts file behind file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.image import TensorSpec, lay_out, round_up
from aiockpt.protocol.messages import FileImage

__all__ = ["MAX_FILE_ENTRIES", "ImageBuilder", "LocalPlan", "Part"]

MAX_FILE_ENTRIES = 100_000
"""Tensors in one file: a reader that wants one of them parses the header of all."""


class Part(NamedTuple):
    """A block of a tensor that this rank stages."""

    entry: int
    local_offsets: tuple[int, ...]
    """Where it begins in this rank's local tensor, by dimension; in the file's terms, as all shapes here."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """Where everything of one rank lies.

    It is about *parts*. In a job of one rank part ``i`` is all of entry ``i``, entries numbered as they were given, and
    ``parts`` is empty.
    """

    files: tuple[FileImage, ...]
    texts: tuple[tuple[int, bytes], ...]
    """(arena offset, bytes) that are the same in each save: headers, plain files, the plan's body."""
    offsets: tuple[int, ...]
    """Arena byte offset of each part."""
    sizes: tuple[int, ...]
    """Bytes of each part."""
    entry_files: tuple[int, ...]
    """Index into ``files`` of each part."""
    order: tuple[int, ...]
    """Part numbers as they lie in the arena."""
    body_offset: int
    body_nbytes: int
    arena_nbytes: int
    """Bytes of the slot, a multiple of 4096."""
    data_nbytes: int
    """Bytes of all parts."""
    digest: str
    """Of names, dtypes, shapes, placings and tree; equal on ranks with equal plans."""
    parts: tuple[Part, ...] = ()
    """With several ranks: what this one stages."""
    extra_files: tuple[int, ...] = ()
    """Indices of the files of undeclared tensors, which are written only where the ranks' contents have been compared
    and no lower rank has them all."""
    extra_keys: tuple[str, ...] = ()
    """Of each of them the key of the state that its tensors stand under; empty for those at the very top."""
    own: bytes = b""
    """What this rank has for itself: JSON of a ``format.manifest.Plan``; empty where that is nothing."""
    common_values: tuple[int, ...] = ()
    """With several ranks: numbers of the values that the body's tree counts, in its order."""
    own_values: tuple[int, ...] = ()
    """Numbers of the values that the tree of ``own`` counts, in its order."""


class ImageBuilder:
    """Puts file after file into the arena.

    Args:
        specs: Name in its file, dtype and shape of each part.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._texts: list[tuple[int, bytes]] = []
        self._order: list[int] = []
        self._offsets = [0] * len(specs)
        self._end = 0
        self.files: list[FileImage] = []
        self.sizes = [nbytes_of(dtype, shape) for _, dtype, shape in specs]
        self.spec_files = [0] * len(specs)

    def cut(
        self, members: Sequence[int], max_entries: int, max_header_nbytes: int, *, with_offsets: bool = False
    ) -> Iterator[list[int]]:
        """Yield the members of each file of a folder; nothing where there are none."""
        part: list[int] = []
        header_nbytes = 0
        for i in members:
            nbytes = self._header_nbytes(i, with_offsets)
            if part and (len(part) >= max_entries or header_nbytes + nbytes > max_header_nbytes):
                yield part
                part, header_nbytes = [], 0
            part.append(i)
            header_nbytes += nbytes
        if part:
            yield part

    def _header_nbytes(self, i: int, with_offsets: bool) -> int:
        """Return how much a part adds to a header at most: name, claims, and 16 digits for each 16 MiB."""
        name, _, shape = self._specs[i]
        claims = len('"":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]},') + 2 * 20 + 20 * len(shape)
        encoded = msgspec.json.encode(name)
        if with_offsets:  # the name stands in a text that stands in the header
            claims += (
                len(msgspec.json.encode(encoded.decode())) + len(r"\"\":{\"saved_offsets\":[]},") + 20 * len(shape)
            )
        return len(encoded) + claims + (self.sizes[i] >> 20)

    def add_image(self, path: str, members: Sequence[int], metadata: Mapping[str, str] | None = None) -> None:
        """Put a tensor file of some of the parts behind the last file."""
        image = lay_out([self._specs[i] for i in members], metadata)
        file = len(self.files)
        self.files.append(
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
            i = members[position]
            self._order.append(i)
            self._offsets[i] = self._end + image.offsets[position]
            self.spec_files[i] = file
        self._end += round_up(image.nbytes)

    def add_plain(self, path: str, content: bytes) -> None:
        """Put a plain file behind the last file."""
        self.files.append(FileImage(path=path, offset=self._end, nbytes=len(content), data_start=0, sums_at=0))
        self._texts.append((self._end, content))
        self._end += round_up(len(content))

    def finish(
        self,
        body: bytes,
        *,
        parts: Sequence[Part] = (),
        extra_files: Sequence[int] = (),
        extra_keys: Sequence[str] = (),
        own: bytes = b"",
        common_values: Sequence[int] = (),
        own_values: Sequence[int] = (),
    ) -> LocalPlan:
        """Put the body behind the last file, and return the plan.

        Raises:
            ValueError: A plain file has the path of another file.
        """
        if len({image.path for image in self.files}) < len(self.files):
            raise ValueError("a plain file has the path of another file")
        return LocalPlan(
            files=tuple(self.files),
            texts=(*self._texts, (self._end, body)),
            offsets=tuple(self._offsets),
            sizes=tuple(self.sizes),
            entry_files=tuple(self.spec_files),
            order=tuple(self._order),
            body_offset=self._end,
            body_nbytes=len(body),
            arena_nbytes=self._end + round_up(len(body)),
            data_nbytes=sum(self.sizes),
            digest=hashlib.blake2b(body, digest_size=16).hexdigest(),
            parts=tuple(parts),
            extra_files=tuple(extra_files),
            extra_keys=tuple(extra_keys),
            own=own,
            common_values=tuple(common_values),
            own_values=tuple(own_values),
        )
