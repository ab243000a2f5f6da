"""Ranks that meet: one end of each meeting for all, whatever dies, and in whatever order things are heard."""

from __future__ import annotations

from collections import deque
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiockpt.protocol.hub import SILENT_RETURN_SECONDS
from aiockpt.protocol.meeting import REMEMBERED, Guest, Room
from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import Attend, Met, StarMessage
from aiockpt.protocol.terms import WireError

BROKEN = WireError(kind="storage", what="broken")
NOT_HEARD = WireError(kind="peer", what="its trainer is not heard", rank=1)
TIMEOUT = 100.0


class Member:
    """One rank, whose trainer goes from one meeting to the next."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.guest = Guest()
        self.is_up = False
        self.inbox: deque[Met] = deque()
        self.outbox: deque[StarMessage] = deque()
        self.waits_for: str | None = None
        self.ends: dict[str, Met] = {}

    def attend(self, meeting: str, *, claim: str = "", error: WireError | None = None) -> None:
        self.waits_for = meeting
        self.say(self.guest.attend(Attend(meeting=meeting, claim=claim, word=b"%d" % self.rank, error=error)))
        self.look()

    def say(self, messages: list[StarMessage]) -> None:
        if self.is_up:
            self.outbox += messages

    def hear(self) -> None:
        if self.inbox:
            self.guest.hear(self.inbox.popleft())
            self.look()

    def look(self) -> None:
        if self.waits_for is not None and (met := self.guest.answer(self.waits_for)) is not None:
            self.ends[self.waits_for] = met
            self.waits_for = None


class Job:
    def __init__(self, world: int) -> None:
        self.world = world
        self.now = 0.0
        self.gone: dict[int, str] = {}
        self.silent: dict[int, WireError] = {}
        self.members = [Member(rank) for rank in range(world)]
        self.room = Room(world, arrival_timeout=TIMEOUT)
        self.settle()

    def start(self, member: Member) -> None:
        """Its next worker joins the hub."""
        if not member.is_up:
            member.is_up = True
            self.gone.pop(member.rank, None)
            self.room.join(member.rank)
            member.say(member.guest.rejoined())

    def kill(self, member: Member) -> None:
        """Its worker dies with all that was under way; rank 0's is the hub."""
        for other in self.members if member.rank == 0 else [member]:
            other.is_up = False
            other.inbox.clear()
            other.outbox.clear()
        if member.rank == 0:
            self.room = Room(self.world, arrival_timeout=TIMEOUT, is_first=False)
            self.gone = {}
        else:
            self.room.lost(member.rank)

    def tell(self, tells: list[Tell]) -> None:
        for tell in tells:
            for rank in tell.ranks:
                assert self.members[rank].is_up
                assert isinstance(tell.message, Met)
                self.members[rank].inbox.append(tell.message)

    def hub_hears(self, member: Member) -> None:
        if member.outbox:
            self.tell(self.room.hear(member.rank, member.outbox.popleft(), self.now))  # type: ignore[arg-type]

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.tell(self.room.tick(self.now, self.gone, self.silent))

    def settle(self) -> None:
        for member in self.members:
            self.start(member)
        while any(member.inbox or member.outbox for member in self.members):
            for member in self.members:
                self.hub_hears(member)
                member.hear()

    def end_of(self, meeting: str) -> Met:
        ends = [member.ends[meeting] for member in self.members]
        assert all(end == ends[0] for end in ends)
        return ends[0]


def test_all_go_past_it_with_the_word_of_rank_0() -> None:
    job = Job(3)
    for rank in (2, 0):
        job.members[rank].attend("a")
    job.settle()
    assert not job.members[0].ends
    job.members[1].attend("a")
    job.settle()
    assert job.end_of("a") == Met(meeting="a", word=b"0")


def test_an_error_ends_it_for_all_and_those_that_come_later() -> None:
    job = Job(3)
    job.members[0].attend("a")
    job.members[2].attend("a", error=BROKEN)
    job.settle()
    assert job.members[1].guest.answer("a") is not None
    job.members[1].attend("a")
    end = job.end_of("a").error
    assert end is not None
    assert (end.rank, end.what) == (2, "broken")


def test_a_rank_that_takes_its_word_back_in_time_ends_it() -> None:
    job = Job(2)
    job.members[1].attend("a")
    job.settle()
    job.members[1].attend("a", error=BROKEN)
    job.settle()
    job.members[0].attend("a")
    assert job.end_of("a").error is not None


def test_ranks_that_come_for_different_things_are_told_what() -> None:
    job = Job(3)
    job.members[0].attend("a", claim="restore(step=5)")
    job.members[1].attend("a", claim="restore()")
    job.members[2].attend("a", claim="restore()")
    job.settle()
    error = job.end_of("a").error
    assert error is not None
    assert (error.kind, error.ranks) == ("mismatch", [0, 1])
    assert error.why == "rank 0 called restore(step=5), rank 1 called restore()"


