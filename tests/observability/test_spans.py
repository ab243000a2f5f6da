"""The spans of a run: which there are, what they say, how they end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.observability.recorder import Recorder
from tests.support import Training, run_script, stopped, wait_until

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"x": torch.arange(1000), "n": 1}


def worker_of(ckpt: blocking.Checkpointer) -> int:
    pid = ckpt.statistics().worker_pid
    assert pid is not None
    return pid


def test_the_spans_of_a_run(tmp_path: Path) -> None:
    """Each call has one with what it is about; a save's parts lie inside of it; all ended when ``close`` returns."""
    recorder, training = Recorder(), Training()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        assert ckpt.restore(training.state) is None
        training.step()
        ckpt.prepare(training.state)
        saved = ckpt.save(3, training.state).result(60)
        ckpt.restore(training.state)
        ckpt.verify(3)
        ckpt.load(3)
        pid = worker_of(ckpt)
    assert [span.name for span in recorder.begun if span.parent_id is None] == [
        *("open", "restore", "prepare", "save", "restore", "verify", "load", "close")
    ]
    assert {span.id for span in recorder.begun} == recorder.spans.keys()
    assert [error for _, _, error in recorder.ended if error is not None] == []
    assert recorder.threads == {"aiockpt-observer"}

    opened, _, _ = recorder.one("open")
    assert opened.attributes == {"run": str(tmp_path)}
    assert recorder.parts(opened) == ["worker_start"]
    assert recorder.one("worker_start")[0].attributes == {"restart": 0, "pid": pid}

    save, elapsed_ns, _ = recorder.one("save")
    assert save.attributes["step"] == 3
    assert save.attributes["path"] == saved.path
    assert save.attributes["nbytes"] == saved.nbytes
    assert len(str(save.attributes["save_id"])) == 32
    assert elapsed_ns / 1e9 == pytest.approx(saved.timings["durable"], abs=1.0)
    assert sorted(recorder.parts(save)) == ["collect", "commit", "stage", "write"]
    for name in recorder.parts(save):
        part, part_ns, _ = recorder.one(name)
        assert save.started_at_ns <= part.started_at_ns
        assert part.started_at_ns + part_ns <= save.started_at_ns + elapsed_ns + 50_000_000  # two clocks
    assert recorder.one("write")[0].attributes["attempt"] == 0
    assert int(recorder.one("write")[0].attributes["nbytes"]) >= saved.nbytes

    nothing, found = (span.attributes for span, _, _ in recorder.ends("restore"))
    assert nothing == {"run": str(tmp_path)}
    assert found == {"run": str(tmp_path), "step": 3, "path": saved.path, "skipped": 0}
    assert int(recorder.one("verify")[0].attributes["nbytes"]) > 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_async_face_tells_the_same(backend: str, tmp_path: Path) -> None:
    """Both faces share what is observed."""
    recorder = Recorder()

    async def body() -> None:
        async with aiockpt.Checkpointer(tmp_path, observer=recorder) as ckpt:
            await ckpt.save(0, STATE)
            await ckpt.restore({"x": torch.zeros(1000, dtype=torch.int64), "n": 0})

    anyio.run(body, backend=backend)
    assert [span.name for span in recorder.begun if span.parent_id is None] == ["open", "save", "restore", "close"]
    # No prepare: the first save waits for shared memory, and says so.
    assert sorted(recorder.parts(recorder.one("save")[0])) == ["collect", "commit", "reserve", "stage", "write"]
    assert {span.id for span in recorder.begun} == recorder.spans.keys()


def test_a_killed_worker(tmp_path: Path) -> None:
    """The write fails by the worker's death and is done again; the new worker's start says why there is one."""
    recorder = Recorder()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        ckpt.prepare(STATE)
        pid = worker_of(ckpt)
        with stopped(pid):
            save = ckpt.save(0, STATE)
            save.wait_staged()
            os.kill(pid, signal.SIGKILL)
            save.result(60)
    first, second = recorder.ends("write")
    assert isinstance(first[2], aiockpt.WorkerExitedError)
    assert (first[0].attributes["attempt"], second[0].attributes["attempt"], second[2]) == (0, 1, None)
    assert recorder.one("save")[2] is None
    _, restart = (span for span, _, _ in recorder.ends("worker_start"))
    assert restart.parent_id is None
    assert restart.attributes["restart"] == 1
    assert str(pid) in str(restart.attributes["reason"])


