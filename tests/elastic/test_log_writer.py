"""The thread that writes what streams printed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

import pytest

from aiockpt.elastic.printing import log_writer
from aiockpt.elastic.printing.feed import MOST_WAITING_NBYTES
from aiockpt.elastic.printing.log_writer import LogWriter
from tests.waiting import wait_until

pytestmark = pytest.mark.process

_log = logging.getLogger("aiockpt.elastic")


class Sink:
    """Keeps what is written; can be made to be stuck, to fail, and to take little at once."""

    def __init__(self, name: str = "sink", *, is_tried_again: bool = True, most: int = 1 << 30) -> None:
        self.name = name
        self.is_tried_again = is_tried_again
        self.most = most
        self.may_go = threading.Event()
        self.may_go.set()
        self.is_stuck = threading.Event()
        self.error: OSError | None = None
        self.data = bytearray()
        self.is_closed = threading.Event()

    def write(self, blocks: Sequence[bytes], source: object) -> int:
        if not self.may_go.is_set():
            self.is_stuck.set()
            assert self.may_go.wait(60)
            self.is_stuck.clear()
        if self.error is not None:
            raise self.error
        data = b"".join(blocks)[: self.most]
        self.data += data
        return len(data)

    def excuse(self) -> str:
        return "it is stuck"

    def close(self) -> None:
        self.is_closed.set()


def writer(*sinks: Sink) -> LogWriter:
    made = LogWriter("aiockpt-test-writer", report=_log.warning)
    for sink in sinks:
        made.add(sink)
    made.start()
    return made


def test_all_that_was_put_is_written_at_the_end() -> None:
    """Nothing is lost, of many streams, in order within each; the thread ends and closes what it wrote to (R-TL-4)."""
    sinks = [Sink(str(at), most=7) for at in range(8)]
    made = writer(*sinks)
    feeds = [made.feed(sink) for sink in sinks]
    for number in range(500):
        for feed in feeds:
            feed.put(b"%d\n" % number)
    assert made.end(60) == {}
    made.close()
    for sink in sinks:
        assert bytes(sink.data) == b"".join(b"%d\n" % number for number in range(500))
        assert sink.is_closed.is_set()


def test_a_stuck_sink_holds_up_nobody() -> None:
    """Putting does not block; 16 MiB wait, more is dropped and marked, and the others go on behind it (R-TL-9)."""
    sink = Sink()
    sink.may_go.clear()
    made = writer(sink)
    feed = made.feed(sink)
    line = b"x" * 1023 + b"\n"
    for _ in range(20 << 10):
        feed.put(line)
    assert feed.waiting_nbytes <= MOST_WAITING_NBYTES
    dropped = feed.dropped_lines
    assert dropped >= 4 << 10
    sink.may_go.set()
    wait_until(lambda: not feed.waiting_nbytes, "what waits to be written")
    feed.put(b"kept\n")
    assert made.end(60) == {}
    made.close()
    assert len(sink.data.splitlines()) == (20 << 10) - dropped + 2
    assert sink.data.endswith(b"x\n[aiockpt: %d lines dropped: it is stuck]\nkept\n" % dropped)


def test_a_failing_sink_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What waits is kept and written once it can be; the error is logged once and counted each time (R-TL-6)."""
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)
    bad, good = Sink("/full/stdout.log"), Sink("good")
    bad.error = OSError(28, os.strerror(28))
    made = writer(bad, good)
    feed, other = made.feed(bad), made.feed(good)
    feed.put(b"one\n")
    wait_until(lambda: made.errors["/full/stdout.log"] >= 3, "three attempts")
    feed.put(b"two\n")
    other.put(b"other\n")
    wait_until(lambda: good.data, "the other sink to go on")
    bad.error = None
    wait_until(lambda: bad.data == b"one\ntwo\n", "what waited")
    feed.put(b"three\n")
    assert made.end(60) == {}
    made.close()
    assert bad.data == b"one\ntwo\nthree\n"
    [record] = [record for record in caplog.records if record.name == "aiockpt.elastic"]
    assert record.levelno == logging.WARNING
    assert "/full/stdout.log" in record.getMessage()
    assert "No space left" in record.getMessage()


def test_a_failing_sink_is_left_alone_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried for each line that comes, but after a time, and at the end."""
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 1000.0)
    bad = Sink("bad")
    bad.error = OSError(28, os.strerror(28))
    made = writer(bad)
    feed, is_served = made.feed(bad), threading.Event()
    for _ in range(100):
        is_served.clear()
        feed.put(b"line\n")
        made.call(is_served.set)
        assert is_served.wait(60)
    assert made.errors["bad"] == 1
    bad.error = None
    assert made.end(60) == {}
    made.close()
    assert bad.data == b"line\n" * 100


def test_a_sink_that_fails_until_the_end() -> None:
    """It is tried a last time, and what is not written is told and counted."""
    bad = Sink("bad")
    bad.error = OSError(5, os.strerror(5))
    made = writer(bad)
    feed = made.feed(bad)
    feed.put(b"one\ntwo\n")
    assert made.end(60) == {"bad": 8}
    made.close()
    assert (feed.dropped_lines, feed.dropped_nbytes) == (2, 8)


def test_a_broken_console_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """One that is not tried again drops all that comes, counted, and the thread goes on."""
    broken, good = Sink("the console", is_tried_again=False), Sink("good")
    broken.error = BrokenPipeError(32, os.strerror(32))
    made = writer(broken, good)
    feed, other = made.feed(broken), made.feed(good)
    feed.put(b"one\n")
    wait_until(lambda: feed.dropped_lines == 1, "the console to be given up")
    feed.put(b"two\n")
    other.put(b"other\n")
    assert made.end(60) == {}
    made.close()
    assert feed.dropped_lines == 2
    assert good.data == b"other\n"
    assert len([record for record in caplog.records if record.name == "aiockpt.elastic"]) == 1


def test_a_thread_that_is_stuck_at_the_end_is_left() -> None:
    """``end`` returns in its time and tells what is missing; once the thread comes out it writes no more and ends."""
    sink = Sink()
    sink.may_go.clear()
    made = writer(sink)
    feed = made.feed(sink)
    feed.put(b"stuck\n")
    assert sink.is_stuck.wait(60)
    feed.put(b"never\n")
    assert made.end(0.01) == {"sink": 12}
    made.close()
    assert not sink.is_closed.is_set()
    sink.may_go.set()
    assert sink.is_closed.wait(60)
    assert sink.data == b"stuck\n"


def test_close_without_end() -> None:
    """What was not written is dropped, the sinks are closed, also where the thread was never started."""
    sink = Sink()
    writer(sink).close()
    assert sink.is_closed.wait(60)
    unstarted, idle = Sink(), LogWriter("aiockpt-test-writer", report=_log.warning)
    idle.add(unstarted)
    idle.close()
    idle.close()
    assert unstarted.is_closed.is_set()
    assert idle.end(0) == {}


def test_no_thread_without_a_sink() -> None:
    """A writer that has nothing to write to starts none (E-60)."""
    before = threading.active_count()
    made = writer()
    assert threading.active_count() == before
    made.close()


def test_calls_are_made_behind_what_was_put() -> None:
    """So that the log tells of a thing after it."""
    sink, seen = Sink(), []
    made = writer(sink)
    made.feed(sink).put(b"first\n")
    made.call(lambda: seen.append(bytes(sink.data)))
    assert made.end(60) == {}
    made.close()
    assert seen == [b"first\n"]
