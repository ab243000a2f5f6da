"""A target appears whole or not at all, and nothing is replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.errors import CheckpointCorruptError, ConfigError
from aiockpt.interchange import appearing
from aiockpt.interchange.exporting import export_checkpoint
from tests.restoring.writing import write_step
from tests.support import run_script

TARGETS = ["set", "m.safetensors", "m.pt"]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_step(tmp_path / "run", 1, {"model": {f"x{i}": torch.full((1000,), float(i)) for i in range(9)}})


def left(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ["a file", "a directory", "a link to nowhere"])
def test_what_exists_stays(target: str, what: str, step: Path, tmp_path: Path) -> None:
    """Whatever it is, also an empty directory."""
    path = tmp_path / target
    match what:
        case "a file":
            path.write_text("x")
        case "a directory":
            path.mkdir()
        case _:
            path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="it exists already"):
        export_checkpoint(str(step), str(path))
    assert left(tmp_path) == sorted(["run", target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ["a file", "a directory"])
def test_what_appears_meanwhile_stays(
    target: str, what: str, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else was faster; ours leaves nothing."""
    path = tmp_path / target
    sync_dir = appearing.sync_dir

    def appear(fd: int) -> None:
        sync_dir(fd)
        if not path.exists():
            path.write_text("theirs") if what == "a file" else path.mkdir()

    monkeypatch.setattr(appearing, "sync_dir", appear)
    with pytest.raises(ConfigError, match="it exists already"):
        export_checkpoint(str(step), str(path))
    assert left(tmp_path) == sorted(["run", target])
    assert path.read_text() == "theirs" if what == "a file" else not os.listdir(path)


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_found_and_leaves_nothing(target: str, step: Path, tmp_path: Path) -> None:
    """Every checksum is compared while the bytes go out."""
    (file,) = (step / "model").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x55")
    with pytest.raises(CheckpointCorruptError) as caught:
        export_checkpoint(str(step), str(tmp_path / target))
    assert (caught.value.file, caught.value.offset) == (str(file), 4096)
    assert left(tmp_path) == ["run"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupt_leaves_nothing(target: str, step: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of it."""

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(str(step), str(tmp_path / target), on_progress=interrupt)
    assert left(tmp_path) == ["run"]


def test_an_interrupt_right_behind_the_first_thing_made_leaves_nothing(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was seen there."""
    mkdir = os.mkdir

    def interrupted(*arguments: Any, **options: Any) -> None:
        mkdir(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(str(step), str(tmp_path / "set"))
    assert left(tmp_path) == ["run"]


@pytest.mark.process
@pytest.mark.parametrize("target", TARGETS)
def test_a_file_system_that_refuses_leaves_nothing(target: str, step: Path, tmp_path: Path) -> None:
    """Here by the limit on the size of files; the error has the errno."""
    done = run_script(
        """
        import errno, resource, signal, sys
        from aiockpt.errors import StorageError
        from aiockpt.interchange.exporting import export_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if sys.argv[2].endswith(".pt"):
            import torch
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            export_checkpoint(sys.argv[1], sys.argv[2])
        except StorageError as exc:
            assert exc.errno == errno.EFBIG, exc
            print("refused")
        """,
        step,
        tmp_path / target,
    )
    assert done.stdout == "refused\n", done.stderr
    assert left(tmp_path) == ["run"]


def test_a_file_system_without_links(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is renamed into its place, after a last look."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    export_checkpoint(str(step), str(tmp_path / "m.pt"))
    assert left(tmp_path) == ["m.pt", "run"]


@pytest.mark.parametrize("where", ["run/new", "run/step-1/new.pt", "run/step-1/model/new"])
def test_a_run_holds_nothing_but_checkpoints(where: str, step: Path, tmp_path: Path) -> None:
    """Another program's files in it would be in the way of the next job, or be removed with a step."""
    with pytest.raises(ConfigError, match="is a run"):
        export_checkpoint(str(step), str(tmp_path / where))
    assert sorted(os.listdir(step)) == ["manifest.json", "model"]


@pytest.mark.parametrize("where", ["nowhere/m.pt", "file/set"])
def test_the_directory_around_it_must_stand(where: str, step: Path, tmp_path: Path) -> None:
    """It is not made, and need not be one."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no directory"):
        export_checkpoint(str(step), str(tmp_path / where))
    assert left(tmp_path) == ["file", "run"]


def test_a_trailing_slash_makes_a_directory(step: Path, tmp_path: Path) -> None:
    """Whatever its name ends with."""
    export_checkpoint(str(step), f"{tmp_path}/weights.bin/")
    assert os.listdir(tmp_path / "weights.bin") == ["model.safetensors"]


def test_the_umask_decides_who_may_read_it(step: Path, tmp_path: Path) -> None:
    """As for any other program's files."""
    old = os.umask(0o027)
    try:
        for target in TARGETS:
            export_checkpoint(str(step), str(tmp_path / target))
    finally:
        os.umask(old)
    assert [(tmp_path / target).stat().st_mode & 0o777 for target in TARGETS] == [0o750, 0o640, 0o640]
    assert (tmp_path / "set" / "model.safetensors").stat().st_mode & 0o777 == 0o640
