"""``bench processes``: what it takes to start processes, to learn of a death, to pass on what they print, to wait."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import arguments, runner
from bench.entrants import OURS, Entry, Key
from bench.machine import facts
from bench.plot import Figure
from bench.process_turns import ProcessTurns
from bench.results import Floors, Report
from bench.sizes import seconds_text
from bench.table import SYSTEM, number, seconds, seconds_between

__all__ = ["COLUMNS", "HELP", "SUPERVISORS", "add_arguments", "figure", "measure"]

HELP = "supervised processes: start, a death noticed, lines teed, processor time at rest, threads and descriptors"
COLUMNS = (
    *SYSTEM,
    number("children", "children", "d"),
    seconds("all there", "start_s"),
    seconds_between("start_s"),
    seconds("with torch", "start_torch_s"),
    seconds("death known", "death_known_s"),
    seconds("all stopped", "death_noticed_s"),
    seconds_between("death_noticed_s"),
    number("lines/s", "lines_per_s", ".3g"),
    number("lost", "lines_lost", "d"),
    seconds("CPU a second", "idle_cpu_s_per_s"),
    number("threads", "threads", "d"),
    number("descriptors", "open_fds", "d"),
    number("threads, no tee", "threads_no_tee", "d"),
    number("descriptors, no tee", "open_fds_no_tee", "d"),
    number("rounds", "rounds", "d"),
)
_TORCH = "torch.distributed.elastic"
SUPERVISORS: Mapping[Key, Entry] = {
    Key(OURS, ""): Entry("bench.supervising:Ours"),
    Key(_TORCH, "period 1 s"): Entry("bench.peers.elastic:Elastic"),
    Key(_TORCH, "period 0.1 s"): Entry("bench.peers.elastic:ElasticOften"),
}
"""Ours first. The period is that of torch's ``wait``: its default, and that of its agent."""
_HELD = ("threads", "open_fds", "threads_no_tee", "open_fds_no_tee")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--children", type=arguments.counts, default="1,4,16,64", help="numbers of them (1,4,16,64)")
    parser.add_argument(
        "--lines", type=arguments.count_argument, default=500_000, help="printed by all together (default 500000)"
    )
    parser.add_argument("--rounds", type=arguments.count_argument, default=3, help="of each (default 3)")
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything.

    Raises:
        EntrantFailedError: Ours failed.
    """
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    chosen = arguments.chosen(SUPERVISORS, args.peers)
    for children in args.children:
        with (
            tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=args.dir) as scratch,
            ProcessTurns(children, max(1, args.lines // children), report.skipped) as turns,
        ):
            for key, entry in chosen.items():
                say(f"{children} children, {key.system} {key.case}".rstrip())
                turns.enter(key, entry, runner.folder(Path(scratch), key))
            for n in range(args.rounds):
                say(f"{children} children, round {n + 1}")
                turns.round(n, of=args.rounds)
            report.rows += turns.rows()
    report.notes += _notes(report.rows)
    return report


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """Say what each further child takes, and what the figures do not say by themselves."""
    notes = [
        "functions: torch's own import torch in each child, ours what the function needs; 'with torch' is a function "
        "whose module imports it"
    ]
    for system, case in dict.fromkeys((row["system"], row["case"]) for row in rows):
        own = [row for row in rows if (row["system"], row["case"]) == (system, case)]
        few, many = min(own, key=_children), max(own, key=_children)
        if _children(few) < _children(many):
            threads, fds, threads_no_tee, fds_no_tee = (_each(name, few, many) for name in _HELD)
            text = f"each further child of {system}, {case}: {threads} threads, {fds} descriptors"
            notes.append(text if fds_no_tee is None else f"{text}; without tee {threads_no_tee} and {fds_no_tee}")
    return notes


def _children(row: dict[str, Any]) -> int:
    return int(row["children"])


def _each(name: str, few: dict[str, Any], many: dict[str, Any]) -> float | None:
    if few[name] is None or many[name] is None:
        return None
    return round(float(many[name] - few[name]) / (_children(many) - _children(few)), 2)


def figure(report: Report) -> Figure:
    """Return what to draw."""
    rows = [row | {"case": f"{row['case']}, {row['children']}"} for row in report.rows if "programs" in row["case"]]
    return Figure(
        title="From the death of one of 1 to 64 programs until the others are stopped, medians",
        axis="seconds (dark: it is known, light: wait() returns)",
        rows=rows,
        dark=lambda row: row["death_known_s"],
        light=lambda row: row["death_noticed_s"],
        text=lambda row: f"{seconds_text(row['death_known_s'])} known, {seconds_text(row['death_noticed_s'])} stopped",
        line=0.02,
        line_label="20 ms",
    )
