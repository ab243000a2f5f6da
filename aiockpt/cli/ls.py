"""``aiockpt ls``: the checkpoints of a run, newest first."""

from __future__ import annotations

import argparse
import datetime
import os
from typing import TYPE_CHECKING

from aiockpt.cli.listing import Listing, read_listing
from aiockpt.cli.screen import console, print_json, size_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Print what the run holds; 0 whatever that is."""
    if args.json:
        print_json(read_listing(args.run))
        return 0
    screen = console()
    listing = read_listing(args.run)
    if listing.checkpoints:
        screen.print(_table(listing))
    count = len(listing.checkpoints)
    total = size_text(sum(entry.nbytes for entry in listing.checkpoints))
    screen.print(f"{count} checkpoint{'' if count == 1 else 's'}, {total}, in {listing.run}", soft_wrap=True)
    for damaged in listing.damaged:
        screen.print(f"damaged: {os.path.basename(damaged.path)}: {damaged.why}", style="red", soft_wrap=True)
    for bad in listing.bad:
        screen.print(f"put aside as bad: {os.path.basename(bad.path)}", style="yellow", soft_wrap=True)
    return 0


def _table(listing: Listing) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", "size", "saved", "save"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for index, entry in enumerate(listing.checkpoints):
        table.add_row(
            str(entry.step),
            size_text(entry.nbytes),
            _local_time(entry.created),
            str(entry.ordinal),
            "newest" if index == 0 else "",
            style="bold" if index == 0 else None,
        )
    return table


def _local_time(created: str | None) -> str:
    """Return a time of the manifest as this machine's clock shows it; as it stands where it is no such time."""
    if created is None:
        return "-"
    try:
        return datetime.datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return created
