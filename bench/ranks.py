"""``bench ranks``: what a save of several ranks takes from each of them, and what being one of them costs."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from bench import arguments, runner
from bench.entrants import OURS, RANKS, Entry, Key
from bench.machine import facts
from bench.plot import Figure
from bench.process import Entrant
from bench.rank_group import RankGroup, of_rank
from bench.results import Floors, Measured, Report
from bench.sizes import seconds_text, size_argument, size_text
from bench.table import SYSTEM, number, seconds, seconds_between, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "several ranks over gloo: blocked, durable, staged and written on each, and what a rank costs"
COLUMNS = (
    *SYSTEM,
    number("ranks", "ranks", "d"),
    size("size", "nbytes"),
    seconds("blocked", "blocked_s"),
    seconds_between("blocked_s"),
    seconds("may change", "staged_s"),
    seconds("durable", "durable_s"),
    seconds_between("durable_s"),
    number("x floor", "ratio_to_floor", ".2f"),
    size("staging, a rank", "staging_bytes"),
    size("written, a rank", "written_bytes"),
    size("all ranks", "all_written_bytes"),
    number("rounds", "rounds", "d"),
)
_TIMES = ("blocked_s", "staged_s", "durable_s")
_BYTES = ("staging_bytes", "written_bytes")
_COSTS = (
    *("start_s", "formed_s", "first_blocked_s", "first_durable_s"),
    *(f"{process}_{what}" for process in ("trainer", "worker") for what in ("bytes", "fds", "threads")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--world", type=_worlds, default="2,4", help="numbers of ranks, with commas between (2,4)")
    parser.add_argument("--size", type=size_argument, default="512MiB", help="bytes of the state (default 512MiB)")
    arguments.add_rounds(parser)
    arguments.add_common(parser)


def _worlds(text: str) -> list[int]:
    found = arguments.counts(text)
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} has a job of one rank: that is bench save")
    return found


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything.

    Raises:
        EntrantFailedError: Ours failed.
    """
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    chosen = arguments.chosen(RANKS, args.peers)
    for world in args.world:
        for case in dict.fromkeys(key.case for key in chosen):
            say(f"{world} ranks, {case}")
            entries = {key: entry for key, entry in chosen.items() if key.case == case}
            _add(report, runner.run(_plan(entries, world, args), runner.SaveTurns, say), world)
    return report


def _plan(entries: dict[Key, Entry], world: int, args: argparse.Namespace) -> runner.Plan:
    def launch(entry: Entry, role: str, plan: runner.Plan, directory: Path) -> Entrant:
        return RankGroup(entry, world, plan.size, directory)

    return runner.Plan(
        entries=entries, size=args.size, rounds=args.rounds, warmup=args.warmup, directory=args.dir, launch=launch
    )


def _add(report: Report, outcome: runner.Outcome, world: int) -> None:
    for measured in outcome.measured:
        report.rows.append(_row(measured, world))
        if measured.key.system == OURS:
            report.notes += [_costs_text(measured, world, rank) for rank in (0, world - 1)]
    report.skipped += [entry | {"case": f"{entry['case']}, {world} ranks"} for entry in outcome.skipped]
    report.notes += outcome.notes
    for floor, rates in outcome.floors.samples.items():
        report.floors.samples.setdefault(floor, []).extend(rates)
    report.floors.threads |= outcome.floors.threads


def _row(measured: Measured, world: int) -> dict[str, Any]:
    row = measured.row("durable_s", "write") | {"ranks": world}
    for name in _BYTES:
        each = [int(_median(measured, of_rank(name, rank))) for rank in range(world)]
        row[name], row[f"{name}_of_ranks"] = max(each), each
    row["all_written_bytes"] = sum(row["written_bytes_of_ranks"])
    for name in _TIMES:
        row[f"{name}_of_ranks"] = [_median(measured, of_rank(name, rank)) for rank in range(world)]
    if measured.key.system == OURS:
        row["costs_of_ranks"] = [_costs(measured, rank) for rank in range(world)]
    return row


def _median(measured: Measured, name: str) -> float:
    return statistics.median(each.times[name] for each in measured.rounds)


def _costs(measured: Measured, rank: int) -> dict[str, float]:
    return {name: measured.opened[of_rank(name, rank)] for name in _COSTS}


def _costs_text(measured: Measured, world: int, rank: int) -> str:
    """Say what being one of several costs, for rank 0, which has the hub, and for the last one."""
    costs = _costs(measured, rank)
    return (
        f"rank {rank} of {world}, {measured.key.case}: trainer +{costs['trainer_fds']} descriptors, "
        f"+{costs['trainer_threads']} threads, +{size_text(costs['trainer_bytes'])}; worker {costs['worker_fds']} "
        f"descriptors, {costs['worker_threads']} threads, {size_text(costs['worker_bytes'])} beside the arena; open "
        f"{seconds_text(costs['start_s'])}, together {seconds_text(costs['formed_s'])}, first save "
        f"{seconds_text(costs['first_blocked_s'])} blocked, {seconds_text(costs['first_durable_s'])} durable"
    )


def figure(report: Report) -> Figure:
    """Return what to draw."""
    nbytes = report.rows[0]["nbytes"]
    floor = nbytes / report.floors.median("write") / 1e9
    return Figure(
        title=f"Saving {size_text(nbytes)} by several ranks, the slowest of them, medians",
        axis="seconds (dark: save() has not returned, light: not yet durable)",
        rows=[row | {"case": f"{row['case']}, {row['ranks']} ranks"} for row in report.rows],
        dark=lambda row: row["blocked_s"],
        light=lambda row: row["durable_s"],
        text=lambda row: f"{seconds_text(row['blocked_s'])} blocked, {seconds_text(row['durable_s'])} durable",
        line=floor,
        line_label=f"floor of the disk: {seconds_text(floor)}",
    )
