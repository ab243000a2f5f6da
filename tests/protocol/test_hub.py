"""The hub's decisions, driven by a model of a job: any order of messages, deaths of workers and of the hub."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiockpt.protocol.hub import SILENT_RETURN_SECONDS, Hub
from aiockpt.protocol.orders import CheckPlans, Commit, Compare, Drop, Look, MakeAttempt, Output, Tell
from aiockpt.protocol.star import (
    Arguments,
    Arrive,
    Body,
    Committing,
    Credit,
    Details,
    Ended,
    EndedCall,
    Fits,
    GiveUp,
    Join,
    Leave,
    Open,
    OpenCall,
    Silent,
    StarMessage,
    WantBody,
    WantDetails,
    Written,
)
from aiockpt.protocol.terms import WireError

DISK_FULL = WireError(kind="storage", what="no space", phase="write")
NOT_HEARD = WireError(kind="peer", what="its trainer is not heard", phase="stage")


@dataclass
class Member:
    """One rank: its trainer calls ``save``, its worker answers the hub."""

    rank: int
    is_up: bool = False
    is_silent: bool = False
    """Its trainer is stopped."""
    inbox: deque[StarMessage] = field(default_factory=deque)
    outbox: deque[StarMessage] = field(default_factory=deque)
    calls: int = 0
    arrival: Arrive | None = None
    """Of the save whose end it does not know."""
    opened: Open | None = None
    has_written: int | None = None
    slot_of: int | None = None
    ends: dict[int, str] = field(default_factory=dict)
    errors: dict[int, WireError] = field(default_factory=dict)

    def call(self, arguments: Arguments) -> None:
        n = self.calls
        self.calls += 1
        self.arrival, self.opened, self.has_written = Arrive(n=n, arguments=arguments, digest="plan"), None, None
        if self.slot_of is None:
            self.slot_of = n
        self.say(self.arrival)

    def say(self, message: StarMessage) -> None:
        if self.is_up:
            self.outbox.append(message)

    def join(self, world: int) -> Join:
        """Its next worker; what it has to say of before follows."""
        known = self.opened
        join = Join(
            rank=self.rank,
            world=world,
            package="1",
            open_call=None if known is None else OpenCall(n=known.n, save_id=known.save_id, attempt=known.attempt),
            ended_calls=[EndedCall(n=n, end=self.ends[n]) for n in sorted(self.ends)[-64:]],  # type: ignore[arg-type]
            slot_of=self.slot_of if self.opened is not None else None,
        )
        self.has_written = None
        if self.is_silent:
            self.outbox.append(Silent(error=NOT_HEARD))
        if self.arrival is not None:
            self.outbox.append(self.arrival)
        return join

    def fall_silent(self) -> None:
        """Its trainer is not heard: what is not all staged is given up."""
        self.is_silent = True
        self.say(Silent(error=NOT_HEARD))
        if self.arrival is not None and self.has_written is None:
            self.say(GiveUp(n=self.arrival.n, error=NOT_HEARD))

    def wake(self) -> None:
        self.is_silent = False
        self.say(Silent())

    def hear(self, message: StarMessage) -> None:
        match message:
            case Open(n=n, verdict=verdict) if self.arrival is not None and n == self.arrival.n:
                if verdict == "take":
                    self.opened = message
                else:
                    self.end(n, verdict)
            case Ended(n=n, error=error) if self.arrival is not None and n == self.arrival.n:
                if error is not None:
                    self.errors[n] = error
                self.end(n, "committed" if error is None else "failed")
            case WantBody(digest=digest):
                self.say(Body(digest=digest, body=b""))
            case WantDetails(n=n) if self.arrival is not None and n == self.arrival.n:
                self.say(Details(n=n, values=b"[]"))

    def end(self, n: int, end: str) -> None:
        assert n not in self.ends
        self.ends[n] = end
        self.arrival = self.opened = None
        if end in ("skip", "busy") and self.slot_of == n:
            self.slot_of = None  # it was never taken

    def write(self) -> None:
        assert self.opened is not None
        self.has_written = self.opened.attempt
        self.say(Written(n=self.opened.n, attempt=self.opened.attempt, files=[]))

    def free(self) -> None:
        assert self.slot_of is not None
        self.say(Credit(n=self.slot_of))
        self.slot_of = None


class Job:
    """All ranks, the hub, and a disk."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.now = 0.0
        self.ids = map(str, count())
        self.members = [Member(rank) for rank in range(world)]
        self.orders: deque[Output] = deque()
        self.published: dict[int, str] = {}
        """By step: the id of its save."""
        self.attempts: set[tuple[int, str, int]] = set()
        self.hub = self.new_hub(is_first=True)
        for member in self.members:
            self.start(member)

    def new_hub(self, *, is_first: bool) -> Hub:
        return Hub(
            self.world,
            new_id=self.ids.__next__,
            arrival_timeout=100.0,
            return_timeout=10.0,
            now=self.now,
            is_first=is_first,
        )

    def start(self, member: Member) -> None:
        member.is_up = True
        self.do(self.hub.join(member.join(self.world), self.now))

    def kill(self, member: Member) -> None:
        """Its worker dies, with all that was under way."""
        member.is_up = False
        member.inbox.clear()
        member.outbox.clear()
        if member.rank == 0:
            self.orders.clear()
            self.attempts.clear()  # moved away by the trainer of rank 0
            for other in self.members:
                other.is_up = False
                other.inbox.clear()
                other.outbox.clear()
            self.hub = self.new_hub(is_first=False)
            self.start(member)
        else:
            self.do(self.hub.lost(member.rank, self.now))

    def do(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Tell):
                for rank in output.ranks:
                    assert self.members[rank].is_up
                    self.members[rank].inbox.append(output.message)
            else:
                self.orders.append(output)

    def hear(self, member: Member) -> None:
        self.do(self.hub.hear(member.rank, member.outbox.popleft(), self.now))

    def work(self, error: WireError | None = None) -> None:
        """Do the next thing that the hub wants in the run directory."""
        match self.orders.popleft():
            case Look(n, step, save_id):
                found = Ended(n=n, path=f"step-{step}") if self.published.get(step) == save_id else None
                self.do(self.hub.looked(n, found))
            case MakeAttempt() as order:
                if order.attempt:
                    self.attempts.discard((order.n, order.save_id, order.attempt - 1))
                if error is None:
                    self.attempts.add((order.n, order.save_id, order.attempt))
                self.do(self.hub.made(order, error))
            case CheckPlans(n):
                self.do(self.hub.checked(n, error))
            case Compare(n, attempt):
                self.do(self.hub.compared(n, attempt, error))
            case Commit() as order:
                key = order.n, order.save_id, order.attempt
                assert key in self.attempts
                assert all(written.attempt == order.attempt for written in order.written.values())
                assert len(order.written) == self.world
                self.attempts.discard(key)
                if error is None:
                    assert order.arguments.step not in self.published
                    self.published[order.arguments.step] = order.save_id
                    self.do(self.hub.committed(order.n, Ended(n=order.n, path=f"step-{order.arguments.step}")))
                else:
                    self.do(self.hub.committed(order.n, Ended(n=order.n, error=error)))
            case Drop(n, _, save_id, attempt):
                self.attempts.discard((n, save_id, attempt))

    def up_to_commit(self) -> None:
        """Let everything happen up to a commit, which is what the hub wants next then."""
        while not (self.orders and isinstance(self.orders[0], Commit)):
            if self.orders:
                self.work()
            for member in self.members:
                while member.inbox and not isinstance(member.inbox[0], Committing):
                    member.hear(member.inbox.popleft())
                while member.outbox:
                    self.hear(member)

    def settle(self) -> None:
        """Let everything happen that is under way."""
        while True:
            busy = False
            for member in self.members:
                if not member.is_up:
                    self.start(member)
                while member.outbox:
                    self.hear(member)
                    busy = True
                while member.inbox:
                    member.hear(member.inbox.popleft())
                    busy = True
                if member.opened is not None and member.has_written != member.opened.attempt:
                    member.write()
                    busy = True
            while self.orders:
                self.work()
                busy = True
            if not busy:
                return

    def save(self, step: int, *, ranks: list[int] | None = None, **arguments: Any) -> None:
        for rank in ranks if ranks is not None else range(self.world):
            self.members[rank].call(Arguments(step=step, **arguments))

    def end_of(self, n: int) -> str:
        ends = {member.ends.get(n, "open") for member in self.members}
        assert len(ends) == 1, ends
        return ends.pop()


