"""Scripts in processes of their own, with an error file, for tests of what they record."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.waiting import PATIENCE_SECONDS

PYTHON_PATH = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))


def run_recorded(script: str, error_file: Path | None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with ``TORCHELASTIC_ERROR_FILE`` set to this path, or with none."""
    clean = {key: value for key, value in os.environ.items() if not key.endswith("_ERROR_FILE")}
    if error_file is not None:
        clean["TORCHELASTIC_ERROR_FILE"] = str(error_file)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**clean, "PYTHONPATH": PYTHON_PATH, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
