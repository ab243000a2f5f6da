"""Programs that have their own way with children: SIGCHLD ignored, handled, or every child waited for elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt import blocking
from tests.support import run_script

pytestmark = pytest.mark.process

WAYS = {
    "ignored": """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    """,
    "handled": """
    signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    """,
    "waited for elsewhere": """
    def reap(number, frame):
        heard.append(number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
    signal.signal(signal.SIGCHLD, reap)
    """,
}
PROGRAM = """
    import os, signal, subprocess, sys, torch, aiockpt
    from torch.utils.data import DataLoader, TensorDataset
    from tests.waiting import wait_until
    heard = []
"""
USE = """
    state = {"x": torch.arange(1000)}
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        ckpt.save(0, state).result(60)
        pid = ckpt.statistics().worker_pid
        before = len(heard)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ckpt.statistics().worker_pid not in (None, pid), "another worker")
        ckpt.save(1, state).result(60)
        assert len(heard) > before or signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN, "its handler was not called"
        if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
            loader = DataLoader(TensorDataset(torch.arange(8)), num_workers=1, multiprocessing_context="fork")
            assert len(list(loader)) == 8
        ckpt.save(2, state)
    print(aiockpt.blocking.steps(sys.argv[1]))
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_program_s_own_way_with_its_children(way: str, tmp_path: Path) -> None:
    """A killed worker is noticed and replaced, its exit status known or not; the program's handler hears of it."""
    done = run_script(PROGRAM + WAYS[way] + USE, tmp_path)
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2]\n"), done.stderr
    expected = "it was ended by SIGKILL" if way == "handled" else "it "
    assert expected in done.stderr
    assert blocking.steps(tmp_path) == [0, 1, 2]
