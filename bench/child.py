"""The process in which one system is measured: commands come on stdin, answers go to a descriptor, one JSON line each.

Standard output is no good for answers, the peers print.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.entrant import Restorer, Saver, stopwatch, timed_save, tree_nbytes
from bench.entrants import load_class
from bench.gpu_role import DeviceTraining
from bench.state import BenchState, Training, make_state
from bench.stepping import Stepping

__all__ = ["main"]

Answer = dict[str, Any]


class Role(Protocol):
    """What this process does for its parent."""

    def begin(self) -> Answer:
        """Get ready; what the parent is told first."""

    def obey(self, command: str, arguments: list[str]) -> Answer:
        """Do one thing."""

    def close(self) -> None:
        """End."""


def main(argv: list[str] | None = None) -> None:
    """Serve commands until ``close`` or end-of-file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", required=True)
    parser.add_argument("--role", choices=sorted(_ROLES), required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--tensor-nbytes", type=int, default=4096)
    parser.add_argument("--nofile", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    if args.nofile is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.nofile, args.nofile))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:
        _serve(args, lambda answer: print(json.dumps(answer), file=replies))


def _serve(args: argparse.Namespace, answer: Callable[[Answer], None]) -> None:
    state = make_state(args.state, args.size, tensor_nbytes=args.tensor_nbytes, device=args.device)
    descriptors = len(os.listdir("/proc/self/fd"))
    role: Role = _ROLES[args.role](load_class(args.place), state, args.dir)
    answer({"descriptors": descriptors, **role.begin()})
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "close":
            break
        answer(role.obey(command, arguments))
    role.close()
    answer({})


class _Saving:
    """Saves, and removes what it saved."""

    def __init__(self, system: type[Saver], state: BenchState, directory: Path) -> None:
        self._state, self._saver, self._step = state, system(state, directory), 0

    def begin(self) -> Answer:
        self._saver.open()
        return {"nbytes": self._state.nbytes, "fsyncs": self._saver.FSYNCS, **self._saver.facts()}

    def obey(self, command: str, arguments: list[str]) -> Answer:
        if command == "discard":
            self._saver.discard(self._step)
            self._saver.settle()
            return {}
        self._step += 1
        # Every tensor differs from the last save's, and the optimizer's hook has fired.
        self._state.train_step()
        self._saver.make_ready(self._step)
        return asdict(timed_save(self._saver, self._step))

    def close(self) -> None:
        self._saver.close()


class _Restoring:
    """Reads one checkpoint again and again."""

    def __init__(self, system: type[Restorer], state: BenchState, directory: Path) -> None:
        self._restorer = system(state, directory)

    def begin(self) -> Answer:
        self._path = self._restorer.write()
        os.sync()
        return {"nbytes": tree_nbytes(self._path), "path": str(self._path)}

    def obey(self, command: str, arguments: list[str]) -> Answer:
        elapsed = stopwatch()
        self._restorer.restore(self._path)
        return {"blocked_s": elapsed()}

    def close(self) -> None:
        pass


class _Training:
    """Trains, with and without saves."""

    def __init__(self, system: type[Saver], state: BenchState, directory: Path) -> None:
        assert isinstance(state, Training)
        self._saver = system(state, directory)
        self._stepping = Stepping(state, self._saver)

    def begin(self) -> Answer:
        self._saver.open()
        return {"nbytes": self._saver.state.nbytes, "fsyncs": self._saver.FSYNCS, **self._saver.facts()}

    def obey(self, command: str, arguments: list[str]) -> Answer:
        match command, arguments:
            case "calibrate", [seconds]:
                return {"tokens": self._stepping.calibrate(float(seconds))}
            case "batch", [tokens]:
                self._stepping.tokens = int(tokens)
                return {}
            case "alone", [count]:
                return {"steps_s": self._stepping.alone(int(count))}
            case "saving", [count]:
                return asdict(self._stepping.saving(int(count)))
        raise ValueError(f"{command} {arguments}")

    def close(self) -> None:
        self._saver.close()


_ROLES: dict[str, Callable[[type[Any], BenchState, Path], Role]] = {
    "save": _Saving,
    "restore": _Restoring,
    "train": _Training,
    "gpu": DeviceTraining,
}


if __name__ == "__main__":
    main()
