"""The armed fault layer does what its plan says, once, at the right place."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from aiockpt.errors import StorageError
from aiockpt.storage.direct import FileWriter, write_small
from aiockpt.storage.faults import NO_FAULTS, FaultPoint
from aiockpt.storage.file_reader import AlignedBuffer
from aiockpt.testing.faults import WORKER_ARGUMENT, ArmedFaults, FaultPlan, FaultRule, from_json
from tests.storage.processes import child
from tests.waiting import wait_until

POINT = FaultPoint.WORKER_BLOCK_WRITE


def armed(**fields: object) -> ArmedFaults:
    return ArmedFaults(FaultPlan(rules=[FaultRule(**{"point": POINT, "action": "errno", "errno": 5, **fields})]))  # type: ignore[arg-type]


def test_the_layer_that_does_nothing() -> None:
    """Every point is passed, every write is whole."""
    for point in FaultPoint:
        NO_FAULTS.at(point, "x")
    assert NO_FAULTS.clip("x", 0, 7) == 7


def test_a_plan_survives_json() -> None:
    """The text is all that another process gets."""
    plan = FaultPlan(
        rules=[FaultRule(point=point, action="delay", nth=2, seconds=0.5, path="*.json") for point in FaultPoint]
    )
    assert msgspec.json.decode(plan.to_json(), type=FaultPlan) == plan
    assert isinstance(from_json(plan.to_json()), ArmedFaults)
    module, _, function = WORKER_ARGUMENT.partition(":")
    assert getattr(__import__(module, fromlist=[function]), function) is from_json


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rules":[{"point":"worker.nowhere","action":"kill"}]}',
        '{"rules":[{"point":"worker.torn","action":"explode"}]}',
        '{"rules":[{"point":"worker.torn","action":"errno"}]}',
        '{"rules":[{"point":"worker.torn","action":"kill","nth":-1}]}',
        '{"rules":[{"point":"worker.torn","action":"delay","seconds":-1}]}',
        '{"rules":[{"point":"worker.torn","action":"kill","when":"later"}]}',
    ],
)
def test_a_plan_that_is_none(text: str) -> None:
    """A typo in a test is an error, not a test that breaks nothing."""
    with pytest.raises(msgspec.DecodeError):
        from_json(text)


def test_the_nth_hit_and_no_other() -> None:
    """A rule fires once; nth=0 fires always."""
    faults, always = armed(nth=3), armed(nth=0)
    for hit in range(1, 6):
        if hit == 3:
            with pytest.raises(OSError, match="x") as caught:
                faults.at(POINT, "x")
            assert caught.value.errno == errno.EIO
        else:
            faults.at(POINT, "x")
        with pytest.raises(OSError, match="y"):
            always.at(POINT, "y")
    assert faults.hits == always.hits == {POINT: 5}


def test_only_its_point_and_path() -> None:
    """Others are counted and passed; only matching hits count for nth."""
    faults = armed(path="model/*", nth=2)
    for point in FaultPoint:
        faults.at(point, "optimizer/a")
    faults.at(POINT, "model/a")
    with pytest.raises(OSError, match="model/b"):
        faults.at(POINT, "model/b")
    assert faults.hits[POINT] == 3


def test_once_among_threads() -> None:
    """Of many hits at once, one meets the fault."""
    faults = armed(nth=50)
    met: list[int] = []

    def hit(number: int) -> None:
        try:
            faults.at(POINT)
        except OSError:
            met.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hit, range(200)))
    assert len(met) == 1


def test_a_delay() -> None:
    """The thread is held for that long, then goes on."""
    begin = time.monotonic()
    armed(action="delay", seconds=0.05).at(POINT)
    assert time.monotonic() - begin >= 0.05


def test_a_torn_write_with_an_errno(tmp_path: Path) -> None:
    """The first half is on disk, then the error comes."""
    fd = os.open(tmp_path, os.O_RDONLY)
    buffer = AlignedBuffer(16384)
    buffer.view[:] = b"x" * 16384
    writer = FileWriter.create(fd, "f", 16384, faults=armed(action="torn", errno=errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        writer.write(buffer.view, 0)
    writer.abort()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "f").read_bytes() == b"x" * 8192 + bytes(8192)
    small = armed(point=FaultPoint.WORKER_MANIFEST_WRITE, action="torn", errno=errno.EIO)
    with pytest.raises(StorageError):
        write_small(fd, "g", b"y" * 1001, faults=small)
    os.close(fd)
    assert (tmp_path / "g").read_bytes() == b"y" * 500


DO = """
    from aiockpt.testing.faults import from_json
    from aiockpt.storage.faults import FaultPoint
    faults = from_json(sys.argv[1])
    say("ready")
    faults.at(FaultPoint.WORKER_BLOCK_WRITE)
    if faults.clip("x", 0, 100) == 50:
        faults.at(FaultPoint.WORKER_TORN)
    say("passed")
"""


@pytest.mark.process
@pytest.mark.parametrize("action", ["kill", "torn"])
def test_a_kill(action: str) -> None:
    """SIGKILL to the process that passes the point; of a torn write behind its half."""
    plan = FaultPlan(rules=[FaultRule(point=POINT, action=action)])  # type: ignore[arg-type]
    with child(DO, plan.to_json()) as process:
        process.expect("ready")
        assert process.wait() == -signal.SIGKILL


@pytest.mark.process
def test_a_stall() -> None:
    """The whole process stands until somebody continues it."""
    plan = FaultPlan(rules=[FaultRule(point=POINT, action="stall")])
    with child(DO, plan.to_json()) as process:
        process.expect("ready")

        def stands() -> bool:
            with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"

        wait_until(stands, "the stop")
        os.kill(process.pid, signal.SIGCONT)
        process.expect("passed")
        assert process.wait() == 0


@pytest.mark.process
def test_the_library_does_not_import_it() -> None:
    """Faults are for tests: no module of the library knows aiockpt.testing."""
    root = Path(__file__).parents[2] / "aiockpt"
    found = subprocess.run(
        ["grep", "-rlE", r"^\s*(from|import) aiockpt\.testing", str(root), "--include=*.py"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert [name for name in found if "/testing/" not in name] == []
