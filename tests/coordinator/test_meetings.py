"""Threads that wait in meetings: for the end, for an interruption, for the loss of the hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiockpt.coordinator import meetings as meetings_module
from aiockpt.coordinator.meetings import Meetings
from aiockpt.errors import PeerFailedError
from aiockpt.protocol.star import Attend, Met, Recall, StarMessage
from aiockpt.protocol.terms import WireError
from tests.coordinator.meeting_hub import ARRIVAL_TIMEOUT, MeetingHub
from tests.support import PATIENCE_SECONDS

BROKEN = WireError(kind="storage", what="broken")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_all_wait_for_the_last_one(pool: ThreadPoolExecutor) -> None:
    with MeetingHub(3) as hub:
        early = [
            pool.submit(hub.meetings[rank].meet, "a", claim="", word=b"%d" % rank, stop=threading.Event())
            for rank in (0, 2)
        ]
        hub.wait_said(3 + 2)
        assert not any(future.done() for future in early)
        assert hub.meetings[1].meet("a", claim="") == Met(meeting="a", word=b"0")
        assert {future.result(PATIENCE_SECONDS).word for future in early} == {b"0"}
        assert hub.meetings[0].has_ended("a")
        assert not hub.meetings[0].has_ended("b")


def test_who_stops_takes_all_along(pool: ThreadPoolExecutor) -> None:
    with MeetingHub(3) as hub:
        stop = threading.Event()
        waiting = [
            pool.submit(hub.meetings[0].meet, "a", claim=""),
            pool.submit(hub.meetings[1].meet, "a", claim="", stop=stop),
        ]
        stop.set()
        for future in waiting:
            error = future.result(PATIENCE_SECONDS).error
            assert error is not None
            assert (error.kind, error.rank) == ("cancelled", 1)


def test_who_stops_without_a_hub_goes_soon_and_is_heard_later(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meetings_module, "GRACE_SECONDS", 0.0)
    with MeetingHub(2) as hub:
        hub.lose(1)
        stop = threading.Event()
        stop.set()
        error = hub.meetings[1].meet("a", claim="", stop=stop).error
        assert error is not None
        assert (error.kind, error.rank) == ("cancelled", 1)
        hub.join(1)
        error = hub.meetings[0].meet("a", claim="").error
        assert error is not None
        assert (error.kind, error.rank) == ("cancelled", 1)


def test_an_excuse_waits_for_nobody() -> None:
    with MeetingHub(2) as hub:
        hub.meetings[1].excuse("a", claim="", error=BROKEN)
        error = hub.meetings[0].meet("a", claim="").error
        assert error is not None
        assert (error.what, error.rank) == ("broken", 1)


def test_no_hub_any_more_ends_what_waits_and_what_comes(pool: ThreadPoolExecutor) -> None:
    """Until one is there again."""
    said: list[StarMessage] = []
    meetings = Meetings(1, 2, said.append)
    waiting = pool.submit(meetings.meet, "a", claim="")
    lost = PeerFailedError("the worker of rank 0 was not reached", rank=0)
    meetings.fail(lost)
    for call in (waiting.result, lambda: meetings.meet("b", claim="")):
        with pytest.raises(PeerFailedError, match="not reached") as caught:
            call()
        assert caught.value is not lost
    said.clear()
    meetings.rejoined()
    assert said == [Recall(mets=[])]
    waiting = pool.submit(meetings.meet, "c", claim="")
    meetings.hear(Met(meeting="c"))
    assert waiting.result(PATIENCE_SECONDS).error is None


def test_what_is_open_is_said_again(pool: ThreadPoolExecutor) -> None:
    with MeetingHub(2) as hub:
        hub.lose(1)
        waiting = [pool.submit(meetings.meet, "a", claim="") for meetings in hub.meetings]
        hub.wait_said(2 + 1)
        hub.join(1)
        assert [future.result(PATIENCE_SECONDS).error for future in waiting] == [None, None]
        assert hub.said[-1][0] == 1
        assert isinstance(hub.said[-1][1], Attend)


def test_a_rank_that_never_comes_is_named(pool: ThreadPoolExecutor) -> None:
    with MeetingHub(2) as hub:
        waiting = pool.submit(hub.meetings[0].meet, "a", claim="")
        hub.wait_said(3)
        hub.pass_time(ARRIVAL_TIMEOUT)
        error = waiting.result(PATIENCE_SECONDS).error
        assert error is not None
        assert (error.kind, error.rank) == ("peer", 1)
