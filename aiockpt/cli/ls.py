"""``aiockpt ls``: the checkpoints of a run, newest first."""

from __future__ import annotations

import argparse
import os

from aiockpt.cli.listing import Checkpoint, read_listing
from aiockpt.cli.screen import console, counted, local_time, print_json, printable, size_text
from aiockpt.cli.table import Cell, Column, table

__all__ = ["run"]

_SHOWN = 50
"""Checkpoints that are listed without --all; a run may have ten thousand."""
_COLUMNS = (
    Column("step", right=True),
    Column("size", right=True),
    Column("saved", right=True),
    Column("save", right=True, rank=1),
    Column("", rank=2),
)


def run(args: argparse.Namespace) -> int:
    """Print what the run holds; 0 whatever that is."""
    if args.json:
        print_json(read_listing(args.run))
        return 0
    screen = console()
    listing = read_listing(args.run)
    shown = listing.checkpoints if args.all else listing.checkpoints[:_SHOWN]
    if shown:
        rows = [_row(entry, is_newest=index == 0) for index, entry in enumerate(shown)]
        screen.print(table(_COLUMNS, rows, screen.width), soft_wrap=True)
    if older := listing.checkpoints[len(shown) :]:
        screen.print(f"… {len(older):,} older, to step {older[-1].step}: --all lists them", style="dim", soft_wrap=True)
    total = size_text(sum(entry.nbytes for entry in listing.checkpoints))
    count = counted(len(listing.checkpoints), "checkpoint")
    screen.print(f"{count}, {total}, in {printable(listing.run)}", soft_wrap=True)
    for damaged in listing.damaged:
        name = os.path.basename(damaged.path)
        screen.print(f"damaged: {name}: {printable(damaged.why)}", style="red", soft_wrap=True)
    for bad in listing.bad:
        screen.print(f"put aside as bad: {printable(os.path.basename(bad.path))}", style="yellow", soft_wrap=True)
    return 0


def _row(entry: Checkpoint, *, is_newest: bool) -> list[Cell | str]:
    style = "bold" if is_newest else ""
    texts = (str(entry.step), size_text(entry.nbytes), local_time(entry.created), str(entry.ordinal))
    return [*(Cell(text, style) for text in texts), Cell("newest" if is_newest else "", style)]
