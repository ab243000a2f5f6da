"""The options that several questions share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.entrants import OURS, Entry, Key

__all__ = ["add_common", "add_output", "add_rounds", "as_json", "chosen", "count_argument", "counts"]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every question takes."""
    parser.add_argument("--peers", default="all", help="names separated by commas, all, or none (default all)")
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add where things go."""
    parser.add_argument("--dir", type=Path, default=Path("."), help="where to write, on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them here")


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Add how often to measure."""
    parser.add_argument("--rounds", type=count_argument, default=5, help="timed rounds of each system (default 5)")
    parser.add_argument("--warmup", type=count_argument, default=1, help="rounds before them (default 1)")


def count_argument(text: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Return the numbers of ``4,16``.

    Raises:
        argparse.ArgumentTypeError: One is none.
    """
    return [count_argument(part) for part in text.split(",")]


def chosen(entries: Mapping[Key, Entry], peers: str) -> dict[Key, Entry]:
    """Return the entries that ``--peers`` leaves, ours always among them.

    Raises:
        SystemExit: It names nobody that there is; exit code 2.
    """
    known = {key.system for key in entries} - {OURS}
    wanted = {name.strip() for name in peers.split(",")}
    wanted = known if peers == "all" else set() if peers == "none" else wanted
    if wanted - known:
        unknown = ", ".join(sorted(wanted - known))
        print(f"unknown peers {unknown}; there are: {', '.join(sorted(known))}", file=sys.stderr)
        raise SystemExit(2)
    return {key: entry for key, entry in entries.items() if key.system in {OURS, *wanted}}


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for the report."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
