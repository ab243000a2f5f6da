"""``bench star``: the real hub of a job against as many connections over loopback as there are ranks.

The hub runs in a process of its own, all other ranks in this one: on two cores neither takes the other's time. Nothing
is written to disk, so what is left is what ranks cost: connections, messages, decisions.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import anyio

from aiockpt.worker.star_hub import make_room
from bench import arguments, runner
from bench.entrants import OURS
from bench.machine import facts
from bench.plot import Figure
from bench.process import EntrantFailedError, EntrantProcess
from bench.results import Floors, Report, spread
from bench.sizes import seconds_text
from bench.star_crowd import Crowd
from bench.table import SYSTEM, number, seconds, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "what the hub of a job costs by the number of ranks: joins, decisions, beats, descriptors"
COLUMNS = (
    *SYSTEM,
    number("ranks", "ranks", "d"),
    seconds("all join", "join_s"),
    seconds("hub's CPU", "join_cpu_s"),
    seconds("digests in", "digests_in_s"),
    seconds("decision out", "decision_out_s"),
    seconds("written in", "written_in_s"),
    seconds("outcome out", "outcome_out_s"),
    seconds("CPU a save", "save_cpu_s"),
    number("CPU at rest, %", "rest_percent", ".2f"),
    number("descriptors", "descriptors", "d"),
    size("memory", "resident_bytes"),
    number("rounds", "rounds", "d"),
)
_STALL_SECONDS = 60.0
"""As a job has it by default."""
_BEAT_SECONDS = 10.0
"""Between two beats, then."""
_SPARE_FDS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--ranks", default="64,1024,4096", help="separated by commas (default 64,1024,4096)")
    arguments.add_rounds(parser)
    arguments.add_output(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything.

    Raises:
        EntrantFailedError: The hub failed, or not all of it was heard in time.
    """
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    for world in _worlds(args.ranks):
        say(f"{world} ranks")
        make_room(world + _SPARE_FDS)
        with EntrantProcess({"world": world, "stall": _STALL_SECONDS}, module="bench.star_process") as process:
            opened = process.answer()
            body = partial(_measure_one, process, opened, world, args)
            try:
                row = anyio.run(body, backend="asyncio", backend_options={"use_uvloop": True})
            except (OSError, ExceptionGroup) as exc:
                raise EntrantFailedError(f"{world} ranks: {exc}") from exc
            process.close()
        report.rows.append({"system": OURS, "case": "star", "ranks": world, **row, "rounds": args.rounds})
    return report


def _worlds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise EntrantFailedError(f"{text!r} are no numbers of ranks, each at least 2")
    return found


async def _measure_one(
    process: EntrantProcess, opened: dict[str, Any], world: int, args: argparse.Namespace
) -> dict[str, Any]:
    crowd = Crowd(world, opened["port"])
    try:
        row: dict[str, Any] = {"join_s": await crowd.join()}
        joined = process.ask("look")
        row["join_cpu_s"] = joined["cpu_s"] - opened["cpu_s"]
        row["descriptors"] = joined["descriptors"]
        rounds = [await _save(process, crowd, n) for n in range(args.warmup + args.rounds)]
        for name in rounds[0]:
            row |= spread(name, [each[name] for each in rounds[args.warmup :]])
        before = process.ask("look")
        crowd.beat()
        await anyio.sleep(_BEAT_SECONDS)
        after = process.ask("look")
        row["rest_percent"] = 100 * (after["cpu_s"] - before["cpu_s"]) / _BEAT_SECONDS
        row["beats"] = crowd.beats
        row["resident_bytes"] = after["resident_bytes"]
        row["resident_bytes_per_rank"] = (after["resident_bytes"] - opened["resident_bytes"]) // world
        return row
    finally:
        await crowd.leave()


async def _save(process: EntrantProcess, crowd: Crowd, n: int) -> dict[str, float]:
    """Save once: all arrive, all have written. Both processes read one monotonic clock."""
    before = process.ask(f"save {n}")
    arrived_at, decided_at = await crowd.arrive(n)
    wrote_at, ended_at = await crowd.write(n)
    after = process.ask("look")
    return {
        "digests_in_s": after["arrived_at"] - arrived_at,
        "decision_out_s": decided_at - arrived_at,
        "written_in_s": after["written_at"] - wrote_at,
        "outcome_out_s": ended_at - after["written_at"],
        "save_cpu_s": after["cpu_s"] - before["cpu_s"],
    }


def figure(report: Report) -> Figure:
    """Return what to draw."""
    rows = [{**row, "case": f"{row['ranks']} ranks"} for row in report.rows]
    whole = [_round_trips(row) for row in rows]
    return Figure(
        title="What a save waits for the star, medians",
        axis="seconds (dark: all have arrived and know the decision, light: all know the outcome)",
        rows=rows,
        dark=lambda row: row["decision_out_s"],
        light=_round_trips,
        text=lambda row: seconds_text(_round_trips(row)),
        line=statistics.median(whole),
        line_label="the middle one",
    )


def _round_trips(row: dict[str, Any]) -> float:
    return float(row["decision_out_s"] + row["written_in_s"] + row["outcome_out_s"])
