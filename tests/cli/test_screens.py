# ruff: noqa: RUF001 - the screens are as they are
"""What somebody in front of a terminal sees: the screens of the commands, as a terminal draws them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.shell import Terminal, command

pytestmark = pytest.mark.process

HELD = """
import os, threading
from aiockpt.storage.file_reader import FileReader
read_block = FileReader.read_block
def held(self, index, buffer):
    pause = threading.Event()
    while not os.path.exists({gate!r}):
        pause.wait(0.01)
    return read_block(self, index, buffer)
FileReader.read_block = held
"""
"""Reading stops in front of the first block until somebody makes the file."""


def masked(lines: list[str], run: Path) -> list[str]:
    """Return lines without what is another time another one: times, ids, paths."""
    text = "\n".join(lines).replace(str(run), "RUN")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "YYYY-MM-DD hh:mm:ss", text)
    return re.sub(r"id [0-9a-f]{32}", "id ID", re.sub(r"aiockpt [0-9]\S*", "aiockpt V", text)).splitlines()


def test_ls_at_80_columns(trained_run: Path) -> None:
    """The whole screen."""
    with Terminal("ls", trained_run, columns=80) as terminal:
        assert terminal.finish() == 0
    assert masked(terminal.lines[:3], trained_run) == [
        "step      size                saved  save",
        " 200  41.2 KiB  YYYY-MM-DD hh:mm:ss     2  newest",
        " 100    32 KiB  YYYY-MM-DD hh:mm:ss     1",
    ]


def test_inspect_at_80_columns(trained_run: Path) -> None:
    """The whole screen: layers that are alike stand once, an optimizer's state is one row for a parameter."""
    with Terminal("inspect", trained_run, columns=80) as terminal:
        assert terminal.finish() == 0
    top = terminal.lines.index("")
    assert masked(terminal.lines[1:top], trained_run) == [
        "saved     YYYY-MM-DD hh:mm:ss, by aiockpt V",
        "save      2 of the run, in term 1, id ID",
        "metadata  {loss: 25.0}",
        "size      41.2 KiB, 87 tensors in 4 files",
    ]
    assert terminal.lines[top:] == [
        "",
        "model                module, 17 tensors                                 5.25 KiB",
        "├─ tokens.weight     float32 [16, 8]                                       512 B",
        "├─ blocks.{0..3}     4 alike, 16 tensors                            4 × 1.19 KiB",
        "│  ├─ norm           float32 weight, bias [8]                           4 × 64 B",
        "│  └─ expand         float32 weight [32, 8], bias [32]              4 × 1.12 KiB",
        "└─ head.weight       float32 [16, 8], tied",
        "optimizer            optimizer, 51 tensors                              10.6 KiB",
        "├─ state.model       51 tensors                                         10.6 KiB",
        "│  ├─ head.weight    float32 exp_avg, exp_avg_sq [16, 8], step []          1 KiB",
        "│  └─ blocks.{0..3}  4 alike, 48 tensors                            4 × 2.39 KiB",
        "│     ├─ norm        24 tensors                                        4 × 136 B",
        "│     │  ├─ weight   float32 exp_avg, exp_avg_sq [8], step []           4 × 68 B",
        "│     │  └─ bias     float32 exp_avg, exp_avg_sq [8], step []           4 × 68 B",
        "│     └─ expand      24 tensors                                     4 × 2.26 KiB",
        "│        ├─ weight   float32 exp_avg, exp_avg_sq [32, 8], step []      4 × 2 KiB",
        "│        └─ bias     float32 exp_avg, exp_avg_sq [32], step []         4 × 260 B",
        "└─ param_groups",
        "   └─ 0              17 params, lr 0.001, betas (0.9, 0.999), eps…",
        "data                 int64 order [10], seen []                              88 B",
        "progress",
        "├─ step              200",
        "└─ epoch             1",
        "ema                  17 tensors                                         5.25 KiB",
        "├─ tokens.weight     float32 [16, 8]                                       512 B",
        "├─ blocks.{0..3}     4 alike, 16 tensors                            4 × 1.19 KiB",
        "│  ├─ norm           float32 weight, bias [8]                           4 × 64 B",
        "│  └─ expand         float32 weight [32, 8], bias [32]              4 × 1.12 KiB",
        "└─ head.weight       float32 [16, 8], tied",
        "",
        "shortened values: --json has them whole",
    ]


def test_tensors_at_80_columns(trained_run: Path) -> None:
    """The whole screen: what a glob names, by files, with the place of each."""
    with Terminal("inspect", trained_run, "--tensors", "model.blocks.0", "--tensors", "data", columns=80) as terminal:
        assert terminal.finish() == 0
    assert terminal.lines == [
        "tensor                          dtype    shape     size  offset",
        "model/model-00001-of-00001.safetensors",
        "  model.blocks.0.norm.weight    float32  [8]       32 B    5280",
        "  model.blocks.0.norm.bias      float32  [8]       32 B    5248",
        "  model.blocks.0.expand.weight  float32  [32, 8]  1 KiB    4224",
        "  model.blocks.0.expand.bias    float32  [32]     128 B    4096",
        "data/model-00001-of-00001.safetensors",
        "  data.order                    int64    [10]      80 B    4096",
        "  data.seen                     int64    []         8 B    4176",
        "6 tensors, 1.27 KiB",
    ]


