"""What a program hears of us: nothing where all is well, and what it forgot where it forgot something."""

from __future__ import annotations

import errno
import gc
import logging
import warnings
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from aiockpt.storage.faults import FaultPoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from tests.support import attempts, is_alive, run_script, wait_until

pytestmark = pytest.mark.process

FULL = FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_PREALLOCATE, action="errno", errno=errno.ENOSPC)]).to_json()

WHOLE = """
    import asyncio, sys, warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        import torch
    import aiockpt
    from tests.support import Training

    async def main(run):
        asyncio.get_running_loop().slow_callback_duration = 60  # torch's first steps are slow
        training = Training()
        async with aiockpt.Checkpointer(run, keep=aiockpt.Latest(2)) as ckpt:
            await ckpt.prepare(training.state)
            for step in range(3):
                training.step()
                ckpt.save(step, training.state)
            await ckpt.restore(training.state)

    asyncio.run(main(sys.argv[1]))
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        ckpt.save(9, {"x": torch.ones(3)})
    print(aiockpt.blocking.steps(sys.argv[1]))
"""


def test_no_word_under_dev_mode_with_warnings_as_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -X dev -W error`` finds nothing, in both faces, from open to the end of the interpreter."""
    monkeypatch.setenv("PYTHONDEVMODE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = run_script(WHOLE, tmp_path, timeout=110)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2, 9]\n", "")


FORGOTTEN = {
    "blocking": """
        ckpt = aiockpt.blocking.Checkpointer(sys.argv[1])
        ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, sys.argv[2])
        ckpt.open()
        save = ckpt.save(0, {"x": torch.arange(1000)})
        wait_until(save.done, "the outcome")
        ckpt._coordinator._supervisor.faults = None
        say(ckpt)
    """,
    "async": """
        async def main():
            global ckpt
            ckpt = aiockpt.Checkpointer(sys.argv[1])
            ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, sys.argv[2])
            await ckpt.open()
            save = ckpt.save(0, {"x": torch.arange(1000)})
            wait_until(save.done, "the outcome")
            say(ckpt)
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("face", FORGOTTEN)
def test_a_failure_that_was_never_heard_of_at_the_interpreters_exit(
    face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResourceWarning names the run, the failure is logged, and neither exit nor worker hangs."""
    monkeypatch.setenv("PYTHONWARNINGS", "default::ResourceWarning")
    code = """
        import asyncio, sys, torch, aiockpt
        from aiockpt.testing.faults import WORKER_ARGUMENT
        from tests.waiting import wait_until
        def say(ckpt):
            print(ckpt.statistics().worker_pid, flush=True)
    """
    done = run_script(code + FORGOTTEN[face], tmp_path, FULL)
    assert done.returncode == 0, done.stderr
    assert f"ResourceWarning: unclosed Checkpointer of {tmp_path}" in done.stderr
    assert "a save failed and nobody was told" in done.stderr
    assert "No space left on device" in done.stderr
    wait_until(lambda: not is_alive(int(done.stdout)), "the worker's end")
    assert blocking.steps(tmp_path) == attempts(tmp_path) == []


def test_a_failure_that_was_never_heard_of_when_collected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same where the object is dropped in a program that goes on."""
    ckpt = blocking.Checkpointer(tmp_path)
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, FULL)
    ckpt.open()
    pid = ckpt.statistics().worker_pid
    save = ckpt.save(0, {"x": torch.arange(1000)})
    wait_until(save.done, "the outcome")
    del save
    with caplog.at_level(logging.ERROR), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ckpt
        gc.collect()
    assert [str(warning.message) for warning in caught] == [f"unclosed Checkpointer of {tmp_path}"]
    wait_until(lambda: "nobody was told" in caplog.text, "the line in the log")
    assert "No space left on device" in caplog.text
    assert pid is not None
    wait_until(lambda: not is_alive(pid), "the worker's end")


LIMITED = """
    import resource, sys, torch, aiockpt
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    model = torch.nn.Linear(1000, 1000)
    with aiockpt.blocking.Checkpointer(sys.argv[1]) as ckpt:
        for call in (lambda: ckpt.prepare({"model": model}), lambda: ckpt.save(0, {"model": model}).result(60)):
            try:
                call()
            except aiockpt.StorageError as exc:
                print(exc.errno, "RLIMIT_FSIZE" in exc.why, "ulimit -f" in exc.next, flush=True)
        print(model(torch.zeros(1000)).isfinite().all().item())
        print(ckpt.save(1, {"x": torch.ones(100)}).result(60).step, ckpt.statistics().worker_restarts)
"""


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """It holds for shared memory: a clear error, nobody dies by SIGXFSZ, and what fits is saved."""
    done = run_script(LIMITED, tmp_path)
    refusal = f"{errno.EFBIG} True True"
    assert done.stdout.splitlines() == [refusal, refusal, "True", "1 0"], done.stderr
    assert blocking.steps(tmp_path) == [1]


def test_nothing_unclosed_is_no_news(tmp_path: Path) -> None:
    """A Checkpointer that was never opened, or is closed, is collected without a word."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, {"x": 1}).result(60)
    never = aiockpt.Checkpointer(tmp_path)
    del ckpt, never
    gc.collect()  # warnings are errors in these tests


class TrainingError(Exception):
    """What a training loop raises."""


def failing(ckpt: Any) -> Any:
    """Make the first worker of a Checkpointer find the disk full."""
    ckpt._coordinator.worker_faults = (WORKER_ARGUMENT, FULL)
    return ckpt


def leave_with(error: BaseException, run: Path, face: str) -> None:
    """Leave a block by an error while a save fails that nobody awaits."""
    if face == "blocking":
        with failing(blocking.Checkpointer(run)) as ckpt:
            save = ckpt.save(0, {"x": torch.arange(1000)})
            wait_until(save.done, "the outcome")
            raise error

    async def body() -> None:
        async with failing(aiockpt.Checkpointer(run)) as ckpt:
            save = ckpt.save(0, {"x": torch.arange(1000)})
            wait_until(save.done, "the outcome")
            raise error

    anyio.run(body, backend=face)


@pytest.mark.parametrize("error", [TrainingError("nan"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("face", ["blocking", "asyncio", "trio"])
def test_a_failure_beside_a_training_error(
    face: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The very same object goes on, with one note of the save that failed; the log has it once."""
    error.__notes__ = []
    with pytest.raises(type(error)) as caught:
        leave_with(error, tmp_path, face)
    assert caught.value is error
    assert len(error.__notes__) == 1
    assert "No space left on device" in error.__notes__[0]
    told = [
        record for record in caplog.records if record.name.startswith("aiockpt") and record.levelno >= logging.ERROR
    ]
    assert len(told) == 1
    assert "No space left on device" in told[0].getMessage()
