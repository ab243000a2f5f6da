"""The one thread of a Stager: it makes the late copies, and all calls back to the owner come from it."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["CopyThread"]

_log = logging.getLogger("aiockpt.staging")

Task = Callable[[], None]


class CopyThread:
    """Runs tasks one after another on a daemon thread that starts with the first one.

    ``SimpleQueue.put`` is one C call that neither a signal handler nor a KeyboardInterrupt can split. The thread
    holds no reference to this object: it ends also when that is collected.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._tasks.put, None)

    def start(self) -> None:
        """Start the thread where it does not run yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._tasks,), name="aiockpt-copy", daemon=True)
            self._thread.start()

    def post(self, task: Task) -> None:
        """Have ``task`` called after all earlier ones; it must not raise."""
        self.start()
        self._tasks.put(task)

    def close(self, timeout: float) -> bool:
        """End the thread after its tasks; returns whether it ended within ``timeout`` seconds. Idempotent."""
        self._end()
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def forget_in_child(self) -> None:
        """In a forked child, where the thread does not exist."""
        self._end.detach()
        self._thread = None


def _run(tasks: queue.SimpleQueue[Task | None]) -> None:
    while True:
        task = tasks.get()
        if task is None:
            return
        try:
            task()
        except BaseException:  # noqa: BLE001  # the thread must live on for the next save
            _log.exception("a task of the copy thread failed")
        del task  # an idle thread must not keep a save's tensors alive