def test_a_save_of_all_ranks_is_committed() -> None:
    job = Job(4)
    job.save(10)
    job.settle()
    assert job.end_of(0) == "committed"
    assert job.published == {10: "0"}


def test_nothing_is_made_twice_and_no_rank_waits_for_another() -> None:
    """The attempt is made, and opened, at the first arrival."""
    job = Job(3)
    job.save(10, ranks=[2])
    job.hear(job.members[2])
    job.work()
    assert [message for message in job.members[2].inbox if isinstance(message, Open)] == [
        Open(n=0, verdict="take", save_id="0", attempt=0)
    ]


def test_skip_is_decided_by_credits_at_the_first_arrival() -> None:
    """Rank 1 has its slot free again and copies at once; rank 0 has not, so all skip."""
    job = Job(2)
    job.save(10)
    job.settle()
    job.members[1].free()
    job.settle()
    job.save(20, when_busy="skip")
    job.settle()
    assert job.end_of(1) == "skip"
    job.members[0].free()
    job.settle()
    job.save(30, when_busy="skip")
    job.settle()
    assert job.end_of(2) == "committed"


def new_hub(*slots: int | None) -> Hub:
    """Return a hub that ranks with these slots have joined."""
    hub = Hub(len(slots), new_id=lambda: "id", arrival_timeout=None, return_timeout=None, now=0.0)
    for rank, slot in enumerate(slots):
        hub.join(Join(rank=rank, world=len(slots), package="", slot_of=slot), 0.0)
    return hub


