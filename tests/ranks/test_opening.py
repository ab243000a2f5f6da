"""How the ranks of a job find each other: groups, several runs, restarts, and what cannot open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import aiockpt
from tests.ranks.conftest import Start
from tests.ranks.scripts import SMALL, errors
from tests.support import wait_until

pytestmark = pytest.mark.process

START_SECONDS = 4.0
"""The ``start_timeout`` of jobs that cannot open."""
PROMPT_SECONDS = 15.0
"""Within which they must have said so; without a word of the rank that failed it would be 60 s and more."""


def files(checkpoint: Path) -> list[str]:
    """Return the names of a checkpoint's tensor files."""
    return sorted(path.name for path in checkpoint.glob("own/*.safetensors"))


def test_groups(start: Start, tmp_path: Path) -> None:
    """The default group, a subgroup, ranks alone, two runs at once, and one run again: each is a job of its own."""
    job = start(
        4,
        SMALL
        + """
    import os
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "192.0.2.1", "1"  # not ours: we bind what we publish
    odd = dist.new_group([1, 3])
    alone = [dist.new_group([one]) for one in range(world)][rank]
    with checkpointer(args[0] + "/all") as ckpt, checkpointer(args[0] + "/other") as other:
        first, second = ckpt.save(0, state), other.save(0, {"own": own(rank + 10)})
        say("both", [of(second.result), of(first.result)])
        if rank in (1, 3):
            with checkpointer(args[0] + "/odd", process_group=odd) as part:
                say("subgroup", of(part.save(1, state).result))
        else:
            with checkpointer(args[0] + f"/alone-{rank}", process_group=alone) as single:
                say("alone", of(single.save(1, state).result))
        if rank == 0:
            job = ckpt._coordinator._job
            say("address", job._found.host)
        dist.barrier()
    with checkpointer(args[0] + "/all") as ckpt:
        say("resumed", of(lambda: ckpt.restore(state)))
        say("again", of(ckpt.save(2, state).result))
    """,
        tmp_path,
    )
    job.check()
    told = job.told()
    assert told["both"] == [[0, 0]] * 4
    assert told["subgroup"] == [None, 1, None, 1]
    assert told["alone"] == [1, None, 1, None]
    assert told["address"][0] == "127.0.0.1"
    assert told["resumed"] == [0] * 4
    assert told["again"] == [2] * 4
    assert files(tmp_path / "all/step-2") == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert files(tmp_path / "odd/step-1") == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files(tmp_path / "alone-0/step-1") == ["model-00001-of-00001.safetensors"]
    assert aiockpt.blocking.load(tmp_path / "other")["own"]["w"][0] == 10


def test_a_job_of_one(start: Start, tmp_path: Path) -> None:
    """It is no job at all: there is no star, and the files are those of one trainer."""
    job = start(
        1,
        SMALL
        + """
    with checkpointer(args[0]) as ckpt:
        say("save", of(ckpt.save(0, state).result))
        say("job", ckpt._coordinator._job is None)
    """,
        tmp_path / "run",
    )
    job.check()
    assert job.told() == {"save": [0], "job": [True]}
    assert files(tmp_path / "run/step-0") == ["model-00001-of-00001.safetensors"]


