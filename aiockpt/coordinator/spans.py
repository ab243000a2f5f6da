"""Spans on their way to the observer, which is called from a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import msgspec

from aiockpt.observing import Observer, Span

__all__ = ["NO_SPAN", "UNOBSERVED", "OpenSpan", "Spans"]

_log = logging.getLogger("aiockpt.observer")

MAX_BACKLOG = 1000
"""Calls of the observer that may wait; a save makes about a dozen. Beyond it new spans are left out."""
CLOSE_SECONDS = 5.0
"""For the observer to take what it was not told of yet, at close and at the interpreter's exit."""

Attribute = str | int | float | bool | None
Call = Callable[[], None]


class OpenSpan:
    """A span that has begun. The first end counts; it may come from any thread.

    As a context manager it ends with the block: completed, or failed by what leaves it.
    """

    __slots__ = ("_began_ns", "_span", "_spans")

    def __init__(self, spans: Spans, span: Span, began_ns: int) -> None:
        self._spans: Spans | None = spans
        self._span = span
        self._began_ns = began_ns

    @property
    def is_open(self) -> bool:
        """Whether it is observed and has not ended."""
        return self._spans is not None

    def begin(self, name: str, **attributes: Attribute) -> OpenSpan:
        """Begin a part of this span; what is part of an ended or unobserved one is not observed either."""
        spans = self._spans  # once: another thread may end it meanwhile
        return NO_SPAN if spans is None else spans.begin(name, parent_id=self._span.id, **attributes)

    def note(self, **attributes: Attribute) -> None:
        """Add what was not known at the beginning, and is told at the end."""
        if self._spans is not None:
            self._span = msgspec.structs.replace(self._span, attributes=self._span.attributes | _known(attributes))

    def complete(self, **attributes: Attribute) -> None:
        """It ended well."""
        self.note(**attributes)
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """It ended by ``error``."""
        self._end(error)

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Fail it by what leaves the block; else it goes on behind it."""
        try:
            yield
        except BaseException as exc:
            self.fail(exc)
            raise

    def _end(self, error: BaseException | None) -> None:
        spans, self._spans = self._spans, None
        if spans is not None:
            spans.ended(self._span, time.perf_counter_ns() - self._began_ns, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)


class Spans:
    """Hands the spans of one Checkpointer to its observer; every method may be called from any thread.

    A span is told as a whole or not at all: where the observer falls behind, new ones are left out with all their
    parts, and the ends of those that were begun wait in the queue however long it is.
    """

    def __init__(
        self, observer: Observer | None, *, run: str = "", on_left_out: Callable[[], None] = lambda: None
    ) -> None:
        """Nothing is told before ``start``; ``run`` stands in every span that is no part of another."""
        self._observer = observer
        self._run = run
        self._on_left_out = on_left_out
        self._calls: SimpleQueue[Call | None] = SimpleQueue()  # put() is one C call, safe in a finalizer
        self._thread: threading.Thread | None = None
        self.close_seconds = CLOSE_SECONDS
        """How long ``close`` waits."""

    def start(self) -> None:
        """Start the thread, where there is an observer."""
        if self._observer is not None:
            # A daemon: an observer that hangs must not hold the interpreter's exit.
            self._thread = threading.Thread(target=_run, args=(self._calls,), name="aiockpt-observer", daemon=True)
            self._thread.start()

    def begin(self, name: str, *, parent_id: int | None = None, **attributes: Attribute) -> OpenSpan:
        """Begin a span; attributes that are None are not known."""
        if self._observer is None or self._thread is None:  # also after close, and in a forked child
            return NO_SPAN
        if self._calls.qsize() >= MAX_BACKLOG:
            self._on_left_out()
            return NO_SPAN
        began_ns, started_at_ns = time.perf_counter_ns(), time.time_ns()
        span = Span(
            name=name,
            id=int.from_bytes(os.urandom(6)),  # the program's own random numbers are left alone
            parent_id=parent_id,
            started_at_ns=started_at_ns,
            attributes=_known(attributes if parent_id else {"run": self._run, **attributes}),
        )
        self._calls.put(partial(self._observer.started, span))
        return OpenSpan(self, span, began_ns)

    def ended(self, span: Span, elapsed_ns: int, error: BaseException | None) -> None:
        """Tell of a span's end."""
        if self._observer is None:
            return
        if error is None:
            self._calls.put(partial(self._observer.completed, span, elapsed_ns))
        else:
            self._calls.put(partial(self._observer.failed, span, elapsed_ns, error))

    def close(self) -> None:
        """Begin no more spans, and wait until the observer was told of all that was; blocks, idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._calls.put(None)
        thread.join(self.close_seconds)
        if thread.is_alive():
            _log.warning(
                "the observer did not take its last %d calls within %g s", self._calls.qsize(), self.close_seconds
            )

    def forget_in_child(self) -> None:
        """In a forked child, where the thread does not exist."""
        self._observer = self._thread = None


class _NoSpan(OpenSpan):
    """What nobody observes."""

    __slots__ = ()

    def __init__(self) -> None:
        self._spans = None


NO_SPAN: OpenSpan = _NoSpan()
UNOBSERVED = Spans(None)


def _known(attributes: dict[str, Attribute]) -> dict[str, str | int | float | bool]:
    return {key: value for key, value in attributes.items() if value is not None}


def _run(calls: SimpleQueue[Call | None]) -> None:
    """Make the calls one after another; holds no Checkpointer, so that one can be collected."""
    is_told = False
    while (call := calls.get()) is not None:
        try:
            call()
        except BaseException:  # noqa: BLE001  # the user's code; whatever it is, saves go on
            if not is_told:
                _log.warning("the observer raised; what it raises from now on is not logged", exc_info=True)
            is_told = True
        del call  # an idle thread keeps no error, and what that holds, alive
