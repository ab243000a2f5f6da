"""``aiockpt inspect``: what a checkpoint holds, and where it lies; no tensor is read."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import msgspec

from aiockpt.cli.contents import Tensor, Value, open_of_rank_0, refuse_idle, tensors_of, values_of
from aiockpt.cli.inspect_screen import show_tensors, show_tree
from aiockpt.cli.listing import find, newest, read_target, readable
from aiockpt.cli.screen import console, print_json
from aiockpt.errors import ConfigError
from aiockpt.restoring.selection import Selection
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["File", "Inspection", "run"]


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the checkpoint."""

    path: str
    """Relative to the checkpoint."""
    nbytes: int
    tensors: int


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds, for programs."""

    path: str
    step: int
    created: str
    """UTC, ISO 8601."""
    package: str
    """Version of aiockpt that wrote it."""
    term: int
    ordinal: int
    save_id: str
    world_size: int
    nbytes: int
    metadata: Any
    """As the file format encodes it, like all values."""
    files: list[File]
    tensors: list[Tensor]
    values: list[Value]


def run(args: argparse.Namespace) -> int:
    """Show what was asked for; 0, or an error."""
    screen = None if args.json else console()
    names = Selection(args.tensors)
    listing = read_target(args.run)
    entry = readable(newest(listing) if args.step is None else find(listing, args.step))
    with open_of_rank_0(entry.path) as checkpoint:
        refuse_idle(names, checkpoint.manifest)
        if screen is None:
            print_json(_inspection(checkpoint, names))
        elif names.everything:
            newer = [other.step for other in listing.checkpoints].index(entry.step)
            show_tree(screen, checkpoint.manifest, listing.run, newer=newer, count=len(listing.checkpoints))
        else:
            tensors = tensors_of(checkpoint, names)
            if not tensors:
                raise ConfigError(
                    f"no tensor of step {entry.step} is named {', '.join(map(repr, args.tensors))}",
                    why="what has this name is a value",
                    next="look at it without --tensors",
                    argument="tensors",
                )
            show_tensors(screen, tensors)
    return 0


def _inspection(checkpoint: OpenCheckpoint, names: Selection) -> Inspection:
    manifest = checkpoint.manifest
    head = manifest.head
    counts = Counter(manifest.plan.entry_files)
    return Inspection(
        path=checkpoint.path,
        step=head.step,
        created=head.created,
        package=head.package,
        term=head.term,
        ordinal=head.ordinal,
        save_id=head.save_id,
        world_size=head.world_size,
        nbytes=head.nbytes,
        metadata=manifest.metadata,
        files=[
            File(path=record.path, nbytes=record.nbytes, tensors=counts[index])
            for index, record in enumerate(manifest.files)
        ],
        tensors=tensors_of(checkpoint, names),
        values=values_of(manifest, names),
    )
