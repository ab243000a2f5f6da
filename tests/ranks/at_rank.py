"""For the scripts of ranks: outcomes as lines of JSON, faults, and workers that are held or killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from aiockpt import PerRank, blocking
from aiockpt.coordinator.results import Restored, Saved
from aiockpt.errors import CheckpointError
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, ArmedFaults, FaultPlan, FaultRule
from tests.waiting import PATIENCE_SECONDS, wait_until

__all__ = [
    "checkpointer",
    "end",
    "evaluate",
    "is_free",
    "kill",
    "of",
    "own",
    "pids_of",
    "pids_of_trainers",
    "rule",
    "say",
    "seconds_of",
    "stop",
    "stop_here",
    "wait_until",
    "wake",
    "worker_of",
]


def say(scenario: str, what: Any = None) -> None:
    """Print one line for ``Job.told``."""
    sys.stdout.write(json.dumps([scenario, what], default=str) + "\n")


def of(call: Callable[[], Any]) -> Any:
    """Return what came of a call: the step that was saved or restored, its value, or its error as a dict."""
    try:
        value = call()
    except CheckpointError as exc:
        told = {"error": type(exc).__name__, "text": str(exc), "cause": type(exc.__cause__).__name__}
        return told | {name: getattr(exc, name) for name in type(exc).FIELDS}
    return value.step if isinstance(value, Saved | Restored) else value


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what came of a call, and how long it took."""
    began = time.monotonic()
    return of(call), time.monotonic() - began


def rule(point: str, action: Any, **options: Any) -> FaultRule:
    """Return one fault."""
    return FaultRule(point=FaultPoint(point), action=action, **options)


def checkpointer(
    run: str, *worker_faults: FaultRule, trainer_faults: tuple[FaultRule, ...] = (), **options: Any
) -> blocking.Checkpointer:
    """Return one that is not open yet; each of its workers meets ``worker_faults``, as if it were the first."""
    made = blocking.Checkpointer(run, **options)
    made._coordinator.worker_faults = (WORKER_ARGUMENT, FaultPlan(rules=[*worker_faults]).to_json())
    made._coordinator.faults = ArmedFaults(FaultPlan(rules=[*trainer_faults]))
    return made


def own(rank: int, nbytes: int = 1 << 16) -> Any:
    """Return tensors of each rank's own, so that every rank has something to write."""
    return PerRank({"w": torch.full((nbytes // 4,), float(rank))})


def worker_of(ckpt: blocking.Checkpointer) -> int:
    """Wait for this rank's worker; returns its pid."""
    return int(wait_until(lambda: ckpt.statistics().worker_pid, "a worker"))


def pids_of(ckpt: blocking.Checkpointer) -> list[int]:
    """Return the pids of all ranks' workers: a collective of the training's group."""
    return _gather(worker_of(ckpt))


def pids_of_trainers() -> list[int]:
    """Return the pids of all ranks: a collective of the training's group."""
    return _gather(os.getpid())


def _gather(number: int) -> list[int]:
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([number]))
    return [int(one) for one in found]


def stop(pid: int) -> None:
    """Stop a process, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _state(pid) in "TtZ", "a process to stop")


def stop_here() -> None:
    """Stop this process until another one wakes it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def wake(pid: int) -> None:
    """Let a stopped process go on."""
    os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """Kill a process, also a stopped one."""
    os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0]


def is_free(ckpt: blocking.Checkpointer) -> bool:
    """Tell whether this rank's slot is free."""
    return ckpt._coordinator._desk.holder is None


def end(status: int = 0) -> None:
    """End this process without a word to the training's group, of which somebody is gone."""
    os._exit(status)


def evaluate(seconds: float) -> None:
    """Be a long evaluation."""
    threading.Event().wait(min(seconds, PATIENCE_SECONDS))
