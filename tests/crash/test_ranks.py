"""Any one process of a job dies, or meets an errno, at any named point: the checkpoint is whole, or there is none.

By default rank 0 and one other rank are walked; ``pytest -m crash_all`` walks every rank.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from tests.crash.crew import Answer, Crew, Role, rule, value_of, values_of, wait_tidy
from tests.crash.points import OF_HUB, OF_TRAINER, OF_WORKER, STARTING, WITHOUT_ERRNO
from tests.ranks.job import Nursery
from tests.support import attempts, is_alive
from tests.waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.crash, pytest.mark.crash_all]

WORLD = 4
WALKED = (0, 2)
"""Ranks, unless all are asked for."""

UNKNOWN = {FaultPoint.WORKER_AFTER_RENAME, FaultPoint.WORKER_RUN_SYNCED}
COMMITTED = {FaultPoint.WORKER_BEFORE_REPORT, FaultPoint.WORKER_PRUNE, FaultPoint.WORKER_REMOVE}
"""What an errno means there; anywhere else the save has failed."""
LEAVES = {
    FaultPoint.WORKER_AFTER_RENAME: {".old.", ".trash.old."},  # the latter once retention removes the step
    FaultPoint.WORKER_RUN_SYNCED: {".old.", ".trash.old."},
    FaultPoint.WORKER_REMOVE: {".trash."},
}
"""What an errno there leaves for the next opening of the run: how names begin. WORKER_DROPPING: that attempt."""
BEHIND = {
    FaultPoint.WORKER_LOOKING: [rule(FaultPoint.WORKER_FILE_SYNC)],
    FaultPoint.WORKER_DROPPING: [rule(FaultPoint.WORKER_BLOCK_WRITE, "errno", errno=errno.EIO)],
}
"""What must go wrong before a point is passed."""
ELSEWHERE = STARTING | {FaultPoint.WORKER_TORN, FaultPoint.WORKER_WELCOMED}
"""Passed before a save begins, or behind a torn write: these have tests of their own."""

SAVE_POINTS = [point for point in OF_WORKER if point not in ELSEWHERE]
OPENING = [FaultPoint.TRAINER_TAKING_RUN, FaultPoint.TRAINER_ENLISTING]
RESTORING = [FaultPoint.TRAINER_RESTORING, FaultPoint.TRAINER_READ, FaultPoint.TRAINER_VOTING]
SAVING = [point for point in OF_TRAINER if point not in (*OPENING, *RESTORING)]
ONLY_RANK_0 = {*OF_HUB, FaultPoint.TRAINER_TAKING_RUN}
"""The run is taken by rank 0's trainer; for the others see ``OF_HUB``."""

