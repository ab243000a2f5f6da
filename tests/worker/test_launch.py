"""How a worker is started, and what it is then."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiockpt.errors import WorkerStartError
from aiockpt.worker.launch import command
from tests.worker.driver import Save, check_checkpoint, snapshot, worker

AUTOGROUP = Path("/proc/self/autogroup")
TOO_LARGE = {"torch", "numpy", "safetensors", "aiockpt.planning.local", "aiockpt.state", "aiockpt.staging"}


def options_of(arguments: list[str]) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(arguments[-1])
    return loaded


def test_the_command_has_the_interpreter_s_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """``-P`` and what this interpreter was started with; the standard library first, relative entries absolute."""
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path, 5])
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    arguments = command(7, 8, faults=("module:function", "text"))
    assert arguments[:2] == [sys.executable, "-P"]
    assert "-Werror" in arguments
    assert arguments[-3:-1] == ["7", "8"]
    options = options_of(arguments)
    assert options["faults"] == ["module:function", "text"]
    path = options["path"]
    assert isinstance(path, list)
    assert os.path.dirname(os.__file__) in path[:2]
    assert path.index(os.path.dirname(os.__file__)) < path.index(os.getcwd()) < path.index(os.path.abspath("relative"))
    assert len(path) == len(set(path))


def test_an_embedded_interpreter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an executable there is nothing to start."""
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(WorkerStartError, match="was not started"):
        command(7, 8)


@pytest.mark.process
def test_it_imports_nothing_large(tmp_path: Path) -> None:
    """No torch, no numpy, and nothing of the trainer's rooms, also after a save; no main module of the program."""
    with worker(tmp_path / "run", odd=f"Reporting:{tmp_path}/modules") as child:
        child.commit(Save(snapshot(), step=1))
        with open(f"/proc/{child.pid}/maps", encoding="utf-8") as maps:
            assert not [line for line in maps if "libtorch" in line or "numpy" in line]
    for when in ("worker.started", "worker.before_report"):
        modules = set((tmp_path / f"modules.{when}").read_text().splitlines())
        assert not {name for name in modules if name in TOO_LARGE or name.split(".")[0] in TOO_LARGE}
        assert "pytest" not in modules


@pytest.mark.process
def test_a_user_s_random_py_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the working directory nor from a script's folder that stands first in the trainer's path."""
    for name in ("random", "types", "asyncio", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    with worker(tmp_path / "run", popen={"cwd": tmp_path}) as child:
        child.commit(Save(snapshot(), step=1))


@pytest.mark.process
def test_it_is_clean_with_warnings_as_errors(tmp_path: Path) -> None:
    """``python -X dev -W error`` says nothing."""
    save = Save(snapshot(), step=1)
    with worker(tmp_path / "run", flags=["-X", "dev", "-W", "error"]) as child:
        child.commit(save)
        assert child.close_politely() == 0
        assert child.words() == ""
    check_checkpoint(tmp_path / "run/step-1", save)


@pytest.mark.process
def test_its_place_in_the_system(tmp_path: Path) -> None:
    """Nice 10, a name of its own, all descriptors that it may have, nothing blocked, streams to nowhere."""
    with worker(tmp_path / "run") as child:
        assert os.getpriority(os.PRIO_PROCESS, child.pid) >= 10
        assert Path(f"/proc/{child.pid}/comm").read_text().strip() == "aiockpt-worker"
        soft, hard = resource.prlimit(child.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        status = Path(f"/proc/{child.pid}/status").read_text()
        assert "SigBlk:\t0000000000000000" in status
        assert [os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in (0, 1)] == ["/dev/null", "/dev/null"]
        assert child.words() == ""


def memory_of(pid: int) -> int:
    """Return the bytes that a process has beside shared memory."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssFile")))


@pytest.mark.process
@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not schedule sessions as groups")
def test_its_session_stands_back_too(tmp_path: Path) -> None:
    """Where the kernel shares the cores out among sessions, nice 10 alone would leave it as much as the trainer has."""
    before = AUTOGROUP.read_text()

    def started() -> str:
        with worker(tmp_path / "run") as child:
            return Path(f"/proc/{child.pid}/autogroup").read_text()

    # The kernel refuses two such changes within 100 ms, whoever makes them.
    assert any("nice 10" in started() for _ in range(5))
    assert AUTOGROUP.read_text() == before


@pytest.mark.process
def test_its_memory_and_descriptors(tmp_path: Path) -> None:
    """At most 45 MiB beside the arena, and few descriptors, after a save of many tensors too."""
    with worker(tmp_path / "run") as child:
        assert memory_of(child.pid) < 45 << 20
        child.commit(Save(snapshot(*((f"part{i:03}", 10_000) for i in range(40))), step=1))
        child.commit(Save(snapshot(("model", 48 << 20)), step=2))
        assert memory_of(child.pid) < 45 << 20
        assert len(os.listdir(f"/proc/{child.pid}/fd")) < 24


def start_seconds(run: Path) -> float:
    began_at = time.perf_counter()
    with worker(run):
        return time.perf_counter() - began_at


@pytest.mark.process
def test_it_starts_soon(tmp_path: Path) -> None:
    """With ten times the slack of the exact bound."""
    assert start_seconds(tmp_path / "run") < 5


@pytest.mark.process
@pytest.mark.timing
def test_it_starts_within_half_a_second(tmp_path: Path) -> None:
    """From the call of Popen to Ready, in the middle of nine."""
    assert sorted(start_seconds(tmp_path / "run") for _ in range(9))[4] < 0.5


@pytest.mark.process
def test_the_program_s_main_module_is_not_imported(tmp_path: Path) -> None:
    """A script without a guard starts one worker, not one after the other."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "print('imported', flush=True)\n"
        "from pathlib import Path\n"
        "from tests.worker.driver import worker\n"
        "with worker(Path(sys.argv[1])) as child:\n"
        "    assert child.close_politely() == 0\n"
    )
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
