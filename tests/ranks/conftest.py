"""Fixtures of the tests with several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks.job import Job, Nursery

Start = Callable[..., Job]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """One for all tests of a test process."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def start(nursery: Nursery, tmp_path: Path) -> Iterator[Start]:
    """Start a job: ``start(world, code, *args)``; what is left of it at the end is killed."""
    jobs: list[Job] = []
    numbers = itertools.count()

    def start(world: int, code: str, *args: object) -> Job:
        jobs.append(Job(nursery, tmp_path / f"job-{next(numbers)}", world, code, *args))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()
