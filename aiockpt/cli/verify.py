"""``aiockpt verify``: every byte of a checkpoint read, every checksum compared."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import msgspec

from aiockpt.cli.listing import Checkpoint, Damaged, Listing, find, newest, read_target
from aiockpt.cli.screen import console, counted, print_json, printable, reading_bar, size_text
from aiockpt.errors import CheckpointCorruptError, CheckpointError, StepNotFoundError
from aiockpt.format.names import MANIFEST_NAME
from aiockpt.storage.readers import open_checkpoint
from aiockpt.storage.verify import verify_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Report", "Verdict", "run"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one checkpoint."""

    step: int
    path: str
    ok: bool
    nbytes: int = 0
    """Read and found good."""
    seconds: float = 0.0
    file: str | None = None
    """The first bad file, None where all are good."""
    offset: int | None = None
    """Where in it; None where it is missing."""
    expected: str | None = None
    found: str | None = None
    why: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in a run."""

    run: str
    ok: bool
    checkpoints: list[Verdict]


def run(args: argparse.Namespace) -> int:
    """Verify what was asked for; 1 where something is bad."""
    screen = None if args.json else console()
    listing = read_target(args.run)
    verdicts: list[Verdict] = []
    for entry in _wanted(listing, args.step, every=args.all):
        with nullcontext() if screen is None else reading_bar(f"step {entry.step}", _nbytes(entry)) as progress:
            verdict = _verify(entry, progress)
        if verdict is None:
            if not args.all:
                find(read_target(args.run), entry.step)  # says that it is gone
            continue
        verdicts.append(verdict)
        if screen is not None:
            _show(screen, verdict)
    ok = all(verdict.ok for verdict in verdicts)
    if screen is not None and len(verdicts) > 1:
        bad = sum(not verdict.ok for verdict in verdicts)
        screen.print(f"{counted(len(verdicts), 'checkpoint')}, {f'{bad} BAD' if bad else 'all good'}")
    if args.json:
        print_json(Report(run=listing.run, ok=ok, checkpoints=verdicts))
    return 0 if ok else 1


def _wanted(listing: Listing, step: int | None, *, every: bool) -> list[Checkpoint | Damaged]:
    """Return what to look at: one step, all, or the newest with what cannot be told from it for want of a manifest."""
    if step is not None:
        return [find(listing, step)]
    if not listing.checkpoints and not listing.damaged:
        newest(listing)  # says that there is none
    if every:
        return sorted((*listing.checkpoints, *listing.damaged), key=lambda entry: entry.step)
    return [*listing.checkpoints[:1], *listing.damaged]


def _nbytes(entry: Checkpoint | Damaged) -> int | None:
    """Return what there is to read, where that can be known."""
    with suppress(CheckpointError), open_checkpoint(entry.path) as checkpoint:
        return sum(record.nbytes for record in checkpoint.manifest.files)
    return None


def _verify(entry: Checkpoint | Damaged, progress: Callable[[int], None] | None) -> Verdict | None:
    """Look at one checkpoint; None where retention removed it since it was listed."""
    if isinstance(entry, Damaged):
        file = f"{entry.path}/{MANIFEST_NAME}"
        return Verdict(step=entry.step, path=entry.path, ok=False, file=file, why=entry.why)
    start = time.monotonic()
    try:
        nbytes = verify_checkpoint(entry.path, on_progress=progress)
    except StepNotFoundError:
        return None
    except CheckpointCorruptError as exc:
        return Verdict(
            step=entry.step,
            path=entry.path,
            ok=False,
            seconds=time.monotonic() - start,
            file=exc.file,
            offset=exc.offset,
            expected=exc.expected,
            found=exc.found,
            why=exc.why,
        )
    return Verdict(step=entry.step, path=entry.path, ok=True, nbytes=nbytes, seconds=time.monotonic() - start)


def _show(screen: Console, verdict: Verdict) -> None:
    if verdict.ok:
        rate = size_text(verdict.nbytes / max(verdict.seconds, 1e-9))
        screen.print(f"step {verdict.step}: good, {size_text(verdict.nbytes)} at {rate}/s", style="green")
        return
    file = os.path.relpath(verdict.file, verdict.path) if verdict.file else "?"
    place = f"{file}, offset {verdict.offset}" if verdict.offset is not None else file
    text = f"step {verdict.step}: BAD: {place}: {verdict.why}"
    if verdict.expected and verdict.found and verdict.expected not in verdict.why:
        text += f" (expected {verdict.expected}, found {verdict.found})"
    screen.print(printable(text), style="red", soft_wrap=True)
