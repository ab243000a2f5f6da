"""How the ranks of one Checkpointer find each other: by one word in the store of their process group.

Never by a collective: the group is the training's. Rank 0 publishes where it is, or why it is not; the others look.
Nothing after that needs the store.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import msgspec
import torch.distributed as dist

from aiockpt import errors
from aiockpt.coordinator.process_hooks import count_opening
from aiockpt.errors import CheckpointError, ConfigError, WorkerStartError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroup, Store  # a torch without distributed has none

__all__ = ["Found", "Group", "Meeting", "Refusal", "Rendezvous", "find_group"]

STORE_SECONDS = 30.0
"""For one or two round trips: thousands of ranks ask one server at once."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that save together, at least two."""

    rank: int
    """Of this process, in the group."""
    world: int
    members: tuple[int, ...]
    """Global ranks, by rank in the group."""
    store: Store
    """Of the group; every user of it has names of its own."""
    process_group: ProcessGroup


def find_group(process_group: ProcessGroup | None) -> Group | None:
    """Return the group that a Checkpointer is one of, None where it is alone.

    Args:
        process_group: As the user gave it; None is the default group, where there is one.

    Raises:
        ConfigError: This process is no member of it, or it was destroyed.
    """
    if not dist.is_available() or (process_group is None and not dist.is_initialized()):
        return None
    from torch.distributed import distributed_c10d

    try:
        group = distributed_c10d._get_default_group() if process_group is None else process_group
        members = tuple(dist.get_process_group_ranks(group))
        rank = dist.get_rank(group)
        store = distributed_c10d._world.pg_map[group][1]  # torch has no public way to it, 2.8 to 2.13
    except (KeyError, ValueError) as exc:
        raise ConfigError(
            "process_group cannot be used",
            why="it was destroyed, or this process is no member of it",
            next="open the Checkpointer while its process group is initialised",
            argument="process_group",
        ) from exc
    if len(members) == 1:
        return None
    return Group(rank=rank, world=len(members), members=members, store=store, process_group=group)


class Meeting(msgspec.Struct, frozen=True, kw_only=True, tag="meeting"):
    """Rank 0 has taken the run, and listens."""

    host: str
    port: int
    token: str
    """64 hexadecimal digits; whoever reads the store knows it."""
    run_id: str
    term: int
    meet: str
    """Name of a file in the run directory, see ``RunClaim.make_meet``."""
    package: str
    """Version of rank 0's aiockpt."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """Rank 0 has not taken the run: an error as data."""

    kind: str
    """Name of a class of ``aiockpt.errors``."""
    what: str
    why: str
    next: str
    fields: dict[str, str | int | float] = {}

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Make one of any error."""
        if not isinstance(error, CheckpointError):
            text = f"{type(error).__name__}: {error}"
            return cls(kind="CheckpointError", what="opening failed", why=text, next="look at rank 0's log")
        fields = {name: getattr(error, name) for name in type(error).FIELDS}
        plain = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
        return cls(kind=type(error).__name__, what=error.what, why=error.why, next=error.next, fields=plain)

    def as_exception(self) -> CheckpointError:
        """Return the error as another rank raises it: the same class and fields, and on which rank it was."""
        kind = getattr(errors, self.kind if self.kind in errors.__all__ else "CheckpointError")
        fields = {name: value for name, value in self.fields.items() if name in kind.FIELDS}
        error: CheckpointError = kind(f"rank 0: {self.what}", why=self.why, next=self.next, **fields)
        return error


Found = Meeting | Refusal


class Rendezvous:
    """One opening of a run over a group; the same number of it on each rank meets, no other one.

    A job that was started again on a store that survived finds what the former one left: whoever looks must go on
    looking until what it found has taken it.

    It owns a thread, because a call into a store whose server is gone may return very late: made by the first call,
    ended by ``close``, a daemon in case it cannot end. With a connection of its own to the server where there is one:
    a call that waits holds all others of its connection, the training's too (measured: 4.7 s).

    Thread-safety: any thread.
    """

    def __init__(self, group: Group, run: str) -> None:
        """Count this opening.

        Args:
            group: The ranks that open.
            run: Absolute path of the run, alike on all of them.
        """
        self._store = group.store
        number = count_opening(group.process_group, run)
        name = msgspec.json.encode(["aiockpt", 1, run, group.members, number])
        self.key = f"aiockpt/{hashlib.sha256(name).hexdigest()}"
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def publish(self, word: Found, *, timeout: float = STORE_SECONDS) -> None:
        """Say where rank 0 is, or why it is not. Blocks for two round trips.

        Raises:
            WorkerStartError: The store does not answer within ``timeout`` seconds.
        """
        data = msgspec.json.encode(word).decode()

        def call(store: Store) -> bool:
            store.set(self.key, data)
            return store.check([self.key])  # after the server's death the first set seems to succeed

        self._call(call, timeout)

    def look(self, *, timeout: float = STORE_SECONDS) -> Found | None:
        """Return what rank 0 has published, perhaps long ago; None where nothing is there. Blocks for two round trips.

        Raises:
            WorkerStartError: The store does not answer within ``timeout`` seconds.
        """

        def call(store: Store) -> bytes | None:
            return store.get(self.key) if store.check([self.key]) else None

        data = self._call(call, timeout)
        try:
            return None if data is None else msgspec.json.decode(data, type=Found)
        except msgspec.DecodeError:
            return None  # nothing that rank 0 said

    def close(self) -> None:
        """End the thread, and its connection; idempotent. Waits for nothing."""
        with self._lock:
            self._closed = True
            self._calls.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, function: Callable[[Store], T], timeout: float) -> T:
        call = _Call(function)
        with self._lock:
            if self._closed:
                raise _no_answer("it was closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_serve, args=(self._store, self._calls), name="aiockpt-store", daemon=True
                )
                self._thread.start()
            self._calls.put(call)
        try:
            return call.done.result(timeout)
        except TimeoutError:
            call.done.cancel()
            raise _no_answer(f"it has said nothing for {timeout:g} s") from None
        except (RuntimeError, OSError) as exc:  # torch's errors of the network are RuntimeErrors
            raise _no_answer(str(exc).partition("\n")[0]) from exc


class _Call(Generic[T]):
    """A call into the store, and its outcome."""

    def __init__(self, function: Callable[[Store], T]) -> None:
        self.function = function
        self.done: Future[T] = Future()


def _serve(store: Store, calls: queue.SimpleQueue[_Call[Any] | None]) -> None:
    own: Store | None = None
    while (call := calls.get()) is not None:
        if not call.done.set_running_or_notify_cancel():
            continue
        try:
            own = _own(store) if own is None else own
            call.done.set_result(call.function(own))
        except BaseException as exc:  # noqa: BLE001  # it is delivered to who called
            call.done.set_exception(exc)
        del call  # an idle thread holds nobody's result


def _own(store: Store) -> Store:
    clone = getattr(store, "clone", None)
    return store if clone is None else clone()


def _no_answer(why: str) -> WorkerStartError:
    return WorkerStartError(
        "the ranks did not find each other: the process group's store does not answer",
        why=why,
        next="look whether the process that serves it lives, mostly rank 0 or the launcher; then start the job again",
    )
