"""Saves against a scripted worker: whoever speaks, copies, cancels or dies when, every save has one true outcome."""

from __future__ import annotations

from typing import Any

import anyio
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiockpt.coordinator import failures
from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import (
    CheckpointError,
    CommitUnknownError,
    ProtocolError,
    SaveBusyError,
    SaveCancelledError,
    TornSnapshotError,
    UsageError,
    WorkerExitedError,
)
from aiockpt.protocol.lifecycle import SaveState
from aiockpt.protocol.messages import Committed, EndStaging, Failed, Message, Progress, SlotFree
from aiockpt.protocol.terms import WireError
from tests.coordinator.scripted import Stage

MEANWHILE = st.lists(
    st.sampled_from(["turn", "come_up", "hear", "take", "move", "die", "cancel", "time_out", "over"]), max_size=3
)
"""What happens while a thread is inside of something: any of the machine's own moves."""
FENCING = st.lists(st.sampled_from(["turn", "cancel", "time_out"]), max_size=3)
"""What happens while the worker is down; supervision itself waits for the fence."""

TIMEOUTS = st.sampled_from([None, 5.0])


class UserObject:
    """Holds the saving thread inside the user's code."""

    def __init__(self, meanwhile: Any) -> None:
        self._meanwhile = meanwhile

    def state_dict(self) -> dict[str, int]:
        self._meanwhile()
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Play(RuleBasedStateMachine):
    """The trainer's side: saves, copies, cancellations, time-outs, deaths. Who the worker is, subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.records: list[SaveRecord] = []
        self.told: list[SaveRecord] = []
        self.step = 0
        self.dropped = 0
        self.answered: list[Message] = []
        self.idle = [self.stage.desk.when_idle()]
        self.free = [self.stage.desk.when_free()]

    # ---- moves that may also happen in the middle of another one

    def turn(self) -> None:
        self.stage.loop.turn()

    def come_up(self) -> None:
        self.stage.come_up()

    def hear(self) -> None:
        stage = self.stage
        if stage.worker is None or not stage.worker.outbox:
            return
        message = stage.worker.outbox[0]
        self.answered.append(message)
        self.count_if_closed(message)
        stage.hear()

    def count_if_closed(self, message: Message) -> None:
        """An answer for a save that is not open is dropped and counted; the holder's last word is not one."""
        save_id = getattr(message, "save_id", "")
        holder = self.stage.desk.holder
        is_holders = isinstance(holder, SaveRecord) and holder.save_id == save_id
        is_expected = isinstance(message, SlotFree) and (is_holders or save_id == self.last_committed)
        if self.stage.desk.find(save_id) is None and not is_expected:
            self.dropped += 1

    @property
    def last_committed(self) -> str:
        """The save of which nobody needs to hear that its slot is free."""
        return next((save.save_id for save in reversed(self.records) if save.state is SaveState.COMMITTED), "")

    def take(self) -> None:
        if self.stage.worker is not None and self.stage.worker.inbox:
            self.stage.worker.take()

    def move(self) -> None:
        if self.stage.worker is not None:
            self.stage.worker.move()

    def cancel(self) -> None:
        for save in self.stage.desk.in_flight() or self.records[-1:]:
            self.stage.loop.post(self.stage.saves.cancel, save)

    def time_out(self) -> None:
        for save in self.stage.tasks.clocks:
            self.stage.saves.give_up(save, failures.timed_out(save))

    def die(self, error: CheckpointError | None = None) -> None:
        stage = self.stage
        if stage.worker is not None:
            stage.worker = None
            with stage.no_worker():  # the next one is started when this one is settled
                anyio.run(stage.coordinator.worker_down, error or WorkerExitedError("the worker died", why="a signal"))

    def over(self) -> None:
        self.die()
        if not self.stage.is_over and self.step > 3:  # else most plays would be over when they begin
            self.stage.coordinator.supervision_over(CheckpointError("no more workers"))

    def act(self, names: list[str]) -> Any:
        """Return a call that makes these moves, once."""
        left = list(names)

        def moves() -> None:
            while left:
                getattr(self, left.pop(0))()

        return moves

    # ---- rules

    @initialize(timeout=TIMEOUTS, reading=MEANWHILE, asking=MEANWHILE, beginning=MEANWHILE, copying=MEANWHILE)
    def begin(self, **options: Any) -> None:
        self.come_up()
        self.save(**options)

    @rule(timeout=TIMEOUTS, reading=MEANWHILE, asking=MEANWHILE, beginning=MEANWHILE, copying=MEANWHILE)
    def saves(self, **options: Any) -> None:
        self.save(**options)

    @precondition(lambda self: self.stage.desk.holder is None)
    @rule(timeout=TIMEOUTS)
    def saves_in_peace(self, timeout: float | None) -> None:
        self.save(timeout)

    def save(self, timeout: float | None, **meanwhile: list[str]) -> None:
        """Call ``save()``, in the midst of which other things happen: see ``MEANWHILE``."""
        stage = self.stage
        was_busy, was_over = stage.desk.holder is not None, stage.is_over
        unheard = [save for save in self.records if save.failure is not None and not save.heard]
        reading, asking, beginning, copying = (
            self.act(meanwhile.get(name, [])) for name in ("reading", "asking", "beginning", "copying")
        )
        stage.arena.meanwhile, stage.stager.before, stage.stager.meanwhile = asking, beginning, copying
        self.idle.append(stage.desk.when_idle())
        self.free.append(stage.desk.when_free())
        self.step += 1
        state = {"user": UserObject(reading)}
        try:
            record = stage.saving.save(
                self.step, state, timeout=timeout, when_busy="raise", overwrite=False, metadata=None
            )
        except SaveBusyError:
            assert was_busy
        except CheckpointError as exc:
            told = [save for save in unheard if save.failure is exc]
            assert told or was_over or stage.is_over, "an error that nobody caused"
            self.told += told
        else:
            assert not unheard, "a failure was not told"
            assert not was_busy
            self.records.append(record)
        finally:
            stage.arena.meanwhile = stage.stager.before = stage.stager.meanwhile = lambda: None

    @precondition(lambda self: self.stage.loop.posted)
    @rule(count=st.integers(1, 4))
    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    @precondition(lambda self: self.stage.stager.copy)
    @rule()
    def copies(self) -> None:
        self.stage.stager.copy.progress()  # type: ignore[union-attr]

    @precondition(lambda self: self.stage.stager.copy)
    @rule(is_torn=st.sampled_from([False, False, True]))
    def is_copied(self, is_torn: bool) -> None:
        self.stage.stager.copy.end(TornSnapshotError("torn") if is_torn else None)  # type: ignore[union-attr]

    @precondition(lambda self: self.stage.worker)
    @rule(drained=st.integers(0, 5), fencing=FENCING, is_broken=st.sampled_from([False, False, True]))
    def dies(self, drained: int, fencing: list[str], is_broken: bool) -> None:
        """Its last words may be in the socket; anything may happen while it is being fenced."""
        for _ in range(drained):
            self.hear()
        self.stage.disk.meanwhile = self.act(fencing)
        self.stage.disk.is_broken = is_broken
        self.die()
        self.stage.disk.meanwhile = lambda: None
        self.stage.disk.is_broken = False

    @precondition(lambda self: self.stage.worker is None)
    @rule()
    def comes_up(self) -> None:
        self.come_up()

    @rule(rounds=st.integers(1, 6))
    def all_goes_well(self, rounds: int) -> None:
        """For a while."""
        for _ in range(rounds):
            self.round()

    @precondition(lambda self: self.stage.desk.in_flight())
    @rule(how=st.sampled_from(["", "", "cancel", "time_out"]))
    def is_given_up(self, how: str) -> None:
        if how:
            getattr(self, how)()

    @precondition(lambda self: self.records and self.records[-1].failure)
    @rule()
    def is_cancelled_too_late(self) -> None:
        self.cancel()

    @precondition(lambda self: self.stage.desk.in_flight())
    @rule(moves=st.integers(0, 4))
    def worker_goes_ahead(self, moves: int) -> None:
        """It has all that is staged, and works on while nobody listens."""
        self.copy_all()
        for _ in range(moves):
            self.move()

    # ---- what holds at every moment

    @invariant()
    def slot_has_one_holder(self) -> None:
        desk = self.stage.desk
        assert all(count == 1 for count in desk.freed.values()), "the slot was freed twice"
        for save in self.records:
            if save is not desk.holder:
                assert save.is_final
                assert not save.copying
                assert not save.with_worker
                assert desk.freed[save] == 1
            else:
                assert not save.is_final or save.copying or save.with_worker, "the slot was not freed"
        assert len(desk.in_flight()) <= 1
        assert desk.holder is not None or self.stage.stager.copy is None, "the slot was freed under a copy"

    @invariant()
    def failures_are_heard_once(self) -> None:
        """Who is told of a failure is who cancelled, or the next save."""
        for save in self.records:
            if save.heard and save.failure is not None:
                assert save in self.told or isinstance(save.cancelling, SaveCancelledError)
        assert len(self.told) == len({save.step for save in self.told})

    @invariant()
    def worker_has_what_it_needs(self) -> None:
        """The interpreter may exit as soon as a save is handed over."""
        for save in self.records:
            worker = self.stage.worker
            frames = worker.told(save.save_id) if worker else []
            if not save.is_final:
                assert save.wait_handed_over(0) == any(isinstance(frame, EndStaging) for frame in frames)

    @invariant()
    def counters_count(self) -> None:
        counts = self.stage.saves.tally.counts
        assert counts["dropped_answers"] == self.dropped
        ended = [save for save in self.records if save.is_final]
        assert counts["committed"] == sum(save.state is SaveState.COMMITTED for save in ended)
        assert counts["committed"] + counts["failed"] + counts["cancelled"] == len(ended)

    # ---- the end

    def go_on(self) -> None:
        """Let everybody do their work, and nothing go wrong any more."""
        stage = self.stage
        for _ in range(50):
            self.round()
            if not (stage.loop.posted or stage.desk.in_flight() or stage.desk.holder):
                return
        raise AssertionError(f"left open: {[save.state for save in stage.desk.in_flight()]}, {stage.desk.holder}")

    def round(self) -> None:
        """Let each do one thing."""
        self.copy_all()
        self.move()
        self.hear()

    def copy_all(self) -> None:
        """End what is being copied, and let the worker know of it."""
        stage = self.stage
        if stage.stager.copy is not None:
            stage.stager.copy.end(None)
        stage.turn_all()
        self.come_up()
        while stage.worker is not None and stage.worker.inbox:
            self.take()

    def teardown(self) -> None:
        """Nothing is left: no save without an outcome, no waiter, and a closed desk takes nobody."""
        self.go_on()
        self.slot_has_one_holder()
        for save in self.records:
            assert save.outcome.done()
            assert save.staged.done()
            assert save.wait_handed_over(0)
        assert all(future.done() for future in [*self.idle, *self.free])
        self.stage.desk.close(lambda: UsageError("closed"))
        with pytest.raises(CheckpointError):
            self.stage.desk.take_slot(object())


