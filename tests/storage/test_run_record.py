"""Which directories can be a run: each refusal says what, why and what to do."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from aiockpt.errors import ConfigError, StorageError
from aiockpt.storage.claim import RunClaim
from aiockpt.storage.run_record import check_run, make_directory, make_record
from tests.storage.making import opened, write_head
from tests.storage.processes import run


def _file(path: Path) -> None:
    path.write_text("not a directory")


def _foreign(path: Path) -> None:
    path.mkdir()
    for name in ("a.py", "b.py", "c.py", "d.py", "e.py"):
        (path / name).write_text("")


def _other_steps(path: Path) -> None:
    (path / "step-100").mkdir(parents=True)
    (path / "step-100" / "weights.bin").write_text("")


def _record(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "aiockpt.json").write_text(text)

    return make


def _fifo(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "aiockpt.json")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_file, "it is a file"),
        (_foreign, "holds 'a.py', 'b.py', 'c.py' and 2 more"),
        (_other_steps, "'step-100'"),
        (_record("{}"), "none of ours"),
        (_record(""), "none of ours"),
        (_record("[" * 4096), "none of ours"),
        (_record('{"format": "x", "run_id": "a"}'), "none of ours"),
        (_record('{"format": 1}'), "none of ours"),
        (_record('{"format": 2, "run_id": "a", "more": []}'), "newer aiockpt"),
        (_record('{"format": 99}'), "newer aiockpt"),
        (_fifo, "none of ours"),
    ],
    ids=["file", "foreign", "foreign-steps", "empty", "zero", "deep", "text", "half", "newer", "newer-half", "fifo"],
)
def test_directories_that_are_refused(make: Callable[[Path], None], why: str, tmp_path: Path) -> None:
    """Reading and writing alike; nothing in them is touched."""
    path = tmp_path / "run"
    make(path)
    before = sorted(os.listdir(path)) if path.is_dir() else None
    for attempt in (lambda: check_run(str(path)), lambda: RunClaim.take(str(path), linger_timeout=1)):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.argument == "run"
        assert caught.value.path == str(path)
        assert why in caught.value.why
        assert caught.value.next
    assert (sorted(os.listdir(path)) if path.is_dir() else None) == before


def test_a_path_through_a_file(tmp_path: Path) -> None:
    """A part of the path that is a file is the caller's mistake, not the disk's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a part of its path is a file"):
        RunClaim.take(str(tmp_path / "file" / "a" / "b"), linger_timeout=1)


def test_a_reader_makes_nothing(tmp_path: Path) -> None:
    """A path that is not there stays so."""
    with pytest.raises(ConfigError, match="it does not exist"):
        check_run(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def _empty(path: Path) -> None:
    path.mkdir()


def _missing(path: Path) -> None:
    return


def _mount_point(path: Path) -> None:
    (path / "lost+found").mkdir(parents=True)


def _half_opened(path: Path) -> None:
    path.mkdir()
    (path / ".lock").write_text("{}")
    (path / ".aiockpt.json.1234").write_text("{")
    (path / ".term-3").write_text("")


def _copied_steps(path: Path) -> None:
    path.mkdir()
    write_head(path, 7, term=4)
    (path / ".bad-step-3.ab").mkdir()


@pytest.mark.parametrize("make", [_empty, _missing, _mount_point, _half_opened, _copied_steps])
def test_directories_that_are_taken(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Empty ones, missing ones, what a killed open left, and checkpoints that were copied without the record."""
    path = tmp_path / "a" / "run"
    path.parent.mkdir()
    make(path)
    claim = RunClaim.take(str(path), linger_timeout=1)
    claim.release()
    record = check_run(str(path))
    assert record is not None
    assert record.run_id == claim.run_id
    assert not [name for name in os.listdir(path) if name.startswith(".aiockpt")]


def test_the_record_stays(tmp_path: Path) -> None:
    """A run keeps its id over all its jobs."""
    first = RunClaim.take(str(tmp_path), linger_timeout=1)
    first.release()
    second = RunClaim.take(str(tmp_path), linger_timeout=1)
    second.release()
    assert first.run_id == second.run_id
    assert len(first.run_id) == 36


def test_directories_are_made_with_their_parents(tmp_path: Path) -> None:
    """Again is harmless."""
    for _ in range(2):
        make_directory(str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    """The directory was removed behind our back."""
    (tmp_path / "run").mkdir()
    fd = opened(tmp_path / "run")
    (tmp_path / "run").rmdir()
    with pytest.raises(OSError, match="No such file"):
        make_record(fd)
    os.close(fd)


@pytest.mark.process
def test_a_read_only_directory() -> None:
    """A StorageError with EACCES; root drops its rights first, which modes do not bind."""
    script = """
        from aiockpt.storage.claim import RunClaim
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        for path in ("run", "run/below"):
            try:
                RunClaim.take(sys.argv[1] + "/" + path, linger_timeout=1)
            except StorageError as exc:
                say(exc.errno)
                say(exc.next)
    """
    give_access = "give this user access to the path, or choose another run directory"
    with tempfile.TemporaryDirectory(prefix="aiockpt-test-") as directory:  # tmp_path is closed to other users
        Path(directory).chmod(0o755)
        (Path(directory) / "run").mkdir(mode=0o555)
        assert run(script, directory).split("\n") == [str(errno.EACCES), give_access] * 2


def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    """An errno is a StorageError, never a ConfigError that blames the caller."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError) as caught:
        RunClaim.take(str(tmp_path / "loop"), linger_timeout=1)
    assert caught.value.errno == errno.ELOOP
