"""Checkpoints that another rank has opened: seen late, or never, or not the same."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aiockpt.errors import CheckpointCorruptError, RestoreError, StorageError
from aiockpt.storage import seen as seen_module
from aiockpt.storage.readers import AlignedBuffer, open_checkpoint
from aiockpt.storage.seen import Seen, open_seen
from tests.storage.making import TENSORS, commit


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(seen_module, "PAUSES", (0.0, 0.0))
    commit(tmp_path, 4)
    return tmp_path / "step-4"


def seen_at(step: Path) -> Seen:
    with open_checkpoint(str(step)) as checkpoint:
        head = checkpoint.manifest.head
        return Seen(head.step, head.save_id, checkpoint.manifest_nbytes, checkpoint.manifest_sum)


class Late:
    """Asked whether to stop while we wait: the third time the file system shows what was hidden."""

    def __init__(self, show: Callable[[], object]) -> None:
        self._show = show
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        if self.asked == 3:
            self._show()
        return False


def never() -> bool:
    return False


def read_all(path: str, seen: Seen, should_stop: Callable[[], bool] = never) -> int:
    with open_seen(path, seen, should_stop=should_stop) as checkpoint:
        buffer = AlignedBuffer()
        count = 0
        for index, record in enumerate(checkpoint.manifest.files):
            if record.data_start:
                reader = checkpoint.file(index)
                for block in range(reader.block_count):
                    count += len(reader.read_block(block, buffer))
        return count


def test_the_same_bytes_are_read(step: Path) -> None:
    assert read_all(str(step), seen_at(step)) > 0


@pytest.mark.parametrize("part", ["directory", "manifest", "file"])
def test_what_comes_late_is_waited_for(part: str, step: Path, tmp_path: Path) -> None:
    seen = seen_at(step)
    hidden = {"directory": step, "manifest": step / "manifest.json", "file": step / TENSORS}[part]
    hidden.rename(tmp_path / "hidden")
    late = Late(lambda: (tmp_path / "hidden").rename(hidden))
    assert read_all(str(step), seen, late) > 0
    assert late.asked == 3


def test_an_older_one_of_that_name_is_waited_out(step: Path, tmp_path: Path) -> None:
    """Attributes and names are cached: the directory that was replaced is seen for a while."""
    seen = seen_at(step)
    step.rename(tmp_path / "newer")
    commit(tmp_path, 4, number=1)

    def show() -> None:
        shutil.rmtree(step)
        (tmp_path / "newer").rename(step)

    assert read_all(str(step), seen, Late(show)) > 0


def test_a_short_file_is_waited_out(step: Path) -> None:
    seen = seen_at(step)
    path = step / TENSORS
    data = path.read_bytes()
    path.write_bytes(data[:100])
    assert read_all(str(step), seen, Late(lambda: path.write_bytes(data))) > 0


def test_a_stale_handle_is_opened_anew(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_at(step)
    stale = [True, True]
    opened = os.open

    def open_stale(path: str, flags: int, *args: object, dir_fd: int | None = None) -> int:
        if dir_fd is not None and path.endswith(".safetensors") and stale:
            stale.pop()
            raise OSError(errno.ESTALE, "stale")
        return opened(path, flags, *args, dir_fd=dir_fd)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_stale)
    assert read_all(str(step), seen) > 0
    assert not stale


@pytest.mark.parametrize("part", ["directory", "manifest", "file"])
def test_what_never_comes_is_no_damage(part: str, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "PATIENCE_SECONDS", 0.0)
    seen = seen_at(step)
    hidden = {"directory": step, "manifest": step / "manifest.json", "file": step / TENSORS}[part]
    hidden.rename(tmp_path / "hidden")
    with pytest.raises(StorageError, match="is not what rank 0 sees there") as caught:
        read_all(str(step), seen)
    assert caught.value.step == 4
    assert "shared file system" in caught.value.next


def test_another_manifest_is_said_with_both_checksums(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_module, "PATIENCE_SECONDS", 0.0)
    seen = seen_at(step)._replace(manifest_sum="0" * 32)
    with pytest.raises(StorageError, match=r"of checksum .* that of rank 0") as caught:
        read_all(str(step), seen)
    assert caught.value.errno == errno.ESTALE


def test_what_may_not_be_read_is_not_waited_for(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_at(step)

    def refuse(*args: object, **options: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError) as caught:
        open_seen(str(step), seen, should_stop=lambda: pytest.fail("waited"))
    assert caught.value.errno == errno.EACCES


def test_bad_checksums_are_damage(step: Path) -> None:
    """The only proof that there is."""
    seen = seen_at(step)
    path = step / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError):
        read_all(str(step), seen)


def test_waiting_ends_when_nobody_wants_it_any_more(step: Path, tmp_path: Path) -> None:
    seen = seen_at(step)
    step.rename(tmp_path / "hidden")
    with pytest.raises(RestoreError, match="cancelled"):
        open_seen(str(step), seen, should_stop=lambda: True)