def skipping(n: int, **more: Any) -> Arrive:
    return Arrive(n=n, arguments=Arguments(step=n, when_busy="skip"), **more)


def test_who_joins_in_the_midst_of_a_call_has_its_slot_for_it() -> None:
    hub = new_hub(0, 0)
    assert any(isinstance(order, MakeAttempt) for order in hub.hear(0, skipping(0, digest="a"), 0.0))
    assert Tell((0,), Open(n=1, verdict="skip")) in hub.hear(0, skipping(1, is_busy=True), 0.0)


def test_a_rank_that_has_skipped_is_busy_whatever_the_hub_has_heard() -> None:
    """Its save before is waiting for memory, and has not been told."""
    hub = new_hub(None, None)
    assert hub.hear(1, skipping(1, is_busy=True), 0.0) == [Tell((1,), Open(n=1, verdict="skip"))]
    assert any(isinstance(order, MakeAttempt) for order in hub.hear(1, skipping(0, digest="a"), 0.0))


def test_a_rank_that_has_not_called_the_save_before_has_no_slot_for_the_next() -> None:
    """Nobody can say when it comes to that; it may be in it, with a worker that stands still."""
    hub = new_hub(None, None)
    hub.hear(0, Arrive(n=0, arguments=Arguments(step=0), digest="a"), 0.0)
    hub.hear(0, GiveUp(n=0, error=DISK_FULL), 0.0)
    hub.hear(0, Credit(n=0), 0.0)
    assert Tell((0,), Open(n=1, verdict="skip")) in hub.hear(0, skipping(1, digest="a"), 0.0)
    hub.hear(1, Arrive(n=0, arguments=Arguments(step=0), digest="a"), 0.0)
    hub.hear(1, Credit(n=0), 0.0)
    assert any(isinstance(order, MakeAttempt) for order in hub.hear(1, skipping(2, digest="a"), 0.0))


