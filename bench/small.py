"""``bench small``: many small tensors, where a save costs per tensor instead of per byte."""

from __future__ import annotations

import argparse

from bench import arguments, runner, save
from bench.entrants import SMALLS
from bench.plot import Figure
from bench.results import Report
from bench.sizes import size_argument, size_text

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "10,000 tensors of 4 KiB: what a save costs per tensor"
COLUMNS = save.COLUMNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--count", type=arguments.count_argument, default=10_000, help="tensors (default 10000)")
    parser.add_argument("--nbytes", type=size_argument, default="4KiB", help="bytes of each (default 4KiB)")
    parser.add_argument(
        "--nofile",
        type=arguments.count_argument,
        help="descriptors that each system may have open (RLIMIT_NOFILE; default: as here)",
    )
    arguments.add_rounds(parser)
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything."""
    plan = runner.Plan(
        entries=arguments.chosen(SMALLS, args.peers),
        size=args.count * args.nbytes,
        tensor_nbytes=args.nbytes,
        rounds=args.rounds,
        warmup=args.warmup,
        directory=args.dir,
        nofile=args.nofile,
    )
    return save.report_of(runner.run(plan, runner.SaveTurns, say), args)


def figure(report: Report) -> Figure:
    """Return what to draw."""
    drawn = save.figure(report)
    count, nbytes = report.args["count"], size_text(report.args["nbytes"])
    return Figure(**{**vars(drawn), "title": f"Saving {count:,} tensors of {nbytes}, medians"})
