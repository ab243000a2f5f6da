"""What a system must do to be measured, with the list of those that are."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from bench.state import BenchState

__all__ = ["OURS", "RESTORES", "SAVES", "Entrant", "Key", "SaveTimes", "load_entrant", "tree_nbytes"]


class Key(NamedTuple):
    """Names one row: a system in one of its cases."""

    system: str
    case: str


@dataclass(frozen=True)
class SaveTimes:
    """Seconds from the call of one save until something is true."""

    blocked_s: float
    """The call returned."""
    staged_s: float
    """The state may be changed without touching the snapshot."""
    durable_s: float
    """The bytes would survive a loss of power, as far as the system promises that."""


class Entrant(ABC):
    """One system in one case, in a process of its own.

    The calls come in this order: ``open``, then ``save`` and ``discard`` in turn; or ``open``, ``write``, then
    ``restore`` again and again; at last ``close``.
    """

    FSYNCS: ClassVar[bool] = True
    """False where the system ends a save without an fsync; durable then means until ``os.sync()`` returned."""

    def __init__(self, state: BenchState, directory: Path) -> None:
        self.state = state
        self.directory = directory

    def open(self) -> None:  # noqa: B027  # most systems have nothing to open
        """Do what a training program does once, before its first save."""

    @abstractmethod
    def save(self, step: int) -> SaveTimes:
        """Save the state and measure it."""

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step goes."""
        return self.directory / f"step-{step}"

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, as far as the system does not do so itself."""
        remove(self.path(step))

    def write(self) -> Path:
        """Write the checkpoint that ``restore`` reads, and return where it is."""
        self.save(0)
        return self.path(0)

    def restore(self) -> None:
        """Read what ``write`` wrote."""
        raise NotImplementedError(f"{type(self).__name__} is not measured restoring")

    def facts(self) -> dict[str, float]:
        """Return what else the row of this system says."""
        return {}

    def close(self) -> None:  # noqa: B027  # most systems have nothing to close
        """End what ``open`` began."""


OURS = Key("aiockpt", "guarded")
"""Runs beside every other entrant, in turn with it."""

SAVES: dict[Key, str] = {
    OURS: "bench.ours:Guarded",
    Key("aiockpt", "inline"): "bench.ours:Inline",
    Key("aiockpt", "first save after prepare"): "bench.ours:FirstSave",
    Key("torch.save", "fsync"): "bench.peers.torch_save:TorchSave",
    Key("safetensors", "save_file, fsync"): "bench.peers.safetensors_file:SafetensorsFile",
    Key("dcp.save", "default"): "bench.peers.dcp_sync:DcpSave",
    Key("dcp.async_save thread", "default"): "bench.peers.dcp_thread:DcpThread",
    Key("dcp.async_save thread", "kept stager"): "bench.peers.dcp_thread:DcpThreadKeptStager",
    Key("dcp.async_save process", "shared-memory stager"): "bench.peers.dcp_process:DcpProcess",
    Key("torch_checkpointing", "async, buffered"): "bench.peers.torch_checkpointing_manager:TorchCheckpointing",
}

RESTORES: dict[Key, str] = {
    Key("aiockpt", "in place, verified"): "bench.ours:Guarded",
    Key("torch.load", "fresh dict"): "bench.peers.torch_save:TorchSave",
    Key("safetensors", "load_file, fresh dict"): "bench.peers.safetensors_file:SafetensorsFile",
    Key("dcp.load", "in place"): "bench.peers.dcp_sync:DcpSave",
}


def load_entrant(place: str) -> type[Entrant]:
    """Import the class that ``module:name`` says; ImportError is for the caller to report."""
    module, _, name = place.partition(":")
    found: type[Entrant] = getattr(importlib.import_module(module), name)
    return found


def stopwatch() -> Callable[[], float]:
    """Return a function that says how many seconds ago it was made."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it."""
    if path.is_dir():
        for entry in path.iterdir():
            remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def tree_nbytes(path: Path) -> int:
    """Return the bytes of all files below a path."""
    if path.is_dir():
        return sum(tree_nbytes(entry) for entry in path.iterdir())
    return path.stat().st_size
