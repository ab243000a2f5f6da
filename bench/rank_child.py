"""The process of one rank: it meets the others over gloo, and saves when it is told to, all ranks at one moment.

Commands and answers are those of ``bench.child``; the first answer of rank 0 has the port at which ``meet PORT`` lets
all ranks find each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from bench.entrant import Saver, timed_save
from bench.entrants import load_class
from bench.memory import memory_of, tree_of, written_by
from bench.rank_state import make_rank_state

__all__ = ["main"]

_PATIENCE = timedelta(seconds=300)


def main(argv: list[str] | None = None) -> None:
    """Serve commands until ``close`` or end-of-file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    # As torchrun sets it; DCP's process looks here.
    os.environ |= {"RANK": str(args.rank), "LOCAL_RANK": str(args.rank), "WORLD_SIZE": str(args.world)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:
        _serve(args, lambda answer: print(json.dumps(answer), file=replies))


def _serve(args: argparse.Namespace, answer: Any) -> None:
    store = None
    if args.rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, args.world, True, _PATIENCE, wait_for_workers=False)
    answer({} if store is None else {"port": store.port})
    _, port = sys.stdin.readline().split()
    if store is None:
        store = distributed.TCPStore("127.0.0.1", int(port), args.world, False, _PATIENCE)
    os.environ["MASTER_PORT"] = port
    distributed.init_process_group("gloo", store=store, rank=args.rank, world_size=args.world, timeout=_PATIENCE)
    state = make_rank_state(args.state, args.size)
    role = _Saving(load_class(args.place)(state, args.dir))
    answer(role.begin())
    for line in sys.stdin:
        command = line.strip()
        if command == "close":
            break
        answer(role.discard() if command == "discard" else role.round())
    role.close()
    answer({})
    distributed.destroy_process_group()


class _Saving:
    """Saves, and removes what was saved."""

    def __init__(self, saver: Saver) -> None:
        self._saver, self._step = saver, 0

    def begin(self) -> dict[str, Any]:
        descriptors = len(os.listdir("/proc/self/fd"))
        self._saver.open()
        facts = {"nbytes": self._saver.state.nbytes, "fsyncs": self._saver.FSYNCS, **self._saver.facts()}
        return {"descriptors": descriptors, **facts}

    def round(self) -> dict[str, Any]:
        """Save together with the others; what was written and what is held is looked at when all are through."""
        self._step += 1
        self._saver.state.train_step()
        self._saver.make_ready(self._step)
        written = _written()
        distributed.barrier()
        times = timed_save(self._saver, self._step)
        distributed.barrier()
        return {**asdict(times), "written_bytes": _written() - written, "staging_bytes": _shared()}

    def discard(self) -> dict[str, Any]:
        if distributed.get_rank() == 0:
            self._saver.discard(self._step)
        self._saver.settle()
        distributed.barrier()
        return {}

    def close(self) -> None:
        self._saver.close()


def _written() -> int:
    """Return what this rank's processes have written."""
    return sum(_of_each(written_by))


def _shared() -> int:
    """Return the shared memory of this rank's processes, each page once."""
    return sum(_of_each(lambda pid: memory_of(pid)[1]))


def _of_each(look: Any) -> list[int]:
    found = []
    for pid in tree_of(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended since it was listed
            found.append(look(pid))
    return found


if __name__ == "__main__":
    main()
