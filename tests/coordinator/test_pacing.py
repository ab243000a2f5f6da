"""When many ranks save: the same reasons at the same steps on all of them, and no wait that does not end."""

from __future__ import annotations

import itertools
import logging
import queue
import random
import signal
import threading
import time
from collections import deque
from functools import partial

import pytest

from aiockpt.config import Every
from aiockpt.coordinator.failures import closed
from aiockpt.coordinator.pacing import Pacing
from aiockpt.coordinator.schedule import Schedule, WhenToSave
from aiockpt.protocol.agreeing import Agreement
from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import Agreed, AgreedStep, AskSave, Dropped, HowFar, Pace, Propose, StarMessage
from tests.waiting import PATIENCE_SECONDS, wait_until


class Job:
    """Ranks and a real hub, in one thread; messages are on their way until ``settle``."""

    def __init__(
        self, world: int, every: Every | None = None, *, stall_timeout: float | None = PATIENCE_SECONDS
    ) -> None:
        self.world = world
        self.now = 0.0
        self.agreement = Agreement(world)
        self.said: deque[tuple[int, StarMessage]] = deque()
        self.told: deque[tuple[int, StarMessage]] = deque()
        self.ranks = [
            Pacing(
                every,
                is_first=rank == 0,
                say=partial(self._say, rank),
                stall_timeout=stall_timeout,
                now=self.now,
            )
            for rank in range(world)
        ]
        for rank in range(world):
            self.tell(self.agreement.join(rank))
        self.settle()

    def _say(self, rank: int, message: StarMessage) -> None:
        self.said.append((rank, message))

    def tell(self, tells: list[Tell]) -> None:
        self.told += [(rank, tell.message) for tell in tells for rank in tell.ranks]

    def settle(self) -> None:
        while self.said or self.told:
            if self.said:
                rank, message = self.said.popleft()
                self.tell(self.agreement.hear(rank, message))  # type: ignore[arg-type]
            if self.told:
                rank, message = self.told.popleft()
                self.ranks[rank].hear(message)

    def train(self, *steps: int) -> list[list[tuple[int, str]]]:
        """Let all ranks do these steps, and save when that is due; returns when and why, by rank."""
        saves: list[list[tuple[int, str]]] = [[] for _ in self.ranks]
        for step in steps:
            for rank, pacing in enumerate(self.ranks):
                reason = pacing.due(step, self.now)
                if reason is not None:
                    saves[rank].append((step, reason))
                    pacing.saved(step, self.now)
            self.settle()
        return saves

    def train_alike(self, *steps: int) -> list[tuple[int, str]]:
        first, *others = self.train(*steps)
        assert all(saves == first for saves in others)
        return first


def test_steps_need_no_word() -> None:
    """They are alike on all ranks by arithmetic."""
    job = Job(2, Every(steps=3))
    assert job.train_alike(*range(7)) == [(2, "every 3 steps"), (5, "every 3 steps")]
    alone: list[WhenToSave] = [job.ranks[0], Schedule(Every(steps=3), 0.0)]
    assert [when.due(8, 0.0) for when in alone] == ["every 3 steps"] * 2
    assert not job.said


def test_a_request_is_a_reason_on_all_ranks() -> None:
    """At one step ahead of all, once."""
    job = Job(3)
    assert job.train_alike(0, 1) == []
    job.ranks[2].request("SIGTERM")
    ((step, reason),) = job.train_alike(*range(2, 30))
    assert reason == "SIGTERM"
    assert 2 < step < 10


def test_a_rank_whose_loop_does_not_call_due() -> None:
    """Its request reaches the hub all the same, and the others."""
    job = Job(2)
    job.train(0)
    job.ranks[1].request("SIGTERM")
    job.ranks[1].poll(0.0)
    job.ranks[1].poll(0.0)
    assert list(job.said) == [(1, AskSave(reason="SIGTERM"))]
    job.settle()
    assert [reason for _, reason in job.train_alike(*range(1, 10))] == ["SIGTERM"]


def test_minutes_by_the_first_ranks_clock() -> None:
    """Another one's says nothing; the hub is asked once until a save is called."""
    job = Job(2, Every(minutes=1))
    job.ranks[1].poll(1e6)
    job.ranks[0].poll(59.9)
    assert not job.said
    job.now = 60.0
    assert job.train_alike(*range(10)) == [(2, "every 1 minutes")]
    job.now = 119.0
    assert job.train_alike(*range(10, 20)) == []
    job.now = 120.0
    job.ranks[0].poll(job.now)
    job.ranks[0].poll(job.now)
    assert len(job.said) == 1
    assert len(job.train_alike(*range(20, 40))) == 1


