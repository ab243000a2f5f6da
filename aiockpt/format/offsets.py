"""Where the parts of cut tensors stand in the whole ones: the text in a file's header that torch's reader knows.

A part stands under its tensor's name, with its own shape. A file that has one lists all of its tensors, those that are
whole with zeros: torch's ``HuggingFaceStorageReader`` looks each of them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import Header

__all__ = ["OFFSETS_KEY", "offsets_metadata", "saved_offsets"]

OFFSETS_KEY = "DCP_SHARDING_INFO"
"""Source: torch.distributed.checkpoint._hf_utils."""


class _Offsets(msgspec.Struct, frozen=True, gc=False):
    saved_offsets: tuple[int, ...]


_decoder = msgspec.json.Decoder(dict[str, _Offsets])


def offsets_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the text for ``__metadata__`` of a file whose tensors begin at ``offsets`` of the whole ones, by name."""
    listed = {name: {"saved_offsets": starts} for name, starts in offsets.items()}
    return {OFFSETS_KEY: msgspec.json.encode(listed).decode(), "DCP_VERSION": "1.0"}


def saved_offsets(header: Header, *, file: str) -> dict[str, tuple[int, ...]]:
    """Return where each tensor of a file begins in the whole one, by name; empty where all of the file are whole.

    Raises:
        CheckpointCorruptError: The text is none that a writer makes, or leaves a tensor out.
    """
    text = header.metadata.get(OFFSETS_KEY)
    if text is None:
        return {}
    try:
        found = {name: item.saved_offsets for name, item in _decoder.decode(text).items()}
        for name, stored in header.tensors.items():
            starts = found.get(name)
            if starts is None or len(starts) != len(stored.shape) or min(starts, default=0) < 0:
                raise ValueError(f"tensor {name!r:.200} of shape {list(stored.shape)} begins at {starts}")
    except (ValueError, RecursionError) as exc:
        raise CheckpointCorruptError(
            f"the header of {file} is not usable", why=str(exc), next="restore another step", file=file, offset=0
        ) from exc
    return found
