"""The supervision of one group, from the first launch until nothing of it is left: one task, whatever ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from aiockpt.elastic.failures.out_of_memory import OomCounter
from aiockpt.elastic.failures.unreaped import Unreaped, look_at
from aiockpt.elastic.failures.verdict import judge
from aiockpt.elastic.group import Group
from aiockpt.elastic.launching.guardian_process import GuardianProcess
from aiockpt.elastic.launching.programs import Entry
from aiockpt.elastic.numa import compute_bindings
from aiockpt.elastic.plan import Plan, check_full_rank
from aiockpt.elastic.printing.logs import LogsDest
from aiockpt.elastic.printing.output import Output
from aiockpt.elastic.results import RunProcsResult
from aiockpt.elastic.signals import SignalScope
from aiockpt.elastic.stopping import Step, Stop
from aiockpt.errors import CheckpointError
from aiockpt.worker.spared import GUARDIAN_VARIABLE

__all__ = ["Supervision"]

_log = logging.getLogger("aiockpt.elastic")

_LAUNCH_SECONDS = 60.0
"""For all launches; one takes a millisecond, unless the machine has no memory or processes left."""
_EMPTYING_SECONDS = 5.0
"""For what the processes left behind to be gone, once it is killed."""
_FLUSHING_SECONDS = 10.0
"""For the last output to reach the log files: a disk that is slower loses what is beyond."""
_KILL_AT_ONCE = 3
"""So many signals mean: now."""
T = TypeVar("T")


class Supervision:
    """One group of processes: who starts it, hears of it, stops it and says what came of it.

    Everything that the operating system gives for it is held by ``run`` alone, in the order in which it is let go.

    Attributes:
        group: Who lives and who has ended.
        logs: Where output and errors go, once started.
        output: The streams, once started.
        bindings: By local rank the processors it runs on; None for all.
        concluded: Set when ``result`` is there.
        signal: The first signal that this program received meanwhile.
        started: Set when all are started, or it is known why they are not.
        error: Then: why.
        ended: Set when nothing of it is left.
    """

    def __init__(self, plan: Plan, entry: Entry, signals: SignalScope) -> None:
        self._plan, self._entry, self._signals = plan, entry, signals
        self.group = Group(plan.nprocs, owes_value=entry.owes_value)
        self.logs: LogsDest | None = None
        self.output: Output | None = None
        self.bindings: dict[int, frozenset[int] | None] = dict.fromkeys(range(plan.nprocs))
        self.result: RunProcsResult | None = None
        self.signal: signal.Signals | None = None
        self.concluded = anyio.Event()
        self._signal_count = 0
        self._stop: Stop | None = None
        self._stop_changed = anyio.Event()
        self._answered = anyio.Event()
        self._over = anyio.Event()
        self._emptied = anyio.Event()
        self._closing = anyio.Event()
        self.started = anyio.Event()
        self.error: Exception | None = None
        self.ended = anyio.Event()
        self._unreaped: tuple[Unreaped, ...] = ()
        self._is_killed = False
        """The guardian has done so: what still lives is for the kernel, and not to be ended by force."""
        self._is_forced = False
        self._limiter = anyio.CapacityLimiter(2)

    @property
    def is_stopping(self) -> bool:
        """Whether the processes are being stopped."""
        return self._stop is not None

    # -- from outside ---------------------------------------------------------------------------------------------

    def stop(self, signum: signal.Signals, timeout: float | None = None) -> None:
        """Stop what runs; a stop that is under way is shortened to ``timeout`` seconds."""
        if self._stop is None:
            timeout = self._plan.stop_timeout if timeout is None else timeout
            self._stop = Stop(signum, timeout, time.monotonic())
        elif timeout is not None:
            self._stop.shorten(time.monotonic(), timeout)
        self._wake()

    def close(self) -> None:
        """Let ``run`` end once all has ended."""
        self._closing.set()

    async def run(self) -> None:
        """Start all, and see to them until ``close``; where that fails, ``error`` says why, and none is left.

        Cancellation: has no effect; ``stop`` and ``close`` end it. To be started by ``start_soon``: ``start`` would
        hold back a cancellation of the caller until this has ended, which waits for ``close``.
        """
        with anyio.CancelScope(shield=True), contextlib.ExitStack() as held:
            held.callback(self.ended.set)
            held.callback(self.started.set)
            try:
                output = await self._prepare(held)
                guardian = await GuardianProcess.start(self._limiter)
            except Exception as exc:  # noqa: BLE001 - a plug-in for logs may raise anything, and is to be heard as it is
                self.error = exc
                return
            held.callback(guardian.close)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen, guardian)
                tasks.start_soon(self._conduct, guardian)
                tasks.start_soon(self._hear_signals)
                tasks.start_soon(output.run)
                await self._launch_all(guardian, output, tasks)
                if self.error is not None:
                    self.stop(signal.SIGKILL, 0)
                    self.close()
                else:
                    self.started.set()
                await self._over.wait()
                await self._conclude(guardian, output)
                await self._closing.wait()
                await self._end(guardian)
                tasks.cancel_scope.cancel()

    # -- start ----------------------------------------------------------------------------------------------------

    async def _prepare(self, held: contextlib.ExitStack) -> Output:
        plan = self._plan
        self.logs = logs = await self._in_thread(lambda: plan.logs_specs.reify(plan.envs))
        held.callback(plan.logs_specs.release)
        check_full_rank("a place for stdout", logs.stdouts, plan.nprocs)
        check_full_rank("a place for stderr", logs.stderrs, plan.nprocs)
        check_full_rank("an error file", logs.error_files, plan.nprocs)
        if plan.numa_options is not None:
            options = plan.numa_options
            self.bindings = await self._in_thread(lambda: compute_bindings(options, plan.nprocs))
        self.output = output = Output(
            plan.name,
            logs,
            nprocs=plan.nprocs,
            prefixes=plan.prefixes,
            stdout_filters=plan.stdout_filters,
            stderr_filters=plan.stderr_filters,
        )
        held.callback(output.close)
        await self._in_thread(output.open)
        held.callback(self._entry.close)
        self._entry.open()
        self._oom = OomCounter()
        self._oom_before = await self._in_thread(self._oom.kills)
        return output

    async def _launch_all(self, guardian: GuardianProcess, output: Output, tasks: anyio.abc.TaskGroup) -> None:
        assert self.logs is not None
        numa = self._plan.numa_options
        for rank in range(self._plan.nprocs):
            command = self._entry.command(rank)
            message = {
                "do": "launch",
                "rank": rank,
                "executable": command.executable,
                "argv": list(command.argv),
                "env": {
                    **self._plan.envs[rank],
                    "TORCHELASTIC_ERROR_FILE": self.logs.error_files[rank],
                    "AIOCKPT_ERROR_FILE": _private_error_file(guardian, rank),
                    GUARDIAN_VARIABLE: str(guardian.socket_path),
                },
                "inherits": list(command.inherited),
                "cpus": None if (cpus := self.bindings[rank]) is None else sorted(cpus),
                "cpus_optional": numa is not None and numa.should_fall_back_if_binding_fails,
            }
            try:
                await guardian.send(message, (*output.descriptors(rank), *command.inherited.values()))
            except OSError:
                break  # a guardian that is gone is noticed where it is listened to, one that is stuck below
            output.release(rank)
            self._entry.release(rank)
        with anyio.move_on_after(_LAUNCH_SECONDS):
            await self._answered.wait()
        for rank in self.group.living:
            tasks.start_soon(self._entry.talk, rank)
        if not self.group.is_launched:
            self._refuse("the guardian that launches them does not answer", "look at the load of the host")
        if not self.group.pids:
            self._over.set()

    def _refuse(self, why: str, advice: str) -> None:
        if self.error is None:
            self.error = CheckpointError(f"{self._plan.name} was not started", why=why, next=advice)

    # -- what is heard --------------------------------------------------------------------------------------------

    async def _listen(self, guardian: GuardianProcess) -> None:
        async for event in guardian.events():
            match event["event"]:
                case "launched":
                    self._launched(event["rank"], event["pid"], event["unbound"])
                case "refused":
                    self._refuse(
                        f"local rank {event['rank']}: {event['text']}",
                        "look at the program, and at the limits of the host (processes, descriptors, memory)",
                    )
                    self._answered.set()
                case "exited":
                    has_value = self._entry.settle(event["rank"])
                    self.group.end(event["rank"], event["status"], event["at_ns"], has_value=has_value)
                case "killed":
                    self._is_killed = True
                case "emptied":
                    self._emptied.set()
                    if event["spared"]:
                        _log.info("waiting for checkpoint workers with a staged save in hand: %s", event["spared"])
            self._consider()
        await self._lost(guardian)

    def _launched(self, rank: int, pid: int, unbound: str | None) -> None:
        self.group.launch(rank, pid)
        if unbound is not None:
            _log.warning("local rank %d runs on all processors: %s", rank, unbound)
            self.bindings[rank] = None
        if self.group.is_launched:
            self._answered.set()

    def _consider(self) -> None:
        """Decide what the state of the group asks for."""
        if self.group.has_failed:
            self.stop(signal.SIGTERM)
        if self.group.is_over and self._answered.is_set():
            self._over.set()

    async def _lost(self, guardian: GuardianProcess) -> None:
        """The guardian is gone: what it had started is left to us."""
        if not self._is_forced and (self.group.living or not self._closing.is_set()):
            _log.error("the guardian of %s has ended; its processes are ended too", self._plan.name)
            await self._in_thread(guardian.kill_all)
        if not self.group.is_launched:
            self._refuse("the guardian that launches them has ended", "look for what ended it, and start again")
        self._emptied.set()
        if not self._is_forced:
            self.group.lose(time.monotonic_ns())
            self._answered.set()
            self._over.set()

    async def _hear_signals(self) -> None:
        async for signum in self._signals.received():
            self._signal_count += 1
            if self.signal is None:
                self.signal = signum
                _log.warning("%s: stopping with %s", self._plan.name, signum.name)
                self.stop(signum)
            elif self._stop is not None:
                self._stop.hasten(time.monotonic())
            self._wake()

    # -- the end --------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._stop_changed.set()

    async def _conduct(self, guardian: GuardianProcess) -> None:
        """Carry out the steps of a stop when they are due."""
        while True:
            if self._stop is not None and not self._over.is_set():
                for step in self._stop.due(time.monotonic()):
                    await self._take(step, guardian)
            next_at = self._stop.next_at if self._stop is not None and not self._over.is_set() else None
            with anyio.move_on_after(None if next_at is None else max(0.0, next_at - time.monotonic())):
                await self._stop_changed.wait()
            self._stop_changed = anyio.Event()

    async def _take(self, step: Step, guardian: GuardianProcess) -> None:
        living = self.group.living
        assert self._stop is not None
        with contextlib.suppress(OSError):  # a guardian that is gone is noticed where it is listened to
            match step:
                case Step.SIGNAL:
                    self.group.sent(living, self._stop.signum, time.monotonic_ns())
                    await _signal(guardian, living, self._stop.signum)
                    await _signal(guardian, living, signal.SIGCONT)  # one that is stopped could not hear it
                case Step.ASK_FOR_STACKS:
                    for rank in living:
                        if (asks := self._entry.stacks_signal(self.group.pids[rank])) is not None:
                            await _signal(guardian, [rank], asks, leader_only=True)
                case Step.KILL:
                    self.group.sent(living, signal.SIGKILL, time.monotonic_ns())
                    await guardian.send({"do": "kill"})
                case Step.GIVE_UP:
                    await self._give_up(guardian)

    async def _give_up(self, guardian: GuardianProcess) -> None:
        """The time is over: name who is left, once it is certain that they were killed."""
        await self._ensure_killed(guardian)
        looks = (look_at(self.group.pids[rank]) for rank in self.group.living)
        self._unreaped = tuple(look for look in looks if look is not None and look.state not in "ZX")
        for one in self._unreaped:
            _log.error("%s", one)
        self.group.abandon(time.monotonic_ns())
        self._over.set()

    async def _ensure_killed(self, guardian: GuardianProcess) -> None:
        """Kill all from here, where the guardian has not: it may be stopped itself."""
        if self._is_killed:
            return
        self._is_forced = True
        _log.error("the guardian of %s does not answer: it is killed, with all that it had started", self._plan.name)
        await self._in_thread(guardian.kill_all)

    async def _conclude(self, guardian: GuardianProcess, output: Output) -> None:
        """End what the processes left behind, take in their last words, and say what came of them."""
        with contextlib.suppress(OSError):
            await guardian.send({"do": "kill"})
        with anyio.move_on_after(0 if self._unreaped else _EMPTYING_SECONDS):
            await self._emptied.wait()
        if not self._emptied.is_set():
            await self._ensure_killed(guardian)
        await output.finish(_FLUSHING_SECONDS)
        logs = self.logs
        assert logs is not None
        oom_kills = await self._in_thread(self._oom.kills) - self._oom_before
        self.result = await self._in_thread(
            lambda: judge(
                self.group,
                self._entry,
                logs,
                private_error_file=lambda rank: _private_error_file(guardian, rank),
                output_tail=output.tail,
                oom_kills=oom_kills,
                unreaped=self._unreaped,
            )
        )
        self.concluded.set()

    async def _end(self, guardian: GuardianProcess) -> None:
        """Have the guardian end; a checkpoint worker that it spares has its time, unless there were three signals."""
        with contextlib.suppress(OSError):
            await guardian.send({"do": "end"})
        if self._unreaped:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._until_third_signal, tasks.cancel_scope)
            await guardian.wait_ended()
            tasks.cancel_scope.cancel()

    async def _until_third_signal(self, scope: anyio.CancelScope) -> None:
        while self._signal_count < _KILL_AT_ONCE:
            await self._stop_changed.wait()
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)


def _private_error_file(guardian: GuardianProcess, rank: int) -> str:
    """Where an error goes that has no file in the logs; it is read before the guardian goes."""
    return str(guardian.directory / f"error_{rank}.json")


async def _signal(guardian: GuardianProcess, ranks: list[int], signum: int, *, leader_only: bool = False) -> None:
    if ranks:
        await guardian.send({"do": "signal", "ranks": ranks, "signum": int(signum), "leader_only": leader_only})
