"""Second processes for the storage tests: scripts that say a word when they are ready and wait for one to go on."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, sys, signal
from pathlib import Path
from aiockpt.errors import *
def say(word):
    print(word, flush=True)
def hear():
    return sys.stdin.readline().strip()
"""


class Child:
    """A running script."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def expect(self, word: str) -> None:
        """Wait for the script's next line, which must be this one."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_SECONDS)
        assert ready, f"the script did not say {word!r}"
        line = self.process.stdout.readline().strip()
        if line != word:
            self.process.kill()
            assert self.process.stderr is not None
            raise AssertionError(f"expected {word!r}, the script said {line!r}\n{self.process.stderr.read()}")

    def tell(self, word: str = "") -> None:
        """Let the script's ``hear`` return."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def child(code: str, *arguments: object) -> Iterator[Child]:
    """Start ``code`` with ``say``, ``hear``, ``Path`` and the errors; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            yield Child(process)
        finally:
            process.kill()


def run(code: str, *arguments: object) -> str:
    """Run ``code`` to its end, which must be a good one, and return its output."""
    with child(code, *arguments) as running:
        out, err = running.process.communicate(timeout=PATIENCE_SECONDS)
        assert running.process.returncode == 0, err
        return out.strip()


def killed(code: str, *arguments: object) -> None:
    """Run ``code``, which must be ended by SIGKILL."""
    with child(code, *arguments) as running:
        out, err = running.process.communicate(timeout=PATIENCE_SECONDS)
        assert running.process.returncode == -9, out + err
