"""The scripts in examples/ for several ranks do what their first lines say, under torchrun."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import aiockpt
from bench.memory import tree_of
from tests.ranks.conftest import Start
from tests.support import PATIENCE_SECONDS, ROOT, wait_until

pytestmark = [pytest.mark.process, pytest.mark.timeout(200)]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}


class Torchrun:
    """A job that ``torchrun`` has started; what it says is there line by line."""

    def __init__(self, ranks: int, name: str, *arguments: object) -> None:
        script = [str(ROOT / "examples" / name), *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, what: str) -> None:
        """Wait until a line has this text."""
        wait_until(lambda: any(what in line for line in self.lines) or self.process.poll() is not None, what)
        assert any(what in line for line in self.lines), "\n".join(self.lines)

    def wait(self) -> list[str]:
        """Wait for its good end; returns what it has said."""
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        assert status == 0, "\n".join(self.lines)
        return self.lines

    def trainer(self, rank: int) -> int:
        """Return the process of a rank."""
        for pid in tree_of(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if b"RANK=%d" % rank in words and b"examples/" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise AssertionError(f"rank {rank} does not run")

    def kill(self) -> None:
        """Kill everything that it has started, as a host does that goes down."""
        self.process.send_signal(signal.SIGSTOP)  # it starts no more
        for pid in tree_of(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def torchrun() -> Iterator[Callable[..., Torchrun]]:
    jobs: list[Torchrun] = []

    def start(ranks: int, name: str, *arguments: object) -> Torchrun:
        jobs.append(Torchrun(ranks, name, *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def losses_of(lines: list[str]) -> dict[int, float]:
    found = (re.match(r"step (\d+): loss ([\d.]+)", line) for line in lines)
    return {int(match[1]): float(match[2]) for match in found if match}


FORKED = """
    import sys
    sys.path.insert(0, args[1])
    import fsdp2
    fsdp2.main(args[0], args[2])
"""


def test_fsdp2_is_killed_and_goes_on_with_other_ranks(
    torchrun: Callable[..., Torchrun], start: Start, tmp_path: Path
) -> None:
    """Four ranks, two, then four: the losses are those of one rank that nobody disturbed."""
    run = tmp_path / "run"
    first = torchrun(4, "fsdp2.py", run, "--steps", 10**9)
    first.wait_for("step 12:")
    first.kill()
    newest = aiockpt.blocking.steps(run)[-1]
    steps = newest + 9
    quiet = start(1, FORKED, tmp_path / "quiet", ROOT / "examples", steps + 8)
    quiet.check()
    expected = losses_of(quiet.out(0))

    second = torchrun(2, "fsdp2.py", run, "--steps", steps).wait()
    assert f"resumed from step {newest}" in second
    more = start(4, FORKED, run, ROOT / "examples", steps + 8)
    more.check()
    assert f"resumed from step {steps - 1}" in more.out(0)

    found = losses_of(second) | losses_of(more.out(0))
    assert list(found) == list(range(newest + 1, steps + 8))
    for step, loss in (losses_of(first.lines) | found).items():
        if step in expected:  # the killed job may have been ahead
            assert math.isclose(loss, expected[step], rel_tol=1e-3), (step, loss, expected[step])


def test_ddp_saves_on_all_ranks_before_a_planned_stop(torchrun: Callable[..., Torchrun], tmp_path: Path) -> None:
    """One rank gets the SIGTERM, all save the same step and end; each has written its share."""
    run = tmp_path / "run"
    job = torchrun(4, "ddp.py", run, "--steps", 10**9)
    job.wait_for("saving: every 20 steps")
    os.kill(job.trainer(2), signal.SIGTERM)
    lines = job.wait()
    (stopped,) = [line for line in lines if line.endswith("saving: SIGTERM")]
    step = int(stopped.split()[1].rstrip(":"))
    assert aiockpt.blocking.steps(run)[-1] == step
    (wrote,) = [line for line in lines if line.startswith(f"step {step}: the ranks wrote")]
    assert len(re.findall(r"[1-9]\.\d MB", wrote)) == 4
