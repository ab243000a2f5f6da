"""The commit, broken at every point: whole or absent, and what stood stands."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiockpt.errors import CommitUnknownError, StepExistsError, StorageError
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.commit import make_attempt, publish, to_trash
from aiockpt.storage.failures import FencedError
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.storage.run_directory import Committed, scan
from aiockpt.storage.verify import verify_checkpoint
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule
from tests.storage.making import PLAIN, TENSORS, commit, content, content_of, make_attempt_files, opened, save_id
from tests.storage.processes import killed

BEFORE_RENAME = [
    FaultPoint.WORKER_ATTEMPT_MADE,
    FaultPoint.WORKER_OPEN_DIRECT,
    FaultPoint.WORKER_PREALLOCATE,
    FaultPoint.WORKER_BLOCK_WRITE,
    FaultPoint.WORKER_FILE_SYNC,
    FaultPoint.WORKER_MANIFEST_WRITE,
    FaultPoint.WORKER_MANIFEST_DURABLE,
    FaultPoint.WORKER_BEFORE_RENAME,
]
BEHIND_RENAME = [FaultPoint.WORKER_AFTER_RENAME, FaultPoint.WORKER_RUN_SYNCED]
OVERWRITE_ONLY = [FaultPoint.WORKER_OLD_ASIDE, FaultPoint.WORKER_REMOVE]

COMMIT = """
    from tests.storage.making import commit
    from aiockpt.testing.faults import from_json
    commit(Path(sys.argv[1]), 8, number=2, overwrite=True, faults=from_json(sys.argv[2]))
"""


@pytest.fixture
def run_fd(tmp_path: Path) -> Iterator[int]:
    RunClaim.take(str(tmp_path), linger_timeout=1).release()
    fd = opened(tmp_path)
    yield fd
    os.close(fd)


def plan(point: FaultPoint, action: str, **fields: object) -> FaultPlan:
    return FaultPlan(rules=[FaultRule(point=point, action=action, **fields)])  # type: ignore[arg-type]


def put(run_fd: int, path: Path, attempt: int = 0, *, number: int = 2, overwrite: bool = False, **more: object) -> str:
    """Make the attempt of save ``number`` for step 8 and publish it; returns the attempt's name."""
    name = f".step-8.{save_id(number)}.{attempt}"
    make_attempt_files(run_fd, name, step=8, number=number, term=1, ordinal=number)
    publish_again(run_fd, path, name, number=number, overwrite=overwrite, **more)
    return name


def publish_again(
    run_fd: int,
    path: Path,
    name: str,
    *,
    number: int = 2,
    overwrite: bool = False,
    term: int = 1,
    faults: Faults = NO_FAULTS,
) -> tuple[Committed, list[str]]:
    return publish(
        run_fd,
        name,
        run=str(path),
        step=8,
        save_id=save_id(number),
        term=term,
        overwrite=overwrite,
        faults=faults,
    )


def check_all(run: Path) -> dict[int, int]:
    """Take the run as the next job does; return which content each step has, after verifying it."""
    claim = RunClaim.take(str(run), linger_timeout=1)
    claim.release()
    assert claim.bad == []
    assert not [name for name in os.listdir(run) if name.startswith((".step-", ".old."))]
    found = {}
    for known in claim.checkpoints:
        verify_checkpoint(known.path)
        data = content_of(Path(known.path))
        found[known.step] = next(number for number in range(9) if content(number, len(data)) == data)
    return found


def test_a_commit(run_fd: int, tmp_path: Path) -> None:
    """It stands, whole; nothing else is left in the run."""
    committed = commit(tmp_path, 8, number=2)
    assert committed == Committed(8, 1, 2, save_id(2), committed.nbytes, str(tmp_path / "step-8"))
    assert check_all(tmp_path) == {8: 2}