class Conversation(Play):
    """The worker keeps to the protocol: what the trainer tells its user is what is on the disk."""

    @precondition(lambda self: self.stage.worker and self.stage.worker.inbox)
    @rule(turns=st.integers(1, 5))
    def worker_takes(self, turns: int) -> None:
        for _ in range(turns):
            self.take()

    @precondition(lambda self: self.stage.worker and self.stage.worker.task)
    @rule(turns=st.integers(1, 3))
    def worker_moves(self, turns: int) -> None:
        for _ in range(turns):
            self.move()

    @precondition(lambda self: self.stage.worker and self.stage.worker.task)
    @rule()
    def worker_fails(self) -> None:
        self.stage.worker.fail()  # type: ignore[union-attr]

    @precondition(lambda self: self.stage.worker and self.stage.worker.outbox)
    @rule(count=st.integers(1, 5))
    def hears(self, count: int) -> None:
        for _ in range(count):
            self.hear()

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def hears_again(self, data: st.DataObject) -> None:
        """Late, or twice: only answers for saves that are closed, see ``Babble`` for the others."""
        message = data.draw(st.sampled_from(self.answered))
        holder = self.stage.desk.holder
        is_holders = isinstance(holder, SaveRecord) and holder.save_id == message.save_id  # type: ignore[union-attr]
        if self.stage.worker is not None and self.stage.desk.find(message.save_id) is None and not is_holders:  # type: ignore[union-attr]
            self.count_if_closed(message)
            self.stage.coordinator.worker_says(message, [])

    @invariant()
    def outcomes_are_true(self) -> None:
        published = set(self.stage.disk.published.values())
        for save in self.records:
            assert save.outcome.done() == save.is_final
            if save.state is SaveState.COMMITTED:
                assert save.save_id in published, "a save was reported that is not on the disk"
            elif save.is_final and save.save_id in published:
                assert isinstance(save.failure, CommitUnknownError), "a committed save was reported as failed"

    def teardown(self) -> None:
        super().teardown()
        self.outcomes_are_true()


