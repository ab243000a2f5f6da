"""Verify: its progress, its threads, and which of several damages it names."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.image import BLOCK_NBYTES
from aiockpt.storage.verify import verify_checkpoint
from tests.files import flip
from tests.storage.making import PLAIN, PLAIN_CONTENT, TENSORS, commit


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_progress_adds_up(threads: int, tmp_path: Path) -> None:
    """Every byte of every file is told once, by one thread at a time."""
    path = commit(tmp_path, 3, number=1, nbytes=2 * BLOCK_NBYTES + 1).path
    told: list[int] = []
    busy = threading.Lock()

    def on_progress(nbytes: int) -> None:
        assert busy.acquire(blocking=False)
        told.append(nbytes)
        busy.release()

    expected = 4096 + 2 * BLOCK_NBYTES + 1 + len(PLAIN_CONTENT)
    assert verify_checkpoint(path, on_progress=on_progress, threads=threads) == sum(told) == expected


def test_the_first_damage_is_named(tmp_path: Path) -> None:
    """In the order of the manifest, whichever thread is faster."""
    path = Path(commit(tmp_path, 3, number=1, nbytes=2 * BLOCK_NBYTES).path)
    flip(path / PLAIN, 1)
    flip(path / TENSORS, 4096 + BLOCK_NBYTES)
    with pytest.raises(CheckpointCorruptError) as caught:
        verify_checkpoint(str(path), threads=1)
    assert caught.value.offset == 4096 + BLOCK_NBYTES
    flip(path / TENSORS, 4096)
    with pytest.raises(CheckpointCorruptError) as caught:
        verify_checkpoint(str(path), threads=1)
    assert caught.value.offset == 4096


def test_what_progress_raises_ends_it(tmp_path: Path) -> None:
    """Ctrl-C in a progress bar does not read on to the end; nothing stays open."""
    path = commit(tmp_path, 3, number=1, nbytes=2 * BLOCK_NBYTES).path
    before = len(os.listdir("/proc/self/fd"))

    def on_progress(nbytes: int) -> None:
        if nbytes == BLOCK_NBYTES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_checkpoint(path, on_progress=on_progress)
    assert len(os.listdir("/proc/self/fd")) == before
