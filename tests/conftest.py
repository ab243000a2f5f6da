"""Leak checks around every test that starts processes, and the warm-up that they need."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import anyio
import pytest

GRACE_SECONDS = 5.0
"""For threads and processes that were told to end."""


def open_descriptors() -> dict[int, str]:
    """Return this process's descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listdir had open
            continue
    return found


def children() -> set[int]:
    """Return the direct children of this process."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                found |= {int(pid) for pid in file.read().split()}
        except OSError:
            continue
    return found


def our_threads() -> set[str]:
    """Return the names of living threads that this library or anyio started."""
    return {
        f"{thread.name}#{thread.ident}"
        for thread in threading.enumerate()
        if thread.name.startswith(("aiockpt", "AnyIO"))
    }


def pytest_configure() -> None:
    """Take SIGINT back: a shell's background jobs start with it ignored, and so would every trainer of the tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _warm_up() -> None:
    """uvloop opens one process-wide pipe pair at first use, which is no leak."""

    async def nothing() -> None:
        return

    anyio.run(nothing, backend="asyncio", backend_options={"use_uvloop": True})


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a ``process`` test that leaves a descriptor, a child or a thread."""
    if request.node.get_closest_marker("process") is None:
        yield
        return
    before = open_descriptors(), children(), our_threads()
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        now = open_descriptors(), children(), our_threads()
        leaked = (
            {fd: what for fd, what in now[0].items() if before[0].get(fd) != what},
            now[1] - before[1],
            now[2] - before[2],
        )
        if not any(leaked):
            return
        if time.monotonic() > deadline:
            break
        gc.collect()  # garbage may hold it; not before: with torch imported it takes 0.3 s, after each of 800 tests
        threading.Event().wait(0.02)
    pytest.fail(f"left behind: descriptors {leaked[0]}, children {leaked[1]}, threads {leaked[2]}")