def test_a_rank_that_has_skipped_what_was_taken_fails_it() -> None:
    hub = new_hub(None, None)
    hub.hear(0, skipping(0, digest="a"), 0.0)
    told = [order.message for order in hub.hear(1, skipping(0, is_busy=True), 0.0) if isinstance(order, Tell)]
    assert [message.error.rank for message in told if isinstance(message, Ended) and message.error] == [1]


def test_busy_is_one_answer_too() -> None:
    job = Job(2)
    job.save(10)
    job.settle()
    job.save(20, when_busy="raise")
    job.settle()
    assert job.end_of(1) == "busy"


@pytest.mark.parametrize(
    ("other", "word"),
    [(Arguments(step=11), "step 11"), (Arguments(step=10, overwrite=True), "overwrite=True")],
)
def test_ranks_that_call_differently_fail_together(other: Arguments, word: str) -> None:
    job = Job(3)
    job.save(10, ranks=[0, 1])
    job.members[2].call(other)
    job.settle()
    assert job.end_of(0) == "failed"
    assert {member.errors[0].kind for member in job.members} == {"mismatch"}
    assert word in job.members[0].errors[0].why
    assert not job.attempts


def test_a_failure_on_one_rank_fails_all_and_names_it() -> None:
    job = Job(3)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.members[1].say(GiveUp(n=0, error=DISK_FULL))
    job.hear(job.members[1])
    job.settle()
    assert job.end_of(0) == "failed"
    assert {(member.errors[0].rank, member.errors[0].phase) for member in job.members} == {(1, "write")}
    assert not job.attempts
    assert not job.published


def test_an_attempt_that_was_moved_away_fails_nothing() -> None:
    """Its writers meet ENOENT when the trainer of rank 0 has fenced it, for the next hub to begin anew."""
    hub = Hub(2, new_id=lambda: "id", arrival_timeout=None, return_timeout=None, now=0.0, is_first=False)
    for rank in range(2):
        known = OpenCall(n=0, save_id="id", attempt=0)
        hub.join(Join(rank=rank, world=2, package="", open_call=known), 0.0)
        hub.hear(rank, Arrive(n=0, arguments=Arguments(step=10)), 0.0)
    late = GiveUp(n=0, error=DISK_FULL, attempt=0)
    assert hub.hear(1, late, 0.0) == []
    made = MakeAttempt(0, 10, "id", 1)
    assert made in hub.looked(0, None)
    hub.made(made, None)
    assert hub.hear(1, late, 0.0) == []
    told = hub.hear(1, msgspec.structs.replace(late, attempt=1), 0.0)
    assert [output.message.error.rank for output in told if isinstance(output, Tell)] == [1]


def test_a_call_that_was_refused_counts() -> None:
    job = Job(2)
    job.save(10, ranks=[0])
    refused = Arrive(n=0, arguments=Arguments(step=10), refused=WireError(kind="config", what="no"))
    job.members[1].calls, job.members[1].arrival = 1, refused
    job.members[1].say(refused)
    job.settle()
    assert job.end_of(0) == "failed"
    job.members[0].free()
    job.save(20)
    job.settle()
    assert job.end_of(1) == "committed"


def test_a_rank_that_does_not_call_is_named_at_the_time_out() -> None:
    job = Job(3)
    job.save(10, ranks=[0, 2])
    job.settle()
    assert job.hub.next_deadline() == 100.0
    job.now = 100.0
    job.do(job.hub.tick(job.now))
    job.settle()
    assert job.members[0].errors[0].rank == 1
    assert "rank 1 did not call save(10)" in job.members[2].errors[0].what
    job.save(10, ranks=[1])
    job.settle()
    assert job.end_of(0) == "failed"


def test_the_time_of_a_save_is_the_hubs() -> None:
    job = Job(2)
    job.save(10, ranks=[0], timeout=5.0)
    job.settle()
    job.now = 5.0
    job.do(job.hub.tick(job.now))
    job.settle()
    assert job.members[0].errors[0].kind == "timeout"


def test_a_worker_that_dies_before_it_has_written_makes_all_write_again() -> None:
    job = Job(3)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.work()
    for member in job.members[:2]:
        while member.inbox:
            member.hear(member.inbox.popleft())
        member.write()
    job.kill(job.members[2])
    job.settle()
    assert job.end_of(0) == "committed"
    assert [member.ends for member in job.members] == [{0: "committed"}] * 3
    assert not job.attempts


