"""All ranks save at the same steps, whoever asks, dies or is fast."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from aiockpt.protocol.agreeing import Agreement, Pacer, Pause
from aiockpt.protocol.orders import Tell
from aiockpt.protocol.star import AskSave, StarMessage


class Trainer:
    """Trains step by step, and saves when that is due."""

    def __init__(self) -> None:
        self.pacer = Pacer()
        self.step = 0
        self.saves: list[int] = []
        self.reasons: list[str] = []
        self.is_up = False
        self.inbox: deque[StarMessage] = deque()
        self.outbox: deque[StarMessage] = deque()

    def train(self) -> bool:
        """Do a step unless it has to stop there."""
        reason = self.pacer.due(self.step)
        if reason is Pause.PAUSE:
            return False
        if reason is not None:
            self.saves.append(self.step)
            self.reasons.append(str(reason))
            self.pacer.saved()
        self.step += 1
        return True

    def ask(self, reason: str) -> None:
        messages = self.pacer.ask(reason)
        if self.is_up:
            self.outbox += messages

    def hear(self) -> None:
        if self.inbox:
            self.outbox += self.pacer.hear(self.inbox.popleft(), lead=1)


class Job:
    def __init__(self, world: int) -> None:
        self.world = world
        self.agreement = Agreement(world)
        self.trainers = [Trainer() for _ in range(world)]
        for rank in range(world):
            self.connect(rank)

    def connect(self, rank: int) -> None:
        if not self.trainers[rank].is_up:
            self.trainers[rank].is_up = True
            self.tell(self.agreement.join(rank))

    def cut(self, rank: int) -> None:
        """Its worker dies, with all that was under way; rank 0's is the hub."""
        for other in range(self.world) if rank == 0 else [rank]:
            trainer = self.trainers[other]
            trainer.inbox.clear()
            trainer.outbox.clear()
            if trainer.is_up and rank != 0:
                trainer.is_up = False
                self.tell(self.agreement.lost(other))
            trainer.is_up = False
        if rank == 0:
            self.agreement = Agreement(self.world)

    def tell(self, tells: list[Tell]) -> None:
        for tell in tells:
            for rank in tell.ranks:
                assert self.trainers[rank].is_up
                self.trainers[rank].inbox.append(tell.message)

    def hub_hears(self, rank: int) -> None:
        if self.trainers[rank].outbox:
            self.tell(self.agreement.hear(rank, self.trainers[rank].outbox.popleft()))  # type: ignore[arg-type]

    def settle(self) -> None:
        for rank in range(self.world):
            self.connect(rank)
        while any(trainer.inbox or trainer.outbox for trainer in self.trainers):
            for rank, trainer in enumerate(self.trainers):
                trainer.hear()
                self.hub_hears(rank)

    def run_to(self, step: int) -> None:
        while any(trainer.step < step for trainer in self.trainers):
            self.settle()
            went_on = [trainer.train() for trainer in self.trainers if trainer.step < step]
            assert any(went_on)


def test_what_one_rank_asks_all_do_at_one_step() -> None:
    job = Job(4)
    job.settle()
    for trainer, steps in zip(job.trainers, (3, 5, 4, 3), strict=True):
        for _ in range(steps):
            assert trainer.train()
    job.trainers[2].ask("SIGTERM")
    job.run_to(20)
    assert [trainer.saves for trainer in job.trainers] == [[6]] * 4
    assert job.trainers[0].reasons == ["SIGTERM"]


def test_two_ranks_that_ask_get_one_save() -> None:
    job = Job(3)
    job.trainers[0].ask("10 minutes")
    job.trainers[1].ask("SIGTERM")
    job.run_to(20)
    assert [len(trainer.saves) for trainer in job.trainers] == [1] * 3
    assert [trainer.reasons for trainer in job.trainers] == [["10 minutes, SIGTERM"]] * 3


def test_what_is_asked_for_after_the_verdict_is_not_swallowed_by_it() -> None:
    """Whoever leaves at SIGTERM must be told of it, on all ranks; the agreed step still has the earlier reason."""
    job = Job(3)
    job.trainers[0].ask("10 minutes")
    job.settle()
    job.trainers[2].ask("SIGTERM")
    job.run_to(20)
    assert [trainer.reasons for trainer in job.trainers] == [["10 minutes", "SIGTERM"]] * 3
    assert job.trainers[0].saves == job.trainers[1].saves == job.trainers[2].saves


