"""What is said of a process that does not end, on a made-up process table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiockpt.elastic.failures.unreaped import Unreaped, look_at


def make(proc: Path, name: str, state: str, channel: str | None) -> None:
    (proc / "77").mkdir(parents=True)
    (proc / "77/stat").write_text(f"77 ({name}) {state} 1 77 77 0 -1 4194560 100 0 0 0 0 0\n")
    if channel is not None:
        (proc / "77/wchan").write_text(channel)


@pytest.mark.parametrize("name", ["python", "odd) R (name", "a b"])
def test_the_d_state(tmp_path: Path, name: str) -> None:
    """A process in uninterruptible sleep is told by pid, state and wait channel, with what to do (E-43, R-MP-23)."""
    make(tmp_path, name, "D", "nfs_wait_bit_killable")
    found = look_at(77, proc=tmp_path)
    assert found == Unreaped(77, "D", "nfs_wait_bit_killable")
    assert str(found).startswith(
        "process 77 did not end after SIGKILL and is left behind\n"
        "why: it is in uninterruptible sleep (state D), and waits in the kernel at nfs_wait_bit_killable\n"
        "next: "
    )
    assert "recycle this host" in str(found)


@pytest.mark.parametrize("channel", [None, "0", ""])
def test_an_unknown_channel(tmp_path: Path, channel: str | None) -> None:
    """Where the kernel does not say where it waits, nothing is said of that (R-MP-23)."""
    make(tmp_path, "python", "R", channel)
    found = look_at(77, proc=tmp_path)
    assert found == Unreaped(77, "R", "unknown")
    assert "waits" not in str(found)


@pytest.mark.parametrize(("state", "says"), [("Z", "zombie"), ("t", "debugger"), ("?", "alive")])
def test_other_states(state: str, says: str) -> None:
    """Every state has words and an advice (R-MP-23)."""
    text = str(Unreaped(77, state, "unknown"))
    assert says in text
    assert "\nnext: " in text


def test_one_that_is_gone(tmp_path: Path) -> None:
    """Of a process that did end nothing is said (R-MP-23)."""
    assert look_at(77, proc=tmp_path) is None


def test_the_real_table() -> None:
    """The kernel's own table is read (R-MP-23)."""
    found = look_at(os.getpid())
    assert found is not None
    assert found.pid == os.getpid()
    assert found.state in "RSD"
