"""Taking a run: terms, leftovers of a former job, waiting for its worker, and letting go."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from aiockpt.errors import ConfigError, StorageError
from aiockpt.storage import claim as claim_module
from aiockpt.storage import locks as locks_module
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.commit import publish
from aiockpt.storage.failures import FencedError
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.run_directory import scan
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule
from tests.files import names
from tests.storage.making import commit, make_attempt_files, opened, save_id, write_head
from tests.storage.processes import child, killed, run
from tests.storage.test_locks import ATTEMPT

OTHER = save_id(0xBEEF)


def take(path: Path, **options: object) -> RunClaim:
    return RunClaim.take(str(path), **{"linger_timeout": 60.0, **options})  # type: ignore[arg-type]


def test_a_new_run(tmp_path: Path) -> None:
    """The directory is made, the first term is 1, and there is nothing to restore."""
    claim = take(tmp_path / "a" / "run")
    assert claim.run == str(tmp_path / "a" / "run")
    assert (claim.term, claim.checkpoints, claim.bad, claim.trash, claim.highest_ordinal) == (1, [], [], [], 0)
    assert sorted(os.listdir(claim.run)) == [".lock", ".term-1", "aiockpt.json"]
    claim.release()


def test_each_claim_has_a_higher_term(tmp_path: Path) -> None:
    """The lower one is removed."""
    for term in (1, 2, 3):
        claim = take(tmp_path)
        assert claim.term == term
        assert names(tmp_path, ".term") == [f".term-{term}"]
        claim.release()


def test_a_term_that_another_host_claims_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks do not reach over every file system; the file that is made exclusively does."""
    (tmp_path / ".term-1").touch()
    (tmp_path / ".term-2").touch()
    monkeypatch.setattr(claim_module, "highest_term", lambda fd: 0)
    claim = take(tmp_path)
    assert claim.term == 3
    claim.release()


def test_checkpoints_of_a_higher_term(tmp_path: Path) -> None:
    """Copied from another run, or the terms got lost: what is saved now must be newer."""
    take(tmp_path).release()
    write_head(tmp_path, 10, term=41, ordinal=3)
    claim = take(tmp_path)
    assert claim.term == 42
    assert names(tmp_path, ".term") == [".term-42"]
    assert claim.highest_ordinal == 3
    claim.release()


def test_what_stands_is_listed(tmp_path: Path) -> None:
    """Newest first, damage apart, ordinals over all."""
    take(tmp_path).release()
    for step, ordinal in ((100, 1), (200, 3), (150, 2)):
        write_head(tmp_path, step, ordinal=ordinal)
    (tmp_path / "step-300").mkdir()
    claim = take(tmp_path)
    assert [known.step for known in claim.checkpoints] == [200, 150, 100]
    assert [(bad.step, bad.path) for bad in claim.bad] == [(300, str(tmp_path / "step-300"))]
    assert claim.highest_ordinal == 3
    claim.release()


def test_attempts_of_others_go_to_the_trash(tmp_path: Path) -> None:
    """So does nothing else; what is in the trash already is named for the worker too."""
    write_head(tmp_path, 5)
    for name in (f".step-9.{OTHER}.0", f".step-9.{OTHER}.1", ".trash.earlier", f".bad-step-2.{OTHER}"):
        (tmp_path / name).mkdir()
    claim = take(tmp_path)
    assert names(tmp_path, ".step") == []
    assert sorted(claim.trash) == names(tmp_path, ".trash")
    assert len(claim.trash) == 3
    assert names(tmp_path, ".bad") == [f".bad-step-2.{OTHER}"]
    assert [known.step for known in claim.checkpoints] == [5]
    claim.release()


def test_a_replaced_checkpoint_comes_back(tmp_path: Path) -> None:
    """Its successor was never published: the step must not be lost."""
    write_head(tmp_path, 7, ordinal=4, name=f".old.step-7.{OTHER}")
    claim = take(tmp_path)
    assert [known.step for known in claim.checkpoints] == [7]
    assert names(tmp_path, ".old") == []
    claim.release()


def test_a_replaced_checkpoint_whose_successor_stands(tmp_path: Path) -> None:
    """It goes to the trash."""
    write_head(tmp_path, 7, ordinal=4, name=f".old.step-7.{OTHER}")
    write_head(tmp_path, 7, ordinal=5)
    claim = take(tmp_path)
    assert [known.ordinal for known in claim.checkpoints] == [5]
    assert names(tmp_path, ".old") == []
    assert len(claim.trash) == 1
    claim.release()