def test_a_rank_that_does_not_come_is_named_at_the_time_out() -> None:
    job = Job(3)
    job.members[2].attend("a")
    job.settle()
    assert job.room.next_deadline() == TIMEOUT
    job.tick(TIMEOUT - 1)
    assert not job.members[2].inbox
    job.tick(1)
    job.settle()
    for rank in (0, 1):
        job.members[rank].attend("a")
    error = job.end_of("a").error
    assert error is not None
    assert error.what == "rank 0 did not come to 'a' within 100 s of rank 2"
    assert error.why == "missing: 0, 1"
    assert job.room.next_deadline() is None


@pytest.mark.parametrize("has_come", [False, True])
def test_a_rank_that_is_gone_ends_what_is_open_and_what_begins(has_come: bool) -> None:
    job = Job(2)
    job.members[0].attend("a")
    job.settle()
    if has_come:
        job = Job(3)
        for rank in (0, 1):
            job.members[rank].attend("a")
        job.settle()
    job.gone = {1: "its trainer died"}
    job.tick()
    job.members[0].hear()
    job.members[0].attend("b")
    job.hub_hears(job.members[0])
    job.members[0].hear()
    for meeting in "ab":
        error = job.members[0].ends[meeting].error
        assert error is not None
        assert (error.rank, error.why) == (1, "its trainer died")


def test_a_rank_whose_trainer_is_silent_ends_what_it_has_not_come_to() -> None:
    """What waits for it at once, what begins in a little; what it has come to, or comes to in time, goes on."""
    job = Job(2)

    def attend(rank: int, meeting: str) -> None:
        job.members[rank].attend(meeting)
        job.settle()

    def hear(silent: dict[int, WireError], seconds: float = 0.0) -> None:
        job.silent = silent
        job.tick(seconds)
        job.settle()

    attend(1, "a")
    hear({1: NOT_HEARD})
    attend(0, "a")
    attend(0, "b")
    hear({1: NOT_HEARD})
    assert "b" not in job.members[0].ends
    hear({1: NOT_HEARD}, SILENT_RETURN_SECONDS)
    attend(0, "c")
    hear({})
    attend(1, "b")
    attend(1, "c")
    attend(0, "d")
    hear({1: NOT_HEARD})
    attend(1, "d")
    assert [job.end_of(meeting).error for meeting in "abcd"] == [None, NOT_HEARD, None, NOT_HEARD]


def test_a_worker_that_comes_back_hears_what_it_missed() -> None:
    job = Job(2)
    for member in job.members:
        member.attend("a")
        job.hub_hears(member)
    job.kill(job.members[1])
    job.settle()
    assert job.end_of("a").error is None


def test_a_new_hub_hears_what_the_old_one_has_told() -> None:
    """Rank 1 has gone on; rank 2 has not heard, and takes its word back in vain."""
    job = Job(3)
    for member in job.members:
        member.attend("a")
        job.hub_hears(member)
    job.members[1].hear()
    job.kill(job.members[0])
    job.start(job.members[0])
    job.start(job.members[2])
    job.members[2].attend("a", error=BROKEN)
    for rank in (0, 0, 2, 2, 2):
        job.hub_hears(job.members[rank])
    assert not job.members[2].inbox
    job.settle()
    assert job.end_of("a") == Met(meeting="a", word=b"0")


def test_a_new_hub_waits_for_what_ranks_know_no_longer_than_for_them() -> None:
    job = Job(2)
    job.kill(job.members[0])
    job.start(job.members[0])
    job.members[0].attend("a")
    for _ in range(2):
        job.hub_hears(job.members[0])
    assert job.room.next_deadline() == TIMEOUT
    job.tick(TIMEOUT)
    job.members[0].hear()
    error = job.members[0].ends["a"].error
    assert error is not None
    assert error.rank == 1


def test_a_new_hub_decides_without_a_rank_that_was_given_up() -> None:
    job = Job(2)
    job.kill(job.members[0])
    job.start(job.members[0])
    job.members[0].attend("a")
    for _ in range(2):
        job.hub_hears(job.members[0])
    job.gone = {1: "no worker of it was there"}
    job.tick()
    job.members[0].hear()
    assert job.members[0].ends["a"].error is not None


def test_few_ends_are_kept() -> None:
    job = Job(2)
    for n in range(2 * REMEMBERED):
        for member in job.members:
            member.attend(f"meeting {n}")
        job.settle()
        assert job.end_of(f"meeting {n}").error is None
    job.kill(job.members[0])
    for member in job.members:
        job.start(member)
        (recall,) = member.outbox
        assert len(recall.mets) == REMEMBERED  # type: ignore[union-attr]
    job.settle()
    job.members[1].attend("meeting 0")
    job.settle()
    assert job.members[1].waits_for == "meeting 0"