def test_a_worker_that_does_not_come_back_fails_the_save() -> None:
    """And every later one, at once."""
    job = Job(2)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.kill(job.members[1])
    job.now = 10.0
    job.do(job.hub.tick(job.now))
    assert job.members[0].inbox[-1].error.rank == 1  # type: ignore[union-attr]
    while job.members[0].inbox:
        job.members[0].hear(job.members[0].inbox.popleft())
    job.save(20, ranks=[0])
    while job.members[0].outbox:
        job.hear(job.members[0])
    assert job.members[0].inbox[-1].error.kind == "peer"  # type: ignore[union-attr]


def test_a_rank_that_comes_to_say_farewell_is_gone_with_its_join() -> None:
    """A rank that arrives between its Join and its Leave hears its cause, not that some hub died."""
    hub = hub_of(2)
    hub.lost(1, 0.0)
    last = [EndedCall(n=0, end="failed")]
    hub.join(Join(rank=1, world=2, package="1", ended_calls=last, why="its worker died too often"), 0.0)
    (tell,) = hub.hear(0, Arrive(n=0, arguments=Arguments(step=0), digest="a"), 0.0)
    assert isinstance(tell, Tell)
    assert isinstance(tell.message, Ended)
    assert tell.message.error is not None
    assert (tell.message.error.rank, tell.message.error.why) == (1, "its worker died too often")


def test_a_rank_that_was_silent_is_waited_for_a_little_only() -> None:
    """Its trainer has replaced the worker by now, or is as lost as that."""
    job = Job(2)
    job.hub = Hub(2, new_id=lambda: "id", arrival_timeout=None, return_timeout=60.0, now=0.0)
    for member in job.members:
        job.do(job.hub.join(member.join(2), 0.0))
    job.do(job.hub.lost(1, 100.0, is_silent=True))
    assert job.hub.next_deadline() == 105.0
    job.do(job.hub.join(job.members[1].join(2), 101.0))
    job.do(job.hub.lost(1, 200.0))
    assert job.hub.next_deadline() == 260.0


def test_a_rank_that_leaves_fails_what_it_has_not_written() -> None:
    job = Job(2)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.do(job.hub.hear(1, Leave(why="its trainer died"), 0.0))
    job.settle()
    assert job.members[0].errors[0].why == "its trainer died"


def test_a_rank_whose_trainer_is_silent_fails_what_it_has_not_called() -> None:
    """What is open at once, and what begins in a little, by name; once it is heard, the next one works."""
    job = Job(3)
    job.save(10, ranks=[0, 1])
    job.settle()
    job.members[2].fall_silent()
    job.settle()
    for member in job.members[:2]:
        assert set(member.errors) == {0}
        member.free()
    job.settle()
    job.save(20, ranks=[0, 1], when_busy="raise")
    job.settle()
    assert job.hub.next_deadline() == job.now + SILENT_RETURN_SECONDS
    job.now += SILENT_RETURN_SECONDS
    job.do(job.hub.tick(job.now))
    job.settle()
    job.members[2].wake()
    job.settle()
    for member in job.members[:2]:
        assert [(error.rank, error.phase) for error in member.errors.values()] == [(2, "save")] * 2
        member.free()
    job.save(10, ranks=[2])
    job.settle()
    job.members[2].free()
    job.save(20, ranks=[2], when_busy="raise")
    job.settle()
    assert [job.end_of(0), job.end_of(1)] == ["failed", "failed"]
    job.members[2].free()
    job.save(30)
    job.settle()
    assert job.end_of(2) == "committed"
    assert not job.attempts


def test_a_save_that_all_have_called_is_left_to_the_workers() -> None:
    """They know whether all is staged, and say so where it is not."""
    job = Job(2)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.do(job.hub.hear(1, Silent(error=NOT_HEARD), 0.0))
    job.settle()
    assert job.end_of(0) == "committed"


