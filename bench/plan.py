"""``bench plan``: what planning costs for many ranks, each rank alone and rank 0 for all of them.

The real planning code runs for ranks that do not exist: nothing is allocated, sent or written. A rank's plan depends
on its own number alone, so some of them are made, and the others take as long. Times are of the processor.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from aiockpt.format.manifest import FileRecord, Head, Plan, decode_manifest, encode_manifest, encode_own
from aiockpt.format.names import shard_name
from aiockpt.format.ranks import plan_for
from aiockpt.planning.body import decode_body
from aiockpt.planning.division import divide
from aiockpt.planning.global_plan import GlobalPlan, merge
from aiockpt.planning.local import LocalPlan, PlanCache, plan_local
from aiockpt.planning.placings import replicated
from aiockpt.planning.sharding import Cut, Sharding
from bench import arguments
from bench.entrants import OURS
from bench.machine import facts
from bench.plan_states import state_of
from bench.plot import Figure
from bench.results import Floors, Report
from bench.sizes import seconds_text
from bench.table import SYSTEM, number, seconds, size

__all__ = ["COLUMNS", "HELP", "add_arguments", "figure", "measure"]

HELP = "plans, digests, global plan and manifest of 8 to 4,096 ranks, simulated"
_T = TypeVar("_T")
_DCP = "dcp planner"
_LIMIT_SECONDS = 60
"""How long rank 0's part of a peer may take."""
_START_SECONDS = 900
"""How long a peer may take to make the plans that its rank 0 is given, which is not timed."""
_STAGES = 64
_HOSTS = 8
"""Ranks of a host: the mesh of HSDP is hosts times these."""
_REPEATS = 3
_DIGEST_NBYTES = 16
COLUMNS = (
    *SYSTEM,
    number("ranks", "ranks", "d"),
    number("bodies", "bodies", "d"),
    number("entries", "entries", "d"),
    seconds("first plan", "local_s"),
    seconds("cached", "cached_s"),
    size("says", "body_bytes"),
    size("rank 0 gets", "received_bytes"),
    size("later", "later_bytes"),
    seconds("checked", "merge_s"),
    seconds("encoded", "encode_s"),
    size("manifest", "manifest_bytes"),
    seconds("decoded", "decode_s"),
    seconds("for a rank", "view_s"),
)


class _Case(NamedTuple):
    """How the tensors lie on the ranks."""

    name: str
    group_of: Callable[[int, int], tuple[int, int]]
    """(first rank, length) of the ranks that have the same state as ``rank`` of ``world``."""
    placing_of: Callable[[int, int], Sharding]
    """Of the ranks from ``first``, ``length`` of them."""


def _all(rank: int, world: int) -> tuple[int, int]:
    return 0, world