def test_a_store_that_outlives_jobs(start: Start, tmp_path: Path) -> None:
    """What the job before left there is read, and leads nobody astray."""
    keeper = start(
        1,
        """
    import select
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    print(store.port)
    select.select([], [], [])
    """,
    )
    port = wait_until(lambda: keeper.out(0), "the store")[0]
    code = (
        SMALL
        + """
    from torch.distributed import distributed_c10d
    group = distributed_c10d._get_default_group()
    backend, _ = distributed_c10d._world.pg_map[group]
    distributed_c10d._world.pg_map[group] = backend, dist.TCPStore("127.0.0.1", int(args[1]), None, False)
    ckpt = checkpointer(args[0])
    if rank == 0:
        dist.barrier()  # so that the others find nothing but what the job before has left
        ckpt.open()
    else:
        ckpt.open()
        job = ckpt._coordinator._job
        say("stale", args[2] and wait_until(lambda: job._found, "what was left").port)
        dist.barrier()
    say("save", of(lambda: ckpt.save(args[2], state).result()))
    say("port", ckpt._coordinator._job._found.port)
    if args[2] < 2:
        end()  # no farewell: as when the host is gone
    ckpt.close()
    """
    )
    ports: list[int] = []
    for turn in range(3):
        job = start(3, code, tmp_path / "run", port, turn)
        job.check()
        told = job.told()
        assert told["save"] == [turn] * 3
        if turn:
            assert told["stale"][1:] == [ports[-1]] * 2
        ports.append(told["port"][0])
        assert told["port"] == [ports[-1]] * 3


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_rank_0_cannot_take(late: bool, start: Start, tmp_path: Path) -> None:
    """Rank 0 is told at open, the others by their first prepare, save or restore: the same class, and its words."""
    (tmp_path / "run").write_text("a file")
    job = start(
        4,
        SMALL
        + """
    import threading
    ckpt = checkpointer(args[0], start_timeout=args[2])
    if rank == 0:
        if args[1]:  # the others have called already, and wait for it
            dist.barrier()
        say("told", seconds_of(ckpt.open))
        if not args[1]:
            dist.barrier()
    else:
        ckpt.open()
        calls = {
            1: lambda: ckpt.prepare(state),
            2: lambda: ckpt.save(0, state).result(),
            3: lambda: ckpt.restore(state),
        }
        if args[1]:
            caller = threading.Thread(target=lambda: say("told", seconds_of(calls[rank])))
            caller.start()
            dist.barrier()
            caller.join()
            if rank == 1:  # prepare() needs no other rank for what it does
                say("told", seconds_of(lambda: ckpt.save(0, state).result()))
        else:
            dist.barrier()
            wait_until(lambda: ckpt._coordinator._job._failure, "the cause")
            say("told", seconds_of(calls[rank]))
        say("again", of(lambda: ckpt.save(1, state).result()))
        ckpt.close()
    dist.barrier()  # rank 0 has the group's store
    """,
        tmp_path / "run",
        late,
        30,
    )
    job.check()
    told = job.told()
    for outcome, seconds in told["told"]:
        assert outcome["error"] == "ConfigError", outcome
        assert outcome["argument"] == "run"
        assert seconds < PROMPT_SECONDS
    for rank in (1, 2, 3):
        assert "rank 0: " in told["told"][rank][0]["text"]
        assert told["again"][rank]["error"] == "ConfigError"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_that_does_not_start(victim: int, start: Start, tmp_path: Path) -> None:
    """All are told, and which rank it is."""
    job = start(
        4,
        SMALL
        + """
    victim = args[1]
    dies = [rule("worker.started", "kill")] if rank == victim else []
    ckpt = checkpointer(args[0], *dies, start_timeout=30)
    if rank == victim:
        say("told", seconds_of(ckpt.open))
    else:
        ckpt.open()
        say("told", seconds_of(lambda: ckpt.save(0, state).result()))
    dist.barrier()
    if rank != victim:
        ckpt.close()
    """,
        tmp_path / "run",
        victim,
    )
    job.check()
    told = job.told()["told"]
    for rank, (outcome, seconds) in enumerate(told):
        assert outcome["error"] in (
            ("WorkerStartError",) if rank == victim else ("WorkerStartError", "PeerFailedError")
        )
        assert f"rank {victim}" in outcome["text"] or rank == victim, outcome
        assert "did not come up" in outcome["text"], outcome
        assert seconds < PROMPT_SECONDS, (rank, outcome, seconds)


def test_a_run_that_is_not_shared(start: Start, tmp_path: Path) -> None:
    """One path that leads to another directory on one host: found behind open, told by all, with the cause."""
    for rank in range(4):
        (tmp_path / f"host-{rank // 3}").mkdir(exist_ok=True)
    job = start(
        4,
        SMALL
        + """
    import os
    os.chdir(args[0] + f"/host-{rank // 3}")
    ckpt = checkpointer("/proc/self/cwd/run", start_timeout=args[1])
    ckpt.open()
    say("told", seconds_of(lambda: ckpt.save(0, state).result()))
    dist.barrier()
    ckpt.close()
    """,
        tmp_path,
        START_SECONDS,
    )
    job.check()
    told = job.told()["told"]
    assert errors([outcome for outcome, _ in told]) == ["PeerFailedError"] * 3 + ["ConfigError"]
    for outcome, seconds in told:
        assert "not shared between the ranks' hosts" in outcome["text"], outcome
        assert seconds < START_SECONDS + PROMPT_SECONDS
    assert all(outcome["rank"] == 3 for outcome, _ in told[:3])
    assert not os.path.exists(tmp_path / "host-1/run/step-0")


