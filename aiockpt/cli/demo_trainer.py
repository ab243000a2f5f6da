"""The parent's hold on a trainer: start it, hear its events, kill it in the middle of a save."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiockpt
from aiockpt.errors import WorkerExitedError
from aiockpt.format.names import parse_attempt

__all__ = ["Trainer", "attempt_of"]

_POLL_SECONDS = 0.001
"""Between two looks for an attempt: a save of 120 MiB takes about 100 ms."""
_SILENCE_SECONDS = 300.0
"""Without an event: a step of the largest model takes a few seconds."""


class Trainer:
    """One trainer process; a context manager that leaves none behind.

    Args:
        run: Its run directory, or the file of ``torch.save`` for the reference.
        options: Of ``demo_train``: size, steps, every, seed, device.
        reference: Train without aiockpt.
    """

    def __init__(self, run: Path, options: dict[str, Any], *, reference: bool = False) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._buffer = b""
        self._events, writing = os.pipe()
        command = [sys.executable, "-P", "-m", "aiockpt.cli.demo_train", "--events", str(writing), "--run", str(run)]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command += ["--reference"] if reference else []
        home = str(Path(aiockpt.__file__).parent.parent)  # the child finds the very package that runs here
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(writing,),
                env={**os.environ, "PYTHONPATH": path},
            )
        except BaseException:
            os.close(self._events)
            raise
        finally:
            os.close(writing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        self.process.wait()
        os.close(self._events)
        self._log.close()

    def kill(self) -> None:
        """Send SIGKILL; nothing of the process runs after it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield its events until it is done.

        Raises:
            WorkerExitedError: It ended before that, or went silent.
        """
        while True:
            event = self._next(_SILENCE_SECONDS)
            if event is None:
                raise self._lost(f"it said nothing for {_SILENCE_SECONDS:.0f} s")
            yield event
            if event["event"] in ("done", "refused"):
                return

    def last_events(self) -> Iterator[dict[str, Any]]:
        """Yield what a killed trainer had said before it died."""
        while True:
            try:
                event = self._next(_SILENCE_SECONDS)
            except WorkerExitedError:
                return
            if event is None:
                return
            yield event

    def kill_while_saving(self, run: Path, step: int, *, after: float) -> bool:
        """Wait until the worker has had an attempt of this step open for ``after`` seconds, then kill the trainer.

        Returns:
            False where the save was over by then; the trainer lives.
        """
        deadline = time.monotonic() + _SILENCE_SECONDS
        while attempt_of(run, step) is None:
            if (run / f"step-{step}").exists():
                return False
            if self.process.poll() is not None:
                raise self._lost("it ended")
            if time.monotonic() > deadline:
                raise self._lost(f"it did not save for {_SILENCE_SECONDS:.0f} s")
            select.select([], [], [], _POLL_SECONDS)
        select.select([], [], [], after)
        if attempt_of(run, step) is None:
            return False
        self.kill()
        return True

    def _next(self, seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._events], [], [], left)[0]:
                return None
            data = os.read(self._events, 65536)
            if not data:
                raise self._lost("it ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _lost(self, why: str) -> WorkerExitedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        last = text.splitlines()[-1] if text else "it wrote nothing to its standard error"
        return WorkerExitedError(
            "the trainer of the demo did not come to its end",
            why=f"{why}: {last}",
            exit_status=self.process.returncode,
            stderr=text,
        )


def attempt_of(run: Path, step: int) -> str | None:
    """Return the name of the attempt to save this step that stands in the run, None where none does."""
    try:
        names = os.listdir(run)
    except FileNotFoundError:
        return None
    return next((name for name in names if (found := parse_attempt(name)) and found.step == step), None)