WALKS = {
    "test_worker_killed": SAVE_POINTS,
    "test_an_errno": [point for point in SAVE_POINTS if point not in WITHOUT_ERRNO],
    "test_a_torn_write": [FaultPoint.WORKER_BLOCK_WRITE, FaultPoint.WORKER_MANIFEST_WRITE],
    "test_first_worker_killed": sorted(STARTING | {FaultPoint.WORKER_WELCOMED}),
    "test_worker_killed_twice": [FaultPoint.WORKER_OPENED, FaultPoint.WORKER_FILE_SYNC, FaultPoint.WORKER_COMMITTING],
    "test_trainer_killed_while_it_saves": SAVING,
    "test_trainer_killed_while_it_opens": OPENING,
    "test_trainer_killed_while_it_restores": RESTORING,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Walk the points of each test on each rank that passes them."""
    ranks = range(WORLD) if "crash_all" in metafunc.config.getoption("markexpr") else WALKED
    if {"point", "rank"} <= {*metafunc.fixturenames}:
        points = WALKS[metafunc.function.__name__]
        pairs = [(point, rank) for point in points for rank in ranks if rank == 0 or point not in ONLY_RANK_0]
        metafunc.parametrize(("point", "rank"), pairs)
    elif "rank" in metafunc.fixturenames:
        metafunc.parametrize("rank", ranks)


def test_every_point_is_walked() -> None:
    """A new point is tested by existing, or fails here."""
    walked = {point for points in WALKS.values() for point in points}
    assert {*FaultPoint} - walked == {FaultPoint.WORKER_TORN}  # passed by test_a_torn_write


# ---- jobs


class Living:
    """A job that goes from test to test while its trainers live."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self._numbers = itertools.count()
        self.n = 0
        self.step = 0
        self.leaves: set[str] = set()
        """How names begin that the next opening of the run has to remove."""
        self.crew = self._start()

    def _start(self) -> Crew:
        here = self._directory / str(next(self._numbers))
        crew = Crew(self._nursery, here, here / "run", world=WORLD)
        for _ in range(2):
            all_committed(self.save_in(crew))
        return crew

    def replace(self) -> None:
        """A test failed: the next one gets another job."""
        self.leaves = set()
        self.crew.end()
        self.crew = self._start()

    def save_in(self, crew: Crew, *, fresh: bool = True) -> dict[int, Answer]:
        """Save the next value, as a new step or over the newest one."""
        return crew.hear(self.begin_in(crew, fresh=fresh))

    def begin_in(self, crew: Crew, *, fresh: bool = True) -> list[int]:
        """Likewise, without waiting for the answers."""
        self.n += 1
        self.step += fresh
        return crew.tell("save", step=self.step, n=self.n, overwrite=not fresh)

    def close(self) -> None:
        """End the job; no worker outlives it."""
        self.crew.look()
        self.crew.ask("close")
        wait_until(lambda: not any(map(is_alive, self.crew.workers)), "the workers' end")
        self.crew.end()
        crew = Crew(self._nursery, self._directory / "last", self.crew.run, world=WORLD)
        wait_tidy(crew.run)
        crew.ask("close")
        crew.end()


@pytest.fixture(scope="module")
def living(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    made = Living(nursery, tmp_path_factory.mktemp("living"))
    yield made
    made.close()


@pytest.fixture
def crew(living: Living, request: pytest.FixtureRequest) -> Iterator[Crew]:
    """The job that lives on; the test behind one that failed gets another."""
    failed = request.session.testsfailed
    yield living.crew
    if request.session.testsfailed > failed:
        living.replace()


# ---- what must hold


def all_committed(answers: dict[int, Answer]) -> None:
    assert [answer["kind"] for answer in answers.values()] == ["committed"] * len(answers), answers


def judge(answers: dict[int, Answer], run: Path, step: int, *, n: int, at_fault: int) -> None:
    """What the ranks that live were told is one of three things, and agrees with the disk."""
    told = {rank: answer for rank, answer in answers.items() if answer["kind"] != "dead"}
    kinds = {answer["kind"] for answer in told.values()}
    for rank, answer in told.items():
        if answer["kind"] == "PeerFailedError":
            assert answer["rank"] == at_fault, answers
        else:
            allowed = {"committed", "CommitUnknownError"}
            assert answer["kind"] in allowed | ({"StorageError", "WorkerExitedError"} if rank == at_fault else set())
    assert not {"committed", "PeerFailedError"} <= kinds, answers
    stands = values_of(run).get(step) == n
    if "committed" in kinds:
        assert stands, answers
    elif kinds - {"CommitUnknownError"}:
        assert not stands, answers


def goes_on(living: Living, crew: Crew, *, restores: bool = False) -> None:
    """The next save succeeds, and behind it nothing is left over; all ranks restore it alike."""
    all_committed(living.save_in(crew))
    assert value_of(crew.run, living.step) == living.n
    wait_tidy(crew.run, tuple(living.leaves))
    if restores:
        found = crew.ask("restore")
        wanted = {"kind": "restored", "step": living.step, "n": living.n}
        assert all(answer == wanted for answer in found.values()), found


# ---- workers


def test_worker_killed(point: FaultPoint, rank: int, living: Living, crew: Crew) -> None:
    """The save is retried by all ranks, and commits on all; the checkpoints before it were never in danger."""
    before = values_of(crew.run)
    is_lost = point is FaultPoint.WORKER_DROPPING  # the save had failed before
    crew.arm("worker", rank, *BEHIND.get(point, []), rule(point))
    # Retention comes with a new step, a step aside with an old one.
    answers = living.save_in(crew, fresh=point is FaultPoint.WORKER_PRUNE)
    wait_until(lambda: not crew.is_armed("worker", rank), f"rank {rank} to pass the point", 20)
    if is_lost or point is FaultPoint.WORKER_LOOKING:
        judge(answers, crew.run, living.step, n=living.n, at_fault=rank)
    else:
        all_committed(answers)
    after = values_of(crew.run)
    if is_lost:
        living.leaves |= {*attempts(crew.run)}  # the later hub was told of no save that is open
    stands = answers[rank]["kind"] == "committed"
    assert after.get(living.step) == (living.n if stands else before.get(living.step))
    assert all(before[step] == n for step, n in after.items() if step != living.step)
    goes_on(living, crew, restores=True)


def test_worker_killed_twice(point: FaultPoint, rank: int, living: Living, crew: Crew) -> None:
    """On one save: it has failed on all ranks, unless it was published before."""
    crew.arm("worker", rank, rule(point), rule(point))
    answers = living.save_in(crew, fresh=False)
    if crew.is_armed("worker", rank):  # the first one was enough: the hub had it committed meanwhile
        all_committed(answers)
        crew.arm("worker", rank)
    judge(answers, crew.run, living.step, n=living.n, at_fault=rank)
    goes_on(living, crew)


def test_an_errno(point: FaultPoint, rank: int, living: Living, crew: Crew) -> None:
    """That save alone fails, on all ranks with the rank named; what it was to replace stands."""
    crew.arm("worker", rank, *BEHIND.get(point, []), rule(point, "errno", errno=errno.EIO))
    answers = living.save_in(crew, fresh=point is FaultPoint.WORKER_PRUNE)
    wait_until(lambda: not crew.is_armed("worker", rank), f"rank {rank} to pass the point", 20)
    kinds = {answer["kind"] for answer in answers.values()}
    if point in COMMITTED:
        all_committed(answers)
    elif point in UNKNOWN:
        assert kinds == {"CommitUnknownError"}, answers
    else:
        assert answers[rank]["kind"] == "StorageError"
        assert answers[rank]["errno"] == errno.EIO
        others = [answer for other, answer in answers.items() if other != rank]
        assert all((told["kind"], told["rank"]) == ("PeerFailedError", rank) for told in others), answers
    assert all(answer["kind"] == "committed" or "\nnext: " in answer["text"] for answer in answers.values())
    judge(answers, crew.run, living.step, n=living.n, at_fault=rank)
    living.leaves |= LEAVES.get(point, set())
    if point is FaultPoint.WORKER_DROPPING:
        living.leaves |= {*attempts(crew.run)}
    goes_on(living, crew)


@pytest.mark.parametrize("code", [0, errno.EIO])
def test_a_torn_write(point: FaultPoint, rank: int, code: int, living: Living, crew: Crew) -> None:
    """Half of it, then death or an errno: nothing of the old try is used again."""
    crew.arm("worker", rank, rule(point, "torn", errno=code))
    answers = living.save_in(crew, fresh=False)
    assert not crew.is_armed("worker", rank)
    if code:
        assert answers[rank]["kind"] == "StorageError"
    else:
        all_committed(answers)
    judge(answers, crew.run, living.step, n=living.n, at_fault=rank)
    goes_on(living, crew, restores=not code)


def test_points_of_the_hub_are_passed_by_rank_0_alone(living: Living, crew: Crew) -> None:
    """Each that was left out above for the other ranks is left out rightly."""
    for point in OF_HUB:
        for rank in range(1, WORLD):
            crew.arm("worker", rank, rule(point))
        all_committed(living.save_in(crew, fresh=point is FaultPoint.WORKER_PRUNE))
        assert all(crew.is_armed("worker", rank) for rank in range(1, WORLD)), f"another rank passes {point}"
    for rank in range(1, WORLD):
        crew.arm("worker", rank)


PHASES = [
    FaultPoint.WORKER_OPENED,
    FaultPoint.WORKER_ATTEMPT_MADE,
    FaultPoint.WORKER_BLOCK_WRITE,
    FaultPoint.WORKER_FILE_SYNC,
    FaultPoint.WORKER_WRITTEN_SAID,
    FaultPoint.WORKER_DETAILS_SAID,
    FaultPoint.WORKER_COMMITTING,
    FaultPoint.WORKER_ENDED,
]


@pytest.mark.parametrize("phase", PHASES)
def test_hub_replaced_while_another_rank_is(phase: FaultPoint, living: Living, crew: Crew) -> None:
    """The next hub finds out from all ranks what they know, and all end alike."""
    workers = {rank: answer["worker"] for rank, answer in crew.look().items()}
    crew.arm("worker", WALKED[1], rule(phase, "stall"))
    asked = living.begin_in(crew, fresh=False)
    wait_until(lambda: not crew.is_armed("worker", WALKED[1]), "the other rank to come there")
    wait_until(lambda: is_stopped(workers[WALKED[1]]), "it to stop")
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(workers[0]), "the hub to be gone")
    os.kill(workers[WALKED[1]], signal.SIGCONT)
    all_committed(crew.hear(asked))
    assert value_of(crew.run, living.step) == living.n
    goes_on(living, crew, restores=True)


def test_worker_killed_while_the_ranks_vote(rank: int, crew: Crew) -> None:
    """A vote outlives workers: the next one of the rank says it again."""
    wanted = max(blocking.steps(crew.run))
    for nth in range(1, 4):
        workers = {rank: answer["worker"] for rank, answer in crew.look().items()}
        crew.arm("trainer", 3, rule(FaultPoint.TRAINER_VOTING, "stall", nth=nth))
        asked = crew.tell("restore")
        wait_until(lambda: not crew.is_armed("trainer", 3), "rank 3 to vote")
        wait_until(lambda: is_stopped(crew.job.pids[3]), "it to stop")
        os.kill(workers[rank], signal.SIGKILL)
        wait_until(lambda pid=workers[rank]: not is_alive(pid), "the worker to be gone")
        os.kill(crew.job.pids[3], signal.SIGCONT)
        answers = crew.hear(asked)
        assert all((told["kind"], told["step"]) == ("restored", wanted) for told in answers.values()), answers


def test_no_leaks(living: Living, crew: Crew) -> None:
    """Over twenty saves with deaths of workers nothing grows in the trainers, and no worker outlives its job."""
    all_committed(living.save_in(crew))
    before, shared = crew.look(), len(os.listdir("/dev/shm"))
    for turn in range(20):
        crew.arm("worker", turn % WORLD, rule(FaultPoint.WORKER_FILE_SYNC))
        all_committed(living.save_in(crew))
        crew.look()
    after = crew.look()
    for rank in range(WORLD):
        assert after[rank]["restarts"] == before[rank]["restarts"] + 20 // WORLD
        assert len(after[rank]["fds"]) <= len(before[rank]["fds"]), (before[rank]["fds"], after[rank]["fds"])
    assert len(os.listdir("/dev/shm")) <= shared
    assert len(crew.workers) > 20
    wait_until(lambda: sum(map(is_alive, crew.workers)) == WORLD, "the dead to be reaped")


# ---- jobs of their own


def is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


class Single:
    """Jobs on one run, one after the other."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self._jobs: list[Crew] = []
        self.run = directory / "run"

    def start(self, rules: dict[tuple[Role, int], Any] | None = None, **options: Any) -> Crew:
        """Start a job."""
        here = self._directory / f"job-{len(self._jobs)}"
        self._jobs.append(Crew(self._nursery, here, self.run, world=WORLD, rules=rules, **options))
        return self._jobs[-1]

    def end(self) -> None:
        """Kill what is left."""
        for crew in self._jobs:
            crew.end()

    def starts_again(self, allowed: set[int]) -> None:
        """The next job restores the newest, with one of these values, and saves; nothing is left over."""
        crew = self.start()
        values = {answer.get("n", -1) for answer in crew.ask("restore").values()}
        assert len(values) == 1, values
        assert values <= allowed
        all_committed(crew.ask("save", step=50, n=50))
        wait_tidy(self.run)
        assert values_of(self.run)[50] == 50
        crew.ask("close")


@pytest.fixture
def single(nursery: Nursery, tmp_path: Path) -> Iterator[Single]:
    made = Single(nursery, tmp_path)
    yield made
    made.end()


def leave(crew: Crew, dead: int) -> None:
    """The survivors close; no worker of the job outlives that, also not the dead trainer's."""
    crew.ask("close", [rank for rank in range(WORLD) if rank != dead])
    wait_until(lambda: not any(map(is_alive, crew.workers)), "the workers' end")


def test_first_worker_killed(point: FaultPoint, rank: int, single: Single) -> None:
    """A first worker that does not come up is an error on every rank; what comes later is tried again."""
    crew = single.start({("worker", rank): [rule(point)]}, opens=False, start_timeout=15.0)
    opened = crew.ask("open")
    answers = crew.ask("save", step=1, n=1)
    assert not crew.is_armed("worker", rank), "the point was not passed"
    if point is FaultPoint.WORKER_STARTED:
        assert opened[rank]["kind"] == "WorkerStartError"
        told = [answer for other, answer in answers.items() if other != rank]
        # What rank 0 could not do, it says in the store, as the error that it is.
        expected = ("PeerFailedError", rank) if rank else ("WorkerStartError", None)
        assert {(answer["kind"], answer["rank"]) for answer in told} == {expected}, answers
        assert all(f"rank {rank}" in answer["text"] for answer in told)
    elif answers[rank]["kind"] == "committed":
        all_committed(answers)
    else:  # the arena was not made
        judge(answers, single.run, 1, n=1, at_fault=rank)
        all_committed(crew.ask("save", step=2, n=2))
    crew.ask("close")
    single.starts_again({-1, 1, 2})


def test_trainer_killed_while_it_saves(point: FaultPoint, rank: int, single: Single) -> None:
    """What was staged whole is committed, what was not fails on all; the survivors know which, and who died."""
    crew = single.start(start_timeout=15.0)
    all_committed(crew.ask("save", step=1, n=1))
    crew.look()
    if point is FaultPoint.TRAINER_BEFORE_FENCE:  # passed when a worker has died
        crew.arm("worker", rank, rule(FaultPoint.WORKER_FILE_SYNC))
    crew.arm("trainer", rank, rule(point))
    answers = crew.ask("save", step=2, n=2)
    assert answers[rank]["kind"] == "dead"
    judge(answers, single.run, 2, n=2, at_fault=rank)
    if point is FaultPoint.TRAINER_BEGIN_SENT:
        assert "committed" not in {answer["kind"] for answer in answers.values()}
    survivors = [other for other in range(WORLD) if other != rank]
    later = crew.ask("save", survivors, step=3, n=3)
    assert all((told["kind"], told["rank"]) == ("PeerFailedError", rank) for told in later.values()), later
    leave(crew, rank)
    single.starts_again({1, 2})


def test_trainer_killed_while_it_opens(point: FaultPoint, rank: int, single: Single) -> None:
    """The others do not wait longer for it than they were told to."""
    crew = single.start({("trainer", rank): [rule(point)]}, opens=False, start_timeout=8.0)
    opened = crew.ask("open")
    assert opened[rank]["kind"] == "dead", opened
    survivors = [other for other in range(WORLD) if other != rank]
    crew.look(survivors)
    answers = crew.ask("save", survivors, step=1, n=1)
    for told in answers.values():
        # Rank 0 of the nursery serves the store, so that this may be what the others find gone.
        is_store = rank == 0 and told["kind"] == "WorkerStartError" and "store does not answer" in told["text"]
        assert is_store or (told["kind"], told["rank"]) == ("PeerFailedError", rank), answers
    leave(crew, rank)
    assert blocking.steps(single.run) == []
    single.starts_again({-1})


def test_trainer_killed_while_it_restores(point: FaultPoint, rank: int, single: Single) -> None:
    """At each vote, and between them: the others hear who died, and the checkpoint stands as it was."""
    for nth in (1, 2, 3) if point is FaultPoint.TRAINER_VOTING else (1,):
        crew = single.start()
        all_committed(crew.ask("save", step=nth, n=nth))
        crew.look()
        crew.arm("trainer", rank, rule(point, nth=nth))
        answers = crew.ask("restore")
        assert answers[rank]["kind"] == "dead"
        told = [answer for other, answer in answers.items() if other != rank]
        assert all((answer["kind"], answer["rank"]) == ("PeerFailedError", rank) for answer in told), answers
        leave(crew, rank)
    single.starts_again({1, 2, 3})