RANKS = st.integers(0, 2)
SOME = st.lists(RANKS, max_size=6)
RARELY = st.integers(0, 7).map(lambda number: number == 0)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: a meeting has one end, and nobody waits for ever."""

    @initialize(gives_up=st.booleans())
    def begin(self, gives_up: bool) -> None:
        self.job = Job(3)
        self.gives_up = gives_up
        self.next = [count() for _ in range(3)]
        self.well: dict[str, set[int]] = {}
        """By meeting: who came without an error."""
        self.given_up = False

    def attend(self, rank: int, *, fails: bool) -> None:
        member = self.job.members[rank]
        if member.waits_for is None:
            meeting = str(next(self.next[rank]))
            if not fails:
                self.well.setdefault(meeting, set()).add(rank)
            member.attend(meeting, error=BROKEN if fails else None)

    @rule(ranks=SOME, fails=RARELY)
    def come(self, ranks: list[int], fails: bool) -> None:
        for rank in ranks:
            self.attend(rank, fails=fails)

    @rule(ranks=SOME)
    def all_come(self, ranks: list[int]) -> None:
        """All attend what they have not yet, the hub hears it, and some hear how it ended."""
        self.respawn([1, 2])
        self.come([0, 1, 2], False)
        self.hub_hears_all()
        self.members_hear(ranks)

    @rule(rank=RANKS)
    def take_back(self, rank: int) -> None:
        member = self.job.members[rank]
        if member.waits_for is not None:
            member.attend(member.waits_for, error=BROKEN)

    @rule(ranks=SOME)
    def hub_hears(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.job.hub_hears(self.job.members[rank])

    @rule()
    def hub_hears_all(self) -> None:
        for member in self.job.members:
            while member.outbox:
                self.job.hub_hears(member)

    @rule(ranks=SOME)
    def members_hear(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.job.members[rank].hear()

    @rule(rank=RANKS, ranks=SOME)
    def kill(self, rank: int, ranks: list[int]) -> None:
        """Those that cannot reach the hub may take their word back until they can."""
        if self.job.members[rank].is_up:
            self.job.kill(self.job.members[rank])
        for other in ranks:
            if not self.job.members[other].is_up:
                self.take_back(other)

    @rule(ranks=SOME)
    def respawn(self, ranks: list[int]) -> None:
        for rank in (0, *ranks):
            self.job.start(self.job.members[rank])

    @rule(rank=RANKS, happens=RARELY, seconds=st.sampled_from([0.0, TIMEOUT]))
    def give_up(self, rank: int, happens: bool, seconds: float) -> None:
        """Too much time passes, for meetings or for a rank that is away: only then may another have gone on alone."""
        if happens and self.gives_up and self.job.members[0].is_up:
            self.given_up = True
            if not self.job.members[rank].is_up:
                self.job.gone[rank] = "it was away"
            self.job.tick(seconds)

    @invariant()
    def ends_agree(self) -> None:
        job = getattr(self, "job", None)
        if job is None:
            return
        for meeting in {name for member in job.members for name in member.ends}:
            ends = [member.ends[meeting] for member in job.members if meeting in member.ends]
            if any(end.error is None for end in ends):
                assert self.well[meeting] == {0, 1, 2}
            if not self.given_up:
                assert len({end.error is None for end in ends}) == 1, meeting

    def teardown(self) -> None:
        job = getattr(self, "job", None)
        if job is None:
            return
        job.settle()
        assert not job.gone
        for _ in range(200):
            waiting = {member.waits_for for member in job.members}
            behind = min(job.members, key=lambda member: len(member.ends))
            if behind.waits_for is None and waiting != {None}:
                self.attend(behind.rank, fails=False)
                job.settle()
            elif waiting == {None}:
                break
            else:
                job.tick(TIMEOUT)
                job.settle()
        self.ends_agree()
        assert all(member.waits_for is None for member in job.members)


AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_long_job_forgets_no_meeting_that_a_rank_is_still_in() -> None:
    """A rank that missed the last end recalls one that is older than all that the hub knows."""
    room, guests = Room(2, arrival_timeout=None), [Guest(), Guest()]
    for rank in range(2):
        room.join(rank)
    for number in range(REMEMBERED + 3):
        for rank, guest in enumerate(guests):
            for message in guest.attend(Attend(meeting=str(number), claim="")):
                for tell in room.hear(rank, message, 0.0):
                    for told in tell.ranks:
                        if (told, number) != (1, REMEMBERED + 2):  # that worker dies first
                            guests[told].hear(tell.message)
    room.lost(1)
    room.join(1)
    heard = [tell.message for message in guests[1].rejoined() for tell in room.hear(1, message, 0.0)]
    assert [met.meeting for met in heard] == [str(REMEMBERED + 2)]
