"""Waiting in tests: by polling, and never for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE_SECONDS = 60.0
"""Upper end of every wait in tests; ten times what a loaded machine needs."""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE_SECONDS) -> Any:
    """Poll until the condition holds and return what it returned; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        pause.wait(0.002)
