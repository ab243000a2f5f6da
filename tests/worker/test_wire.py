"""What a worker does with bytes that an honest trainer does not send."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from aiockpt.protocol.frames import encode
from aiockpt.protocol.messages import (
    Adopt,
    BeginSave,
    Cancel,
    Committed,
    EndStaging,
    FileImage,
    Hello,
    Message,
    Reserve,
    SlotFree,
    Staged,
)
from tests.worker.driver import Ended, Save, Worker, snapshot, worker

pytestmark = pytest.mark.process

PROTOCOL = 65

GARBAGE = {
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
    "a huge length": struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
    "one byte too long": struct.pack("<I", (16 << 20) + 1),
    "no msgpack": struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
    "an unknown tag": struct.pack("<I", len(b := msgspec.msgpack.encode({"is": "nonsense"}))) + b,
    "a wrong field": struct.pack("<I", len(b := msgspec.msgpack.encode({"is": "reserve", "nbytes": "much"}))) + b,
}


def leave_little_memory(pid: int) -> None:
    """Let a process take 64 MiB of address space more, and no larger allocation."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        nbytes = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmSize")) + (64 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (nbytes, nbytes))


def check_refused(child: Worker) -> None:
    with pytest.raises(Ended):
        child.next(SlotFree)
    assert child.wait() == PROTOCOL
    assert "not understood" in child.words()


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_the_worker(tmp_path: Path, name: str) -> None:
    """At once, with a status of its own, a line in the log, and no large allocation."""
    with worker(tmp_path / "run") as child:
        leave_little_memory(child.pid)
        child.socket.sendall(GARBAGE[name])
        check_refused(child)


def test_garbage_instead_of_hello(tmp_path: Path) -> None:
    """Also where nothing was agreed on."""
    with worker(tmp_path / "run", ready=False) as child:
        child.socket.sendall(GARBAGE["a huge length"])
        check_refused(child)


@pytest.mark.parametrize("change", [{"magic": "other"}, {"protocol": 2}, {"package": "0.0"}, {"path": "/elsewhere"}])
def test_another_version(tmp_path: Path, change: dict[str, object]) -> None:
    """The worker says its own Hello, so that both logs can name the difference, and ends."""
    with worker(tmp_path / "run", ready=False) as child:
        child.hello(**change)
        child.next(Hello)
        check_refused(child)
        assert repr(next(iter(change.values()))) in child.words()


@pytest.mark.parametrize("changes", [{"setup": None}, {"beat": 0.0}])
def test_no_usable_setup(tmp_path: Path, changes: dict[str, object]) -> None:
    """A Hello that says not what to do, or to beat without a pause."""
    with worker(tmp_path / "run", ready=False) as child:
        child.hello(**changes)  # type: ignore[arg-type]
        check_refused(child)


def test_a_frame_before_ready(tmp_path: Path) -> None:
    """The trainer waits for Ready."""
    with worker(tmp_path / "run", ready=False) as child:
        child.hello()
        child.send(Reserve(nbytes=4096))
        check_refused(child)


def begin(save: Save, **changes: object) -> BeginSave:
    plan = save.shot.plan
    fields: dict[str, object] = {
        "save_id": save.save_id,
        "step": save.step,
        "attempt": 0,
        "ordinal": 1,
        "overwrite": False,
        "files": list(plan.files),
        "plan_offset": plan.body_offset,
        "plan_nbytes": plan.body_nbytes,
    }
    return BeginSave(**(fields | changes))  # type: ignore[arg-type]


def image(**changes: object) -> FileImage:
    fields: dict[str, object] = {"path": "model/a", "offset": 0, "nbytes": 8192, "data_start": 4096, "sums_at": 100}
    return FileImage(**(fields | changes))  # type: ignore[arg-type]


SAVE = Save(snapshot(), step=1)

