"""``bench gpu``: a state on a GPU, saved beside the floor of pinned copies, and what training steps lose meanwhile.

Each system runs in a process of its own: first saves alone, each beside the floor, then blocks of training steps, alone
and saving in turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import arguments, runner
from bench.entrants import OURS, SAVES, Entry, Key
from bench.floor_process import FloorProcess
from bench.machine import facts
from bench.plot import Figure
from bench.process import EntrantFailedError, EntrantProcess
from bench.results import Floors, Report, percentile, spread
from bench.sizes import gigabytes_per_second, seconds_text, size_argument, size_text
from bench.table import SYSTEM, number, seconds, size

__all__ = ["COLUMNS", "HELP", "SYSTEMS", "add_arguments", "figure", "measure"]

HELP = "a GPT with AdamW on a GPU: save() beside pinned copies, and what training steps lose"
SYSTEMS: Mapping[Key, Entry] = {
    Key(OURS, "guarded"): SAVES[Key(OURS, "guarded")],
    Key(OURS, "inline"): SAVES[Key(OURS, "inline")],
    Key("dcp.async_save thread", "default"): SAVES[Key("dcp.async_save thread", "default")],
    Key("dcp.async_save thread", "pinned stager"): Entry("bench.gpu_peers:DcpThreadPinned"),
    Key("dcp.async_save process", "shared-memory stager"): SAVES[Key("dcp.async_save process", "shared-memory stager")],
    Key("dcp.async_save process", "pinned stager"): Entry("bench.gpu_peers:DcpProcessPinned"),
    Key("torch_checkpointing", "async, buffered"): SAVES[Key("torch_checkpointing", "async, buffered")],
}
COLUMNS = (
    *SYSTEM,
    size("size", "nbytes"),
    seconds("blocked", "blocked_s"),
    seconds("staged", "staged_s"),
    seconds("durable", "durable_s"),
    number("GB/s", "gbps"),
    number("copy GB/s", "copy_gbps"),
    number("of pinned", "copy_ratio", ".2f"),
    seconds("step alone", "step_alone_s"),
    seconds("saving", "step_saving_s"),
    number("ratio", "step_ratio_median", ".3f"),
    number("p99", "step_ratio_p99", ".2f"),
    seconds("a save costs", "cost_s"),
    size("on the GPU", "device_nbytes"),
    number("saves", "saves", "d"),
)
_BLOCK = 10
"""Steps in a row of a kind."""
_FLOOR_ROUNDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument("--size", type=size_argument, default="2GiB", help="bytes of the state (default 2GiB)")
    arguments.add_rounds(parser)
    parser.add_argument(
        "--steps", type=arguments.count_argument, default=40, help="steps with a save in flight, and alone (default 40)"
    )
    parser.add_argument("--step-ms", type=arguments.count_argument, default=100, help="aimed at for a step (100)")
    parser.add_argument("--device", default="cuda", help="default cuda; cpu shows that the programs run")
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: runner.Say) -> Report:
    """Measure and return everything.

    Raises:
        EntrantFailedError: Ours failed, for want of a GPU for example.
    """
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    with tempfile.TemporaryDirectory(prefix="aiockpt-bench-", dir=args.dir) as scratch:
        for key, entry in arguments.chosen(SYSTEMS, args.peers).items():
            say(f"{key.system}, {key.case}")
            own = runner.folder(Path(scratch), key)
            try:
                report.rows.append(_measure_one(key, entry, args, own, report))
            except EntrantFailedError as exc:
                if not report.rows:  # ours comes first
                    raise
                report.skipped.append(runner.skip(key, exc))
            finally:
                shutil.rmtree(own, ignore_errors=True)
        say("floors of the disk")
        with FloorProcess(args.size, Path(scratch)) as floor:
            report.floors.samples |= floor.choose(_FLOOR_ROUNDS)
            report.floors.threads = floor.threads
    for row in report.rows:
        row["ratio_to_floor"] = report.floors.median("write") / row["gbps"]
    return report


def _measure_one(key: Key, entry: Entry, args: argparse.Namespace, directory: Path, report: Report) -> dict[str, Any]:
    given = {"place": entry.place, "role": "gpu", "state": entry.state, "size": args.size, "dir": directory}
    with EntrantProcess(given | {"device": args.device}) as process:
        entered = runner.Entered(key, process)
        report.machine["gpu"] = entered.measured.opened["gpu"]
        rounds = [_round(process) for _ in range(args.warmup + 1 + args.rounds)]
        row = _row_of_saves(entered, rounds[args.warmup + 1 :])  # guarded from the second one on
        for each in rounds:
            report.floors.add({"pinned": each["pinned"]})
        if "tokens" not in report.args:  # the same batch for all
            report.args["tokens"] = int(process.ask(f"calibrate {args.step_ms / 1e3}")["tokens"])
        process.ask(f"batch {report.args['tokens']}")
        row |= _row_of_steps(process, args.steps)
        entered.weigh(lambda: _round(process))
        process.close()
    return row | entered.measured.resources() | {"rounds": args.rounds}


def _round(process: EntrantProcess) -> dict[str, Any]:
    os.sync()  # what others left unwritten is not for this one to wait for
    times = process.ask("round")
    process.ask("discard")
    return times | process.ask("floor")


def _row_of_saves(entered: runner.Entered, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    nbytes = entered.measured.nbytes
    key = entered.measured.key
    row: dict[str, Any] = {"system": key.system, "case": key.case, "nbytes": nbytes}
    for name in ("blocked_s", "staged_s", "durable_s"):
        row |= spread(name, [each[name] for each in rounds])
    row["gbps"] = gigabytes_per_second(nbytes, row["durable_s"])
    rates = [gigabytes_per_second(nbytes, each["staged_s"]) for each in rounds]
    row |= spread("copy_gbps", rates) | spread("pinned_gbps", [each["pinned"] for each in rounds])
    row |= spread("copy_ratio", [rate / each["pinned"] for rate, each in zip(rates, rounds, strict=True)])
    return row | spread("device_nbytes", [each["device_nbytes"] for each in rounds])


def _row_of_steps(process: EntrantProcess, count: int) -> dict[str, Any]:
    process.ask("saving 2")
    alone: list[float] = []
    saving: dict[str, list[float]] = {"steps_s": [], "blocked_s": [], "durable_s": []}
    while len(saving["steps_s"]) < count:
        block = min(_BLOCK, count - len(saving["steps_s"]))
        alone += process.ask(f"alone {block}")["steps_s"]
        answer = process.ask(f"saving {block}")
        for name, values in saving.items():
            values += answer[name]
    steps = saving["steps_s"]
    row = spread("step_alone_s", alone) | spread("step_saving_s", steps)
    row["step_ratio_median"] = statistics.median(steps) / statistics.median(alone)
    row["step_ratio_p99"] = percentile(steps, 0.99) / percentile(alone, 0.99)
    row["cost_s"] = (sum(steps) - len(steps) * statistics.fmean(alone) + sum(saving["blocked_s"])) / len(
        saving["blocked_s"]
    )
    return row | {"steps": len(steps), "saves": len(saving["blocked_s"])}


def figure(report: Report) -> Figure:
    """Return what to draw."""
    nbytes = report.rows[0]["nbytes"]
    floor = nbytes / report.floors.median("pinned") / 1e9
    return Figure(
        title=f"Saving {size_text(nbytes)} from {report.machine['gpu']}, medians",
        axis="seconds (dark: save() has not returned, light: the state may not change yet)",
        rows=report.rows,
        dark=lambda row: row["blocked_s"],
        light=lambda row: row["staged_s"],
        text=lambda row: (
            f"{seconds_text(row['blocked_s'])} blocked, {seconds_text(row['staged_s'])} staged, "
            f"{seconds_text(row['durable_s'])} durable"
        ),
        line=floor,
        line_label=f"pinned copy: {seconds_text(floor)}",
    )
