"""``bench exchange``: ranks agree on plans over the star that they have anyway, or by a gloo group of their workers."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import arguments, runner
from bench.entrants import OURS
from bench.machine import facts
from bench.plot import Figure
from bench.process import EntrantProcess
from bench.results import Floors, Report, spread
from bench.sizes import seconds_text
from bench.star_process import digest_of
from bench.table import SYSTEM, number, seconds, seconds_between, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "what it takes workers to exchange a plan: over their star, or by a gloo group, which needs torch in them"
COLUMNS = (
    *SYSTEM,
    number("ranks", "ranks", "d"),
    seconds("worker ready", "ready_s"),
    seconds("of it torch", "import_s"),
    seconds("group", "group_s"),
    size("PSS of each", "pss_bytes"),
    size("resident", "rss_bytes"),
    number("descriptors", "fds", "d"),
    seconds("exchange", "exchange_s"),
    seconds_between("exchange_s"),
    number("rounds", "rounds", "d"),
)
_AHEAD_SECONDS = 0.1
"""From the command to the moment at which all begin."""
_STALL_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument(
        "--world", type=arguments.counts, default="4,16", help="numbers of ranks, commas between (4,16)"
    )
    arguments.add_rounds(parser)
    arguments.add_output(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything.

    Raises:
        EntrantFailedError: A process failed.
    """
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    for world in args.world:
        say(f"{world} ranks, star")
        report.rows.append({"system": OURS, "case": "star", "ranks": world, **_star(world, args)})
        say(f"{world} ranks, gloo")
        report.rows.append({"system": "gloo", "case": "group", "ranks": world, **_gloo(world, args)})
    return report


def _star(world: int, args: argparse.Namespace) -> dict[str, Any]:
    with EntrantProcess({"world": world, "stall": _STALL_SECONDS}, module="bench.star_process") as hub:
        port = hub.answer()["port"]
        with contextlib.ExitStack() as stack:
            members = [_start(stack, "star", rank, world, port) for rank in range(1, world)]

            def exchange(n: int, at: float) -> list[float]:
                for member in members:
                    member.tell(f"exchange {n} {at}")
                # Rank 0 comes right behind, so that the plan is asked of a member: the dearer way.
                time.sleep(max(0.0, at - time.monotonic()))
                hub.tell(f"save {n} {digest_of(n)}")
                hub.answer()
                return [member.answer()["known_at"] for member in members]

            row = _row([member.answer() for member in members], exchange, args)
            for member in members:
                member.close()
        hub.close()
    return row


def _gloo(world: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=args.dir) as scratch, contextlib.ExitStack() as stack:
        members = [_start(stack, "gloo", rank, world, Path(scratch) / "meet") for rank in range(world)]

        def exchange(n: int, at: float) -> list[float]:
            for member in members:
                member.tell(f"exchange {n} {at}")
            return [member.answer()["known_at"] for member in members]

        row = _row([member.answer() for member in members], exchange, args)
        for member in members:
            member.close()
    return row


def _start(stack: contextlib.ExitStack, how: str, rank: int, world: int, place: object) -> EntrantProcess:
    given = {"how": how, "rank": rank, "world": world, "place": place, "spawned": time.monotonic()}
    return stack.enter_context(EntrantProcess(given, module="bench.exchange_process"))


def _row(opened: Sequence[dict[str, Any]], exchange: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the slowest rank took, and the dearest holds."""
    row = {name: max(each[name] for each in opened) for name in opened[0]}
    took = []
    for n in range(args.warmup + args.rounds):
        at = time.monotonic() + _AHEAD_SECONDS
        took.append(max(exchange(n, at)) - at)
    return row | spread("exchange_s", took[args.warmup :]) | {"rounds": args.rounds}


def figure(report: Report) -> Figure:
    """Return what to draw."""
    return Figure(
        title="A worker until it can exchange plans, the slowest rank",
        axis="seconds (dark: of it the import of torch, light: all)",
        rows=[row | {"case": f"{row['case']}, {row['ranks']} ranks"} for row in report.rows],
        dark=lambda row: row["import_s"],
        light=lambda row: row["ready_s"],
        text=lambda row: f"{seconds_text(row['ready_s'])}, then {seconds_text(row['exchange_s'])} an exchange",
        line=0.5,
        line_label="a worker should be up in 0.5 s",
    )
