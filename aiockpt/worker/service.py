"""The worker's loop: what the trainer says, and what becomes of it."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable

import anyio
import anyio.abc
import anyio.to_thread
from msgspec.structs import replace

from aiockpt import __version__
from aiockpt.errors import CheckpointError, ProtocolError
from aiockpt.protocol.frames import check_hello
from aiockpt.protocol.messages import (
    MAGIC,
    PROTOCOL_VERSION,
    Adopt,
    Beat,
    BeginSave,
    Cancel,
    Close,
    Closed,
    EndStaging,
    Enlist,
    Hello,
    Message,
    NoHub,
    Ready,
    Reserve,
    Reserved,
    Setup,
    Staged,
    ToHub,
    TrainerBeat,
)
from aiockpt.protocol.star import StarMessage
from aiockpt.storage.faults import NO_FAULTS, Faults
from aiockpt.worker.activity import Activity
from aiockpt.worker.arena import ArenaMap, allocate
from aiockpt.worker.exits import ExitStatus
from aiockpt.worker.failures import as_wire_error
from aiockpt.worker.launch import PACKAGE_PATH
from aiockpt.worker.link import Link
from aiockpt.worker.membership import Membership
from aiockpt.worker.rank_save import RankSave
from aiockpt.worker.run import Run
from aiockpt.worker.save import Save, Surroundings, check_begin
from aiockpt.worker.single_save import SingleSave
from aiockpt.worker.spared import Spared
from aiockpt.worker.sweeper import Sweeper
from aiockpt.worker.trainer_watch import TrainerWatch
from aiockpt.worker.writer import DEFAULT_WRITERS

__all__ = ["serve"]

_log = logging.getLogger("aiockpt.worker")

SIGTERM_LINGER_SECONDS = 5.0
"""What is left of ``linger_timeout`` after SIGTERM: batch systems send SIGKILL some seconds later."""
CLOSE_SWEEP_SECONDS = 10.0
"""How long a close waits for removals; the next worker on the run goes on with the rest."""
FLUSH_SECONDS = 2.0
"""For the trainer to take the last frames."""


async def serve(
    socket_fd: int, trainer_pidfd: int, *, faults: Faults = NO_FAULTS, end: Callable[[ExitStatus], None]
) -> ExitStatus:
    """Serve one trainer until it closes, dies or talks nonsense.

    Args:
        socket_fd: Stream socket to the trainer.
        trainer_pidfd: Readable when the trainer is dead.
        faults: Fault layer.
        end: Ends the process; called with threads still at work where a disk hangs. Where it returns, so does this.
    """
    link = await Link.wrap(socket_fd)
    async with anyio.create_task_group() as tasks:
        service = _Service(link, tasks, faults)
        tasks.start_soon(service.send)
        tasks.start_soon(service.read)
        tasks.start_soon(service.watch_trainer, trainer_pidfd)
        status = await service.wait_end()
        end(status)
        tasks.cancel_scope.cancel()
    return status


class _Service:
    """Every method runs in the loop; a handler updates state without waiting, and starts tasks for the rest."""

    def __init__(self, link: Link, tasks: anyio.abc.TaskGroup, faults: Faults) -> None:
        self._link = link
        self._tasks = tasks
        self._faults = faults
        self._activity = Activity()
        self._reading = anyio.CancelScope()
        self._sending = anyio.CancelScope()
        self._setup: Setup | None = None
        self._around: Surroundings | None = None  # once the run is open
        self._arena: ArenaMap | None = None
        self._is_reserving = False
        self._saves: dict[str, Save] = {}
        self._spared = Spared(None)
        self._membership: Membership | None = None
        self._trainer: TrainerWatch | None = None
        self._taking_part = anyio.CancelScope()
        self._is_closing = False
        self._is_orphaned = False
        self._status: ExitStatus | None = None
        self._end_decided = anyio.Event()

    # ---- the end

    async def wait_end(self) -> ExitStatus:
        """Wait until the worker is to end, and for the last frames to be taken."""
        await self._end_decided.wait()
        assert self._status is not None, "the event says that it is set"
        with anyio.move_on_after(FLUSH_SECONDS):
            await self._link.wait_idle()
        return self._status

    def _end(self, status: ExitStatus) -> None:
        if self._status is None:
            self._status = status
            self._end_decided.set()

    # ---- tasks

    async def send(self) -> None:
        """Send what is queued, while somebody reads it."""
        with self._sending:
            await self._link.run_sender()

    async def read(self) -> None:
        """Handle what the trainer says, in order."""
        try:
            with self._reading:
                async for message, fds in self._link.receive():
                    self._handle(message, fds)
                self._trainer_is_gone("it closed its end of the socket")
        except ProtocolError as exc:
            _log.error("the trainer was not understood\n%s", exc)
            self._end(ExitStatus.PROTOCOL)

    async def watch_trainer(self, pidfd: int) -> None:
        """Wait for the trainer's death, which its forked children may hide from the socket."""
        await anyio.wait_readable(pidfd)
        self._trainer_is_gone("it died")

    async def _open_run(self, setup: Setup) -> None:
        run = Run(setup.run, setup.term)
        sweeper = Sweeper(run, self._activity, self._faults)
        if setup.rank == 0:
            try:
                await self._open_directory(run)
            except CheckpointError as exc:
                self._link.send(Ready(pid=os.getpid(), error=as_wire_error(exc)))
                self._end(ExitStatus.NOT_READY)
                return
            self._tasks.start_soon(sweeper.run)
        self._around = Surroundings(
            run=run,
            sweeper=sweeper,
            activity=self._activity,
            faults=self._faults,
            writers=anyio.CapacityLimiter(DEFAULT_WRITERS),
            clerks=anyio.CapacityLimiter(4),
            send=self._link.send,
        )
        self._link.send(Ready(pid=os.getpid()))
        self._tasks.start_soon(self._beat, setup.beat_interval)

    async def _open_directory(self, run: Run) -> None:
        def open_run() -> None:
            with self._activity.operation(f"open {run.path}"):
                run.open()

        await anyio.to_thread.run_sync(open_run, limiter=anyio.CapacityLimiter(1))

    async def _take_part(self, enlist: Enlist, listener_fd: int) -> None:
        """Be a rank of a job, until another ``Enlist`` comes."""
        assert self._around is not None, "nothing is handled before Ready"
        with anyio.CancelScope() as self._taking_part:
            if self._around.run.fd < 0:
                try:
                    await self._open_directory(self._around.run)
                except CheckpointError as exc:
                    self._link.send(NoHub(error=as_wire_error(exc)))
                    return
            self._membership = Membership(
                enlist, listener_fd, saves=self._rank_saves, send=self._link.send, surroundings=self._around
            )
            self._trainer = TrainerWatch(enlist.stall_timeout, self._membership, lambda: self._link.has_unread)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._trainer.run)
                await self._membership.run()
                self._trainer.end()

    def _rank_saves(self) -> list[RankSave]:
        return [save for save in self._saves.values() if isinstance(save, RankSave)]

    async def _beat(self, interval: float) -> None:
        while True:
            await anyio.sleep(interval)
            if self._link.is_idle:  # else the trainer does not read, and needs no further proof
                for save in self._saves.values():
                    save.report()
                moved, busy = self._activity.look()
                self._link.send(Beat(moved=moved, busy=busy))

    async def _reserve(self, message: Reserve, old: ArenaMap | None) -> None:
        def make() -> tuple[int, ArenaMap]:
            if old is not None:
                old.close()  # before the look at what is free
            fd = allocate(
                message.nbytes,
                capacity=message.capacity,
                activity=self._activity,
                stop=lambda: self._is_closing or self._is_orphaned,
                faults=self._faults,
            )
            try:
                return fd, ArenaMap(os.dup(fd), message.nbytes)
            except BaseException:
                os.close(fd)
                raise

        try:
            fd, self._arena = await anyio.to_thread.run_sync(make, limiter=anyio.CapacityLimiter(1))
        except InterruptedError:
            return
        except (CheckpointError, OSError) as exc:
            error = as_wire_error(exc)
            if error.kind == "storage":
                error = replace(error, kind="memory")
            self._link.send(Reserved(nbytes=message.nbytes, error=error))
        else:
            self._link.send(Reserved(nbytes=message.nbytes, fds=1), fd)
        finally:
            self._is_reserving = False

    async def _run_save(self, save: Save) -> None:
        await save.run()
        del self._saves[save.save_id]
        if not any(other.is_staged for other in self._saves.values()):
            self._spared.let_go()

    async def _close(self) -> None:
        await self._finish_saves()
        await self._leave_job("its Checkpointer was closed")
        if self._around is not None and self._rank == 0:
            with anyio.move_on_after(CLOSE_SWEEP_SECONDS):
                await self._around.sweeper.wait_idle()
        self._link.send(Closed())
        self._end(ExitStatus.CLOSED)

    async def _linger(self) -> None:
        """Finish what a trainer that is gone had staged, and end."""
        try:
            self._link.drain(self._handle)
        except ProtocolError as exc:
            _log.warning("what the trainer said last was not understood\n%s", exc)
        timeout = self._setup.linger_timeout if self._setup is not None else 0.0
        deadline = math.inf if timeout is None else anyio.current_time() + timeout
        with anyio.CancelScope(deadline=deadline) as scope:
            self._tasks.start_soon(self._hurry, scope)
            await self._finish_saves()
            await self._leave_job("its trainer is gone")
        if scope.cancelled_caught:
            _log.warning("the trainer is gone, and its last save did not end in time")
        self._end(ExitStatus.LINGERED if scope.cancelled_caught else ExitStatus.ORPHANED)

    async def _hurry(self, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                scope.deadline = min(scope.deadline, anyio.current_time() + SIGTERM_LINGER_SECONDS)

    async def _finish_saves(self) -> None:
        """Let staged saves end; what is not staged never will be."""
        for save in list(self._saves.values()):
            if not save.is_staged:
                save.abandon()
        for save in list(self._saves.values()):
            await save.wait_ended()

    async def _leave_job(self, why: str) -> None:
        if self._membership is not None:
            await self._membership.leave(why)

    def _trainer_is_gone(self, why: str) -> None:
        if self._is_orphaned:
            return
        self._is_orphaned = True
        self._expect_no_more()
        _log.info("the trainer is gone: %s", why)
        self._reading.cancel()
        self._sending.cancel()
        self._link.mute()
        self._tasks.start_soon(self._linger)

    def _expect_no_more(self) -> None:
        """The trainer ends, or has told us to: its silence is no news."""
        if self._trainer is not None:
            self._trainer.end()

    # ---- what the trainer says

    def _handle(self, message: Message, fds: list[int]) -> None:
        if self._trainer is not None:
            self._trainer.heard()
        try:
            self._dispatch(message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _dispatch(self, message: Message, fds: list[int]) -> None:
        if self._setup is None:
            self._greet(message)
            return
        if self._around is None and not self._is_orphaned and not isinstance(message, Close):
            raise ProtocolError(f"a {type(message).__name__} came before Ready was sent")
        match message:
            case Reserve():
                self._begin_reserving(message)
            case Adopt():
                self._adopt(message, fds)
            case BeginSave():
                self._begin_save(message)
            case Staged() | EndStaging() | Cancel():
                self._tell_save(message)
            case Enlist():
                self._enlist(message, fds)
            case ToHub():
                self._say_to_hub(message.message)
            case TrainerBeat():
                pass
            case Close():
                if not self._is_closing:
                    self._is_closing = True
                    self._expect_no_more()
                    self._tasks.start_soon(self._close)
            case _:
                raise ProtocolError(f"a {type(message).__name__} came, which is not for a worker")

    def _greet(self, message: Message) -> None:
        self._link.send(Hello(magic=MAGIC, protocol=PROTOCOL_VERSION, package=__version__, path=PACKAGE_PATH))
        setup = check_hello(message, package=__version__, path=PACKAGE_PATH).setup
        if setup is None or setup.beat_interval <= 0:
            raise ProtocolError("the trainer's Hello has no setup, or one that cannot be")
        self._setup = setup
        self._spared = Spared(setup.linger_timeout)
        self._tasks.start_soon(self._open_run, setup)

    def _begin_reserving(self, message: Reserve) -> None:
        self._refuse_with_slot("Reserve")
        if message.nbytes <= 0:
            raise ProtocolError(f"an arena of {message.nbytes} bytes was asked for")
        self._is_reserving = True
        old, self._arena = self._arena, None
        self._tasks.start_soon(self._reserve, message, old)

    def _adopt(self, message: Adopt, fds: list[int]) -> None:
        self._refuse_with_slot("Adopt")
        if len(fds) != 1:
            raise ProtocolError(f"an arena came with {len(fds)} descriptors")
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        try:
            self._arena = ArenaMap(fds.pop(), message.nbytes)
        except (OSError, ValueError) as exc:
            raise ProtocolError("the arena that came with Adopt was not mapped", why=str(exc)) from exc

    def _refuse_with_slot(self, name: str) -> None:
        if self._is_reserving or any(save.holds_slot for save in self._saves.values()):
            raise ProtocolError(f"a {name} came while the arena was in use")

    def _begin_save(self, message: BeginSave) -> None:
        if self._around is None or self._is_closing:
            return  # the trainer died before the run was open, or said Close before: nothing was promised
        self._refuse_with_slot("BeginSave")
        if self._arena is None or message.save_id in self._saves:
            raise ProtocolError("a save began without an arena, or twice")
        check_begin(message, self._arena.nbytes)
        save: Save
        if message.call is None:
            save = SingleSave(message, self._arena.view(), self._around)
        else:
            save = RankSave(message, self._arena.view(), self._around, rank=self._rank, say=self._say_to_hub)
            if self._membership is not None:
                self._membership.begin(save)
        self._saves[message.save_id] = save
        self._tasks.start_soon(self._run_save, save)

    @property
    def _rank(self) -> int:
        return 0 if self._setup is None else self._setup.rank

    def _say_to_hub(self, message: StarMessage) -> None:
        if self._membership is not None:
            self._membership.say(message)

    def _enlist(self, message: Enlist, fds: list[int]) -> None:
        if message.rank != self._rank or (message.rank == 0) != bool(fds):
            raise ProtocolError("an Enlist came for another rank, or with descriptors that it cannot have")
        self._taking_part.cancel()
        self._tasks.start_soon(self._take_part, message, fds.pop() if fds else -1)

    def _tell_save(self, message: Staged | EndStaging | Cancel) -> None:
        save = self._saves.get(message.save_id)
        if save is None or not save.holds_slot:
            return  # it had ended before the trainer heard of it
        match message:
            case Staged():
                save.staged(message)
            case EndStaging():
                self._spared.ask()  # before the trainer hears that its save is safe with us
                save.end_staging(message)
            case Cancel(error=error, is_unheard=is_unheard):
                if isinstance(save, RankSave) and is_unheard and not self._was_in:
                    save.cancel_unheard(error)
                else:
                    save.cancel(error)

    @property
    def _was_in(self) -> bool:
        return self._membership is not None and self._membership.was_in