def test_strangers_at_the_port(start: Start, tmp_path: Path) -> None:
    """Garbage, silence, a wrong token, another version: refused and logged, and the job saves on."""
    job = start(
        3,
        SMALL
        + """
    import logging, socket, anyio
    from aiockpt.protocol.star import Join
    from aiockpt.worker.star_member import StarMember
    logging.basicConfig(level=logging.INFO)

    class Stranger:
        def __init__(self, package):
            self.package, self.why = package, ""
        def join(self):
            return Join(rank=1, world=3, package=self.package, member="another")
        def welcome(self, epoch):
            self.why = "welcome"
        def hear(self, message):
            pass
        def lost(self, why):
            pass
        def gone(self, error):
            self.why = error.why

    def visit(found, token, package):
        stranger = Stranger(package)
        async def come():
            with anyio.move_on_after(3):
                await StarMember((found.host, found.port), token=token, party=stranger, stall_timeout=5,
                                 return_timeout=1).run()
        anyio.run(come)
        return stranger.why

    with checkpointer(args[0]) as ckpt:
        say("before", of(ckpt.save(0, state).result))
        if rank == 0:
            found = ckpt._coordinator._job._found
            silent = socket.create_connection((found.host, found.port))
            garbage = socket.create_connection((found.host, found.port))
            garbage.sendall(bytes(1000))
            say("garbage", wait_until(lambda: garbage.recv(100) is not None, "the end of it"))
            token = bytes.fromhex(found.token)
            say("token", visit(found, bytes(32), found.package))
            say("version", visit(found, token, "0.0.0"))
            say("another", visit(found, token, found.package))
        dist.barrier()
        say("after", of(ckpt.save(1, state).result))
        say("restarts", ckpt.statistics().worker_restarts)
        if rank == 0:
            silent.close()
            garbage.close()
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["before"] == [0] * 3
    assert told["after"] == [1] * 3
    assert told["restarts"] == [0] * 3
    assert told["token"][0] not in ("", "welcome")
    assert "version '0.0.0'" in told["version"][0]
    assert "another process" in told["another"][0]
    assert "did not become a rank" in job.err(0)


def test_a_hundred_first_saves_at_once(start: Start, tmp_path: Path) -> None:
    """They make one worker and one star: nothing is started by a save."""
    job = start(
        4,
        SMALL
        + """
    import os, pathlib, threading
    from aiockpt.errors import UsageError
    ckpt = checkpointer(args[0])
    ckpt.open()
    outcomes = []
    def save():
        while True:
            try:
                outcomes.append(of(ckpt.save(0, state, when_busy="skip", overwrite=True).result))
                return
            except UsageError:  # another thread is in it
                pass
    threads = [threading.Thread(target=save) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("outcomes", sorted(map(str, outcomes)))
    own_children = pathlib.Path("/proc/self/task").glob("*/children")
    say("children", sum(len(children.read_text().split()) for children in own_children))
    say("restarts", ckpt.statistics().worker_restarts)
    ckpt.save(1, state).result()
    if rank == 0:
        opened = pathlib.Path(f"/proc/{worker_of(ckpt)}/fd").iterdir()  # to the trainer, listening, and two of uvloop
        say("links", sum("socket" in os.readlink(fd) for fd in opened) - 4)
    dist.barrier()
    ckpt.close()
    """,
        tmp_path / "run",
    )
    job.check()
    told = job.told()
    assert told["children"] == [1] * 4
    assert told["restarts"] == [0] * 4
    assert told["links"][0] == 3
    outcomes = told["outcomes"]
    assert all(one == outcomes[0] for one in outcomes)
    assert len(outcomes[0]) == 100
    assert set(outcomes[0]) <= {"0", "None"}
    assert "0" in outcomes[0]