def test_everything_is_durable_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then the directories that name them, then the rename, then the directory of that."""
    _taken(tmp_path)
    calls: list[tuple[str, ...]] = []

    def named(path: str) -> str:
        return path.replace(str(tmp_path), "run").replace(f".step-8.{save_id(2)}.0", "attempt")

    def recorded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> None:
            paths = [named(os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else a) for a in arguments]
            real(*arguments, **options)
            calls.append((name, *paths))

        return call

    for name in ("fdatasync", "fsync", "rename"):
        monkeypatch.setattr(os, name, recorded(name))
    commit(tmp_path, 8, number=2)
    assert calls == [
        ("fdatasync", f"run/attempt/{TENSORS}"),
        ("fdatasync", f"run/attempt/{PLAIN}"),
        ("fdatasync", "run/attempt/manifest.json"),
        ("fsync", "run/attempt/model"),
        ("fsync", "run/attempt"),
        ("rename", "attempt", "step-8"),
        ("fsync", "run"),
    ]


@pytest.mark.process
@pytest.mark.crash
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("point", BEFORE_RENAME + BEHIND_RENAME)
def test_killed_anywhere(point: FaultPoint, replaces: bool, tmp_path: Path) -> None:
    """Before the rename the old one stands, or nothing; behind it the new one."""
    commit(_taken(tmp_path), 5, number=1)
    if replaces:
        commit(tmp_path, 8, number=1)
    killed(COMMIT, tmp_path, plan(point, "kill").to_json())
    absent = {8: 1} if replaces else {}
    assert check_all(tmp_path) == {5: 1, **({8: 2} if point in BEHIND_RENAME else absent)}
    commit(tmp_path, 8, number=2, overwrite=True, attempt=1, term=2)
    assert check_all(tmp_path) == {5: 1, 8: 2}


@pytest.mark.process
@pytest.mark.crash
@pytest.mark.parametrize("point", OVERWRITE_ONLY)
def test_killed_while_replacing(point: FaultPoint, tmp_path: Path) -> None:
    """The old one comes back where its successor is not there, and goes where it is."""
    commit(_taken(tmp_path), 8, number=1)
    killed(COMMIT, tmp_path, plan(point, "kill").to_json())
    assert check_all(tmp_path) == {8: 1 if point is FaultPoint.WORKER_OLD_ASIDE else 2}


@pytest.mark.process
@pytest.mark.crash
@pytest.mark.parametrize("point", [FaultPoint.WORKER_BLOCK_WRITE, FaultPoint.WORKER_MANIFEST_WRITE])
def test_a_torn_write(point: FaultPoint, tmp_path: Path) -> None:
    """Half a write, then death: never seen by anybody."""
    commit(_taken(tmp_path), 5, number=1)
    killed(COMMIT, tmp_path, plan(point, "torn").to_json())
    assert check_all(tmp_path) == {5: 1}


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("point", [*BEFORE_RENAME, FaultPoint.WORKER_OLD_ASIDE])
def test_an_errno_before_the_rename(point: FaultPoint, replaces: bool, run_fd: int, tmp_path: Path) -> None:
    """A StorageError; what stood stands under its name at once, without a claim."""
    if replaces:
        commit(tmp_path, 8, number=1)
    elif point is FaultPoint.WORKER_OLD_ASIDE:
        return  # nothing is put aside
    faults = ArmedFaults(plan(point, "errno", errno=errno.EIO))
    with pytest.raises(StorageError) as caught:
        commit(tmp_path, 8, number=2, overwrite=True, faults=faults)
    assert caught.value.errno == errno.EIO
    assert faults.hits[point]
    assert [known.save_id for known in scan(str(tmp_path)).checkpoints] == ([save_id(1)] if replaces else [])
    assert check_all(tmp_path) == ({8: 1} if replaces else {})


@pytest.mark.parametrize("point", BEHIND_RENAME)
def test_an_errno_behind_the_rename(point: FaultPoint, run_fd: int, tmp_path: Path) -> None:
    """Nobody can say whether it is durable: neither a success nor a failure. Looking again settles it."""
    with pytest.raises(CommitUnknownError) as caught:
        commit(tmp_path, 8, number=2, faults=ArmedFaults(plan(point, "errno", errno=errno.EIO)))
    assert caught.value.step == 8
    assert caught.value.path == str(tmp_path / "step-8")
    assert caught.value.why
    assert caught.value.next
    publish_again(run_fd, tmp_path, f".step-8.{save_id(2)}.1")
    assert check_all(tmp_path) == {8: 2}


def test_publishing_twice(run_fd: int, tmp_path: Path) -> None:
    """The second finds its own id and says the same, whatever became of the attempt; a later try does too."""
    name = put(run_fd, tmp_path)
    first = publish_again(run_fd, tmp_path, name)
    assert first == publish_again(run_fd, tmp_path, f".step-8.{save_id(2)}.7")
    assert check_all(tmp_path) == {8: 2}


def test_a_step_that_stands(run_fd: int, tmp_path: Path) -> None:
    """It is not replaced unless that was asked for."""
    commit(tmp_path, 8, number=1)
    with pytest.raises(StepExistsError) as caught:
        put(run_fd, tmp_path)
    assert caught.value.step == 8
    assert caught.value.path == str(tmp_path / "step-8")
    assert "overwrite=True" in caught.value.next
    assert check_all(tmp_path) == {8: 1}


class _Then(Faults):
    """Does something of somebody else's at one point."""

    def __init__(self, point: FaultPoint, action: Callable[[], object]) -> None:
        self.point, self.action = point, action

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is self.point:
            self.action()


