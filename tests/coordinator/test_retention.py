"""A run directory over many jobs: whatever is saved, replaced, read, removed or killed, what must stay stands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import anyio
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aiockpt.config import Latest
from aiockpt.coordinator.restoring import Restoring
from aiockpt.coordinator.results import Restored
from aiockpt.coordinator.spans import UNOBSERVED
from aiockpt.errors import StepExistsError, StorageError, WorkerExitedError
from aiockpt.format.names import attempt_name
from aiockpt.protocol.messages import BeginSave, Committed, EndStaging, Failed, Message, SlotFree
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.commit import publish, remove_tree, retire
from aiockpt.storage.readers import AlignedBuffer, OpenCheckpoint, open_checkpoint
from aiockpt.storage.run_directory import find_committed, scan
from aiockpt.storage.verify import verify_checkpoint
from aiockpt.worker.failures import as_wire_error
from tests.coordinator.scripted import Link, Stage
from tests.storage.making import content, content_of, make_attempt_files, opened

STEPS = st.integers(0, 4)
CUTS = st.sampled_from([None, 0, 1, 2, 3, 4, 4, 5, 5, 6, 8, 10, 12])
"""After how many changes of the directory the process is killed."""


class Killed(BaseException):
    """The process ended here."""


@contextmanager
def killed_after(changes: int | None) -> Iterator[None]:
    """Kill whoever changes a directory once more; nothing is synced, which only a power loss could tell."""
    left = changes

    def counted(real: Any) -> Any:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left is not None:
                if left == 0:
                    raise Killed
                left -= 1
            return real(*args, **options)

        return change

    with pytest.MonkeyPatch.context() as patched:
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda fd: None)
        yield


class Saved(NamedTuple):
    """A checkpoint as the model knows it."""

    step: int
    save_id: str
    number: int
    """Of its content."""


class FileWorker:
    """Does with real files what a worker does, in one call."""

    def __init__(self, claim: RunClaim, run_fd: int) -> None:
        self.inbox: list[Message] = []
        self._claim = claim
        self._run_fd = run_fd

    def work(self, number: int) -> list[Message]:
        """Bring the save that it was told of to its end; returns what it says then."""
        begin = next(message for message in reversed(self.inbox) if isinstance(message, BeginSave))
        assert isinstance(self.inbox[-1], EndStaging)
        name = attempt_name(begin.step, begin.save_id, begin.attempt)
        try:
            known = find_committed(self._run_fd, self._claim.run, begin.step)
            if not begin.attempt or known is None or known.save_id != begin.save_id:
                make_attempt_files(
                    self._run_fd,
                    name,
                    step=begin.step,
                    number=number,
                    term=self._claim.term,
                    ordinal=begin.ordinal,
                    own_id=begin.save_id,
                )
            known, trash = publish(
                self._run_fd,
                name,
                run=self._claim.run,
                step=begin.step,
                save_id=begin.save_id,
                term=self._claim.term,
                overwrite=begin.overwrite,
            )
        except StorageError as exc:
            remove_tree(self._run_fd, name)
            return [Failed(save_id=begin.save_id, error=as_wire_error(exc)), SlotFree(save_id=begin.save_id)]
        pruned = {step: gone for step in begin.prune if (gone := retire(self._run_fd, step)) is not None}
        for gone in [*trash, *pruned.values()]:
            remove_tree(self._run_fd, gone)
        committed = Committed(
            save_id=begin.save_id, path=known.path, nbytes=known.nbytes, timings={}, pruned=list(pruned)
        )
        return [committed, SlotFree(save_id=begin.save_id)]


class Job:
    """One trainer that has the run, with the real bookkeeping of its saves."""

    def __init__(self, run: Path, keep: Latest | None) -> None:
        self.claim = RunClaim.take(str(run), linger_timeout=1)
        self.keep = keep
        self.run_fd = opened(run)
        self.stage = Stage(self.claim, keep)
        self.restoring = Restoring(
            str(run), self.claim, self.stage.saves, self.stage.saving, cast("Any", self.stage.stager), UNOBSERVED
        )
        self.ghosts: set[int] = set()
        """Steps that somebody else removed since the job listed them: it saves on without asking the directory."""
        self.worker_comes_up()

    def worker_comes_up(self) -> None:
        self.worker = FileWorker(self.claim, self.run_fd)
        self.stage.coordinator.worker_up(cast("Any", Link(self.worker.inbox)))

    @property
    def known(self) -> list[int]:
        """Steps as the job knows them, newest first."""
        return list(self.stage.saves.checkpoints)

    def sweep(self) -> None:
        """What its worker does in the background with what former jobs left."""
        for name in self.claim.trash:
            remove_tree(self.run_fd, name)

    def end(self) -> None:
        self.claim.release()
        os.close(self.run_fd)


class RunDirectory(RuleBasedStateMachine):
    """One run, one job at a time, readers beside it."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run
        self.job: Job | None = None
        self.commits: list[Saved] = []
        """All that ever stood, in the order of their commits."""
        self.stands: dict[int, Saved] = {}
        """What must stand after the next claim, by step."""
        self.readers: list[tuple[Saved, OpenCheckpoint]] = []
        self.branch: set[str] = set()
        """What stands behind the checkpoint that the job restored last."""
        self.may_be_untidy = False
        """Whether a process was killed since the last claim."""

    # ---- jobs

    @precondition(lambda self: self.job is None)
    @rule(keep=st.sampled_from([None, Latest(1), Latest(2), Latest(3)]), cut=CUTS, sweeps=st.booleans())
    def opens(self, keep: Latest | None, cut: int | None, sweeps: bool) -> None:
        try:
            with killed_after(cut):
                RunClaim.take(str(self.run), linger_timeout=1).release()
        except Killed:
            self.may_be_untidy = True
        with killed_after(None):
            first = RunClaim.take(str(self.run), linger_timeout=1)
            first.release()
            self.job = Job(self.run, keep)
            second = self.job.claim
            assert second.term == first.term + 1
            assert second.checkpoints == first.checkpoints, "a second claim saw another list"
            assert second.highest_ordinal == first.highest_ordinal
            assert not self.names(".old.", ".step-")
            assert self.names(".trash.") == sorted(second.trash)
            if sweeps:
                self.job.sweep()
                assert not self.names(".trash.")
        self.may_be_untidy = False
        self.check_list()
        for saved in self.stands.values():
            path = self.run / f"step-{saved.step}"
            verify_checkpoint(str(path), threads=1)
            assert content_of(path) == content(saved.number, 5000)

    @precondition(lambda self: self.job)
    @rule()
    def ends(self) -> None:
        """By close or by SIGKILL: for the directory that is the same, between two saves."""
        self.job.end()  # type: ignore[union-attr]
        self.job = None
        self.branch = set()

    @precondition(lambda self: self.job)
    @rule(steps=st.lists(STEPS, min_size=1, max_size=4), overwrite=st.booleans())
    def saves_in_peace(self, steps: list[int], overwrite: bool) -> None:
        for step in steps:
            self.save(step, overwrite)

    @precondition(lambda self: self.job)
    @rule(step=STEPS, overwrite=st.booleans(), cut=CUTS, again=CUTS, trainer_dies=st.booleans())
    def saves(self, **options: Any) -> None:
        self.save(**options)

    @precondition(lambda self: self.job and self.stands)
    @rule(data=st.data(), cut=st.integers(3, 6), again=st.sampled_from([None, 3, 4]), trainer_dies=st.booleans())
    def is_killed_while_it_replaces(self, data: st.DataObject, **options: Any) -> None:
        """Before, between and behind the two renames."""
        self.save(data.draw(st.sampled_from(sorted(self.stands))), True, **options)

    def save(
        self,
        step: int,
        overwrite: bool,
        cut: int | None = None,
        again: int | None = None,
        trainer_dies: bool = False,
    ) -> None:
        """Save one step, whose first worker dies after ``cut`` changes, and the next one after ``again``."""
        job = self.job
        assert job is not None
        known = job.stage.saves.checkpoints.get(step)
        is_refused = known is not None and not overwrite and known.save_id not in self.branch
        try:
            record = job.stage.saving.save(
                step, {}, timeout=None, when_busy="raise", overwrite=overwrite, metadata=None
            )
        except StepExistsError:
            assert is_refused
            return
        assert not is_refused
        copy = job.stage.stager.copy
        assert copy is not None
        copy.end(None)
        job.stage.turn_all()
        newest_first = [step, *(other for other in job.known if other != step)]
        prune = newest_first[job.keep.n :] if job.keep else []
        saved = Saved(step, record.save_id, len(self.commits))
        for changes in (cut, again):
            try:
                with killed_after(changes):
                    answers = job.worker.work(saved.number)
                break
            except Killed:
                self.look_what_stands(saved, prune)
                if trainer_dies:
                    self.may_be_untidy = True
                    self.ends()
                    return
                with killed_after(None):
                    anyio.run(job.stage.coordinator.worker_down, WorkerExitedError("the worker died", why="a signal"))
                self.check_list()
                assert not self.names(".old.", ".step-")
                job.worker_comes_up()
                if record.is_final:
                    assert (self.stands.get(step) == saved) == (record.failure is None)
                    record.heard = True
                    return
        for answer in answers:
            job.stage.coordinator.worker_says(answer, [])
        assert record.outcome.done()
        if record.failure is not None:
            assert isinstance(record.failure, StorageError)
            record.heard = True
            return
        self.has_committed(saved, prune)

    def look_what_stands(self, saved: Saved, prune: list[int]) -> None:
        """A killed worker may have published, and pruned some of what it was to prune, and nothing else."""
        visible = {known.step: known.save_id for known in scan(str(self.run)).checkpoints}
        if visible.get(saved.step) == saved.save_id and self.stands.get(saved.step) != saved:
            self.stands[saved.step] = saved
            self.commits.append(saved)
            for step in prune:
                if step not in visible and self.stands.pop(step, None):
                    self.job.ghosts.add(step)  # type: ignore[union-attr]

    def has_committed(self, saved: Saved, prune: list[int]) -> None:
        if self.stands.get(saved.step) != saved:
            self.stands[saved.step] = saved
            self.commits.append(saved)
        held = {reader.save_id for reader, _ in self.readers}
        for step in prune:
            if step in self.stands and self.stands[step].save_id not in held:
                del self.stands[step]
        keep = cast("Job", self.job).keep
        if keep is not None:
            left = [saved for saved in self.stands.values() if saved.save_id not in held]
            assert len(left) <= keep.n, "more than the newest n remain"
        assert not self.names(".old.", ".step-")
        self.check_list()

    # ---- what others do

    @precondition(lambda self: self.stands)
    @rule(data=st.data())
    def reads(self, data: st.DataObject) -> None:
        saved = data.draw(st.sampled_from(sorted(self.stands.values())))
        if (self.run / f"step-{saved.step}").exists():  # not between two renames that a death has parted
            self.readers.append((saved, open_checkpoint(str(self.run / f"step-{saved.step}"))))

    @precondition(lambda self: self.readers)
    @rule()
    def has_read(self) -> None:
        """To its end, whatever happened to the checkpoint meanwhile."""
        saved, reader = self.readers.pop(0)
        with reader:
            assert reader.file(0).read_block(0, AlignedBuffer()) == content(saved.number, 5000)

    @precondition(lambda self: self.stands)
    @rule(data=st.data())
    def removes(self, data: st.DataObject) -> None:
        """As ``aiockpt rm`` does, which does not ask the job."""
        saved = data.draw(st.sampled_from(sorted(self.stands.values())))
        run_fd = opened(self.run)
        try:
            with killed_after(None):
                is_there = (self.run / f"step-{saved.step}").exists()  # else a death has parted two renames
                is_held = saved.save_id in {reader.save_id for reader, _ in self.readers}
                gone = retire(run_fd, f"step-{saved.step}")
                assert (gone is not None) == (is_there and not is_held)
                if gone is not None:
                    remove_tree(run_fd, gone)
                    del self.stands[saved.step]
                    if self.job is not None:
                        self.job.ghosts.add(saved.step)
        finally:
            os.close(run_fd)

    @precondition(lambda self: self.job and self.job.claim.checkpoints)
    @rule(data=st.data())
    def finds_bad(self, data: st.DataObject) -> None:
        """A restore puts a damaged checkpoint aside."""
        job = cast("Job", self.job)
        mine = [
            known
            for known in job.claim.checkpoints
            if self.stands.get(known.step, Saved(0, "", 0)).save_id == known.save_id
        ]
        if mine:
            bad = data.draw(st.sampled_from(mine))
            with killed_after(None):
                job.claim.mark_bad(bad, "damaged")
            job.stage.saves.forget(bad.step)
            del self.stands[bad.step]

    @precondition(lambda self: self.job and self.stands)
    @rule(data=st.data())
    def goes_back(self, data: st.DataObject) -> None:
        """A restore of an older checkpoint makes those behind it a branch that saving replaces."""
        job = cast("Job", self.job)
        standing = [known for known in job.stage.saves.checkpoints.values() if known.step in self.stands]
        if standing:
            known = data.draw(st.sampled_from(standing))
            order = [saved.save_id for saved in self.commits]
            self.branch = set(order[order.index(known.save_id) + 1 :])
            job.restoring._begin_branch(
                Restored(
                    step=known.step,
                    path=known.path,
                    ordinal=known.ordinal,
                    metadata=None,
                    missing=(),
                    unexpected=(),
                    skipped={},
                )
            )

    # ---- what holds

    def names(self, *prefixes: str) -> list[str]:
        return sorted(name for name in os.listdir(self.run) if name.startswith(prefixes))

    def check_list(self) -> None:
        """The run lists exactly what must stand, newest first by the order of the commits."""
        listed = scan(str(self.run)).checkpoints
        expected = [saved for saved in reversed(self.commits) if self.stands.get(saved.step) == saved]
        assert [(known.step, known.save_id) for known in listed] == [(saved.step, saved.save_id) for saved in expected]
        ordinals = [known.ordinal for known in listed]
        assert ordinals == sorted(set(ordinals), reverse=True), "a branch goes by ordinals alone"

    @invariant()
    def nothing_is_lost(self) -> None:
        found = scan(str(self.run))
        assert found.unreadable == []
        visible = {known.step: known.save_id for known in found.checkpoints}
        expected = {step: saved.save_id for step, saved in self.stands.items()}
        if not self.may_be_untidy:
            assert visible == expected
        else:
            assert visible.items() <= expected.items()
            assert len(expected) - len(visible) <= len(self.names(".old."))

    @invariant()
    def job_knows_what_stands(self) -> None:
        if self.job is not None and not self.may_be_untidy:
            known = [step for step in self.job.known if step in self.stands or step not in self.job.ghosts]
            assert known == [found.step for found in scan(str(self.run)).checkpoints]

    def teardown(self) -> None:
        for _, reader in self.readers:
            reader.close()
        if self.job is not None:
            self.ends()
        with killed_after(None):
            RunClaim.take(str(self.run), linger_timeout=1).release()
        self.check_list()


FIXED = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_any_life_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Saves in any order, branches, retention, removals, readers, and deaths between any two changes."""
    run_state_machine_as_test(lambda: RunDirectory(tmp_path_factory.mktemp("run")), settings=FIXED)
