"""``due`` on several ranks: true at the same step on all, whoever asked."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start
from tests.support import wait_until

pytestmark = pytest.mark.process

COMMON = """
    import signal
    from tests.ranks.at_rank import *
    state = {"own": own(rank), "epoch": 3}

    def train(ckpt, saves, until=None):
        '''Train until so many steps were saved; no rank waits for another but in its own collective.'''
        x = torch.zeros(1)
        saved = []
        step = 0
        while len(saved) < saves:
            dist.all_reduce(x)
            reason = ckpt.due(step)
            if reason is not None:
                saved.append([of(ckpt.save(step, state).result), reason])
            step += 1
        return saved
"""


def test_sigterm_on_one_rank(start: Start, tmp_path: Path) -> None:
    """As when a node is preempted: all ranks save the same step, and leave."""
    run = tmp_path / "run"
    job = start(
        4,
        COMMON
        + """
    with checkpointer(args[0]) as ckpt:
        signal.signal(signal.SIGTERM, lambda *_: ckpt.request_save("preempted"))
        ckpt.save(10**6, state).result()
        say("training")
        say("saved", train(ckpt, 1))
    """,
        run,
    )
    wait_until(lambda: all(job.out(rank) for rank in range(4)), "all ranks to train")
    job.kill(2, signal.SIGTERM)
    job.check()
    saved = job.told()["saved"]
    step, _ = saved[0][0]
    assert saved == [[[step, "preempted"]]] * 4
    assert sorted(aiockpt.blocking.steps(run)) == [step, 10**6]


def test_clock_and_steps(start: Start, tmp_path: Path) -> None:
    """Minutes are rank 0's, steps are arithmetic; requests of several ranks at once are one save."""
    job = start(
        4,
        COMMON
        + """
    with checkpointer(args[0] + "/minutes", every=aiockpt.Every(minutes=0.005)) as ckpt:
        say("minutes", train(ckpt, 3))
    with checkpointer(args[0] + "/steps", every=aiockpt.Every(steps=7)) as ckpt:
        say("steps", train(ckpt, 3))
    with checkpointer(args[0] + "/requests") as ckpt:
        if rank % 2:
            ckpt.request_save(f"asked by {rank}")
        say("requests", train(ckpt, 1))
        if rank == 0:  # also what was asked for before the worker of a rank died
            ckpt.request_save("again")
            kill(worker_of(ckpt))
        say("again", train(ckpt, 1)[-1][1])
    """,
        tmp_path,
    )
    job.check()
    told = job.told()
    assert told["minutes"] == [told["minutes"][0]] * 4
    assert len({step for step, _ in told["minutes"][0]}) == 3
    assert (
        told["steps"] == [[[6, told["steps"][0][0][1]], [13, told["steps"][0][1][1]], [20, told["steps"][0][2][1]]]] * 4
    )
    assert told["requests"] == [told["requests"][0]] * 4
    assert "asked by" in told["requests"][0][0][1]
    assert told["again"] == ["again"] * 4
