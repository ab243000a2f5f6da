"""How processes end, in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiockpt.process_ends import describe_exit, name_of_signal, wait_channel


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "it exited with status 0"),
        (3, "it exited with status 3"),
        (-15, "it was ended by SIGTERM"),
        (-9, "it was ended by SIGKILL, as the kernel does when memory runs out"),
        (-40, "it was ended by signal 40"),
        (None, "it ended, and the program's own SIGCHLD handling took its exit status"),
    ],
)
def test_every_status_has_words(status: int | None, words: str) -> None:
    """Exit codes, signals with and without a name, and a status that another took are told apart."""
    assert describe_exit(status) == words


def test_signals_without_a_name() -> None:
    """A real-time signal is told by its number."""
    assert (name_of_signal(9), name_of_signal(40)) == ("SIGKILL", "signal 40")


def test_the_wait_channel(tmp_path: Path) -> None:
    """The wait channel is the kernel's, and unknown where it does not say."""
    assert wait_channel(os.getpid()) == "unknown" or wait_channel(os.getpid()).isidentifier()
    assert wait_channel(7, proc=tmp_path) == "unknown"
    (tmp_path / "7").mkdir()
    for text, expected in (("0", "unknown"), ("io_schedule", "io_schedule")):
        (tmp_path / "7/wchan").write_text(text)
        assert wait_channel(7, proc=tmp_path) == expected
