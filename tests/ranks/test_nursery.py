"""The harness itself: ranks that talk, fail, and are killed."""

from __future__ import annotations

import signal

import pytest

from tests.ranks.conftest import Start
from tests.support import wait_until

pytestmark = pytest.mark.process


def test_ranks_have_a_group(start: Start) -> None:
    """Of gloo, by a store of the job's own."""
    job = start(3, "x = torch.tensor([rank + 1]); dist.all_reduce(x); print(x.item(), args)", "hello")
    job.check()
    assert [job.out(rank) for rank in range(3)] == [["6 ['hello']"]] * 3


def test_a_rank_that_raises_says_so(start: Start) -> None:
    """Its traceback is kept; the others go on."""
    job = start(2, "if rank: raise ValueError('no')")
    assert job.wait() == [0, 1]
    assert "ValueError: no" in job.err(1)


def test_a_killed_rank_is_told_by_its_signal(start: Start) -> None:
    """While others wait for it."""
    job = start(2, "print('up'); import select; select.select([], [], [])")
    wait_until(lambda: job.out(0) and job.out(1), "both ranks")
    job.kill(1)
    assert job._nursery.status(job.pids[1], 10) == -signal.SIGKILL
    job.end()
