"""``aiockpt export``: a checkpoint's tensors as files that other programs read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from aiockpt.cli.late_bar import LateBar
from aiockpt.cli.listing import find, newest, read_target, readable
from aiockpt.cli.screen import console, counted, print_json, printable, size_text
from aiockpt.interchange.exporting import MAX_SHARD_NBYTES, Exported, export_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]

_MOST_NOTES = 10


def run(args: argparse.Namespace) -> int:
    """Export what was asked for; 0, or an error."""
    screen = None if args.json else console()
    listing = read_target(args.run)
    entry = readable(newest(listing) if args.step is None else find(listing, args.step))
    with LateBar(f"step {entry.step}", is_shown=screen is not None) as bar:
        exported = export_checkpoint(
            entry.path,
            args.to,
            part=args.part,
            tensors=args.tensors,
            max_shard_nbytes=args.max_shard_size or MAX_SHARD_NBYTES,
            on_total=bar.begin,
            on_progress=lambda nbytes: bar.advance(nbytes),
        )
    if screen is None:
        print_json(exported)
    else:
        _show(screen, exported)
    return 0


def _show(screen: Console, exported: Exported) -> None:
    files = f", {len(exported.files)} files" if len(exported.files) > 1 else ""
    screen.print(
        f"step {exported.step}: {counted(exported.tensors, 'tensor')}, "
        f"{size_text(exported.nbytes)}{files}, in {exported.path}",
        soft_wrap=True,
    )
    if exported.values_left_out:
        screen.print(f"left out: {counted(exported.values_left_out, 'value')}, which a .pt file would hold")
    notes = [f"tied: {name} is {kept}" for name, kept in exported.tied.items()]
    notes += [f"converted: {name}: {what}" for name, what in exported.converted.items()]
    for note in notes[:_MOST_NOTES]:
        screen.print(printable(note), soft_wrap=True)
    if len(notes) > _MOST_NOTES:
        screen.print(f"and {len(notes) - _MOST_NOTES} more notes; --json has all")
