"""Lines on the console, whatever the console is."""

from __future__ import annotations

import ast
import io
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import aiockpt.elastic.printing.output
from aiockpt.elastic.printing.output import Output
from tests.elastic.outputs import (
    FakeConsole,
    Run,
    python,
    run,
    sh,
    supervise,
    teed,
    wait_for,
)

pytestmark = pytest.mark.process


def test_a_line_in_two_parts(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """A line that is written in two parts is one line, though another rank prints in between (E-62, R-TL-10)."""
    go = tmp_path / "go"
    output = Output("w", teed(tmp_path, 2), nprocs=2)
    os.mkfifo(go)

    async def meanwhile(children: object) -> None:
        await wait_for(lambda: (tmp_path / "0.out").read_bytes() == b"abc", "the first part")
        await wait_for(lambda: "[w1]:other" in console.lines(), "the other rank")
        go.write_text("go")

    commands = {0: sh(f"printf abc; read x < {go}; echo def"), 1: sh("echo other")}
    run_async(lambda: supervise(output, commands, meanwhile=meanwhile))
    assert sorted(console.lines()) == ["[w0]:abcdef", "[w1]:other"]


def test_an_unfinished_line_appears_after_a_second(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """A prompt is shown though its line has no end (R-TL-10)."""
    output = Output("w", teed(tmp_path), nprocs=1)

    async def meanwhile(children: Any) -> None:
        await wait_for(lambda: console.read() == "[w0]:Password: \n", "the prompt")
        children[0].kill()

    run_async(lambda: supervise(output, {0: sh("printf 'Password: '; exec sleep 1000")}, meanwhile=meanwhile))
    assert (tmp_path / "0.out").read_bytes() == b"Password: "


def test_a_progress_bar(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """A thousand updates are one line on the console, and all of them are in the file (E-63, R-TL-10)."""
    output = Output("w", teed(tmp_path), nprocs=1)
    code = "import os\nfor at in range(1000): os.write(1, b'\\r%d/1000' % (at + 1))\nos.write(1, b'\\n')"
    run_async(lambda: supervise(output, {0: python(code)}))
    assert console.read().split("\r")[-1] == "[w0]:1000/1000\n"
    assert console.read().count("\n") == 1
    assert console.read().count("\r") < 100
    assert (tmp_path / "0.out").read_bytes().count(b"\r") == 1000


def test_another_line_does_not_overwrite_a_progress_bar(tmp_path: Path, console: FakeConsole) -> None:
    """The bar that the cursor stands on is left with a newline before another stream prints (E-63)."""
    go, go_on = tmp_path / "go", tmp_path / "go_on"
    os.mkfifo(go)
    os.mkfifo(go_on)
    output = Output("w", teed(tmp_path, 2), nprocs=2)
    commands = {
        0: python(f"import os\nos.write(1, b'\\r50%')\nopen('{go_on}').read()\nos.write(1, b'\\r100%\\n')"),
        1: sh(f"read x < {go}; echo other"),
    }

    async def meanwhile(children: object) -> None:
        await wait_for(lambda: console.read() == "[w0]:50%\r", "the bar")
        go.write_text("go")
        await wait_for(lambda: "[w1]:other\n" in console.read(), "the other rank")
        go_on.write_text("go")

    run(lambda: supervise(output, commands, meanwhile=meanwhile))
    assert console.read() == "[w0]:50%\r\n[w1]:other\n[w0]:100%\n"


def test_bytes_that_are_no_text(run_async: Run, tmp_path: Path, console: FakeConsole) -> None:
    """They are replaced on the console and in the last words, and are in the file as they are (R-TL-7)."""
    output = Output("w", teed(tmp_path), nprocs=1)
    run_async(lambda: supervise(output, {0: sh(r"printf 'caf\303\251 \377\n'")}))
    assert console.read() == "[w0]:café �\n"
    assert (tmp_path / "0.out").read_bytes() == b"caf\xc3\xa9 \xff\n"
    assert output.tail(0) == "café �\n"


def test_a_console_that_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook has for ``sys.stdout``, with neither buffer nor descriptor, gets text (E-66, R-RE-6)."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    output = Output("w", teed(tmp_path), nprocs=1)
    run(lambda: supervise(output, {0: sh(r"printf 'a\377\n'")}))
    assert shown.getvalue() == "[w0]:a�\n"


def test_no_console_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon, whose ``sys.stdout`` is None, tees into files."""
    monkeypatch.setattr(sys, "stdout", None)
    output = Output("w", teed(tmp_path), nprocs=1)
    run(lambda: supervise(output, {0: sh("echo a")}))
    assert (tmp_path / "0.out").read_text() == "a\n"


def test_the_console_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is seen while its child runs on, also where the console is a pipe (E-65, R-TL-12)."""
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1 << 16))
    output = Output("w", teed(tmp_path), nprocs=1)

    async def meanwhile(children: Any) -> None:
        with anyio.fail_after(60):
            await anyio.wait_readable(read)
        assert os.read(read, 100) == b"[w0]:early\n"
        children[0].kill()

    run(lambda: supervise(output, {0: sh("echo early; exec sleep 1000")}, meanwhile=meanwhile))
    sys.stdout.close()
    os.close(read)


def test_no_libc_is_needed(tmp_path: Path) -> None:
    """Neither ctypes nor a C library by name is imported (E-66, R-RE-5)."""
    folder = Path(aiockpt.elastic.printing.output.__file__).parent
    for name in ("output", "pipe_reader", "teed_stream", "log_writer", "sinks", "feed", "lines", "last_words"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "ctypes" not in imported
