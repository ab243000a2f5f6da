"""``bench interference``: what a training step loses while saves run one behind the other.

Each system trains in a process of its own, in blocks of steps: alone, saving, alone, saving. Both kinds see the same
minutes of the machine, so what drifts cancels out of their ratio.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import arguments, runner
from bench.entrants import INTERFERENCES, Entry
from bench.floor_process import FloorProcess
from bench.machine import facts
from bench.plot import Figure
from bench.process import EntrantFailedError, EntrantProcess
from bench.results import Floors, Measured, Report, percentile, spread
from bench.sizes import gigabytes_per_second, seconds_text, size_argument, size_text
from bench.table import SYSTEM, number, seconds, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "what training steps lose while saves run one behind the other"
_FLOOR_ROUNDS = 3
_UNTIMED_STEPS = 4
COLUMNS = (
    *SYSTEM,
    size("size", "nbytes"),
    seconds("step alone", "step_alone_s"),
    seconds("saving", "step_saving_s"),
    number("ratio", "step_ratio_median", ".2f"),
    seconds("p99 alone", "step_alone_p99_s"),
    seconds("saving", "step_saving_p99_s"),
    number("ratio", "step_ratio_p99", ".2f"),
    seconds("waited", "guard_wait_s"),
    seconds("p99", "guard_wait_p99_s"),
    seconds("blocked", "blocked_s"),
    seconds("durable", "durable_s"),
    seconds("a save costs", "cost_s"),
    number("steps", "steps", "d"),
    number("saves", "saves", "d"),
)


@dataclass
class _Series:
    """All blocks of one system, seconds."""

    alone: list[float] = field(default_factory=list)
    saving: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)

    def add(self, alone: dict[str, Any], saving: dict[str, Any]) -> None:
        """Take in a block of each kind."""
        self.alone += alone["steps_s"]
        self.saving += saving["steps_s"]
        self.waits += saving["waits_s"]
        self.blocked += saving["blocked_s"]
        self.durable += saving["durable_s"]

    def row(self, measured: Measured, floors: Floors) -> dict[str, Any]:
        """Return the row of the JSON file."""
        row: dict[str, Any] = {"system": measured.key.system, "case": measured.key.case, "nbytes": measured.nbytes}
        for name, values in (("alone", self.alone), ("saving", self.saving)):
            row |= spread(f"step_{name}_s", values) | {f"step_{name}_p99_s": percentile(values, 0.99)}
        row["step_ratio_median"] = row["step_saving_s"] / row["step_alone_s"]
        row["step_ratio_p99"] = row["step_saving_p99_s"] / row["step_alone_p99_s"]
        row |= spread("guard_wait_s", self.waits) | {"guard_wait_p99_s": percentile(self.waits, 0.99)}
        row |= spread("blocked_s", self.blocked) | spread("durable_s", self.durable)
        lost = sum(self.saving) - len(self.saving) * statistics.fmean(self.alone) + sum(self.blocked)
        row["cost_s"] = lost / len(self.blocked)
        row["gbps"] = gigabytes_per_second(measured.nbytes, row["durable_s"]) if self.durable else None
        row["ratio_to_floor"] = floors.median("write") / row["gbps"] if row["gbps"] else None
        counts = {"steps": len(self.saving), "saves": len(self.blocked)}
        return row | counts | measured.resources() | {"rounds": len(self.blocked)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--size", type=size_argument, default="256MiB", help="bytes of the state (default 256MiB)")
    parser.add_argument(
        "--steps", type=arguments.count_argument, default=200, help="steps with a save in flight, and alone (200)"
    )
    parser.add_argument("--block", type=arguments.count_argument, default=20, help="steps in a row of a kind (20)")
    parser.add_argument("--threads", type=arguments.count_argument, default=2, help="threads that compute (2)")
    parser.add_argument("--step-ms", type=arguments.count_argument, default=200, help="aimed at for a step (200)")
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything."""
    entries = arguments.chosen(INTERFERENCES, args.peers)
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    with tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=args.dir) as scratch:
        say("floors")
        with FloorProcess(args.size, Path(scratch)) as floor:
            report.floors.samples = floor.choose(_FLOOR_ROUNDS)
            report.floors.threads = floor.threads
        tokens: int | None = None
        for key, entry in entries.items():
            say(f"{key.system}, {key.case}")
            own = runner.folder(Path(scratch), key)
            try:
                with _start(entry, args, own) as process:
                    entered = runner.Entered(key, process)
                    if tokens is None:  # the same batch for all
                        tokens = int(process.ask(f"calibrate {args.step_ms / 1e3}")["tokens"])
                        report.args["tokens"] = tokens
                    process.ask(f"batch {tokens}")
                    report.rows.append(_measure_one(entered, args).row(entered.measured, report.floors))
                    process.close()
            except EntrantFailedError as exc:
                if not report.rows:  # ours comes first
                    raise
                report.skipped.append(runner.skip(key, exc))
            finally:
                shutil.rmtree(own, ignore_errors=True)
    alone = statistics.median(row["step_alone_s"] for row in report.rows)
    if not 0.5 <= alone / (args.step_ms / 1e3) <= 1.5:
        report.notes.append(
            f"a step alone took {seconds_text(alone)}, not the {args.step_ms} ms that --step-ms asked for: "
            "the machine was not idle, or one optimizer step takes longer"
        )
    return report


def _start(entry: Entry, args: argparse.Namespace, directory: Path) -> EntrantProcess:
    given = {"place": entry.place, "role": "train", "state": entry.state, "size": args.size, "dir": directory}
    return EntrantProcess(given | {"threads": args.threads})


def _measure_one(entered: runner.Entered, args: argparse.Namespace) -> _Series:
    ask = entered.process.ask
    ask(f"saving {_UNTIMED_STEPS}")
    series = _Series()
    while len(series.saving) < args.steps:
        count = min(args.block, args.steps - len(series.saving))
        series.add(ask(f"alone {count}"), ask(f"saving {count}"))
    entered.weigh(lambda: ask(f"saving {_UNTIMED_STEPS}"))
    return series


def figure(report: Report) -> Figure:
    """Return what to draw."""
    alone = statistics.median(row["step_alone_s"] for row in report.rows)
    return Figure(
        title=f"Training steps of {seconds_text(alone)} while {size_text(report.rows[0]['nbytes'])} are being saved",
        axis="times as long as alone (dark: median against median, light: p99 against p99)",
        rows=report.rows,
        dark=lambda row: row["step_ratio_median"],
        light=lambda row: max(row["step_ratio_p99"], row["step_ratio_median"]),
        text=lambda row: (
            f"{row['step_ratio_median']:.2f}, p99 {row['step_ratio_p99']:.2f}; "
            f"a save costs {seconds_text(row['cost_s'])}"
        ),
        line=1.0,
        line_label="alone",
    )