WRONG: dict[str, Callable[[Worker], list[Message]]] = {
    "a file outside of the arena": lambda child: [begin(SAVE, files=[image(offset=1 << 40)])],
    "a file before the arena": lambda child: [begin(SAVE, files=[image(offset=-4096)])],
    "a plan outside of the arena": lambda child: [begin(SAVE, plan_offset=1 << 40)],
    "a path that leads out": lambda child: [begin(SAVE, files=[image(path="../../etc/passwd")])],
    "an absolute path": lambda child: [begin(SAVE, files=[image(path="/etc/passwd")])],
    "a path too deep": lambda child: [begin(SAVE, files=[image(path="a/b/c")])],
    "the manifest's name": lambda child: [begin(SAVE, files=[image(path="manifest.json")])],
    "a file twice": lambda child: [begin(SAVE, files=[image(), image()])],
    "a header behind the end": lambda child: [begin(SAVE, files=[image(data_start=12288)])],
    "an unaligned header": lambda child: [begin(SAVE, files=[image(data_start=100, sums_at=50)])],
    "sums outside of the header": lambda child: [begin(SAVE, files=[image(sums_at=5000)])],
    "an id that is a path": lambda child: [begin(SAVE, save_id="../x")],
    "a negative step": lambda child: [begin(SAVE, step=-1)],
    "retention outside of the run": lambda child: [begin(SAVE, prune=["../other"])],
    "retention of no checkpoint": lambda child: [begin(SAVE, prune=[".lock"])],
    "a second save in the slot": lambda child: [begin(SAVE), begin(Save(SAVE.shot, step=2))],
    "an arena for an open save": lambda child: [begin(SAVE), Reserve(nbytes=4096)],
    "an empty arena": lambda child: [Reserve(nbytes=0)],
    "an arena while one is made": lambda child: [Reserve(nbytes=64 << 20), Reserve(nbytes=4096)],
    "no such file": lambda child: [begin(SAVE), Staged(save_id=SAVE.save_id, file=99, upto=1)],
    "behind the end of a file": lambda child: [begin(SAVE), Staged(save_id=SAVE.save_id, file=0, upto=1 << 40)],
    "staged after the end": lambda child: [begin(SAVE), end(SAVE), Staged(save_id=SAVE.save_id, file=0, upto=1)],
    "two ends": lambda child: [begin(SAVE), end(SAVE), end(SAVE)],
    "a second hello": lambda child: [Hello(magic="aiockpt", protocol=1, package="", path="")],
    "a worker's message": lambda child: [SlotFree(save_id="x")],
    "a descriptor that is not there": lambda child: [Adopt(nbytes=4096)],
}


def end(save: Save) -> EndStaging:
    return EndStaging(save_id=save.save_id, values=b"[]", metadata=b"null")


@pytest.mark.parametrize("name", WRONG)
def test_a_frame_that_makes_no_sense(tmp_path: Path, name: str) -> None:
    """Whatever it is, the worker ends rather than to guess."""
    with worker(tmp_path / "run") as child:
        if not name.endswith("is made"):
            assert child.reserve(SAVE.shot.plan.arena_nbytes).error is None
            child.fill(SAVE.shot)
        child.socket.sendall(b"".join(encode(message) for message in WRONG[name](child)))
        check_refused(child)
    assert not (tmp_path / "run/step-1").exists()


def test_a_save_without_an_arena(tmp_path: Path) -> None:
    """There is nothing to write."""
    with worker(tmp_path / "run") as child:
        child.send(begin(SAVE))
        check_refused(child)


def test_an_arena_that_can_shrink_is_not_adopted(tmp_path: Path) -> None:
    """Reading what was cut off would end the worker by SIGBUS; a descriptor of another size is refused too."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        for nbytes in (4096, 8192):
            with worker(tmp_path / "run") as child:
                child.send(Adopt(nbytes=nbytes), fd)
                check_refused(child)
    finally:
        os.close(fd)


def test_descriptors_that_nobody_claims(tmp_path: Path) -> None:
    """They are bounded."""
    with worker(tmp_path / "run") as child:
        for _ in range(9):
            child.send(Cancel(save_id="x"), child.pidfd)
        check_refused(child)


def test_messages_about_a_save_that_ended_are_dropped(tmp_path: Path) -> None:
    """It may have failed before the trainer heard of it."""
    with worker(tmp_path / "run") as child:
        child.send(Staged(save_id="gone", file=0, upto=1))
        child.send(EndStaging(save_id="gone", values=b"[]", metadata=b"null"))
        child.send(Cancel(save_id="gone"))
        save = Save(snapshot(), step=1)
        child.start_save(save)
        assert isinstance(child.outcome(save), Committed)


def test_descriptors_are_closed_and_not_inherited(tmp_path: Path) -> None:
    """Adopting again and again leaves one arena's descriptor."""
    with worker(tmp_path / "run") as child:
        assert child.reserve(1 << 20).error is None
        save = Save(snapshot(), step=0)
        child.commit(save)
        before = len(os.listdir(f"/proc/{child.pid}/fd"))
        for step in range(1, 6):
            assert child.arena is not None
            child.send(Adopt(nbytes=len(child.arena)), child.arena_fd)
            child.commit(Save(snapshot(), step=step))
        assert len(os.listdir(f"/proc/{child.pid}/fd")) == before
