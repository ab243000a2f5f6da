"""A process of its own with the real hub of a star, which answers for its times and what it holds."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from aiockpt.format.manifest import FileRecord
from aiockpt.protocol.orders import CheckPlans, Commit, Compare, Drop, Look, MakeAttempt
from aiockpt.protocol.star import (
    Arguments,
    Arrive,
    Body,
    Details,
    Ended,
    Join,
    Open,
    StarMessage,
    WantBody,
    WantDetails,
    Written,
)
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star_hub import StarHub

__all__ = ["PACKAGE", "PLAN_NBYTES", "TOKEN", "arrival", "digest_of", "main", "written"]

TOKEN = b"of this benchmark"
PACKAGE = "bench"
DIGEST = "0" * 32
PLAN_NBYTES = 331_000
"""Measured of a plan with 4,500 entries."""


def arrival(n: int, digest: str = DIGEST) -> Arrive:
    """Return what each rank says in its call number ``n``."""
    return Arrive(n=n, arguments=Arguments(step=n), digest=digest)


def digest_of(n: int) -> str:
    """Return the digest of a plan that is new in call number ``n``."""
    return f"{n + 1:032x}"


def written(n: int, files: list[FileRecord]) -> Written:
    """Return what each rank says when its files are durable."""
    return Written(n=n, attempt=0, files=files, values_sum="0" * 32, tensors_sum="0" * 32)


class _Clerk:
    """Does nothing, and notes when."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    async def look(self, order: Look) -> Ended | None:
        return None

    async def make(self, order: MakeAttempt) -> WireError | None:
        self.times = {"made_at": time.monotonic()}
        return None

    async def check(self, order: CheckPlans) -> tuple[WireError, int | None] | dict[int, list[str]]:
        self.times["arrived_at"] = time.monotonic()
        return {}

    async def compare(self, order: Compare) -> WireError | None:
        return None

    async def commit(self, order: Commit) -> Ended:
        self.times["written_at"] = time.monotonic()
        return Ended(n=order.n, path=f"step-{order.n}")

    async def drop(self, order: Drop) -> None:
        return


class _RankZero:
    """Calls ``save`` when it is told to, and has written at once."""

    def __init__(self, world: int) -> None:
        self._world = world
        self.hub: StarHub | None = None

    def join(self) -> Join:
        return Join(rank=0, world=self._world, package=PACKAGE)

    def welcome(self, epoch: int) -> None:
        return

    def hear(self, message: StarMessage) -> None:
        assert self.hub is not None
        match message:
            case WantBody():
                self.hub.say(Body(digest=message.digest, body=bytes(PLAN_NBYTES)))
            case Open():
                self.hub.say(written(message.n, []))
            case WantDetails():
                self.hub.say(Details(n=message.n, values=b"[]"))

    def lost(self, why: str) -> None:
        return

    def gone(self, error: WireError) -> None:
        return


def main(argv: list[str] | None = None) -> None:
    """Serve commands until ``close`` or end-of-file: ``save N``, perhaps with a digest, and ``look``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--stall", type=float, required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    anyio.run(_serve, args, backend="asyncio", backend_options={"use_uvloop": True})


async def _serve(args: argparse.Namespace) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    clerk, rank = _Clerk(), _RankZero(args.world)
    hub = rank.hub = StarHub(
        listener.detach(),
        world=args.world,
        token=TOKEN,
        package=PACKAGE,
        clerk=clerk,
        party=rank,
        stall_timeout=args.stall,
        arrival_timeout=600.0,
        return_timeout=600.0,
    )
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.run)
            while hub.joined == 0:  # noqa: ASYNC110 -- a process has no more than one such moment
                await anyio.sleep(0.001)
            print(json.dumps({"port": port, **_look(hub)}), file=replies)
            while line := await anyio.to_thread.run_sync(sys.stdin.readline):
                command, *given = line.split()
                if command == "save":
                    hub.say(arrival(int(given[0]), *given[1:]))
                print(json.dumps({**_look(hub), **clerk.times}), file=replies)
                if command == "close":
                    break
            tasks.cancel_scope.cancel()


def _look(hub: StarHub) -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return {
        "joined": hub.joined,
        "cpu_s": time.process_time(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "resident_bytes": int(resident.split()[1]) * 1024,
    }


if __name__ == "__main__":
    main()