def test_a_rank_that_is_heard_again_may_come_behind_those_who_know() -> None:
    """They call the next save as soon as they have heard so from itself, which may be sooner than the hub has."""
    job = Job(2)
    job.members[1].fall_silent()
    job.settle()
    job.save(10, ranks=[0])
    job.settle()
    job.members[1].wake()
    job.save(10, ranks=[1])
    job.settle()
    assert job.end_of(0) == "committed"


def test_an_attempt_that_is_being_made_fails_when_it_stands() -> None:
    """So that it is removed again; a rank may fall silent, and be heard, as often as it likes meanwhile."""
    hub = hub_of(2)
    out = hub.hear(0, Arrive(n=0, arguments=Arguments(step=0), digest="a"), 0.0)
    (make,) = [order for order in out if isinstance(order, MakeAttempt)]
    for message in (Silent(error=NOT_HEARD), Silent(), Silent(error=NOT_HEARD)):
        assert hub.hear(1, message, 0.0) == []
    hub.made(make, None)
    assert [type(output) for output in hub.tick(SILENT_RETURN_SECONDS)] == [Drop, Tell]


def test_a_new_hub_finds_what_the_old_one_published() -> None:
    job = Job(2)
    job.save(10)
    for member in job.members:
        job.hear(member)
    job.work()
    for member in job.members:
        while member.inbox:
            member.hear(member.inbox.popleft())
        member.write()
        while member.outbox:
            job.hear(member)
    job.up_to_commit()
    job.work()
    assert job.published
    job.kill(job.members[0])
    job.settle()
    assert job.end_of(0) == "committed"


def test_too_late_for_a_cancel_while_it_is_committed() -> None:
    job = Job(1)
    job.save(10)
    job.hear(job.members[0])
    job.work()
    member = job.members[0]
    while member.inbox:
        member.hear(member.inbox.popleft())
    member.write()
    while member.outbox:
        job.hear(member)
    job.up_to_commit()
    assert any(isinstance(message, Committing) for message in member.inbox)
    member.say(GiveUp(n=0, error=WireError(kind="cancelled", what="cancelled")))
    job.settle()
    assert job.end_of(0) == "committed"


def in_one_attempt(hub: Hub, n: int, digests: dict[int, str]) -> list[Output]:
    """All ranks arrive with these plans; return what the hub wanted once the attempt stood."""
    out: list[Output] = []
    for rank, digest in digests.items():
        out += hub.hear(rank, Arrive(n=n, arguments=Arguments(step=n), digest=digest), 0.0)
    for order in [order for order in out if isinstance(order, MakeAttempt)]:
        out += hub.made(order, None)
    return out


def hub_of(world: int) -> Hub:
    hub = Hub(world, new_id=lambda: "id", arrival_timeout=None, return_timeout=None, now=0.0)
    for rank in range(world):
        hub.join(Join(rank=rank, world=world, package="1"), 0.0)
    return hub


def wanted(out: list[Output]) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (tell.message.digest, tell.ranks)
        for tell in out
        if isinstance(tell, Tell) and isinstance(tell.message, WantBody)
    ]


def test_each_plan_is_asked_for_once_and_kept_until_another_save_ended() -> None:
    hub = hub_of(3)
    assert wanted(in_one_attempt(hub, 0, {0: "a", 1: "b", 2: "a"})) == [("a", (0,)), ("b", (1,))]
    hub.hear(0, Body(digest="a", body=b"A"), 0.0)
    (check,) = hub.hear(1, Body(digest="b", body=b"B"), 0.0)
    assert check == CheckPlans(0, {"a": (0, 2), "b": (1,)}, {"a": b"A", "b": b"B"})
    hub.checked(0, DISK_FULL)
    assert wanted(in_one_attempt(hub, 1, {0: "a", 1: "a", 2: "a"})) == []
    hub.checked(1, DISK_FULL)
    assert wanted(in_one_attempt(hub, 2, {0: "b", 1: "a", 2: "a"})) == [("b", (0,))]


