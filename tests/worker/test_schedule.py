"""Which piece is written next, without any file."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import ProtocolError
from aiockpt.format.image import BLOCK_NBYTES, block_count
from aiockpt.protocol.messages import FileImage
from aiockpt.worker.schedule import Job, JobKind, Schedule


def image(data_nbytes: int, data_start: int = 4096) -> FileImage:
    return FileImage(path="f", offset=0, nbytes=data_start + data_nbytes, data_start=data_start, sums_at=8)


def plain(nbytes: int) -> FileImage:
    return FileImage(path="p", offset=0, nbytes=nbytes, data_start=0, sums_at=0)


def take_all(schedule: Schedule) -> list[Job]:
    return list(iter(schedule.take, None))


def test_a_file_from_its_creation_to_its_end() -> None:
    """Created at once, blocks as they are staged, the header and the sync last."""
    schedule = Schedule([image(2 * BLOCK_NBYTES + 5)])
    (create,) = take_all(schedule)
    assert create == Job(JobKind.CREATE, 0)
    schedule.staged(0, 4096 + BLOCK_NBYTES)
    assert take_all(schedule) == []
    schedule.done(create)
    (first,) = take_all(schedule)
    assert first == Job(JobKind.BLOCK, 0, 0)
    schedule.staged(0, 4096 + 2 * BLOCK_NBYTES + 5)
    second, third = take_all(schedule)
    for job in (third, first):
        schedule.done(job)
    assert take_all(schedule) == []
    schedule.done(second)
    (finish,) = take_all(schedule)
    assert finish == Job(JobKind.FINISH, 0)
    assert not schedule.is_complete
    schedule.done(finish)
    assert schedule.is_complete


def test_a_plain_file_is_one_job() -> None:
    """Once, whole, however often it is announced; one of no bytes when somebody says so."""
    schedule = Schedule([plain(10), plain(0)])
    schedule.staged(0, 9)
    assert schedule.take() is None
    schedule.staged(0, 10)
    schedule.staged(0, 10)
    schedule.end()
    jobs = take_all(schedule)
    assert jobs == [Job(JobKind.PLAIN, 0), Job(JobKind.PLAIN, 1)]
    for job in jobs:
        schedule.done(job)
    assert schedule.is_complete


def test_no_file_is_complete() -> None:
    """A state without tensors."""
    assert Schedule([]).is_complete


@pytest.mark.parametrize(("file", "upto"), [(1, 0), (-1, 0), (0, -1), (0, 1 << 40)])
def test_bytes_that_the_plan_does_not_have(file: int, upto: int) -> None:
    """The other end talks nonsense."""
    with pytest.raises(ProtocolError):
        Schedule([image(5)]).staged(file, upto)


@given(
    data=st.lists(st.sampled_from([0, 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, 3 * BLOCK_NBYTES]), max_size=6),
    plains=st.integers(0, 3),
    threads=st.integers(1, 8),
    max_open=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
)
def test_any_order_of_staging_and_of_threads(
    data: list[int], plains: int, threads: int, max_open: int, seed: int
) -> None:
    """Every block once and only when staged, a header only after its blocks, few files open, and an end."""
    source = random.Random(seed)
    images = [image(nbytes) for nbytes in data] + [plain(10) for _ in range(plains)]
    schedule = Schedule(images, max_open=max_open)
    upto = [0] * len(images)
    running: list[Job] = []
    done: list[Job] = []
    open_files: set[int] = set()
    while not schedule.is_complete:
        choice = source.randrange(3)
        if choice == 0 and images:
            index = source.randrange(len(images))
            upto[index] = min(images[index].nbytes, upto[index] + source.randrange(1, 2 * BLOCK_NBYTES))
            schedule.staged(index, upto[index])
        elif choice == 1 and len(running) < threads and (job := schedule.take()) is not None:
            running.append(job)
            one = images[job.file]
            if job.kind is JobKind.CREATE:
                open_files.add(job.file)
                assert len(open_files) <= max_open
            elif job.kind is JobKind.BLOCK:
                assert Job(JobKind.CREATE, job.file) in done
                assert upto[job.file] >= min(one.data_start + (job.block + 1) * BLOCK_NBYTES, one.nbytes)
            elif job.kind is JobKind.FINISH:
                blocks = block_count(one.nbytes - one.data_start)
                assert all(Job(JobKind.BLOCK, job.file, block) in done for block in range(blocks))
                assert upto[job.file] == one.nbytes
        elif choice == 2 and running:
            job = running.pop(source.randrange(len(running)))
            schedule.done(job)
            done.append(job)
            if job.kind is JobKind.FINISH:
                open_files.remove(job.file)
    assert schedule.take() is None
    assert len(done) == len(set(done))
    blocks = sum(block_count(nbytes) for nbytes in data)
    assert len(done) == 2 * len(data) + blocks + plains
