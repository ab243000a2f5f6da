"""The guard: one process-wide hook that makes an optimizer's step wait for the copies that it would overwrite.

This module is one of the few with state of its own: torch's registry of optimizer hooks is process-wide, and every
Checkpointer of the process must be heard by the one hook.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aiockpt.errors import ConfigError
from aiockpt.staging.pending import PendingCopies

__all__ = ["begin", "end", "fired_since", "forget_in_child", "install", "is_capturing", "refuse_capture"]

_log = logging.getLogger("aiockpt.staging")


class _Guard:
    """Which optimizers were seen when, and which copies are pending.

    Time is counted in saves of the whole process: ``turn`` grows with each.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turn = 0
        self.pending: tuple[PendingCopies, ...] = ()  # replaced, never changed: the hook reads it without the lock
        self.fired: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.captured: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.blind = False

    def step(self, optimizer: Optimizer) -> None:
        """Wait for what ``optimizer`` is about to overwrite, and remember that it came by here."""
        if is_capturing():
            # Its kernels will run again without any hook.
            with self.lock:
                self.captured.add(optimizer)
            self.wait(optimizer, capturing=True)
            return
        if self.fired.get(optimizer) == self.turn:
            return
        turn = self.turn
        self.wait(optimizer)
        with self.lock:
            self.fired[optimizer] = turn

    def wait(self, optimizer: Optimizer | None, *, capturing: bool = False) -> None:
        for pending in self.pending:
            pending.enter(optimizer, capturing=capturing)


_guard = _Guard()
_installing = threading.Lock()
_installed = False


def install() -> None:
    """Register the hook, once in the life of the process; the first save calls this."""
    global _installed
    if "torch._dynamo" not in sys.modules:
        # The constructor of every Optimizer imports it, so there is none yet; ours would cost the first save 1 s.
        return
    with _installing:
        if _installed:
            return
        # A graph break: dynamo cannot trace a lock, and a traced hook would wait at compile time only.
        step = torch.compiler.disable(_step)  # type: ignore[no-untyped-call]  # torch has no annotation here
        is_traced_whole = torch.compiler.assume_constant_result(_is_traced_whole)  # type: ignore[no-untyped-call]  # torch has no annotation here

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling() and is_traced_whole():
                return
            step(optimizer)

        register_optimizer_step_pre_hook(before_step)
        _installed = True


def _step(optimizer: Optimizer) -> None:
    try:
        _guard.step(optimizer)
    except Exception:  # noqa: BLE001  # an optimizer that cannot be hashed: never seen, so never guarded
        _log.debug("%s is not guarded", type(optimizer).__qualname__, exc_info=True)


def _is_traced_whole() -> bool:
    """Say, while dynamo traces a step, whether a graph break is forbidden (``fullgraph=True``).

    Such a step would raise into training at our graph break, so it is compiled without the hook. Runs of it are not
    seen then: what is pending is waited for now, and nothing is guarded any more.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        translator = InstructionTranslator.current_tx()
        whole = bool(translator.one_graph or getattr(translator, "error_on_graph_break", False))
    except Exception:  # noqa: BLE001  # private to torch; without it such a step fails loudly at its compilation
        return False
    if whole:
        _guard.blind = True
        _guard.wait(None)
    return whole


def is_capturing() -> bool:
    """Whether the current CUDA stream of this thread records a graph."""
    # Builds without CUDA have is_current_stream_capturing, and raise from it.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no annotation here
    return initialized and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str) -> None:
    """Refuse a call while the current CUDA stream of this thread records a graph.

    Raises:
        ConfigError: It does.
    """
    if is_capturing():
        raise ConfigError(
            f"{what} was called while a CUDA graph is captured",
            why="the copies would become part of the graph, and the state's generators cannot be read",
            next=f"call {what} before the capture begins or after it ended",
        )


def fired_since(turn: int) -> list[Optimizer]:
    """Return the optimizers that stepped eagerly at or after ``turn`` and that no CUDA graph holds."""
    if _guard.blind:
        return []
    with _guard.lock:
        return [o for o, seen in _guard.fired.items() if seen >= turn and o not in _guard.captured]


def begin(pending: PendingCopies | None) -> int:
    """Start a new turn, with the copies that optimizers have to wait for from now on; returns the turn."""
    with _guard.lock:
        _guard.turn += 1
        if pending is not None:
            _guard.pending = (*_guard.pending, pending)
        return _guard.turn


def end(pending: PendingCopies) -> None:
    """Nobody has to wait for these copies any more; harmless when repeated."""
    with _guard.lock:
        _guard.pending = tuple(other for other in _guard.pending if other is not pending)


def forget_in_child() -> None:
    """In a forked child: forget the parent's copies, which no thread here will make."""
    global _guard, _installing
    _guard = _Guard()
    _installing = threading.Lock()
