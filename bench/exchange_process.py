"""A process with what a worker imports, which exchanges plans with others: over the star, or by collectives of gloo.

Each command is ``exchange N AT``: at the moment ``AT`` of the monotonic clock, which all processes share, every rank
has the digest of a plan that nobody has seen. The answer has the moment at which this rank knew the verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

import aiockpt.worker.service  # noqa: F401  # what any worker has imported
from aiockpt.protocol.star import Body, Ended, Join, Open, StarMessage, WantBody
from aiockpt.protocol.terms import WireError
from aiockpt.worker.star_member import StarMember
from bench.memory import memory_of
from bench.star_process import PACKAGE, PLAN_NBYTES, TOKEN, arrival, digest_of, written

__all__ = ["main"]

_PATIENCE_SECONDS = 300.0


def main(argv: list[str] | None = None) -> None:
    """Serve commands until ``close`` or end-of-file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--how", choices=("star", "gloo"), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--place", required=True)
    parser.add_argument("--spawned", type=float, required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:
        if args.how == "gloo":
            _serve_gloo(args, lambda answer: print(json.dumps(answer), file=replies))
        else:
            anyio.run(_serve_star, args, replies, backend="asyncio", backend_options={"use_uvloop": True})


def _opened(args: argparse.Namespace, **more: float) -> dict[str, Any]:
    pss, shared = memory_of(os.getpid())
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    held = {"pss_bytes": pss - shared, "rss_bytes": int(resident.split()[1]) * 1024}
    return {"ready_s": time.monotonic() - args.spawned, **held, "fds": len(os.listdir("/proc/self/fd")), **more}


# ---- gloo


def _serve_gloo(args: argparse.Namespace, answer: Any) -> None:
    begun = time.monotonic()
    import torch
    from torch import distributed

    imported = time.monotonic()
    patience = timedelta(seconds=_PATIENCE_SECONDS)
    store = distributed.FileStore(args.place, args.world)
    if args.rank == 0:
        server = distributed.TCPStore("127.0.0.1", 0, args.world, True, patience, wait_for_workers=False)
        store.set("port", str(server.port))
    else:
        server = distributed.TCPStore("127.0.0.1", int(store.get("port")), args.world, False, patience)
    distributed.init_process_group("gloo", store=server, rank=args.rank, world_size=args.world, timeout=patience)
    distributed.barrier()
    answer(_opened(args, import_s=imported - begun, group_s=time.monotonic() - imported))
    plan = torch.zeros(PLAN_NBYTES, dtype=torch.uint8)
    for line in sys.stdin:
        command, *given = line.split()
        if command == "close":
            break
        n, at = int(given[0]), float(given[1])
        mine = torch.tensor(list(bytes.fromhex(digest_of(n))), dtype=torch.uint8)
        everybodys = [torch.empty_like(mine) for _ in range(args.world)]
        verdict = torch.zeros(1, dtype=torch.uint8)
        time.sleep(max(0.0, at - time.monotonic()))
        distributed.all_gather(everybodys, mine)
        # One body for each digest: the ranks are equal here, and rank 0 has its own. To be as dear as over the star it
        # gets the one of rank 1.
        if args.rank == 0:
            distributed.recv(plan, src=1)
        elif args.rank == 1:
            distributed.send(plan, dst=0)
        distributed.broadcast(verdict, src=0)
        answer({"known_at": time.monotonic()})
    answer({})
    distributed.destroy_process_group()


# ---- the star


class _Member:
    """Has written as soon as it hears the decision, so the outcome tells that the plan was checked."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self.star: StarMember | None = None
        self.is_in = anyio.Event()
        self.ended = anyio.Event()
        self.error: WireError | None = None

    def join(self) -> Join:
        return Join(rank=self._rank, world=self._world, package=PACKAGE)

    def welcome(self, epoch: int) -> None:
        self.is_in.set()

    def hear(self, message: StarMessage) -> None:
        assert self.star is not None
        match message:
            case WantBody():
                self.star.say(Body(digest=message.digest, body=bytes(PLAN_NBYTES)))
            case Open():
                self.star.say(written(message.n, []))
            case Ended():
                self.error = message.error
                self.ended.set()

    def lost(self, why: str) -> None:
        return

    def gone(self, error: WireError) -> None:
        self.error = error
        self.is_in.set()
        self.ended.set()


async def _serve_star(args: argparse.Namespace, replies: Any) -> None:
    begun = time.monotonic()
    member = _Member(args.rank, args.world)
    address = ("127.0.0.1", int(args.place))
    star = member.star = StarMember(address, token=TOKEN, party=member, stall_timeout=None, return_timeout=None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(star.run)
        await member.is_in.wait()
        print(json.dumps(_opened(args, import_s=0.0, group_s=time.monotonic() - begun)), file=replies)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            command, *given = line.split()
            if command == "close":
                break
            n, at = int(given[0]), float(given[1])
            member.ended = anyio.Event()
            await anyio.sleep(max(0.0, at - time.monotonic()))
            star.say(arrival(n, digest_of(n)))
            with anyio.fail_after(_PATIENCE_SECONDS):
                await member.ended.wait()
            if member.error is not None:
                raise RuntimeError(f"{member.error.what}: {member.error.why}")
            print(json.dumps({"known_at": time.monotonic()}), file=replies)
        print("{}", file=replies)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    main()
