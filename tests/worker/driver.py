"""Plays the trainer of a real worker: frames over a real socketpair, an arena that is really shared."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors

from aiockpt import __version__
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.manifest import Manifest, decode_manifest
from aiockpt.planning.local import Entry, LocalPlan, plan_local
from aiockpt.protocol.frames import FrameDecoder, check_hello, encode
from aiockpt.protocol.messages import (
    Adopt,
    BeginSave,
    Close,
    Closed,
    Committed,
    EndStaging,
    Failed,
    Hello,
    Message,
    Progress,
    Ready,
    Reserve,
    Reserved,
    Setup,
    SlotFree,
    Staged,
)
from aiockpt.protocol.terms import WireError
from aiockpt.storage.verify import verify_checkpoint
from aiockpt.testing.faults import WORKER_ARGUMENT, FaultPlan, FaultRule
from aiockpt.worker.launch import PACKAGE_PATH, command
from tests.protocol.examples import our_hello

PATIENCE_SECONDS = 20.0
M = TypeVar("M", bound=Message)


@dataclass
class Snapshot:
    """A state to save: its plan and the bytes of its tensors."""

    plan: LocalPlan
    contents: list[bytes]
    entries: Sequence[Entry]
    values: bytes = b'[7,{"~tuple":[1,2]}]'
    metadata: bytes = b'{"note":"text"}'


def snapshot(*folders: tuple[str, int], seed: int = 0, plain: Mapping[str, bytes] | None = None) -> Snapshot:
    """Make one tensor of the given bytes, and a small one, for each named folder."""
    entries: list[Entry] = []
    tree: dict[str, Any] = {"step": -1, "betas": -2}
    for folder, nbytes in folders or (("model", 100_000), ("optimizer", 5_000)):
        entries += [Entry((folder, "weight"), "U8", (nbytes,)), Entry((folder, "bias"), "F32", (3,))]
        tree[folder] = {"weight": len(entries) - 2, "bias": len(entries) - 1}
    source = random.Random(seed)
    contents = [source.randbytes(nbytes_of(entry.dtype, entry.shape)) for entry in entries]
    return Snapshot(plan_local(entries, tree, plain), contents, entries)


@dataclass
class Save:
    """One save as the driver knows it."""

    shot: Snapshot
    step: int
    save_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    ordinal: int = 1
    attempt: int = 0


class Ended(Exception):
    """The worker closed its end."""


class Trainer:
    """A process that can die in the trainer's place, so that the test lives on and holds the socket."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self.pidfd = os.pidfd_open(self.process.pid)

    def die(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.die()
        os.close(self.pidfd)


class Worker:
    """A worker's process, and the trainer's end of everything; made by ``worker()``."""

    def __init__(self, run: Path, sock: socket.socket, process: subprocess.Popen[bytes], stderr: int):
        self.run = run
        self.socket = sock
        self.process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.seen: list[Message] = []
        self.arena: mmap.mmap | None = None
        self.arena_fd = -1
        self.last_words = b""
        self._unread: list[Message] = []
        self._stderr = stderr
        self._decoder = FrameDecoder()
        self._fds: list[int] = []

    # ---- frames

    def send(self, message: Message, fd: int | None = None) -> None:
        data = encode(message)
        try:
            if fd is not None:
                socket.send_fds(self.socket, [data], [fd])
            else:
                self.socket.sendall(data)
        except BrokenPipeError:
            raise Ended(self.words()) from None

    def hello(self, *, term: int = 1, linger: float | None = 10.0, beat: float = 0.02, **changes: Any) -> None:
        setup = Setup(run=str(self.run), term=term, linger_timeout=linger, beat_interval=beat)
        self.send(our_hello(**({"setup": setup} | changes)))

    def get_ready(self, **setup: Any) -> Ready:
        self.hello(**setup)
        check_hello(self.next(Hello), package=__version__, path=PACKAGE_PATH)
        return self.next(Ready)

    def next(self, *kinds: type[M], timeout: float = PATIENCE_SECONDS) -> M:
        """Return the next message of these kinds; the others are kept in ``seen``."""
        return self.next_where(lambda message: isinstance(message, kinds), timeout=timeout)  # type: ignore[return-value]

    def next_where(self, wanted: Callable[[Message], bool], *, timeout: float = PATIENCE_SECONDS) -> Message:
        deadline = time.monotonic() + timeout
        while True:
            while self._unread:
                message = self._unread.pop(0)
                self.seen.append(message)
                if wanted(message):
                    return message
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"no such message came; seen: {self.seen[-10:]}, stderr: {self.words()}")
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
        except ConnectionResetError:
            data, fds = b"", []
        self._fds += fds
        if not data:
            raise Ended(self.words())
        self._unread += self._decoder.feed(data)

    # ---- arena and saves

    def reserve(self, nbytes: int, capacity: int | None = None) -> Reserved:
        self.send(Reserve(nbytes=nbytes, capacity=capacity))
        reserved = self.next(Reserved)
        if reserved.error is None:
            self.drop_arena()
            self.arena_fd = self._fds.pop(0)
            self.arena = mmap.mmap(self.arena_fd, nbytes)
        return reserved

    def adopt(self, other: Worker) -> None:
        assert other.arena is not None
        self.drop_arena()
        self.arena_fd, other.arena_fd = other.arena_fd, -1
        self.arena, other.arena = other.arena, None
        self.send(Adopt(nbytes=len(self.arena)), self.arena_fd)

    def drop_arena(self) -> None:
        if self.arena is not None:
            self.arena.close()
            os.close(self.arena_fd)
            self.arena, self.arena_fd = None, -1

    def begin(self, save: Save, *, overwrite: bool = False, prune: Sequence[str] = ()) -> None:
        plan = save.shot.plan
        if self.arena is None or len(self.arena) < plan.arena_nbytes:
            assert self.reserve(plan.arena_nbytes).error is None
        self.send(
            BeginSave(
                save_id=save.save_id,
                step=save.step,
                attempt=save.attempt,
                ordinal=save.ordinal,
                overwrite=overwrite,
                files=list(plan.files),
                plan_offset=plan.body_offset,
                plan_nbytes=plan.body_nbytes,
                prune=list(prune),
            )
        )

    def fill(self, shot: Snapshot) -> None:
        """Copy everything into the arena, saying nothing."""
        assert self.arena is not None
        for offset, text in shot.plan.texts:
            self.arena[offset : offset + len(text)] = text
        for offset, content in zip(shot.plan.offsets, shot.contents, strict=True):
            self.arena[offset : offset + len(content)] = content

    def stage(self, save: Save, *, files: Sequence[int] | None = None) -> None:
        """Copy everything and announce these files whole (all of them by default)."""
        self.fill(save.shot)
        for index, image in enumerate(save.shot.plan.files):
            if files is None or index in files:
                self.send(Staged(save_id=save.save_id, file=index, upto=image.nbytes))

    def end(self, save: Save) -> None:
        self.send(EndStaging(save_id=save.save_id, values=save.shot.values, metadata=save.shot.metadata))

    def start_save(self, save: Save, **options: Any) -> None:
        self.begin(save, **options)
        self.stage(save)
        self.end(save)

    def outcome(self, save: Save, timeout: float = PATIENCE_SECONDS) -> Committed | WireError:
        """Wait for the save's end and the free slot behind it; exactly one of each comes."""

        def answers() -> list[Message]:
            mine = [m for m in self.seen if getattr(m, "save_id", "") == save.save_id]
            return [m for m in mine if isinstance(m, (Committed, Failed, SlotFree))]

        while len(answers()) < 2:
            self.next(Committed, Failed, SlotFree, timeout=timeout)
        end, free = answers()
        assert isinstance(free, SlotFree), "the outcome comes before the slot is free"
        assert isinstance(end, (Committed, Failed))
        return end.error if isinstance(end, Failed) else end

    def commit(self, save: Save, **options: Any) -> Committed:
        self.start_save(save, **options)
        outcome = self.outcome(save)
        assert isinstance(outcome, Committed), outcome
        return outcome

    def states(self, save: Save) -> list[str]:
        """Return the states that were reported, in order, each once."""
        found = [m.state for m in self.seen if isinstance(m, Progress) and m.save_id == save.save_id]
        return list(dict.fromkeys(found))

    # ---- the process

    def words(self) -> str:
        """Return what it wrote on stderr until now."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._stderr, 1 << 16):
                self.last_words += data
        return self.last_words.decode()

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close_politely(self) -> int:
        self.send(Close())
        self.next(Closed)
        return self.wait()

    def release(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.kill()
        self.socket.close()
        self.drop_arena()
        for fd in [self.pidfd, self._stderr, *self._fds]:
            os.close(fd)


def rule(point: str, action: str, **more: Any) -> FaultPlan:
    return FaultPlan(rules=[FaultRule(point=point, action=action, **more)])  # type: ignore[arg-type]


class Switch:
    """The file that ``odd_faults.Switched`` goes by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(FaultPlan())

    def set(self, plan: FaultPlan) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(plan.to_json())
        temporary.rename(self.path)

    @property
    def spec(self) -> str:
        """For ``worker(odd=…)``."""
        return f"Switched:{self.path}"