def test_several_replaced_checkpoints_of_one_step(tmp_path: Path) -> None:
    """The newest comes back, whatever its name sorts like."""
    take(tmp_path).release()
    write_head(tmp_path, 7, ordinal=6, name=f".old.step-7.{save_id(2)}")
    write_head(tmp_path, 7, ordinal=5, name=f".old.step-7.{save_id(1)}")
    (tmp_path / f".old.step-7.{save_id(0)}").mkdir()
    claim = take(tmp_path)
    assert [known.ordinal for known in claim.checkpoints] == [6]
    assert len(claim.trash) == 2
    claim.release()


@pytest.mark.process
def test_a_second_job(tmp_path: Path) -> None:
    """It is refused, in this process at once, in another one after the time it was given."""
    claim = take(tmp_path)
    with pytest.raises(ConfigError, match="this process"):
        take(tmp_path)
    script = """
        from aiockpt.storage.claim import RunClaim
        try:
            RunClaim.take(sys.argv[1], linger_timeout=1, lock_timeout=0.05)
        except ConfigError as exc:
            say(str(exc))
    """
    said = run(script, tmp_path)
    assert f"process {os.getpid()} on host" in said
    assert "next: end that job" in said
    claim.release()
    take(tmp_path).release()


@pytest.mark.process
def test_waiting_for_the_former_jobs_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One INFO line, then what it commits meanwhile is found."""
    caplog.set_level(logging.INFO, "aiockpt.run")
    take(tmp_path).release()
    with child(ATTEMPT, tmp_path) as worker:
        worker.expect("open")
        turns = []

        def on_wait(what: str) -> None:
            turns.append(what)
            if len(turns) == 3:
                commit(tmp_path, 8, number=1)
                worker.tell()
                worker.expect("closed")

        claim = take(tmp_path, on_wait=on_wait)
    assert [known.step for known in claim.checkpoints] == [8]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    claim.release()


@pytest.mark.process
def test_a_former_jobs_worker_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One WARNING, then the term fences it: its late publication finds nothing and publishes nothing."""
    monkeypatch.setattr(claim_module, "_LINGER_SLACK", 0.05)
    former = take(tmp_path)
    former.release()
    run_fd = opened(tmp_path)
    attempt = f".step-8.{save_id(1)}.0"
    with child(ATTEMPT, tmp_path) as worker:
        worker.expect("open")
        make_attempt_files(run_fd, attempt, step=8, number=1, term=former.term, ordinal=1)
        claim = take(tmp_path, linger_timeout=0.01)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert claim.checkpoints == []
    with pytest.raises(FencedError, match=f"term {claim.term}"):
        publish(run_fd, attempt, run=str(tmp_path), step=8, save_id=save_id(1), term=former.term, overwrite=False)
    assert scan(str(tmp_path)).checkpoints == []
    os.close(run_fd)
    claim.release()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_claim_that_fails_lets_go(code: int, tmp_path: Path) -> None:
    """The error is the kernel's, no descriptor stays, and the next try gets the run."""
    before = os.listdir("/proc/self/fd")
    rule = FaultRule(point=FaultPoint.TRAINER_TAKING_RUN, action="errno", errno=code)
    with pytest.raises(StorageError) as caught:
        take(tmp_path, faults=ArmedFaults(FaultPlan(rules=[rule])))
    assert caught.value.errno == code
    assert caught.value.path == str(tmp_path)
    assert os.listdir("/proc/self/fd") == before
    take(tmp_path).release()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("code", "advice"), [(errno.ENOLCK, "nolock"), (errno.ENOSYS, "-o flock")])
