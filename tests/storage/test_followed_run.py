"""Ranks that see the same directory, and ranks that do not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aiockpt.cli.listing import read_listing
from aiockpt.coordinator.held_run import HeldRun
from aiockpt.errors import ConfigError, StorageError
from aiockpt.storage import followed_run as module
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.followed_run import FollowedRun
from aiockpt.storage.run_directory import scan
from aiockpt.storage.run_record import check_run
from tests.files import names
from tests.storage.making import commit, save_id, write_head
from tests.storage.processes import child, killed
from tests.storage.test_claim import take


def follow(path: Path, claim: RunClaim, meet: str, **options: object) -> FollowedRun:
    return FollowedRun.check(
        str(path),
        run_id=claim.run_id,
        term=claim.term,
        meet=meet,
        **{"timeout": 0.0, **options},  # type: ignore[arg-type]
    )


def refused(call: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError, match="not shared between the ranks' hosts") as caught:
        call()
    assert caught.value.argument == "run"
    assert "one directory on all hosts" in caught.value.next
    return caught.value


def test_one_directory(tmp_path: Path) -> None:
    """By whichever path: what rank 0 has made is there. Nothing is opened for good."""
    claim = take(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    meet = claim.make_meet()
    before = os.listdir("/proc/self/fd")
    for path in ("run", "link"):
        followed = follow(tmp_path / path, claim, meet)
        assert (followed.run, followed.run_id, followed.term) == (str(tmp_path / path), claim.run_id, 1)
    assert os.listdir("/proc/self/fd") == before
    claim.release()


def test_both_are_a_run_for_the_coordinator(tmp_path: Path) -> None:
    """What mypy sees, and the attributes at run time."""
    claim = take(tmp_path)
    held: list[HeldRun] = [claim, follow(tmp_path, claim, claim.make_meet())]
    assert all(hasattr(run, name) for run in held for name in HeldRun.__annotations__)
    claim.release()


def test_another_directory(tmp_path: Path) -> None:
    """A local one of the same path on another host, with a run of its own, is none of rank 0's."""
    claim, other = take(tmp_path / "here"), take(tmp_path / "there")
    meet = claim.make_meet()
    other.make_meet()
    error = refused(lambda: follow(tmp_path / "there", claim, meet))
    assert meet in error.why
    assert error.path == str(tmp_path / "there")
    claim.release()
    other.release()


def test_a_copy_of_the_directory(tmp_path: Path) -> None:
    """The run id is that of rank 0's, and the file of this opening is not there."""
    claim = take(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    refused(lambda: follow(tmp_path / "there", claim, claim.make_meet()))
    claim.release()


def test_the_file_alone_is_not_enough(tmp_path: Path) -> None:
    """Where the record is another run's, or none, something is wrong with what this host sees."""
    claim, other = take(tmp_path / "here"), take(tmp_path / "there")
    meet = claim.make_meet()
    (tmp_path / "there" / meet).touch()
    assert other.run_id in refused(lambda: follow(tmp_path / "there", claim, meet)).why
    (tmp_path / "there" / "aiockpt.json").unlink()
    assert "no record" in refused(lambda: follow(tmp_path / "there", claim, meet)).why
    claim.release()
    other.release()


@pytest.mark.parametrize("name", ["nowhere", "a/b", "file", "file/in/it"])
def test_no_directory(name: str, tmp_path: Path) -> None:
    """A rank other than the first makes none: it would be a second run."""
    claim = take(tmp_path / "run")
    (tmp_path / "file").touch()
    refused(lambda: follow(tmp_path / name, claim, claim.make_meet()))
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]
    claim.release()


