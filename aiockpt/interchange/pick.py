"""What of a checkpoint goes out, and under which names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from aiockpt.errors import ConfigError
from aiockpt.format.image import METADATA_KEY
from aiockpt.format.manifest import Manifest
from aiockpt.format.names import INDEX_NAME, Segments, dotted, file_name, sort_key
from aiockpt.format.tree import Node, children, is_blob, walk
from aiockpt.restoring.selection import Selection

__all__ = ["Outgoing", "Picked", "find_part", "pick", "plain_files"]


_MOST_NAMED = 10


class Outgoing(NamedTuple):
    """A tensor and its name in the new file."""

    name: str
    entry: int


@dataclass(frozen=True, slots=True)
class Picked:
    """What safetensors can hold of what was asked for."""

    tensors: list[Outgoing]
    """Each once, under the first of its names in sorted order, in the order of the state."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tied tensors, with the name that the tensor has."""
    value_count: int = 0
    """Values that no tensor holds."""


def pick(manifest: Manifest, selection: Selection, part: str | None) -> Picked:
    """Choose by name.

    Args:
        manifest: Of the checkpoint.
        selection: Of full dotted names.
        part: Dotted name of what alone goes out, its tensors under names without it; None is everything.

    Raises:
        ConfigError: There is no such part, or no tensor is left.
    """
    above = () if part is None else find_part(manifest.plan.tree, part, step=manifest.head.step)[0]
    names: dict[int, list[Segments]] = {}
    value_count = 0
    for path, leaf in walk(manifest.plan.tree):
        if path[: len(above)] != above or path == above or not selection.takes_whole(dotted(path)):
            continue
        if isinstance(leaf, int) and leaf < 0:
            value_count += 1
        else:
            names.setdefault(leaf[1] if is_blob(leaf) else leaf, []).append(path[len(above) :])
    if not names:
        raise ConfigError(
            f"step {manifest.head.step} has no tensor to export",
            why=f"what was chosen holds {value_count} value{'' if value_count == 1 else 's'}, and no tensor",
            next="export to a .pt file, which holds values too",
            argument="part" if part is not None else "tensors",
        )
    return _named(names, value_count)


def _named(names: dict[int, list[Segments]], value_count: int) -> Picked:
    tensors = []
    others = []
    for entry, paths in names.items():
        first, *rest = sorted(paths, key=sort_key)
        tensors.append(Outgoing(dotted(first), entry))
        others += [(dotted(path), dotted(first)) for path in rest]
    taken = {outgoing.name for outgoing in tensors}
    if METADATA_KEY in taken:
        raise ConfigError(
            f"a tensor has the name {METADATA_KEY}, which safetensors has for itself",
            next="leave --part out, or export to a .pt file",
            argument="part",
        )
    return Picked(tensors, {alias: name for alias, name in others if alias not in taken}, value_count)


def find_part(tree: Node, part: str, *, step: int) -> tuple[Segments, Node]:
    """Return path and node of what has this dotted name.

    Raises:
        ConfigError: Nothing has.
    """
    found = _find(tree, part, ())
    if found is None:
        tops = [] if isinstance(tree, int) or is_blob(tree) else [segment for segment, _ in children(tree)]
        raise ConfigError(
            f"step {step} has no part {part!r}",
            why=f"at the top it has {', '.join(tops[:_MOST_NAMED]) or 'nothing'}{', …' * (len(tops) > _MOST_NAMED)}",
            next="give the dotted name of a mapping or a module in it",
            argument="part",
        )
    return found


def _find(node: Node, part: str, path: Segments) -> tuple[Segments, Node] | None:
    if isinstance(node, int) or is_blob(node):
        return None
    for segment, child in children(node):
        here = (*path, segment)
        if part == segment:
            return here, child
        if part.startswith(f"{segment}.") and (found := _find(child, part[len(segment) + 1 :], here)) is not None:
            return found
    return None


def plain_files(manifest: Manifest, part: str | None) -> dict[str, int]:
    """Return name and file number of the plain files beside a part's tensors, such as ``config.json``."""
    above = () if part is None else find_part(manifest.plan.tree, part, step=manifest.head.step)[0]
    folder = file_name(above[0]) if len(above) == 1 else None  # a folder is a top-level key
    files = {}
    for number, record in enumerate(manifest.files):
        home, _, name = record.path.rpartition("/")
        if not record.data_start and home == folder and name != INDEX_NAME:
            files[name] = number
    return files
