"""The guardian's process: one loop over its supervisor, its children, and those that are spared."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable

from aiockpt.elastic.guardian.descendants import children, descendants, kill
from aiockpt.elastic.guardian.launch import Child, launch
from aiockpt.elastic.guardian.spared import Spared
from aiockpt.elastic.guardian.wire import MOST_DESCRIPTORS, Frames, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Guardian", "main"]

UNKILLABLE_SECONDS = 60.0
"""After which the guardian leaves processes that SIGKILL does not end: they wait in the kernel, and may for ever."""
_LOOK_SECONDS = 0.02
"""Between two looks at who is alive, while somebody is being killed; the end of a child of ours is told at once."""
_SPARED_LOOK_SECONDS = 0.1
"""The same, while only spared ones live."""
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36


class Guardian:
    """Carries out what the supervisor says, and all that is left to do when it is gone."""

    def __init__(self, control: socket.socket, supervisor: int, listener: socket.socket, wakeup: int) -> None:
        self._control, self._listener = control, listener
        self._frames = Frames()
        self._received: list[int] = []
        self._unsent = bytearray()
        self._children: dict[int, Child] = {}
        self._spared: dict[int, Spared] = {}
        self._killing_since: float | None = None
        self._left: set[int] = set()
        self._told_killed = self._told_empty = False
        self._has_orphans = True
        """Some process may have ended that is a child of ours by its parent's end: looked for only then, as it takes a
        walk through ``/proc``, which a start of many children would wait for at each of them."""
        self._ends = False
        self._selector = selectors.DefaultSelector()
        self._supervisor: dict[Any, Callable[[], None]] = {control: self._hear, supervisor: self._let_go}
        for what, call in self._supervisor.items():
            self._watch(what, call)
        self._watch(listener, self._accept)
        self._watch(wakeup, functools.partial(self._heed_signals, wakeup))

    def run(self) -> None:
        """Serve until it is told to end, or the supervisor is gone, and nobody is left."""
        while not self._is_over():
            for key, _ in self._selector.select(self._next_look()):
                key.data()
            if self._has_orphans:
                self._reap_orphans()
            if self._killing_since is not None:
                self._kill_all()
            self._flush()
        for child in self._children.values():
            child.reap()

    def _watch(self, what: Any, call: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, call)

    def _next_look(self) -> float | None:
        if self._killing_since is None:
            return None
        return _SPARED_LOOK_SECONDS if self._told_empty else _LOOK_SECONDS

    def _is_over(self) -> bool:
        if not self._ends or (not self._told_empty and self._killed_for() < UNKILLABLE_SECONDS):
            return False
        return not self._left or self._killed_for() > self._longest()

    def _killed_for(self) -> float:
        return 0.0 if self._killing_since is None else time.monotonic() - self._killing_since

    def _longest(self) -> float:
        return UNKILLABLE_SECONDS + max((one.seconds for one in self._spared.values()), default=0.0)

    # -- the supervisor -------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._received += descriptors
        if not data:
            self._let_go()
            return
        for message in self._frames.feed(data):
            getattr(self, f"_do_{message['do']}")(message)

    def _let_go(self) -> None:
        """The supervisor has ended, or has let go of us: both is the end of everything, and often seen in one look."""
        for what in self._supervisor:
            self._selector.unregister(what)
        self._supervisor = {}
        self._ends = True
        self._start_killing()

    def _tell(self, **event: Any) -> None:
        self._unsent += encode(event)
        self._flush()

    def _flush(self) -> None:
        """Send what is waiting; what the supervisor does not take in yet waits, a few hundred bytes for each child."""
        with contextlib.suppress(OSError):
            while self._unsent:
                del self._unsent[: self._control.send(self._unsent, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)]

    def _do_launch(self, message: dict[str, Any]) -> None:
        count = 2 + len(message["inherits"])
        descriptors, self._received = self._received[:count], self._received[count:]
        try:
            child, unbound = launch(message, descriptors)
        except (OSError, ValueError) as exc:
            self._tell(event="refused", rank=message["rank"], errno=getattr(exc, "errno", None), text=str(exc))
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._children[child.rank] = child
        self._tell(event="launched", rank=child.rank, pid=child.pid, unbound=unbound)
        self._watch(child.pidfd, functools.partial(self._ended, child))

    def _do_signal(self, message: dict[str, Any]) -> None:
        for rank in message["ranks"]:
            if rank in self._children:
                self._children[rank].signal(message["signum"], leader_only=message["leader_only"])

    def _do_kill(self, message: dict[str, Any]) -> None:
        self._start_killing()

    def _do_end(self, message: dict[str, Any]) -> None:
        self._ends = True
        self._start_killing()

    # -- the children ---------------------------------------------------------------------------------------------

    def _ended(self, child: Child) -> None:
        status = child.exit_status()
        if status is None:
            return
        self._selector.unregister(child.pidfd)
        self._tell(event="exited", rank=child.rank, status=status, at_ns=time.monotonic_ns())

    def _reap_orphans(self) -> None:
        """Reap what was left to us: descendants whose parents have ended."""
        self._has_orphans = False
        ours = {child.pid for child in self._children.values()}
        for pid in children(os.getpid()) - ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _heed_signals(self, wakeup: int) -> None:
        """Take note that signals came: SIGCHLD for each end below us, and others that ask for nothing."""
        with contextlib.suppress(BlockingIOError):
            while os.read(wakeup, 4096):
                pass
        self._has_orphans = True

    def _start_killing(self) -> None:
        if self._killing_since is None:
            self._killing_since = time.monotonic()

    def _kill_all(self) -> None:
        """Send SIGKILL to all descendants but the spared ones, until nobody is left: the next look finds forks."""
        self._accept()
        living = descendants(os.getpid())
        spared = self._spared_now() & living.keys()
        for pid, parent in living.items():
            if pid not in spared:
                kill(pid, parent)
        if not self._told_killed:
            self._told_killed = True
            self._tell(event="killed")
        self._left = set(living)
        if self._left == spared and not self._told_empty:
            self._told_empty = True
            self._tell(event="emptied", spared=sorted(spared))

    # -- the spared -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Take in all that wait: one that had connected before a kill is spared by it."""
        with contextlib.suppress(OSError):  # BlockingIOError: no more of them
            while True:
                connection, _ = self._listener.accept()
                spared = Spared(connection)
                if not spared.is_ours:
                    connection.close()
                    continue
                self._spared[connection.fileno()] = spared
                self._watch(connection, functools.partial(self._hear_spared, spared))

    def _hear_spared(self, spared: Spared) -> None:
        if not spared.read():
            self._selector.unregister(spared.connection)
            del self._spared[spared.connection.fileno()]
            spared.connection.close()

    def _spared_now(self) -> set[int]:
        return {one.pid for one in self._spared.values() if self._killed_for() < one.seconds}


def main() -> None:
    """Run over inherited descriptors: control, supervisor (a pidfd), listener; and the path of its socket."""
    control, supervisor, listener = map(int, sys.argv[1:4])
    path = sys.argv[4]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, b"aiockpt-guard")
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("the kernel makes no subreaper of the guardian")
    for descriptor in (control, supervisor, listener):
        os.set_inheritable(descriptor, False)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # Caught and not ignored, since children would inherit that; what our parent ignores, they are to ignore as well.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        if signum == signal.SIGCHLD or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        Guardian(_socket(control), supervisor, _socket(listener), read).run()
    finally:
        _remove(os.path.dirname(path))


def _remove(directory: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def _socket(descriptor: int) -> socket.socket:
    made = socket.socket(fileno=descriptor)
    made.setblocking(False)
    return made
