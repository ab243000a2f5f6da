"""What the process of one system does for ``bench gpu``: saves, and trains, a state that is on a device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aiockpt.cli.demo_model import CONTEXT
from bench.entrant import Pending, Saver, timed_save
from bench.state import BenchState, Training
from bench.stepping import Stepping

__all__ = ["DeviceTraining"]

_FLOOR_NBYTES = 512 << 20
_FLOOR_COPIES = 3
_LOGITS_NBYTES = 2 << 30
"""Most that one step's largest tensor takes of the device."""


class DeviceTraining:
    """Obeys ``floor``, ``round``, ``discard``, ``calibrate SECONDS``, ``batch TOKENS``, ``alone N``, ``saving N``."""

    def __init__(self, system: type[Saver], state: BenchState, directory: Path) -> None:
        assert isinstance(state, Training)
        self._state = state
        self._device = next(state.model.parameters()).device
        self._saver = system(state, directory)
        self._numbers = itertools.count(1)  # one run: each of its steps is saved once
        self._step = 0
        self._stepping = _DeviceStepping(state, self._saver, self._device, self._numbers)

    def begin(self) -> dict[str, Any]:
        """Open the system."""
        self._saver.open()
        name = (
            torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "no GPU: figures mean nothing"
        )
        return {"nbytes": self._state.nbytes, "gpu": name, "fsyncs": self._saver.FSYNCS, **self._saver.facts()}

    def obey(self, command: str, arguments: list[str]) -> dict[str, Any]:
        """Do one thing."""
        match command, arguments:
            case "floor", []:
                return {"pinned": self._floor()}
            case "round", []:
                return self._round()
            case "discard", []:
                self._saver.discard(self._step)
                self._saver.settle()
                return {}
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
        """End what ``begin`` began."""
        self._saver.close()

    def _round(self) -> dict[str, Any]:
        self._step = next(self._numbers)
        self._state.train_step()
        self._saver.make_ready(self._step)
        synchronize(self._device)
        held = _allocated(self._device)
        times = asdict(timed_save(self._saver, self._step))
        return {**times, "device_nbytes": _peak(self._device) - held}

    def _floor(self) -> float:
        """Return the GB/s of one copy of the device's memory into pinned memory, the best of some."""
        nbytes = min(_FLOOR_NBYTES, self._state.nbytes)
        source = torch.ones(nbytes, dtype=torch.uint8, device=self._device)
        target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        took = []
        for _ in range(_FLOOR_COPIES):
            synchronize(self._device)
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(self._device)
            took.append(time.perf_counter() - began)
        return nbytes / min(took) / 1e9


class _DeviceStepping(Stepping):
    """Steps whose batch is on the device, each timed until the device has done it."""

    def __init__(self, state: Training, saver: Saver, device: torch.device, numbers: Iterator[int]) -> None:
        self._device = device
        super().__init__(state, saver, numbers)

    @Stepping.tokens.setter  # type: ignore[attr-defined]  # mypy takes a property for its value here
    def tokens(self, count: int) -> None:
        """Draw a batch of so many tokens."""
        Stepping.tokens.fset(self, count)  # type: ignore[attr-defined]
        self._inputs, self._targets = self._inputs.to(self._device), self._targets.to(self._device)

    def calibrate(self, target_s: float) -> int:
        """Return the number of tokens, a power of two of sequences, from which on a step takes ``target_s`` seconds."""
        vocabulary = len(self._model.get_parameter("tokens.weight"))
        self.tokens = CONTEXT
        self.alone(2)
        while min(self.alone(3)) < target_s and 2 * self.tokens * vocabulary * 4 <= _LOGITS_NBYTES:
            self.tokens = 2 * self.tokens
            self.alone(1)
        return self.tokens

    def _step(self, pending: Pending) -> tuple[float, float]:
        synchronize(self._device)
        began = time.perf_counter()
        _, waited = super()._step(pending)
        synchronize(self._device)
        return time.perf_counter() - began, waited


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what was enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
