"""What is to be saved, tensor by tensor: names that fit, folders, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.image import METADATA_KEY
from aiockpt.format.names import Segments, dotted, file_name
from aiockpt.planning.placings import UNDECLARED, Placing

__all__ = [
    "MAX_DATA_NBYTES",
    "MAX_NAME_LENGTH",
    "Entry",
    "canonical_order",
    "check_sizes",
    "folders_of",
    "key_of",
    "name_in_file",
    "unfit",
]

MAX_DATA_NBYTES = 32 << 40
"""Of all tensors of a rank. No host has that much memory, but an expanded tensor of one element may claim it."""
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
    """Shape in the file, of the whole tensor."""
    mark: str = ""
    """``C128`` where the file's dtype and shape are not the tensor's."""
    placing: Placing = UNDECLARED
    """Means nothing in a job of one rank."""


def canonical_order(entries: Sequence[Entry]) -> list[int]:
    """Return the numbers of the entries in the order that every rank has, and check their names.

    Raises:
        UnsupportedValueError: Two entries have the same dotted name (names both), or a name cannot stand in a file.
    """
    # That of ``names.sort_key``, four times as fast: text compares by code points, and so do its UTF-8 bytes.
    canonical = sorted(range(len(entries)), key=lambda i: entries[i].segments)
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
        if name.endswith(METADATA_KEY) and name_in_file(segments) == METADATA_KEY:
            raise unfit(name, f"safetensors has {METADATA_KEY} for itself")
        if len(name) > MAX_NAME_LENGTH:
            raise unfit(f"{name[:80]}…", f"its name has {len(name)} characters, a header holds all names of a file")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise unfit(name, "its name has lone surrogates, and no UTF-8")
    return canonical


def check_sizes(entries: Sequence[Entry], sizes: Sequence[int]) -> None:
    """Refuse what no memory holds.

    Raises:
        UnsupportedValueError: The tensors take more than ``MAX_DATA_NBYTES``; names the largest.
    """
    if sum(sizes) > MAX_DATA_NBYTES:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        why = f"all tensors take {sum(sizes):,} bytes, this one {sizes[largest]:,}; is it expanded?"
        raise unfit(dotted(entries[largest].segments), why, "save the tensor that it was expanded from")


def unfit(key: str, why: str, next: str = "rename or rearrange its keys") -> UnsupportedValueError:
    """Return the error for something that cannot be saved."""
    return UnsupportedValueError(f"{key!r} cannot be saved", why=why, next=next, key=key)


def name_in_file(segments: Segments) -> str:
    """Return an entry's name in the file: its folder has the first segment."""
    return dotted(segments[1:] or segments)


def key_of(entry: Entry) -> str:
    """Return the key of the state that an entry stands under; empty at the very top."""
    return entry.segments[0] if len(entry.segments) > 1 else ""


def folders_of(entries: Sequence[Entry]) -> list[str]:
    """Return the folder of each entry, that of its first segment."""
    keys = {entry.segments[0]: "" for entry in entries if len(entry.segments) > 1}
    # "%state" is the name of no key: an encoded name has two hexadecimal digits behind each "%".
    top = TOP_FOLDER if TOP_FOLDER not in keys else "%" + TOP_FOLDER
    names = {key: file_name(key) for key in keys}
    return [names[entry.segments[0]] if len(entry.segments) > 1 else top for entry in entries]
