"""``aiockpt rm``: one checkpoint taken out of a run, then deleted.

The same way as retention goes: renamed out of sight while its manifest is locked, so that a reader is never robbed of
its files; the rename is made durable before the first file is deleted, so that a power loss leaves no checkpoint with
holes. The run's lock is not asked: making room on a full disk must not need the job to end.
"""

from __future__ import annotations

import argparse
import os

import msgspec

from aiockpt.cli.listing import Listing, find, read_listing
from aiockpt.cli.screen import console, print_json
from aiockpt.errors import StepNotFoundError, UsageError
from aiockpt.storage.commit import remove_tree, retire
from aiockpt.storage.direct import sync_dir
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.run_directory import open_run

__all__ = ["Removed", "run"]


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What is gone."""

    run: str
    step: int
    removed: list[str]
    """Names in the run directory."""


def run(args: argparse.Namespace) -> int:
    """Remove what was asked for; 0, or an error."""
    screen = None if args.json else console()
    listing = read_listing(args.run)
    names = _bad_names(listing, args.step) if args.bad else [os.path.basename(find(listing, args.step).path)]
    run_fd = open_run(listing.run)
    try:
        for name in names:
            _remove(run_fd, listing.run, name, args.step)
    finally:
        os.close(run_fd)
    if screen is None:
        print_json(Removed(run=listing.run, step=args.step, removed=names))
    else:
        screen.print(*(f"removed {name}" for name in names), sep="\n", soft_wrap=True)
    return 0


def _bad_names(listing: Listing, step: int) -> list[str]:
    names = [os.path.basename(entry.path) for entry in listing.bad if entry.step == step]
    if not names:
        raise StepNotFoundError(
            f"{listing.run} has nothing of step {step} that a restore put aside as bad",
            next=f'look with "aiockpt ls {listing.run}"',
            step=step,
            path=listing.run,
        )
    return names


def _remove(run_fd: int, run: str, name: str, step: int) -> None:
    trash = retire(run_fd, name)
    if trash is None:
        if os.access(name, os.F_OK, dir_fd=run_fd, follow_symlinks=False):
            raise UsageError(
                f"step {step} of {run} was not removed", why="somebody is reading it", next="try again later"
            )
        raise StepNotFoundError(
            f"{run} has no step {step} any more", why="somebody else removed it", step=step, path=run
        )
    with storage_errors("a removal was not made durable", run):
        sync_dir(run_fd)
    remove_tree(run_fd, trash)