def test_diff_at_80_columns(trained_run: Path) -> None:
    """The whole screen, after a bar: form, distance, values; counters that are alike are one row."""
    names = ("data", "progress", "model.blocks.0.norm", "optimizer.state.*.norm", "ema.tokens")
    globs = [text for name in names for text in ("--tensors", name)]
    with Terminal("diff", trained_run, "100", "200", *globs, "--limit", "4", columns=80) as terminal:
        assert terminal.finish() == 0
        assert not terminal.screen.cursor.hidden
    assert "━" in terminal.written.decode()
    assert masked(terminal.lines, trained_run)[1:] == [
        "1 added, 1 of another form, 27 tensors moved, 1 value changed, 0 tensors and 1",
        "value equal",
        "",
        "~ data.order         int64 [20] → int64 [10]",
        "+ ema.tokens.weight  float32 [16, 8]",
        "",
        "tensor                                             max |a-b|  |a-b|/|a|  unequal",
        "model.blocks.0.norm.bias                               0.001          1    100 %",
        "optimizer.state.…el.blocks.0.norm.bias.exp_avg_sq   0.000999      0.999    100 %",
        "optimizer.state.….blocks.0.norm.weight.exp_avg_sq   0.000999      0.999    100 %",
        "optimizer.state.…el.blocks.1.norm.bias.exp_avg_sq   0.000999      0.999    100 %",
        "… 14 more: --limit 18 shows them",
        "",
        "value             a    b",
        "progress.step     100  200",
        "data.seen         100  300",
        "optimizer.*.step  1.0  2.0  8 alike",
    ]


@pytest.mark.parametrize("columns", [40, 120])
@pytest.mark.parametrize(
    "arguments", [("ls",), ("inspect",), ("inspect", "--tensors", "*.blocks.*"), ("verify", "--all")]
)
def test_every_line_fits(trained_run: Path, arguments: tuple[str, ...], columns: int) -> None:
    """On a narrow and on a wide terminal: only lines with a path may be longer, so that it can be copied."""
    name, *rest = arguments
    with Terminal(name, trained_run, *rest, columns=columns) as terminal:
        assert terminal.finish() == 0
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r(?!\n)", "", terminal.written.decode()).split("\r\n")
    drawn = [line for line in written if str(trained_run) not in line and "━" not in line]
    assert max(map(len, drawn)) <= columns
    assert len(drawn) > 2


def test_rm_on_a_terminal(run_directory: Path) -> None:
    """A line for what is gone, or one for why it is not."""
    with Terminal("rm", run_directory, "5") as terminal:
        assert terminal.finish() == 0
    assert terminal.lines == ["removed step-5"]
    with Terminal("rm", run_directory, "5", columns=1000) as terminal:
        assert terminal.finish() == 2
    (line,) = terminal.lines
    assert line.startswith(f"aiockpt: {run_directory} has no step 5; it has 0, 10; ")


def test_a_dumb_terminal_gets_plain_text(trained_run: Path) -> None:
    """TERM=dumb: no bar, no control codes."""
    with Terminal("verify", trained_run, TERM="dumb") as terminal:
        assert terminal.finish() == 0
    assert b"\x1b" not in terminal.written
    assert terminal.text.startswith("step 200: good, 47.2 KiB at ")


def test_colours_can_be_turned_off(trained_run: Path) -> None:
    """NO_COLOR: nothing that is written has a colour."""
    with Terminal("inspect", trained_run, "--tensors", "model", NO_COLOR="1") as terminal:
        assert terminal.finish() == 0
    codes = {
        int(code) for found in re.findall(rb"\x1b\[([0-9;]*)m", terminal.written) for code in found.split(b";") if code
    }
    assert codes <= {0, 1, 2}


def test_a_pipe_gets_whole_plain_lines(trained_run: Path) -> None:
    """Nothing is cut there, nothing is coloured, nothing is padded."""
    done = command("inspect", trained_run, "--tensors", "*")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert "tied to model.tokens.weight" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]


def test_an_old_encoding_gets_what_it_has(trained_run: Path) -> None:
    """ASCII has no lines for a tree."""
    done = command("inspect", trained_run, code="sys.stdout.reconfigure(encoding='ascii')")
    assert (done.returncode, done.stderr) == (0, "")
    assert "|- blocks.{0..3}     4 alike, 16 tensors  " in done.stdout
    assert "  4 x 1.19 KiB\n" in done.stdout


@pytest.mark.parametrize("arguments", [("verify", "--step", "200"), ("diff", "100", "200")])
def test_a_bar_is_seen_and_goes(trained_run: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """While bytes are read; the result stands in its place, and the cursor is back."""
    name, *rest = arguments
    gate = tmp_path / "gate"
    with Terminal(name, trained_run, *rest, code=HELD.format(gate=str(gate))) as terminal:
        terminal.wait_for(lambda: "KiB" in terminal.text and "━" in terminal.text, "a bar")
        (bar,) = terminal.lines
        assert re.fullmatch(r"steps? [0-9 and]+ ━+ .*[0-9.]+/[0-9.]+ KiB.*", bar)
        assert len(bar) < 80
        assert terminal.screen.cursor.hidden
        gate.touch()
        assert terminal.finish() == 0
        assert not terminal.screen.cursor.hidden
    assert "━" not in terminal.text
    assert terminal.lines[0].startswith("step ")


@pytest.mark.parametrize("arguments", [("verify",), ("diff", "100", "200")])
def test_ctrl_c_leaves_the_terminal_as_it_was(trained_run: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Status 130, no bar and no traceback left, the cursor back."""
    name, *rest = arguments
    gate = tmp_path / "gate"
    with Terminal(name, trained_run, *rest, code=HELD.format(gate=str(gate))) as terminal:
        terminal.wait_for(lambda: "━" in terminal.text, "a bar")
        terminal.type(b"\x03")
        terminal.wait_for(lambda: b"^C" in terminal.written, "the signal")
        gate.touch()  # a read that has begun is waited for
        assert terminal.finish() == 130
        assert not terminal.screen.cursor.hidden
    assert terminal.lines == []