def test_a_request_is_not_lost_behind_the_clock() -> None:
    """Both are told; while a request is under way the clock does not ask."""
    job = Job(2, Every(minutes=1))
    job.now = 60.0
    job.ranks[0].poll(job.now)
    job.settle()
    job.ranks[1].request("SIGTERM")
    reasons = [reason for _, reason in job.train_alike(*range(20))]
    assert reasons == ["every 1 minutes", "SIGTERM"]
    job.now = 200.0
    job.ranks[0].request("again")
    assert [reason for _, reason in job.train_alike(*range(20, 40))] == ["again"]


def test_what_is_agreed_on_goes_before_arithmetic() -> None:
    """A loop that leaves by the reason must be told of it where both fall on one step."""
    job = Job(2, Every(steps=1))
    job.ranks[1].request("SIGTERM")
    job.ranks[1].poll(0.0)
    job.settle()
    assert job.train_alike(*range(4)) == [
        (0, "every 1 steps"),
        (1, "every 1 steps"),
        (2, "SIGTERM"),
        (3, "every 1 steps"),
    ]


def test_a_request_between_due_and_save() -> None:
    """It is not served by that save; the same text twice is two requests."""
    job = Job(2)
    job.ranks[0].request("SIGTERM")
    job.train()
    job.ranks[0].poll(0.0)
    job.settle()
    for pacing in job.ranks:
        assert pacing.due(2, 0.0) == pacing.due(3, 0.0) == "SIGTERM"
    job.ranks[0].request("SIGTERM")
    for pacing in job.ranks:
        pacing.saved(3, 0.0)
    assert [reason for _, reason in job.train_alike(*range(4, 20))] == ["SIGTERM"]


def test_a_reason_is_cut() -> None:
    """It goes to every rank."""
    job = Job(1)
    job.ranks[0].request("x" * 10_000)
    ((_, reason),) = job.train_alike(*range(9))
    assert reason == "x" * 200


def test_training_that_goes_back() -> None:
    """After a restore of an earlier step what is asked for is due there, not where training was before."""
    job = Job(3)
    job.ranks[0].request("one")
    assert len(job.train_alike(*range(500))) == 1
    assert job.train_alike(*range(50, 60)) == []
    job.ranks[1].request("two")
    ((step, reason),) = job.train_alike(*range(60, 100))
    assert (reason, step < 70) == ("two", True)
    job.train(*range(20))
    job.ranks[2].request("three")
    ((step, reason),) = job.train_alike(*range(10, 40))
    assert (reason, step < 20) == ("three", True)


def test_the_lead_is_what_is_trained_in_a_second() -> None:
    """A fast loop is asked for a step that it will not have gone past when the word comes."""
    job = Job(1)
    (pacing,) = job.ranks

    def lead() -> int:
        pacing.hear(HowFar(round=7))
        _, pace = job.said.pop()
        assert isinstance(pace, Pace)
        return pace.lead

    assert lead() == 0
    for step in range(201):
        pacing.due(step, step / 100)
    assert lead() == 100
    for step in range(201, 260):
        pacing.due(step, 2.0 + (step - 200) / 10)
    assert lead() == 10


class Waiting:
    """A rank that has accepted step 2 and asks for it, in a thread."""

    def __init__(self, job: Job) -> None:
        self.pacing = job.ranks[0]
        self.pacing.hear(Propose(round=job.agreement._round, step=2))
        job.said.clear()
        self.reasons: list[str | None] = []
        self.thread = threading.Thread(target=lambda: self.reasons.append(self.pacing.due(2, 0.0)))
        self.thread.start()

    def waits(self) -> bool:
        """Whether it has come to where it waits: a waiter is there, and the lock is free."""
        return bool(self.pacing._changed._waiters)  # type: ignore[attr-defined]

    def join(self) -> list[str | None]:
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive()
        return self.reasons


@pytest.mark.parametrize("agreed", [True, False])
def test_due_waits_for_the_verdict(agreed: bool) -> None:
    """And goes on at once when it is there, whichever it is."""
    waiting = Waiting(Job(2))
    wait_until(waiting.waits, "due to wait")
    waiting.pacing.hear(HowFar(round=2))
    assert waiting.thread.is_alive()
    waiting.pacing.hear(Agreed(agreed=AgreedStep(step=2, reasons=["SIGTERM"])) if agreed else Dropped())
    assert waiting.join() == ["SIGTERM" if agreed else None]


def test_a_request_while_due_waits() -> None:
    """The loop passes it on."""
    job = Job(2)
    waiting = Waiting(job)
    wait_until(waiting.waits, "due to wait")
    waiting.pacing.request("SIGTERM")
    waiting.pacing.poll(0.0)
    assert list(job.said) == [(0, AskSave(reason="SIGTERM"))]
    waiting.pacing.hear(Dropped())
    assert waiting.join() == [None]