def told(out: list[Output], kind: type[StarMessage]) -> list[tuple[int, ...]]:
    return [tell.ranks for tell in out if isinstance(tell, Tell) and isinstance(tell.message, kind)]


def all_written(hub: Hub, written: list[dict[str, Any]]) -> list[Output]:
    """All ranks have one plan, which fits, and have written; return what the hub wanted then."""
    in_one_attempt(hub, 0, dict.fromkeys(range(len(written)), "a"))
    hub.hear(0, Body(digest="a", body=b"A"), 0.0)
    hub.checked(0, None)
    out: list[Output] = []
    for rank, said in enumerate(written):
        out = hub.hear(rank, Written(n=0, attempt=0, files=[], **said), 0.0)
    return out


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ([{}, {}, {}], (0,)),
        ([{"values_sum": "x"}, {"values_sum": "y"}, {"values_sum": "x"}], (0, 1)),
        ([{"tensors_sum": "x"}, {"tensors_sum": "x"}, {"tensors_sum": "y"}], (0, 2)),
        ([{"probes": {"g": "1"}}, {"probes": {"g": "1"}}, {"probes": {"g": "2"}}], (0, 2)),
        ([{"probes": {"g": "1"}}, {"probes": {"h": "2"}}, {"probes": {"h": "2"}}], (0,)),
    ],
)
def test_one_rank_is_asked_for_each_sum_that_was_said(said: list[dict[str, Any]], asked: tuple[int, ...]) -> None:
    """Where all say the same sum, all have the same: one rank speaks for thousands."""
    assert told(all_written(hub_of(3), said), WantDetails) == [asked]


def test_contents_are_compared_once_all_that_were_asked_have_answered() -> None:
    hub = hub_of(2)
    all_written(hub, [{"values_sum": "x"}, {"values_sum": "y"}])
    details = [Details(n=0, values=b"[1]"), Details(n=0, values=b"[2]")]
    assert hub.hear(0, details[0], 0.0) == []
    assert hub.hear(1, details[1], 0.0) == [Compare(0, 0, {"a": (0, 1)}, dict(enumerate(details)))]
    out = hub.compared(0, 0, None)
    assert told(out, Committing) == [(0, 1)]
    assert isinstance(out[-1], Commit)


def test_contents_that_differ_fail_the_save_on_all_ranks() -> None:
    hub = hub_of(2)
    all_written(hub, [{}, {}])
    hub.hear(0, Details(n=0, values=b"[]"), 0.0)
    out = hub.compared(0, 0, WireError(kind="mismatch", what="they differ"))
    assert told(out, Ended) == [(0, 1)]
    assert isinstance(out[0], Drop)


def test_each_rank_hears_once_the_plans_fit_what_of_the_undeclared_it_writes() -> None:
    """Also one whose worker comes again later."""
    hub = hub_of(3)
    in_one_attempt(hub, 0, {0: "a", 1: "a", 2: "a"})
    hub.hear(0, Body(digest="a", body=b"A"), 0.0)
    said = [
        (tell.ranks, tell.message.extra)
        for tell in hub.checked(0, None, extra={0: ["model"]})
        if isinstance(tell, Tell) and isinstance(tell.message, Fits)
    ]
    assert said == [((0,), ["model"]), ((1, 2), [])]
    hub.lost(2, 0.0)
    hub.join(Join(rank=2, world=3, package="1"), 0.0)
    again = hub.hear(2, Arrive(n=0, arguments=Arguments(step=0), digest="a"), 0.0)
    assert told(again, Fits) == [(2,)]


def test_a_rank_that_leaves_owing_details_fails_the_save() -> None:
    hub = hub_of(2)
    all_written(hub, [{"values_sum": "x"}, {"values_sum": "y"}])
    out = hub.hear(1, Leave(why="its trainer died"), 0.0)
    assert told(out, Ended) == [(0, 1)]


def test_a_rank_that_gave_a_save_up_without_a_worker_fails_it_when_it_joins() -> None:
    hub = hub_of(2)
    in_one_attempt(hub, 0, {0: "a", 1: "a"})
    hub.lost(1, 0.0)
    out = hub.join(Join(rank=1, world=2, package="1", ended_calls=[EndedCall(n=0, end="failed")]), 0.0)
    assert told(out, Ended) == [(0, 1)]


