"""Fixtures of the tests about what children print."""

from __future__ import annotations

import anyio
import pytest

from tests.elastic.outputs import BACKENDS, FakeConsole, Run


@pytest.fixture(params=BACKENDS)
def run_async(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine function on each of the loops that anyio knows."""
    return lambda body: anyio.run(body, **BACKENDS[request.param])


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> FakeConsole:
    """Put a console in place that remembers."""
    return FakeConsole(monkeypatch)
