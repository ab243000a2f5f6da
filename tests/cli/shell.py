"""The command line as a process, on pipes or on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 60.0


def command(
    *arguments: str | Path, code: str = "", seconds: float = SECONDS, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``aiockpt`` with these arguments, after ``code``, with ``path`` in front of what can be imported."""
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": f"{path}:{os.getcwd()}"}
    program = f"import sys\n{code}\nfrom aiockpt.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
    )


def on_a_terminal(*arguments: str | Path, seconds: float = SECONDS) -> tuple[int, str]:
    """Run ``aiockpt`` on a terminal of 100 columns; return its status and all that it wrote there."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "aiockpt.cli", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
    finally:
        os.close(theirs)
    written = b""
    deadline = time.monotonic() + seconds
    try:
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed by all
                break
            if not data:
                break
            written += data
        return process.wait(max(1.0, deadline - time.monotonic())), written.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
