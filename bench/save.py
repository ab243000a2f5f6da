"""``bench save``: how long a save holds training, and how long until it is durable."""

from __future__ import annotations

import argparse

from bench import arguments, runner
from bench.entrants import SAVES
from bench.machine import facts
from bench.plot import Figure
from bench.results import Report
from bench.sizes import seconds_text, size_argument, size_text
from bench.table import DESCRIPTORS, MEMORY, SYSTEM, number, seconds, seconds_between, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure", "report_of"]

HELP = "a GPT with AdamW: how long save() holds training, and until when it is durable"
COLUMNS = (
    *SYSTEM,
    size("size", "nbytes"),
    seconds("blocked", "blocked_s"),
    seconds_between("blocked_s"),
    seconds("may change", "staged_s"),
    seconds("durable", "durable_s"),
    seconds_between("durable_s"),
    number("GB/s", "gbps"),
    number("x floor", "ratio_to_floor", ".2f"),
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
        entries=arguments.chosen(SAVES, args.peers),
        size=args.size,
        rounds=args.rounds,
        warmup=args.warmup,
        directory=args.dir,
    )
    return report_of(runner.run(plan, runner.SaveTurns, say), args)


def report_of(outcome: runner.Outcome, args: argparse.Namespace) -> Report:
    """Return the report of a run of saves."""
    return Report(
        machine=facts(args.dir),
        args=arguments.as_json(args),
        floors=outcome.floors,
        rows=[measured.row("durable_s", "write") for measured in outcome.measured],
        skipped=outcome.skipped,
        notes=outcome.notes,
    )


def figure(report: Report) -> Figure:
    """Return what to draw."""
    nbytes = report.rows[0]["nbytes"]
    floor = nbytes / report.floors.median("write") / 1e9
    return Figure(
        title=f"Saving {size_text(nbytes)}, medians",
        axis="seconds (dark: save() has not returned, light: not yet durable)",
        rows=report.rows,
        dark=lambda row: row["blocked_s"],
        light=lambda row: row["durable_s"],
        text=lambda row: f"{seconds_text(row['blocked_s'])} blocked, {seconds_text(row['durable_s'])} durable",
        line=floor,
        line_label=f"floor of the disk: {seconds_text(floor)}",
    )
