"""Ranks of real jobs that find each other, with collectives of the training around it."""

from __future__ import annotations

import signal

import pytest

from tests.ranks.conftest import Start
from tests.support import wait_until

pytestmark = pytest.mark.process

COMMON = """
    from aiockpt.coordinator.listener import listen
    from aiockpt.coordinator.rendezvous import Meeting, Refusal, Rendezvous, find_group
    from aiockpt.errors import *
    from tests.waiting import wait_until

    def word(port, token=""):
        return Meeting(host="", port=port, token=token, run_id="", term=1, meet="", package="")

    def found(rendezvous):
        return wait_until(rendezvous.look, "a word of rank 0")
"""


def test_a_job(start: Start) -> None:
    """All find what rank 0 publishes, can connect there, and the training's collectives go on meanwhile."""
    job = start(
        3,
        COMMON
        + """
    import socket
    group = find_group(None)
    assert (group.rank, group.world, group.members) == (rank, 3, (0, 1, 2)), group
    for opening in range(2):
        with Rendezvous(group, "/run") as rendezvous:
            if rank == 0:
                listener = listen(group.store)
                port = listener.getsockname()[1]
                rendezvous.publish(word(port, f"token {opening}"))
            x = torch.tensor([rank]); dist.all_reduce(x); assert x.item() == 3
            meeting = found(rendezvous)
            if rank:
                socket.create_connection(("127.0.0.1", meeting.port)).close()
            dist.barrier()
            print(meeting.token)
    """,
    )
    job.check()
    assert [job.out(rank) for rank in range(3)] == [["token 0", "token 1"]] * 3


def test_subgroups(start: Start) -> None:
    """Each has its own rank 0, and its own word; a group of one rank is none."""
    job = start(
        4,
        COMMON
        + """
    even, odd = dist.new_group([0, 2]), dist.new_group([1, 3])
    alone = [dist.new_group([one]) for one in range(world)][rank]
    assert find_group(alone) is None
    group = find_group(odd if rank % 2 else even)
    assert (group.rank, group.world, group.members) == (rank // 2, 2, (rank % 2, rank % 2 + 2)), group
    with Rendezvous(group, "/run") as rendezvous:
        if group.rank == 0:
            rendezvous.publish(word(rank))
        print(found(rendezvous).port)
        dist.barrier()
    """,
    )
    job.check()
    assert [job.out(rank) for rank in range(4)] == [["0"], ["1"], ["0"], ["1"]]


def test_the_cause_of_rank_0(start: Start) -> None:
    """All raise what it raised."""
    job = start(
        2,
        COMMON
        + """
    with Rendezvous(find_group(None), "/run") as rendezvous:
        if rank == 0:
            rendezvous.publish(Refusal.of(ConfigError("taken", why="by a job", next="end it", argument="run")))
        try:
            raise found(rendezvous).as_exception()
        except ConfigError as error:
            print(error.argument, error.why)
        dist.barrier()
    """,
    )
    job.check()
    assert job.out(0) == job.out(1) == ["run by a job"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_is_gone(number: signal.Signals, start: Start) -> None:
    """Its store says nothing any more: an error, not a hang."""
    job = start(
        2,
        COMMON
        + """
    import select, sys
    with Rendezvous(find_group(None), "/run") as rendezvous:
        assert rendezvous.look() is None
        dist.barrier()
        print("up")
        if rank == 0:
            select.select([], [], [])
        def look():
            try:
                rendezvous.look(timeout=1)
            except WorkerStartError as error:
                return error
        print(wait_until(look, "an error").what)
        sys.stdout.flush()
        import os; os._exit(0)
    """,
    )
    wait_until(lambda: job.out(0) and job.out(1), "both ranks")
    job.kill(0, number)
    wait_until(lambda: len(job.out(1)) == 2, "rank 1 to tell")
    assert "store does not answer" in job.out(1)[1]
    job.end()