def test_saves_that_end_otherwise(tmp_path: Path) -> None:
    """Refused, skipped, cancelled: the span ends as the save does, by the very error that its caller gets."""
    recorder = Recorder()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        ckpt.prepare(STATE)
        with stopped(worker_of(ckpt)):
            save = ckpt.save(0, STATE)
            ckpt.save(1, STATE, when_busy="skip")
            with pytest.raises(aiockpt.SaveBusyError) as busy:
                ckpt.save(2, STATE, when_busy="raise")
            with pytest.raises(aiockpt.SaveBusyError):
                ckpt.save(3, STATE, timeout=0.01)
            save.cancel()
        with pytest.raises(aiockpt.SaveCancelledError) as cancelled:
            save.result(60)
        ckpt.wait_ready()
        with pytest.raises(aiockpt.UnsupportedValueError):
            ckpt.save(4, {"x": object()})
    ends = {span.attributes["step"]: (span, error) for span, _, error in recorder.ends("save")}
    assert ends[0][1] is cancelled.value
    assert ends[1][0].attributes["skipped"] is True
    assert ends[2][1] is busy.value
    assert recorder.parts(ends[3][0]) == ["wait"]
    assert recorder.parts(ends[4][0]) == ["collect"]
    assert isinstance(ends[4][1], aiockpt.UnsupportedValueError)
    assert {span.id for span in recorder.begun} == recorder.spans.keys()


def test_what_cannot_be_opened_or_restored(tmp_path: Path) -> None:
    """The span fails by the error that is raised."""
    recorder = Recorder()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        with pytest.raises(aiockpt.ConfigError) as taken:
            blocking.Checkpointer(tmp_path, observer=recorder).open()
        with pytest.raises(aiockpt.StepNotFoundError) as missing:
            ckpt.restore({"x": 1}, step=7)
    assert [error for _, _, error in recorder.ends("open")] == [None, taken.value]
    assert recorder.one("restore")[2] is missing.value


def test_a_slow_observer_delays_nothing(tmp_path: Path) -> None:
    """Saves become durable while it holds its first call; ``close`` waits for it, but not for long."""
    go_on = threading.Event()

    class Slow(Recorder):
        def started(self, span: aiockpt.Span) -> None:
            go_on.wait(60)

    recorder = Slow()
    with blocking.Checkpointer(tmp_path, observer=recorder) as ckpt:
        ckpt._coordinator.spans.close_seconds = 0.05
        for step in range(3):
            ckpt.save(step, STATE).result(60)
        assert recorder.ended == []
        ckpt.wait_idle()
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert recorder.ended == []
    go_on.set()
    wait_until(lambda: len(recorder.ends("save")) == 3, "what it was told before")


def test_an_observer_that_raises_harms_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, whatever it raises."""

    class Raising(aiockpt.Observer):
        def started(self, span: aiockpt.Span) -> None:
            raise KeyboardInterrupt

        def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None:
            raise RuntimeError

    with blocking.Checkpointer(tmp_path, observer=Raising()) as ckpt:
        ckpt.save(0, STATE).result(60)
    assert blocking.steps(tmp_path) == [0]
    assert len([record for record in caplog.records if record.name == "aiockpt.observer"]) == 1


def test_without_an_observer_there_is_no_thread(tmp_path: Path) -> None:
    """Nothing is made for nobody."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, STATE).result(60)
        assert not any(thread.name == "aiockpt-observer" for thread in threading.enumerate())


def test_the_exit_of_a_program_that_does_not_close(tmp_path: Path) -> None:
    """An observer that hangs does not hold it; one that does not has heard of what happened."""
    result = run_script(
        """
        import sys, threading, torch, aiockpt

        class Printing(aiockpt.Observer):
            def completed(self, span, elapsed_ns):
                print(span.name, flush=True)
                if span.name == "prepare":
                    threading.Event().wait()

        ckpt = aiockpt.blocking.Checkpointer(sys.argv[1], observer=Printing())
        ckpt.open()
        ckpt._coordinator.spans.close_seconds = 0.2
        ckpt.prepare({"x": torch.arange(10)})
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["worker_start", "open", "prepare"]
    assert "the observer did not take its last 1 calls" in result.stderr


def test_an_observer_may_ask_for_figures(tmp_path: Path) -> None:
    """From its own thread, in the middle of a save."""
    asked: list[int] = []

    class Asking(aiockpt.Observer):
        def completed(self, span: aiockpt.Span, elapsed_ns: int) -> None:
            if span.name == "save":
                asked.append(ckpt.statistics().committed)

    ckpt = blocking.Checkpointer(tmp_path, observer=Asking())
    ckpt.open()
    ckpt.save(0, STATE).result(60)
    wait_until(lambda: asked == [1], "its question")
    ckpt.close()
