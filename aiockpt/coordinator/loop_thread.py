"""A daemon thread that runs one event loop, with the ways into it from other threads."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel

from aiockpt.coordinator.failures import closed

__all__ = ["LoopThread", "wait_for"]

T = TypeVar("T")

PARK_SECONDS = 5.0
"""For the loop to get to it; nothing that it does takes longer."""


class LoopThread:
    """One thread, one loop (uvloop), one task group.

    The thread is a daemon: a thread that is not would be joined before exit hooks could end it, and hang the exit.
    It holds no reference to who started it but the tasks that it was given.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = threading.Event()
        self._lock = threading.RLock()  # reentrant: a garbage collection inside may run a finalizer that posts
        self._pending: set[Future[Any]] = set()
        self.ended: Future[None] = Future()
        self._loop: Any = None  # asyncio.AbstractEventLoop; None before the start and after the end
        self._tasks: anyio.abc.TaskGroup | None = None
        self._stop: anyio.Event | None = None

    def start(self) -> None:
        """Start the thread; returns when its loop runs."""
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            anyio.run(self._main, backend="asyncio", backend_options={"use_uvloop": True})
        except BaseException as exc:  # noqa: BLE001  # delivered through ``ended``
            error = exc
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self._loop = None
            pending, self._pending = self._pending, set()
        for future in pending:  # of tasks that were cancelled before they began, or were never started
            future.set_exception(closed())
        self._started.set()
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    async def _main(self) -> None:
        self._stop = anyio.Event()
        async with anyio.create_task_group() as self._tasks:
            self._loop = anyio.lowlevel.current_token().native_token
            self._context = contextvars.copy_context()  # by it anyio knows in a posted call that it runs in a loop
            self._started.set()
            await self._stop.wait()
            with self._lock:
                self._loop = None
            self._tasks.cancel_scope.cancel()

    @property
    def tasks(self) -> anyio.abc.TaskGroup:
        """The task group that everything in the loop belongs to; cancelled at ``stop``."""
        assert self._tasks is not None
        return self._tasks

    def post(self, call: Callable[..., object], *args: Any) -> bool:
        """Have ``call`` run in the loop soon; safe from any thread. False where the loop has ended."""
        with self._lock:
            if self._loop is None:
                return False
            self._loop.call_soon_threadsafe(functools.partial(call, *args), context=self._context)
            return True

    def submit(self, call: Callable[..., Awaitable[T]], *args: Any) -> Future[T]:
        """Run a coroutine function as a task of the loop; its outcome arrives in the future.

        Where the loop ends before the task does, the future gets a UsageError.
        """
        future: Future[T] = Future()

        async def run() -> None:
            try:
                result = await call(*args)
            except anyio.get_cancelled_exc_class():
                raise  # the thread's end answers
            except BaseException as exc:  # noqa: BLE001  # it is delivered, not swallowed
                self._pending.discard(future)
                future.set_exception(exc)
            else:
                self._pending.discard(future)
                future.set_result(result)

        with self._lock:
            self._pending.add(future)
            if not self.post(lambda: self.tasks.start_soon(run)):
                self._pending.discard(future)
                future.set_exception(closed())
        return future

    def stop(self) -> None:
        """Cancel what still runs and end the loop; ``ended`` says when, or with what error."""
        if self._stop is not None:
            self.post(self._stop.set)

    def park(self) -> bool:
        """Hold the thread for good, in a wait that no event ends: the interpreter is about to go away under it.

        uvloop takes the interpreter's lock for every event. When there is no interpreter any more, and the process is
        still about to end (torch's own clean-up takes 0.1 s and more), that is a segmentation fault.

        Returns:
            Whether the loop ran until now, and nothing of it runs any more; it counts as ended.
        """
        parked = threading.Event()

        def hold() -> None:
            parked.set()
            threading.Event().wait()

        if not self.post(hold) or not parked.wait(PARK_SECONDS):
            return False
        self._end(None)
        return True


async def wait_for(future: Future[Any], *others: anyio.Event) -> None:
    """Wait on the loop until a future is done, or until one of the events is set."""
    if future.done():
        return
    done = anyio.Event()
    token = anyio.lowlevel.current_token().native_token
    future.add_done_callback(lambda _: token.call_soon_threadsafe(done.set))  # type: ignore[attr-defined]  # asyncio's
    async with anyio.create_task_group() as tasks:

        async def watch(event: anyio.Event) -> None:
            await event.wait()
            tasks.cancel_scope.cancel()

        for event in (done, *others):
            tasks.start_soon(watch, event)