@contextlib.contextmanager
def worker(
    run: Path,
    *,
    faults: FaultPlan | None = None,
    odd: str | None = None,
    trainer_pidfd: int | None = None,
    ready: bool = True,
    flags: Sequence[str] = (),
    popen: Mapping[str, Any] | None = None,
    **setup: Any,
) -> Iterator[Worker]:
    """Start a worker; kill it and close everything at the end.

    Args:
        run: Made if missing.
        faults: A plan for the worker's fault layer.
        odd: ``Class:text`` of a layer in ``odd_faults`` instead.
        trainer_pidfd: Whom the worker takes for its trainer; this process by default.
        ready: Shake hands first, with ``setup``.
        flags: More for the interpreter.
        popen: More for Popen.
        **setup: See ``Worker.hello``.
    """
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        run.mkdir()
    ours, theirs = socket.socketpair()
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    own = os.pidfd_open(os.getpid())
    pidfd = own if trainer_pidfd is None else trainer_pidfd
    try:
        spec = None if faults is None else (WORKER_ARGUMENT, faults.to_json())
        if odd is not None:
            name, _, text = odd.partition(":")
            spec = (f"tests.worker.odd_faults:{name}", text)
        argv = command(theirs.fileno(), pidfd, faults=spec)
        argv[1:1] = flags
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=write,
            pass_fds=(theirs.fileno(), pidfd),
            start_new_session=True,
            **({"cwd": "/"} | dict(popen or {})),
        )
    finally:
        theirs.close()
        os.close(write)
        os.close(own)
    child = Worker(run, ours, process, read)
    try:
        if ready:
            assert child.get_ready(**setup).error is None
        yield child
    finally:
        child.release()


@contextlib.contextmanager
def mortal_trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    try:
        yield trainer
    finally:
        trainer.close()


def check_checkpoint(path: Path, save: Save) -> Manifest:
    """Fail unless the checkpoint is whole, verified, and holds what was staged; return its manifest."""
    verify_checkpoint(str(path))
    manifest = decode_manifest((path / "manifest.json").read_bytes(), file="manifest.json")
    shot = save.shot
    assert manifest.head.step == save.step
    assert manifest.head.save_id == save.save_id
    assert manifest.values == json.loads(shot.values)
    assert manifest.metadata == json.loads(shot.metadata)
    found: dict[str, bytes] = {}
    for record in manifest.files:
        data = (path / record.path).read_bytes()
        assert len(data) == record.nbytes
        if record.data_start:
            folder = record.path.split("/")[0]
            found |= {f"{folder}.{name}": bytes(t["data"]) for name, t in safetensors.deserialize(data)}
    assert found == {".".join(e.segments): c for e, c in zip(shot.entries, shot.contents, strict=True)}
    return manifest


def state_of(pid: int) -> str:
    """Return the letter of a process's state; T is stopped."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0]
