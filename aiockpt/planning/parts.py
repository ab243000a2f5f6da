"""The parts that a rank stages, and which of them share a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiockpt.format.image import TensorSpec
from aiockpt.format.names import shard_name
from aiockpt.format.offsets import offsets_metadata
from aiockpt.planning.division import Block
from aiockpt.planning.images import ImageBuilder, Part

__all__ = ["PartList"]


class PartList:
    """Parts in the order in which they were added.

    Args:
        specs: By entry: name in its file, dtype, shape of the whole tensor.
        folders: By entry.
        limits: Entries and header bytes of a file.
    """

    def __init__(self, specs: Sequence[TensorSpec], folders: Sequence[str], limits: tuple[int, int]) -> None:
        self._entry_specs = specs
        self._folders = folders
        self._limits = limits
        self._starts: dict[int, tuple[int, ...]] = {}
        self._layers: dict[str, list[list[int]]] = {}
        self._extra: dict[str, list[int]] = {}
        self.parts: list[Part] = []
        self.specs: list[TensorSpec] = []
        """By part."""

    def add_block(self, entry: int, block: Block, depth: int) -> None:
        """Add a box of a tensor; those of one ``depth`` may share a file, which has each name once."""
        number = self._add(entry, block.chunk.local_offsets, block.chunk.shape)
        if not block.is_whole:
            self._starts[number] = block.chunk.offsets
        layers = self._layers.setdefault(self._folders[entry], [[]])
        while len(layers) <= depth:
            layers.append([])
        layers[depth].append(number)

    def add_whole(self, entry: int, *, extra: bool = False) -> int:
        """Add all of a tensor, and return its part; ``extra`` ones stand in files of their own."""
        shape = self._entry_specs[entry].shape
        number = self._add(entry, (0,) * len(shape), shape)
        if extra:
            self._extra.setdefault(self._folders[entry], []).append(number)
        else:
            self._layers.setdefault(self._folders[entry], [[]])[0].append(number)
        return number

    def _add(self, entry: int, local_offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
        name, dtype, _ = self._entry_specs[entry]
        self.parts.append(Part(entry, local_offsets, shape))
        self.specs.append(TensorSpec(name, dtype, shape))
        return len(self.parts) - 1

    def main_files(self, builder: ImageBuilder, folder: str) -> Iterator[list[int]]:
        """Yield the parts of each file of a folder; extra ones aside."""
        layers = self._layers.get(folder, [])
        with_offsets = any(number in self._starts for layer in layers for number in layer)
        for layer in layers:
            yield from builder.cut(layer, *self._limits, with_offsets=with_offsets)

    def extra_files(self, builder: ImageBuilder, folder: str) -> Iterator[list[int]]:
        """Yield the parts of each extra file of a folder."""
        yield from builder.cut(self._extra.get(folder, []), *self._limits)

    def add_images(self, builder: ImageBuilder, rank: int, world: int) -> list[int]:
        """Lay out all tensor files, and return which of them are extra ones: these come last."""
        for folder in sorted(self._layers):
            for part, members in enumerate(self.main_files(builder, folder), start=1):
                path = f"{folder}/{shard_name(rank, world, part=part)}"
                builder.add_image(path, members, self._metadata(members))
        first_extra = len(builder.files)
        for folder in sorted(self._extra):
            for part, members in enumerate(self.extra_files(builder, folder), start=1):
                builder.add_image(f"{folder}/{shard_name(rank, world, part=part, extra=True)}", members)
        return list(range(first_extra, len(builder.files)))

    def _metadata(self, members: Sequence[int]) -> dict[str, str] | None:
        if self._starts.keys().isdisjoint(members):
            return None
        zeros = ((0,) * len(self.specs[i].shape) for i in members)
        return offsets_metadata(
            {self.specs[i].name: self._starts.get(i, whole) for i, whole in zip(members, zeros, strict=True)}
        )