def test_a_file_system_without_locks(code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and Lustre say it in their own ways; the run is refused, with the mount option to look at."""

    def lockf(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks_module.fcntl, "lockf", lockf)
    with pytest.raises(StorageError) as caught:
        take(tmp_path)
    assert advice in caught.value.next


@pytest.mark.process
@pytest.mark.crash
def test_a_claim_that_is_killed(tmp_path: Path) -> None:
    """The next one takes the run at once."""
    script = """
        from aiockpt.storage.claim import RunClaim
        from aiockpt.storage.faults import FaultPoint, Faults
        from aiockpt.testing.faults import *
        rule = FaultRule(point=FaultPoint.TRAINER_TAKING_RUN, action="kill")
        RunClaim.take(sys.argv[1], linger_timeout=1, faults=ArmedFaults(FaultPlan(rules=[rule])))
    """
    killed(script, tmp_path)
    claim = take(tmp_path)
    assert claim.term == 1
    claim.release()


def test_looking_for_a_save(tmp_path: Path) -> None:
    """Only the step with this id is found."""
    claim = take(tmp_path)
    assert claim.find(3, save_id(1)) is None
    committed = commit(tmp_path, 3, number=1)
    assert claim.find(3, save_id(1)) == committed
    assert claim.find(3, save_id(2)) is None
    claim.release()


def test_a_fenced_attempt_cannot_be_published(tmp_path: Path) -> None:
    """The late rename of the old try finds nothing; the new one is published."""
    claim = take(tmp_path)
    run_fd = opened(tmp_path)
    old, new = (f".step-8.{save_id(1)}.{attempt}" for attempt in (0, 1))
    make_attempt_files(run_fd, old, step=8, number=1, term=1, ordinal=1)
    assert claim.fence(old)
    assert not claim.fence(old)
    assert len(claim.trash) == 1
    with pytest.raises(FencedError, match="moved away"):
        publish(run_fd, old, run=claim.run, step=8, save_id=save_id(1), term=1, overwrite=False)
    make_attempt_files(run_fd, new, step=8, number=1, term=1, ordinal=1)
    publish(run_fd, new, run=claim.run, step=8, save_id=save_id(1), term=1, overwrite=False)
    assert claim.find(8, save_id(1)) is not None
    os.close(run_fd)
    claim.release()


@pytest.mark.parametrize("point", [FaultPoint.WORKER_OLD_ASIDE, FaultPoint.WORKER_AFTER_RENAME])
def test_a_fence_puts_a_half_done_replacement_straight(point: FaultPoint, tmp_path: Path) -> None:
    """The run never lacks the step: the old one is back at once, or gone where the new one is there."""

    class Killed(BaseException):
        pass

    class Kills(Faults):
        def at(self, at: FaultPoint, path: str = "") -> None:
            if at is point:
                raise Killed

    claim = take(tmp_path)
    commit(tmp_path, 8, number=1)
    with pytest.raises(Killed):
        commit(tmp_path, 8, number=2, overwrite=True, faults=Kills())
    assert names(tmp_path, ".old") == [f".old.step-8.{save_id(2)}"]
    is_published = point is FaultPoint.WORKER_AFTER_RENAME
    assert claim.fence(f".step-8.{save_id(2)}.0") is not is_published
    assert [known.save_id for known in scan(claim.run).checkpoints] == [save_id(2 if is_published else 1)]
    assert names(tmp_path, ".old") == names(tmp_path, ".step") == []
    assert sorted(claim.trash) == names(tmp_path, ".trash")
    claim.release()


def test_a_bad_checkpoint_is_kept_under_another_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its step is free again, and no scan takes it for a checkpoint."""
    take(tmp_path).release()
    commit(tmp_path, 3, number=1)
    (tmp_path / "step-4").mkdir()
    claim = take(tmp_path)
    (good,), (damaged,) = claim.checkpoints, claim.bad
    path = claim.mark_bad(good, "a block's checksum")
    assert path == str(tmp_path / f".bad-step-3.{save_id(1)}")
    assert os.path.isdir(path)
    other = claim.mark_bad(damaged, "no manifest")
    assert os.path.basename(other).startswith(".bad-step-4.")
    assert (claim.checkpoints, claim.bad) == ([], [])
    assert "a block's checksum" in caplog.text
    assert scan(claim.run) == ([], [])
    with pytest.raises(StorageError) as caught:
        claim.mark_bad(good, "again")
    assert caught.value.errno == errno.ENOENT
    claim.release()
    again = take(tmp_path)
    assert len(names(tmp_path, ".bad")) == 2
    again.release()


def test_letting_go_twice(tmp_path: Path) -> None:
    """Harmless, also where the descriptor's number was given to somebody else meanwhile."""
    claim = take(tmp_path)
    claim.release()
    mine = os.open(tmp_path, os.O_RDONLY)
    claim.release()
    os.fstat(mine)
    os.close(mine)


@pytest.mark.process
def test_a_forked_child_forgets(tmp_path: Path) -> None:
    """It closes its copies; the parent's claim stands."""
    script = """
        from aiockpt.storage.claim import RunClaim
        claim = RunClaim.take(sys.argv[1], linger_timeout=1)
        before = len(os.listdir("/proc/self/fd"))
        forked = os.fork()
        if forked == 0:
            claim.forget_in_child()
            claim.release()
            os._exit(0 if len(os.listdir("/proc/self/fd")) == before - 2 else 1)
        assert os.waitpid(forked, 0)[1] == 0
        say("forked")
        hear()
    """
    with child(script, tmp_path) as owner:
        owner.expect("forked")
        with pytest.raises(ConfigError, match=f"process {owner.pid}"):
            take(tmp_path, lock_timeout=0.01)