ANSWERS = st.sampled_from(
    [
        lambda save_id: Progress(save_id=save_id, written=1, state="written"),
        lambda save_id: Progress(save_id=save_id, written=1, state="committing"),
        lambda save_id: Progress(save_id=save_id, written=1, state="committed"),
        lambda save_id: Committed(save_id=save_id, path="/run/step-1", nbytes=1, timings={}, pruned=["step-1"]),
        lambda save_id: Failed(save_id=save_id, error=WireError(kind="storage", what="no space")),
        lambda save_id: Failed(save_id=save_id, error=WireError(kind="cancelled", what="cancelled")),
        lambda save_id: Failed(save_id=save_id, error=WireError(kind="unknown_commit", what="who knows")),
        lambda save_id: SlotFree(save_id=save_id),
    ]
)


class Babble(Play):
    """The worker says anything about any save at any time: nothing stays open, and the slot is freed once."""

    @precondition(lambda self: self.stage.worker)
    @rule(answers=st.lists(ANSWERS, min_size=1, max_size=4), data=st.data())
    def babbles(self, answers: list[Any], data: st.DataObject) -> None:
        self.stage.worker.is_mad = True  # type: ignore[union-attr]
        for make in answers:
            about = [save.save_id for save in self.records[-3:]]
            open_saves = [save.save_id for save in self.stage.desk.in_flight()]
            message = make(data.draw(st.sampled_from(["nobody's", *about, *open_saves, *open_saves])))
            self.count_if_closed(message)
            try:
                self.stage.coordinator.worker_says(message, [])
            except ProtocolError as exc:  # the supervisor replaces who speaks so
                self.die(exc)
                return

    def teardown(self) -> None:
        self.die()
        super().teardown()


FIXED = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

TestConversation = Conversation.TestCase
TestConversation.settings = FIXED

TestBabble = Babble.TestCase
TestBabble.settings = FIXED
