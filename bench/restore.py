"""``bench restore``: how long reading a checkpoint takes from a cold cache."""

from __future__ import annotations

import argparse
import statistics

from bench import arguments, runner
from bench.entrants import RESTORES
from bench.machine import facts
from bench.plot import Figure
from bench.results import Report
from bench.sizes import seconds_text, size_argument, size_text
from bench.table import DESCRIPTORS, MEMORY, SYSTEM, Column, number, seconds, seconds_between, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "a GPT with AdamW: how long reading it takes from a cold cache"
COLUMNS = (
    *SYSTEM,
    size("size", "nbytes"),
    seconds("restored", "blocked_s"),
    seconds_between("blocked_s"),
    number("GB/s", "gbps"),
    number("its files' floor", "floor_gbps"),
    number("x floor", "ratio_to_floor", ".2f"),
    Column("(min - max)", lambda row: f"({row['ratio_to_floor_min']:.2f} - {row['ratio_to_floor_max']:.2f})"),
    MEMORY,
    DESCRIPTORS,
    number("rounds", "rounds", "d"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--size", type=size_argument, default="2GiB", help="bytes of the state (default 2GiB)")
    arguments.add_rounds(parser)
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything."""
    plan = runner.Plan(
        entries=arguments.chosen(RESTORES, args.peers),
        size=args.size,
        rounds=args.rounds,
        warmup=args.warmup,
        directory=args.dir,
    )
    outcome = runner.run(plan, runner.RestoreTurns, say)
    return Report(
        machine=facts(args.dir),
        args=arguments.as_json(args),
        floors=outcome.floors,
        rows=[measured.row("blocked_s", "read") for measured in outcome.measured],
        skipped=outcome.skipped,
        notes=outcome.notes,
    )


def figure(report: Report) -> Figure:
    """Return what to draw."""
    nbytes = report.rows[0]["nbytes"]
    floor = nbytes / statistics.median(row["floor_gbps"] for row in report.rows) / 1e9
    return Figure(
        title=f"Restoring {size_text(nbytes)}, medians",
        axis="seconds, cold cache",
        rows=report.rows,
        dark=lambda row: row["blocked_s"],
        light=lambda row: row["blocked_s"],
        text=lambda row: f"{seconds_text(row['blocked_s'])}, {row['ratio_to_floor']:.2f} x the floor of its files",
        line=floor,
        line_label=f"floor of the files, median: {seconds_text(floor)}",
    )
