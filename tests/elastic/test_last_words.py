"""The end of what a child said, and pipes that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aiockpt.elastic.printing import pipe_reader
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import (
    FakeConsole,
    Logs,
    run,
    sh,
    started,
    supervise,
    teed,
    wait_dead,
)

pytestmark = pytest.mark.process


def test_tails(tmp_path: Path, console: FakeConsole) -> None:
    """A ring for pipes, the end of the file for redirected streams, nothing for the console (R-TL-11)."""
    logs = teed(tmp_path, 3)
    del logs.tee_stdouts[1], logs.tee_stderrs[1]
    logs.stdouts[2] = ""
    del logs.tee_stdouts[2], logs.tee_stderrs[2]
    logs.stderrs[2] = os.devnull
    output = Output("w", logs, nprocs=3)
    code = r"seq 1 20000; printf '\r1%%\r2%%\377'; echo fatal >&2"
    run(lambda: supervise(output, {0: sh(code), 1: sh(code), 2: sh("true")}))
    for rank in (0, 1):
        tail = output.tail(rank)
        assert tail.startswith("stderr:\nfatal\nstdout:\n")
        assert tail.endswith("\n20000\n2%�\n")
        lines = tail.splitlines()[3:-1]
        assert lines == [str(at) for at in range(20001 - len(lines), 20001)], "whole lines"
        assert 60_000 < len(tail) <= (64 << 10) + 30
    assert output.tail(2) == ""


def test_the_tail_of_one_stream_has_no_heading(tmp_path: Path, console: FakeConsole) -> None:
    """Where only one stream said something, that is all there is."""
    output = Output("w", teed(tmp_path), nprocs=1)
    run(lambda: supervise(output, {0: sh("echo fatal >&2")}))
    assert output.tail(0) == "fatal\n"


def test_the_tail_of_a_file_that_is_gone(tmp_path: Path) -> None:
    """There is nothing to say, and no error."""
    output = Output("w", Logs({0: str(tmp_path / "0.out")}), nprocs=1)
    output.open()
    output.close()
    (tmp_path / "0.out").unlink()
    assert output.tail(0) == ""


def test_an_error_in_one_pipe(
    tmp_path: Path, console: FakeConsole, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A stream that cannot be read is told with its rank, and counted, and the others go on (R-TL-6)."""
    output = Output("w", teed(tmp_path, 2, stderr=False), nprocs=2)
    readv, bad = os.readv, set()

    def failing(descriptor: int, buffers: Any) -> int:
        if descriptor in bad:
            raise OSError(5, os.strerror(5))
        return readv(descriptor, buffers)

    async def body() -> None:
        output.open()
        bad.add(output._reader._streams[0].descriptor)
        monkeypatch.setattr(pipe_reader.os, "readv", failing)
        with started(output, {0: sh("echo a"), 1: sh("echo b")}) as children:
            await output.run()
            await wait_dead(children)
            await output.finish(60)

    run(body)
    assert console.lines() == ["[w1]:b"]
    assert output.statistics().errors == {"rank 0 stdout": 1}
    assert "rank 0 stdout is not read any more" in caplog.text
