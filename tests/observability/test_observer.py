"""How an observer is called, and what its misbehaviour leads to."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import aiockpt
from aiockpt.config import Options
from aiockpt.coordinator import spans as spans_module
from aiockpt.coordinator.spans import NO_SPAN, UNOBSERVED, Spans
from tests.observability.recorder import Recorder
from tests.support import wait_until


@contextmanager
def telling(observer: aiockpt.Observer) -> Iterator[Spans]:
    """Spans whose observer was told of all of them when the block is left."""
    spans = Spans(observer, run="/run")
    spans.start()
    try:
        yield spans
    finally:
        spans.close_seconds = 60
        spans.close()


def test_a_span_and_its_parts() -> None:
    """Attributes that are None are left out, those that come later stand at the end, the run only at the top."""
    recorder = Recorder()
    with telling(recorder) as spans:
        whole = spans.begin("save", step=3, save_id=None)
        part = whole.begin("stage", nbytes=5)
        whole.note(path="/run/step-3")
        part.complete(speed=1.5)
        whole.complete()
        whole.complete()
    begun, part_begun = recorder.begun
    assert (begun.name, begun.parent_id, begun.attributes) == ("save", None, {"run": "/run", "step": 3})
    assert (part_begun.name, part_begun.parent_id) == ("stage", begun.id)
    (part_span, part_ns, _), (span, elapsed_ns, error) = recorder.ended
    assert part_span.attributes == {"nbytes": 5, "speed": 1.5}
    assert span.attributes == {"run": "/run", "step": 3, "path": "/run/step-3"}
    assert (span.id, span.started_at_ns, error) == (begun.id, begun.started_at_ns, None)
    assert elapsed_ns > part_ns > 0
    assert recorder.threads == {"aiockpt-observer"}


def test_a_block_ends_its_span() -> None:
    """Completed, or failed by what leaves it, which goes on."""
    recorder = Recorder()
    with telling(recorder) as spans:
        with spans.begin("good"):
            pass
        with pytest.raises(KeyboardInterrupt) as caught, spans.begin("bad"):
            raise KeyboardInterrupt
        with spans.begin("failed already") as span:
            span.fail(OSError("first"))
        goes_on = spans.begin("goes on")
        with goes_on.unless_it_fails():
            pass
        assert goes_on.is_open
        with pytest.raises(ValueError, match="here"), goes_on.unless_it_fails():
            raise ValueError("here")
        assert not goes_on.is_open
    good, bad, already, went_on = (error for _, _, error in recorder.ended)
    assert good is None
    assert bad is caught.value
    assert isinstance(already, OSError)
    assert isinstance(went_on, ValueError)


def test_without_an_observer_nothing_is_made() -> None:
    """No thread, no object: every span is the one that nobody observes."""
    UNOBSERVED.start()
    span = UNOBSERVED.begin("save", step=1)
    assert span is NO_SPAN
    assert span.begin("stage") is NO_SPAN
    assert not span.is_open
    span.note(step=2)
    span.complete()
    span.fail(ValueError())
    with pytest.raises(ValueError, match="passed on"), span:
        raise ValueError("passed on")
    UNOBSERVED.close()


def test_what_raises_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback; it is called on."""

    class Raising(Recorder):
        def started(self, span: aiockpt.Span) -> None:
            super().started(span)
            raise SystemExit("from the observer")

    recorder = Raising()
    with telling(recorder) as spans:
        for _ in range(3):
            spans.begin("save").complete()
    assert len(recorder.begun) == len(recorder.ended) == 3
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aiockpt.observer", logging.WARNING)
    assert record.exc_info is not None
    assert "from the observer" in caplog.text


class Held(Recorder):
    """Holds its thread at the first call until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_in = threading.Event()
        self.go_on = threading.Event()

    def started(self, span: aiockpt.Span) -> None:
        self.is_in.set()
        self.go_on.wait(60)
        super().started(span)


def test_one_that_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """New spans are left out with their parts and counted; of those that it was told of it hears the end."""
    monkeypatch.setattr(spans_module, "MAX_BACKLOG", 4)
    observer = Held()
    left_out: list[None] = []
    spans = Spans(observer, on_left_out=lambda: left_out.append(None))
    spans.start()
    first = spans.begin("first")
    assert observer.is_in.wait(60)
    told = [spans.begin(f"told {i}") for i in range(4)]
    lost = spans.begin("lost")
    lost.begin("a part of it").complete()
    lost.complete()
    assert len(left_out) == 1
    for span in (first, *told):
        span.complete()
    observer.go_on.set()
    spans.close()
    assert [span.name for span in observer.begun] == ["first", "told 0", "told 1", "told 2", "told 3"]
    assert {span.id for span in observer.begun} == observer.spans.keys()


def test_closing_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """One that hangs is left behind with a line in the log; what begins later is told to nobody."""
    observer = Held()
    spans = Spans(observer)
    spans.start()
    spans.begin("save").complete()
    assert observer.is_in.wait(60)
    spans.close_seconds = 0.01
    spans.close()
    assert "did not take its last" in caplog.text
    assert spans.begin("late") is NO_SPAN
    spans.close()
    observer.go_on.set()
    wait_until(lambda: observer.ended, "what it was told before")


def test_an_idle_thread_keeps_nothing_alive() -> None:
    """An error holds the frames that it came through, and with them a state: it is let go once it was told."""

    class Heavy:
        """Stands for a state of many GiB."""

    class Forgetful(aiockpt.Observer):
        pass

    def fail(spans: Spans) -> weakref.ref[Heavy]:
        heavy = Heavy()
        try:
            raise ValueError(heavy)
        except ValueError as exc:
            spans.begin("save").fail(exc)
        return weakref.ref(heavy)

    with telling(Forgetful()) as spans:
        reference = fail(spans)
        wait_until(lambda: gc.collect() >= 0 and reference() is None, "the error to go")


def test_a_forked_child_tells_nobody() -> None:
    """Its observer thread does not exist: nothing piles up there."""
    with telling(Recorder()) as spans:
        pid = os.fork()
        if pid == 0:
            spans.forget_in_child()
            os._exit(0 if spans.begin("save") is NO_SPAN else 1)
        assert os.waitpid(pid, 0)[1] == 0
        spans.begin("save").complete()


class Incomplete:
    def started(self, span: aiockpt.Span) -> None: ...
    def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None: ...


@pytest.mark.parametrize("observer", [Recorder, Incomplete(), object(), print, "prometheus", 1])
def test_what_is_no_observer(observer: Any) -> None:
    """Refused at the construction, by its name, before anything is opened."""
    with pytest.raises(aiockpt.ConfigError) as caught:
        Options.make("run", observer=observer)
    assert caught.value.argument == "observer"
    assert "aiockpt.Observer" in str(caught.value)


def test_an_observer_need_not_derive() -> None:
    """Three methods make one."""

    class Whole(Incomplete):
        def failed(self, span: aiockpt.Span, elapsed_ns: int, error: BaseException) -> None: ...

    observer = Whole()
    assert Options.make("run", observer=observer).observer is observer
