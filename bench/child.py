"""The process in which one system is measured: commands come on stdin, answers go to a descriptor, one JSON line each.

Standard output is no good for answers, the peers print.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.entrant import Entrant, load_entrant, stopwatch, tree_nbytes
from bench.state import make_state

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Serve commands until ``close`` or end-of-file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", required=True)
    parser.add_argument("--question", choices=("save", "restore"), required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:
        _serve(args, lambda answer: print(json.dumps(answer), file=replies))


def _serve(args: argparse.Namespace, answer: Callable[[dict[str, Any]], None]) -> None:
    state = make_state(args.state, args.size)
    descriptors = len(os.listdir("/proc/self/fd"))
    entrant = load_entrant(args.place)(state, args.dir)
    entrant.open()
    nbytes = state.nbytes
    if args.question == "restore":
        nbytes = tree_nbytes(entrant.write())
    answer({"nbytes": nbytes, "descriptors": descriptors, **entrant.facts()})
    step = 0
    for line in sys.stdin:
        command = line.strip()
        if command == "close":
            break
        if command == "discard":
            entrant.discard(step)
            answer({})
        else:
            step += 1
            answer(_save(entrant, step) if args.question == "save" else _restore(entrant))
    entrant.close()
    answer({})


def _save(entrant: Entrant, step: int) -> dict[str, Any]:
    entrant.state.train_step()  # every tensor differs from the last save's, and the optimizer's hook has fired
    return asdict(entrant.save(step))


def _restore(entrant: Entrant) -> dict[str, Any]:
    elapsed = stopwatch()
    entrant.restore()
    return {"blocked_s": elapsed()}


if __name__ == "__main__":
    main()