def test_a_verdict_that_never_comes(caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on after stall_timeout with one WARNING, and waits no more for that."""
    job = Job(2, stall_timeout=0.02)
    assert Waiting(job).join() == [None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "due(2) has waited 0.02 s" in caplog.text
    assert job.ranks[0].due(3, 0.0) is None
    assert len(caplog.records) == 1


def test_the_end_lets_training_go(caplog: pytest.LogCaptureFixture) -> None:
    """Closing, or a worker that does not come back: nothing to warn of here."""
    caplog.set_level(logging.INFO)
    waiting = Waiting(Job(2, stall_timeout=None))
    wait_until(waiting.waits, "due to wait")
    waiting.pacing.fail(closed())
    assert waiting.join() == [None]
    waiting.pacing.hear(Propose(round=9, step=5))
    assert waiting.pacing.due(5, 0.0) is None
    assert not caplog.records


def test_a_new_worker_is_told_again() -> None:
    """What the former one was told may have died with it; once it is agreed on, nothing is said."""
    job = Job(2)
    job.ranks[1].request("SIGTERM")
    job.ranks[1].poll(0.0)
    job.said.clear()  # it died
    job.ranks[1].poll(0.0)
    assert not job.said
    job.ranks[1].rejoined()
    job.ranks[0].rejoined()
    assert list(job.said) == [(1, AskSave(reason="SIGTERM"))]
    job.settle()
    job.ranks[1].rejoined()
    assert not job.said
    assert [reason for _, reason in job.train_alike(*range(9))] == ["SIGTERM"]


def test_a_request_in_a_signal_handler_that_meets_the_lock() -> None:
    """A handler runs in the thread that holds it, anywhere."""
    job = Job(1)
    (pacing,) = job.ranks
    before = signal.signal(signal.SIGUSR1, lambda number, frame: pacing.request("SIGUSR1"))
    try:
        with pacing._changed:
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [reason for _, reason in job.train_alike(*range(9))] == ["SIGUSR1"]


class RunningJob:
    """Ranks that train in threads as fast as they can until they are told to leave, and a hub in another one."""

    def __init__(self, world: int, every: Every, requests: dict[tuple[int, int], str]) -> None:
        self._agreement = Agreement(world)
        self._said: queue.SimpleQueue[tuple[int, StarMessage] | None] = queue.SimpleQueue()
        self._requests = requests
        self.saves: list[list[tuple[int, str]]] = [[] for _ in range(world)]
        self._ranks = [
            Pacing(
                every,
                is_first=rank == 0,
                say=lambda message, rank=rank: self._said.put((rank, message)),
                stall_timeout=PATIENCE_SECONDS,
                now=self._now(),
            )
            for rank in range(world)
        ]
        self._hub = threading.Thread(target=self._serve)
        self._trainers = [threading.Thread(target=self._train, args=(rank,)) for rank in range(world)]

    @staticmethod
    def _now() -> float:
        """A clock that is fast: what is asked for is agreed on for a second later, of which the test waits for many."""
        return 20 * time.monotonic()

    def run(self) -> None:
        for thread in (self._hub, *self._trainers):
            thread.start()
        for thread in self._trainers:
            thread.join(PATIENCE_SECONDS)
        self._said.put(None)
        self._hub.join(PATIENCE_SECONDS)
        assert not any(thread.is_alive() for thread in (self._hub, *self._trainers))

    def _serve(self) -> None:
        tells = [tell for rank in range(len(self._ranks)) for tell in self._agreement.join(rank)]
        while True:
            for tell in tells:
                for rank in tell.ranks:
                    self._ranks[rank].hear(tell.message)
            said = self._said.get()
            if said is None:
                return
            tells = self._agreement.hear(*said)  # type: ignore[arg-type]

    def _train(self, rank: int) -> None:
        pacing = self._ranks[rank]
        for step in itertools.count():
            reason = pacing.due(step, self._now())
            if reason is not None:
                self.saves[rank].append((step, reason))
                pacing.saved(step, self._now())
                if "SIGTERM" in reason:
                    return
            if (rank, step) in self._requests:
                pacing.request(self._requests[rank, step])


@pytest.mark.parametrize("seed", range(4))
def test_ranks_in_threads(seed: int) -> None:
    """Whoever is fast, and whenever something is asked for: the same saves for the same reasons, and one way out."""
    chance = random.Random(seed)
    requests = {(rank, chance.randrange(2000)): f"request of {rank}" for rank in range(4)}
    requests[chance.randrange(4), chance.randrange(2000, 20_000)] = "SIGTERM"
    job = RunningJob(4, Every(steps=700, minutes=1 / 60), requests)
    job.run()
    assert job.saves[0] == job.saves[1] == job.saves[2] == job.saves[3]
    assert "SIGTERM" in job.saves[0][-1][1]