RANKS = st.integers(0, 2)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: one end of each save on all ranks, and nothing hangs."""

    @initialize(when_busy=st.lists(st.sampled_from(["wait", "skip", "raise"]), min_size=12, max_size=12))
    def begin(self, when_busy: list[str]) -> None:
        self.job = Job(3)
        self.script = [Arguments(step=step, when_busy=kind) for step, kind in enumerate(when_busy)]  # type: ignore[arg-type]
        self.is_cancelled: set[int] = set()

    @rule(rank=RANKS)
    def call(self, rank: int) -> None:
        member = self.job.members[rank]
        if not member.is_silent and member.arrival is None and member.calls < len(self.script):
            arguments = self.script[member.calls]
            if arguments.when_busy == "wait" and member.slot_of is not None:
                return  # it waits for the slot
            member.call(arguments)

    @rule(rank=RANKS)
    def hub_hears(self, rank: int) -> None:
        if self.job.members[rank].outbox:
            self.job.hear(self.job.members[rank])

    @rule(rank=RANKS)
    def member_hears(self, rank: int) -> None:
        member = self.job.members[rank]
        if member.inbox:
            member.hear(member.inbox.popleft())

    @rule(rank=RANKS)
    def write(self, rank: int) -> None:
        member = self.job.members[rank]
        if member.is_up and member.opened is not None and member.has_written != member.opened.attempt:
            member.write()

    @rule(rank=RANKS)
    def free(self, rank: int) -> None:
        member = self.job.members[rank]
        if member.is_up and not member.is_silent and member.slot_of is not None and member.slot_of in member.ends:
            member.free()

    @rule(rank=RANKS)
    def stop(self, rank: int) -> None:
        if not self.job.members[rank].is_silent:
            self.job.members[rank].fall_silent()

    @rule(rank=RANKS)
    def wake(self, rank: int) -> None:
        if self.job.members[rank].is_silent:
            self.job.members[rank].wake()

    @precondition(lambda self: all(member.is_up for member in self.job.members))  # nobody is given up
    @rule()
    def wait(self) -> None:
        self.job.now += SILENT_RETURN_SECONDS
        self.job.do(self.job.hub.tick(self.job.now))

    @precondition(lambda self: self.job.orders)
    @rule(fails=st.integers(0, 9).map(lambda number: number == 0))
    def work(self, fails: bool) -> None:
        self.job.work(DISK_FULL if fails else None)

    @rule(rank=RANKS)
    def kill(self, rank: int) -> None:
        if self.job.members[rank].is_up:
            self.job.kill(self.job.members[rank])

    @rule(rank=RANKS)
    def respawn(self, rank: int) -> None:
        member = self.job.members[rank]
        if not member.is_up:
            self.job.start(member)

    @rule(rank=RANKS)
    def cancel(self, rank: int) -> None:
        member = self.job.members[rank]
        if member.arrival is not None:
            member.say(GiveUp(n=member.arrival.n, error=WireError(kind="cancelled", what="cancelled", phase="save")))

    @invariant()
    def ends_agree(self) -> None:
        job = getattr(self, "job", None)
        if job is not None:
            for n in range(len(self.script)):
                assert len({member.ends[n] for member in job.members if n in member.ends}) <= 1, n

    def teardown(self) -> None:
        job = getattr(self, "job", None)
        if job is None:
            return
        for member in job.members:
            if member.is_silent:
                member.wake()
        for _ in range(len(self.script) + 1):
            job.settle()
            for member in job.members:
                if member.slot_of in member.ends:
                    member.free()
            most = max(member.calls for member in job.members)
            for member in job.members:
                if member.calls < most and member.arrival is None:
                    member.call(self.script[member.calls])
        job.settle()
        self.ends_agree()
        assert all(member.arrival is None for member in job.members)
        assert not job.attempts


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnyOrder = AnyOrder.TestCase