def test_a_file_that_is_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS remembers for a while that a name was not there: it is looked for again."""
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)
    claim = take(tmp_path / "run")
    meet = claim.make_meet()
    hidden = tmp_path / "hidden"
    (tmp_path / "run").rename(hidden)
    turns: list[str] = []

    def on_wait(what: str) -> None:
        turns.append(what)
        if len(turns) == 2:
            (hidden / meet).rename(tmp_path / meet)
            hidden.rename(tmp_path / "run")
        if len(turns) == 4:
            (tmp_path / meet).rename(tmp_path / "run" / meet)

    follow(tmp_path / "run", claim, meet, timeout=60.0, on_wait=on_wait)
    assert len(turns) == 4
    assert str(tmp_path / "run") in turns[0]
    claim.release()


def test_waiting_can_be_ended(tmp_path: Path) -> None:
    """By who waits: close() does so."""
    claim = take(tmp_path / "run")
    meet = claim.make_meet()

    class Enough(Exception):
        pass

    def on_wait(_: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        follow(tmp_path / "other", claim, meet, timeout=60.0, on_wait=on_wait)
    claim.release()


def test_what_cannot_be_read_is_no_proof(tmp_path: Path) -> None:
    """An errno of the file system is told as that, at once."""
    claim = take(tmp_path / "run")
    meet = claim.make_meet()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError) as caught:
        follow(tmp_path / "loop", claim, meet, timeout=60.0)
    assert caught.value.path == str(tmp_path / "loop")
    claim.release()


def test_it_moves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It finds what is committed, and says what is bad; rank 0 does the rest."""
    claim = take(tmp_path)
    known = commit(tmp_path, 3, number=1)
    attempt = f".step-4.{save_id(2)}.0"
    (tmp_path / attempt).mkdir()
    followed = follow(tmp_path, claim, claim.make_meet())
    before = sorted(os.listdir(tmp_path))
    assert (followed.checkpoints, followed.bad, followed.trash, followed.highest_ordinal) == ([], [], [], 0)
    assert followed.find(3, save_id(1)) == known
    assert followed.find(3, save_id(2)) is None
    assert followed.find(4, save_id(2)) is None
    assert not followed.fence(attempt)
    assert followed.mark_bad(known, "a block's checksum") == known.path
    assert "a block's checksum" in caplog.text
    followed.release()
    followed.forget_in_child()
    assert sorted(os.listdir(tmp_path)) == before
    claim.release()


def test_the_file_goes_with_the_claim(tmp_path: Path) -> None:
    """Its name is another one each time."""
    made = set()
    for _ in range(3):
        claim = take(tmp_path)
        made.add(claim.make_meet())
        assert set(names(tmp_path, ".meet")) <= made
        assert len(names(tmp_path, ".meet")) == 1
        claim.release()
        assert names(tmp_path, ".meet") == []
    assert len(made) == 3


def test_no_reader_minds_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither scan nor ``aiockpt ls`` nor the check of a directory that lost its record."""
    caplog.set_level(logging.INFO)
    claim = take(tmp_path)
    claim.make_meet()
    write_head(tmp_path, 5)
    assert [known.step for known in scan(str(tmp_path)).checkpoints] == [5]
    assert [known.step for known in read_listing(str(tmp_path)).checkpoints] == [5]
    (tmp_path / "aiockpt.json").unlink()
    (tmp_path / "step-5" / "manifest.json").unlink()
    (tmp_path / "step-5").rmdir()
    assert check_run(str(tmp_path)) is None
    claim.release()


@pytest.mark.process
@pytest.mark.crash
def test_a_killed_owner_leaves_it_to_the_next(tmp_path: Path) -> None:
    """The next claim removes it, before it makes its own."""
    killed(
        """
        from aiockpt.storage.claim import RunClaim
        RunClaim.take(sys.argv[1], linger_timeout=1).make_meet()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    (left,) = names(tmp_path, ".meet")
    claim = take(tmp_path)
    assert names(tmp_path, ".meet") == []
    assert claim.make_meet() != left
    claim.release()


@pytest.mark.process
def test_a_forked_child_leaves_the_file(tmp_path: Path) -> None:
    """It is the parent's."""
    script = """
        from aiockpt.storage.claim import RunClaim
        claim = RunClaim.take(sys.argv[1], linger_timeout=1)
        claim.make_meet()
        forked = os.fork()
        if forked == 0:
            claim.forget_in_child()
            claim.release()
            os._exit(0)
        assert os.waitpid(forked, 0)[1] == 0
        say("forked")
        hear()
    """
    with child(script, tmp_path) as owner:
        owner.expect("forked")
        assert len(names(tmp_path, ".meet")) == 1