def _stage(rank: int, world: int) -> tuple[int, int]:
    length = max(1, world // _STAGES)
    return rank // length * length, length


def _rows(first: int, length: int) -> Sharding:
    return Sharding((length,), tuple(range(first, first + length)), (Cut(0, 0),))


def _hybrid(first: int, length: int) -> Sharding:
    inner = min(_HOSTS, length)
    return Sharding((length // inner, inner), tuple(range(first, first + length)), (Cut(1, 0),))


_CASES = (
    _Case("FSDP", _all, _rows),
    _Case("HSDP", _all, _hybrid),
    _Case("DDP", _all, lambda first, length: replicated(length)),
    _Case(f"FSDP in {_STAGES} stages", _stage, _rows),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this question takes."""
    parser.add_argument(
        "--ranks", type=arguments.counts, default="8,64,256,1024,4096", help="numbers, with commas between"
    )
    parser.add_argument(
        "--tensors", type=arguments.count_argument, default=1500, help="parameters, each with two states (1500)"
    )
    arguments.add_common(parser)


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> Report:
    """Measure and return everything."""
    report = Report(facts(args.dir), arguments.as_json(args), Floors(), [], [], [])
    for case in _CASES:
        for world in sorted(args.ranks):
            say(f"{case.name}, {world} ranks")
            report.rows.append(_ours(case, world, args.tensors))
    if args.peers != "none":
        _measure_peer(report, args, say)
    return report


# ---- ours


def _ours(case: _Case, world: int, tensors: int) -> dict[str, Any]:
    groups = dict.fromkeys(case.group_of(rank, world) for rank in range(world))
    plans: dict[tuple[int, int], LocalPlan] = {}
    times: dict[str, list[float]] = {"local_s": [], "cached_s": []}
    for position, (first, length) in enumerate(groups):
        placing = case.placing_of(first, length)
        entries, tree = state_of(tensors, placing, prefix=f"stage{position}." if len(groups) > 1 else "")
        took, plans[first, length] = _timed(lambda: plan_local(entries, tree, {}, rank=first, world=world))  # noqa: B023
        times["local_s"].append(took)
        if position == 0:
            for rank in (length // 2, length - 1):
                took, plan = _timed(lambda: plan_local(entries, tree, {}, rank=rank, world=world))  # noqa: B023
                times["local_s"].append(took)
                if plan.digest != plans[first, length].digest:
                    raise AssertionError("ranks with equal states have different bodies")
            cache = PlanCache(rank=first, world=world)
            cache.plan(entries, tree, {})
            times["cached_s"] = [_timed(lambda: cache.plan(entries, tree, {}))[0] for _ in range(_REPEATS)]  # noqa: B023
    bodies = {plan.digest: dict(plan.texts)[plan.body_offset] for plan in plans.values()}
    ranks_of = {plan.digest: range(first, first + length) for (first, length), plan in plans.items()}
    merge_s, whole = _best(lambda: merge(bodies, ranks_of, world=world))
    return {
        "system": OURS,
        "case": case.name,
        "ranks": world,
        "bodies": len(bodies),
        "local_s": statistics.median(times["local_s"]),
        "local_s_max": max(times["local_s"]),
        "cached_s": min(times["cached_s"]),
        "body_bytes": max(map(len, bodies.values())),
        "received_bytes": sum(map(len, bodies.values())) + world * _DIGEST_NBYTES,
        "later_bytes": world * _DIGEST_NBYTES,
        "merge_s": merge_s,
        **_manifest(plans, whole, bodies, world),
    }


def _manifest(
    plans: dict[tuple[int, int], LocalPlan], whole: GlobalPlan, bodies: dict[str, bytes], world: int
) -> dict[str, Any]:
    """Return what the manifest takes: rank 0 encodes it, every rank of a restore decodes it."""
    records: list[FileRecord] = []
    own: list[bytes] = []
    for (first, length), plan in plans.items():
        columns = decode_body(bodies[plan.digest], world=world)
        replicas = columns.replicas()
        for rank in range(first, first + length):
            folders = {columns.keys[block.entry][0] for layer in divide(columns, replicas, rank) for block in layer}
            names = [f"{folder}/{shard_name(rank, world)}" for folder in [*sorted(folders), "rng"]]
            records += [
                FileRecord(path=path, nbytes=1 << 20, data_start=4096, sum="0" * 32, rank=rank) for path in names
            ]
            mine = msgspec.json.decode(plan.own, type=Plan)
            own.append(msgspec.json.encode(msgspec.structs.replace(mine, entry_files=[len(names) - 1])))
    head = Head(step=1, term=1, ordinal=1, save_id="ab", world_size=world, nbytes=0, created="", package="")
    values = whole.merge_values({plan.digest: b"[1]" for plan in plans.values()})

    def encode() -> bytes:
        rng = [b'[{"python":"state"}]'] * world
        plan = whole.encode(records)
        return encode_manifest(head, records, values=values, metadata=b"null", plan=plan, own=encode_own(own, rng))

    encode_s, data = _best(encode)
    decode_s, manifest = _best(lambda: decode_manifest(data, file="manifest.json"))
    view_s, view = _best(lambda: plan_for(manifest, world - 1))
    if view.missing:
        raise AssertionError("the last rank does not find its own")
    return {
        "entries": len(manifest.plan.names),
        "encode_s": encode_s,
        "manifest_bytes": len(data),
        "decode_s": decode_s,
        "view_s": view_s,
    }


def _timed(call: Callable[[], _T]) -> tuple[float, _T]:
    begin = time.process_time()
    found = call()
    return time.process_time() - begin, found


def _best(call: Callable[[], _T]) -> tuple[float, _T]:
    """Return the least of some times: what the machine does besides is not of the code."""
    return min((_timed(call) for _ in range(_REPEATS)), key=lambda pair: pair[0])


# ---- the peer


def _measure_peer(report: Report, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Add a row for each number of ranks, until one takes longer than a minute."""
    for world in sorted(args.ranks):
        say(f"{_DCP}, {world} ranks")
        why = _add_peer(report, world, args.tensors)
        if why is not None:
            report.skipped.append({"system": _DCP, "case": f"{world} ranks", "why": why})
            report.notes.append(f"{_DCP} was not tried with more than {world} ranks")
            return


def _add_peer(report: Report, world: int, tensors: int) -> str | None:
    """Measure it, or return why that was not possible."""
    command = [sys.executable, "-m", "bench.peers.dcp_planner", str(world), str(tensors), str(_LIMIT_SECONDS)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"its plans were not made within {_START_SECONDS} s"
    if ended.returncode == -signal.SIGALRM:
        return f"rank 0 needs more than {_LIMIT_SECONDS} s"
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    found = json.loads(ended.stdout)
    report.rows.append(
        {
            "system": _DCP,
            "case": "FSDP",
            "ranks": world,
            "bodies": world,
            "entries": found.pop("entries"),
            "cached_s": None,
            "body_bytes": found["received_bytes"] // world,
            "later_bytes": found["received_bytes"],
            "merge_s": sum(found[name] for name in ("unpickle_s", "global_s", "validate_s", "scatter_s")),
            "view_s": None,
            **found,
        }
    )
    return None


def figure(report: Report) -> Figure:
    """Return what to draw."""
    most = max(row["ranks"] for row in report.rows)
    rows = [row | {"case": f"{row['case']}, {row['ranks']} ranks"} for row in report.rows]
    return Figure(
        title=f"Rank 0 plans a first save of {report.args['tensors']} parameters with AdamW, up to {most} ranks",
        axis="seconds of processor (dark: plans checked, light: and the manifest encoded)",
        rows=rows,
        dark=lambda row: row["merge_s"],
        light=lambda row: row["merge_s"] + row["encode_s"],
        text=lambda row: seconds_text(row["merge_s"] + row["encode_s"]),
        line=1.0,
        line_label="1 s",
    )