def test_what_an_agreed_step_serves_already_gets_no_other_one() -> None:
    job = Job(2)
    job.trainers[0].ask("SIGTERM")
    job.settle()
    job.trainers[1].ask("SIGTERM")
    job.run_to(20)
    assert [trainer.reasons for trainer in job.trainers] == [["SIGTERM"]] * 2


def test_reasons_stand_until_a_save_is_called_for_them() -> None:
    """Several in one text; a save that nobody was given them for serves none."""
    job = Job(1)
    (trainer,) = job.trainers
    job.settle()
    for reason in ("one", "two", "one"):
        trainer.ask(reason)
        job.settle()
    trainer.pacer.saved()
    assert trainer.pacer.due(100) == trainer.pacer.due(101) == "one, two"
    trainer.pacer.saved()
    assert trainer.pacer.due(102) is None


def test_more_reasons_than_one_step_has_room_for() -> None:
    job = Job(40)
    for rank, trainer in enumerate(job.trainers):
        trainer.ask(f"rank {rank}")
    job.run_to(60)
    assert {", ".join(trainer.reasons) for trainer in job.trainers} == {", ".join(f"rank {rank}" for rank in range(40))}
    assert len(job.trainers[0].saves) == 3


def test_a_new_hub_is_told_again() -> None:
    """While nothing is agreed on for it, and no longer."""
    job = Job(2)
    job.trainers[1].ask("SIGTERM")
    assert job.trainers[1].pacer.pending() == [AskSave(reason="SIGTERM")]
    job.settle()
    assert job.trainers[1].pacer.pending() == []


def test_nobody_waits_where_nothing_was_proposed() -> None:
    job = Job(2)
    for _ in range(100):
        assert job.trainers[0].train()


def test_a_rank_that_has_accepted_stops_there_until_the_verdict() -> None:
    job = Job(2)
    job.settle()
    job.trainers[0].ask("SIGTERM")
    job.hub_hears(0)
    for _ in range(2):
        for rank in (0, 1):
            job.trainers[rank].hear()
            job.hub_hears(rank)
    fast = job.trainers[0]
    job.trainers[1].inbox.clear()
    job.trainers[1].outbox.clear()
    while fast.train():
        assert fast.step < 10
    assert fast.pacer.due(fast.step) is Pause.PAUSE


def test_a_dead_peer_lets_the_waiting_go() -> None:
    job = Job(2)
    job.settle()
    job.trainers[0].ask("SIGTERM")
    job.hub_hears(0)
    for rank in (0, 1):
        job.trainers[rank].hear()
        job.hub_hears(rank)
    job.trainers[0].hear()
    while job.trainers[0].train():
        assert job.trainers[0].step < 10
    job.cut(1)
    job.trainers[0].hear()
    assert job.trainers[0].train()
    job.run_to(30)
    assert job.trainers[0].saves == job.trainers[1].saves
    assert len(job.trainers[0].saves) == 1


RANKS = st.integers(0, 2)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: the same saves on all ranks, and none that was asked for is forgotten."""

    @initialize()
    def begin(self) -> None:
        self.job = Job(3)
        self.asked_at = -1

    @rule(rank=RANKS)
    def train(self, rank: int) -> None:
        self.job.trainers[rank].train()

    @rule(rank=RANKS)
    def ask(self, rank: int) -> None:
        self.job.trainers[rank].ask(f"rank {rank}")
        self.asked_at = max(self.asked_at, self.job.trainers[rank].step)

    @rule(rank=RANKS)
    def hub_hears(self, rank: int) -> None:
        self.job.hub_hears(rank)

    @rule(rank=RANKS)
    def hear(self, rank: int) -> None:
        self.job.trainers[rank].hear()

    @rule(rank=RANKS)
    def cut(self, rank: int) -> None:
        self.job.cut(rank)

    @rule(rank=RANKS)
    def connect(self, rank: int) -> None:
        self.job.connect(rank)

    def teardown(self) -> None:
        job = getattr(self, "job", None)
        if job is None:
            return
        job.run_to(max(trainer.step for trainer in job.trainers) + 1)
        job.settle()
        job.run_to(job.trainers[0].step + 300)
        assert job.trainers[0].saves == job.trainers[1].saves == job.trainers[2].saves
        assert job.trainers[0].reasons == job.trainers[1].reasons == job.trainers[2].reasons
        if self.asked_at >= 0:
            assert job.trainers[0].saves
            assert max(job.trainers[0].saves) >= self.asked_at


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnyOrder = AnyOrder.TestCase
