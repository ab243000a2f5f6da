"""The desk of the saves: who has the slot, and which failures nobody has heard of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from aiockpt.coordinator.save_record import SaveRecord
from aiockpt.errors import CheckpointError

__all__ = ["Desk"]


class Desk:
    """Shared by the thread that saves and the coordinator's loop; every method is quick but ``wait_slot``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: SaveRecord | object | None = None
        self._closed: Callable[[], CheckpointError] | None = None
        self._open: dict[str, SaveRecord] = {}
        self._failed: list[SaveRecord] = []
        self._waiting_free: list[Future[None]] = []
        self._waiting_idle: list[Future[None]] = []

    # ---- the slot

    @property
    def holder(self) -> SaveRecord | object | None:
        """Who has the slot."""
        return self._holder

    def take_slot(self, holder: SaveRecord | object) -> bool:
        """Take the slot if it is free.

        Raises:
            CheckpointError: The desk is closed; what it was closed with.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed()
            if self._holder is not None:
                return False
            self._holder = holder
            return True

    def wait_slot(
        self, holder: SaveRecord | object, *, patience: float, timeout: float | None, on_slow: Callable[[], None]
    ) -> bool:
        """Hold the thread until the slot is taken; after ``patience`` seconds call ``on_slow`` once.

        Returns:
            False where ``timeout`` seconds passed first.
        """
        with self._changed:

            def ready() -> bool:
                return self._closed is not None or self._holder is None

            first = patience if timeout is None else min(patience, timeout)
            if not self._changed.wait_for(ready, first):
                on_slow()
                if not self._changed.wait_for(ready, None if timeout is None else max(0.0, timeout - first)):
                    return False
            if self._closed is not None:
                raise self._closed()
            self._holder = holder
            return True

    def free_slot(self, holder: SaveRecord | object) -> None:
        """Give the slot back; nothing happens where ``holder`` does not have it."""
        with self._changed:
            if self._holder is not holder:
                return
            self._holder = None
            self._changed.notify_all()
            waiting, self._waiting_free = self._waiting_free, []
        _resolve(waiting)

    def when_free(self) -> Future[None]:
        """Return a future that is done when the slot is free, or the desk closed."""
        future: Future[None] = Future()
        with self._changed:
            if self._holder is not None and self._closed is None:
                self._waiting_free.append(future)
                return future
        future.set_result(None)
        return future

    # ---- saves in flight

    def add(self, save: SaveRecord) -> None:
        """A save begins.

        Raises:
            CheckpointError: The desk was closed since the save took the slot: nobody would bring it to its end.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed()
            self._open[save.save_id] = save

    def find(self, save_id: str) -> SaveRecord | None:
        """Return the save that is open under this id."""
        return self._open.get(save_id)

    def in_flight(self) -> list[SaveRecord]:
        """Return the open saves, oldest first."""
        with self._changed:
            return list(self._open.values())

    def remove(self, save: SaveRecord) -> None:
        """A save has its outcome; remember it where it failed."""
        with self._changed:
            self._open.pop(save.save_id, None)
            if save.failure is not None and not save.heard:
                self._failed.append(save)
            waiting: list[Future[None]] = []
            if not self._open:
                waiting, self._waiting_idle = self._waiting_idle, []
        _resolve(waiting)

    def when_idle(self) -> Future[None]:
        """Return a future that is done when no save is open."""
        future: Future[None] = Future()
        with self._changed:
            if self._open:
                self._waiting_idle.append(future)
                return future
        future.set_result(None)
        return future

    def take_unheard(self) -> list[SaveRecord]:
        """Return the failed saves that nobody has heard of or waits for; they count as heard from now on."""
        with self._changed:
            unheard = [save for save in self._failed if not save.heard and not save.listeners]
            self._failed = [save for save in self._failed if not save.heard and save.listeners]
            for save in unheard:
                save.heard = True
            return unheard

    def put_back(self, saves: list[SaveRecord]) -> None:
        """Undo ``take_unheard`` for these."""
        with self._changed:
            for save in saves:
                save.heard = False
            self._failed = saves + self._failed

    def close(self, error: Callable[[], CheckpointError]) -> None:
        """Refuse every save from now on with what ``error`` makes; who waits for the slot gets it too."""
        with self._changed:
            if self._closed is None:
                self._closed = error
            self._changed.notify_all()
            waiting, self._waiting_free = self._waiting_free, []
        _resolve(waiting)


def _resolve(futures: list[Future[None]]) -> None:
    # Outside the lock: a future's callbacks run here, and may come back to the desk.
    for future in futures:
        future.set_result(None)
