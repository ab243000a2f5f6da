"""Training steps of a real model, timed: alone, or while saves run one behind the other."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from aiockpt.cli.demo_model import CONTEXT
from bench.entrant import DONE, Pending, Saver
from bench.state import Training

__all__ = ["SavingBlock", "Stepping"]

_SEQUENCE_STEP = 8
"""Tokens by which a batch grows below one whole sequence."""


@dataclass
class SavingBlock:
    """Seconds, in order, of a run of steps during each of which a save was in flight."""

    steps_s: list[float] = field(default_factory=list)
    """Forward, backward and optimizer, with what the optimizer's step waited."""
    waits_s: list[float] = field(default_factory=list)
    """What each optimizer's step waited for the snapshot; a part of ``steps_s``."""
    blocked_s: list[float] = field(default_factory=list)
    """Each call of save, between two steps and a part of neither."""
    durable_s: list[float] = field(default_factory=list)
    """From each of these calls to its end, for those that ended while steps ran."""


class _Watch:
    """Waits for the end of a save on a thread of its own, which costs nothing, and notes when it came."""

    def __init__(self, step: int, pending: Pending, began: float) -> None:
        self.step = step
        self.pending = pending
        self.durable_s = 0.0
        self._began = began
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bench-watch")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.pending.wait()
        except BaseException as exc:  # noqa: BLE001  # raised where the save is asked for
            self._error = exc
        self.durable_s = time.perf_counter() - self._began

    def is_over(self) -> bool:
        """Whether the save has ended; raises what it raised."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def join(self) -> None:
        self._thread.join()
        self.is_over()


class Stepping:
    """Trains one model with one optimizer on the same batch again and again, which a loss does not mind.

    Args:
        state: What is trained.
        saver: Saves it.
        numbers: Of the steps that are saved, each once; shared with whoever else saves by the same saver.
    """

    def __init__(self, state: Training, saver: Saver, numbers: Iterator[int] | None = None) -> None:
        self._model, self._optimizer, self._saver = state.model, state.optimizer, saver
        self._numbers = numbers or itertools.count(1)
        self._updating = 0.0
        # Behind the process-wide hooks of torch.optim, where aiockpt waits.
        self._optimizer.register_step_pre_hook(self._note_update)
        self.tokens = _SEQUENCE_STEP

    @property
    def tokens(self) -> int:
        """Tokens of a batch: what a step costs."""
        return self._inputs.numel()

    @tokens.setter
    def tokens(self, count: int) -> None:
        rows = max(1, count // CONTEXT)
        tokens = self._model.get_parameter("tokens.weight")
        drawn = torch.randint(len(tokens), (2, rows, min(count, CONTEXT)))
        self._inputs, self._targets = drawn[0], drawn[1]

    def calibrate(self, target_s: float) -> int:
        """Return the number of tokens with which a step takes about ``target_s`` seconds."""
        costs = []
        for count in (CONTEXT // 4, CONTEXT):
            self.tokens = count
            self.alone(1)
            costs.append(statistics.median(self.alone(3)))
        per_token = max((costs[1] - costs[0]) / (CONTEXT - CONTEXT // 4), 1e-9)
        wanted = max(_SEQUENCE_STEP, (target_s - costs[0]) / per_token + CONTEXT // 4)
        unit = CONTEXT if wanted >= CONTEXT else _SEQUENCE_STEP
        return round(wanted / unit) * unit

    def alone(self, count: int) -> list[float]:
        """Run steps without saves; returns the seconds of each."""
        return [self._step(DONE)[0] for _ in range(count)]

    def saving(self, count: int) -> SavingBlock:
        """Run steps with a save in flight during each, then wait for the last save."""
        block = SavingBlock()
        watch: _Watch | None = None
        for _ in range(count):
            if watch is None or watch.is_over():
                if watch is not None:
                    block.durable_s.append(watch.durable_s)
                    self._saver.discard(watch.step)
                watch = self._save(block)
            total, waited = self._step(watch.pending)
            block.steps_s.append(total)
            block.waits_s.append(waited)
        assert watch is not None
        if watch.is_over():
            block.durable_s.append(watch.durable_s)
        watch.join()
        self._saver.discard(watch.step)
        self._saver.settle()
        os.sync()  # what a system left unwritten is not for the next steps to suffer from
        return block

    def _save(self, block: SavingBlock) -> _Watch:
        step = next(self._numbers)
        self._saver.make_ready(step)
        began = time.perf_counter()
        pending = self._saver.begin(step)
        block.blocked_s.append(time.perf_counter() - began)
        return _Watch(step, pending, began)

    def _step(self, pending: Pending) -> tuple[float, float]:
        began = time.perf_counter()
        loss = functional.cross_entropy(self._model(self._inputs).flatten(0, 1), self._targets.flatten())
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        computed = time.perf_counter()
        if not self._saver.OPTIMIZERS_WAIT:
            pending.wait_staged()
        self._optimizer.step()
        return time.perf_counter() - began, self._updating - computed

    def _note_update(self, *_: Any) -> None:
        self._updating = time.perf_counter()