def test_a_step_that_appears_at_the_last_moment(run_fd: int, tmp_path: Path) -> None:
    """The rename itself refuses a committed directory, because it is never empty."""
    commit(tmp_path, 9, number=1)
    name = f".step-8.{save_id(2)}.0"
    make_attempt_files(run_fd, name, step=8, number=2, term=1, ordinal=2)
    original = os.access

    def appear() -> None:
        os.access = lambda *a, **k: False  # type: ignore[assignment]  # as if it came right after the look
        (tmp_path / "step-9").rename(tmp_path / "step-8")

    try:
        with pytest.raises(StepExistsError):
            publish_again(run_fd, tmp_path, name, faults=_Then(FaultPoint.WORKER_BEFORE_RENAME, appear))
    finally:
        os.access = original
    assert content_of(tmp_path / "step-8") == content(1, 5000)


def test_a_higher_term(run_fd: int, tmp_path: Path) -> None:
    """Another job has the run: nothing is published, and the error says which term."""
    (tmp_path / ".term-2").touch()
    with pytest.raises(FencedError, match="term 2, this one has 1") as caught:
        put(run_fd, tmp_path)
    assert caught.value.next
    assert scan(str(tmp_path)).checkpoints == []


@pytest.mark.parametrize("point", [FaultPoint.WORKER_BEFORE_RENAME, FaultPoint.WORKER_OLD_ASIDE])
def test_an_attempt_that_is_fenced_in_mid_publication(point: FaultPoint, run_fd: int, tmp_path: Path) -> None:
    """Its rename finds nothing; what it had put aside is back."""
    commit(tmp_path, 8, number=1)
    name = f".step-8.{save_id(2)}.0"
    with pytest.raises(FencedError, match="moved away"):
        put(run_fd, tmp_path, overwrite=True, faults=_Then(point, lambda: to_trash(run_fd, name)))
    assert check_all(tmp_path) == {8: 1}


def test_a_later_try_that_is_faster(run_fd: int, tmp_path: Path) -> None:
    """The old worker wakes up between its two renames; its successor has published: that one stands."""
    commit(tmp_path, 8, number=1)
    slow = f".step-8.{save_id(2)}.0"

    def overtake() -> None:
        to_trash(run_fd, slow)
        put(run_fd, tmp_path, 1, overwrite=True)

    with pytest.raises(FencedError):
        put(run_fd, tmp_path, overwrite=True, faults=_Then(FaultPoint.WORKER_OLD_ASIDE, overtake))
    assert check_all(tmp_path) == {8: 2}


def test_a_step_that_is_no_checkpoint(run_fd: int, tmp_path: Path) -> None:
    """A directory without a manifest is in the way too, and is replaced when that was asked for."""
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8" / "notes.txt").write_text("mine")
    with pytest.raises(StepExistsError):
        put(run_fd, tmp_path)
    put(run_fd, tmp_path, 1, overwrite=True)
    assert check_all(tmp_path) == {8: 2}


def test_an_attempts_name_is_never_used_twice(run_fd: int, tmp_path: Path) -> None:
    """Somebody else's directory is not written into, and no descriptor stays open."""
    before = os.listdir("/proc/self/fd")
    fd = make_attempt(run_fd, ".step-1.ab.0", ["model", "optimizer"])
    os.close(fd)
    assert sorted(os.listdir(tmp_path / ".step-1.ab.0")) == ["model", "optimizer"]
    with pytest.raises(StorageError) as caught:
        make_attempt(run_fd, ".step-1.ab.0", [])
    assert caught.value.errno == errno.EEXIST
    assert caught.value.path == str(tmp_path / ".step-1.ab.0")
    with pytest.raises(StorageError):
        make_attempt(run_fd, ".step-1.ab.1", ["model", "model"])
    assert os.listdir("/proc/self/fd") == before


def _taken(path: Path) -> Path:
    RunClaim.take(str(path), linger_timeout=1).release()
    return path
