"""Signals that stop the children: scoped, restored, and turned into events.

A signal handler runs between any two instructions of the main thread, so it raises nothing here: it leaves a note and
wakes the loop. Only the main thread may install handlers. Elsewhere there are none: a signal then does to the program
what it does without us, and if the program ends by it the guardian ends the children.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import FrameType
from typing import Any

import anyio

from aiockpt.elastic.results import RunProcsResult

__all__ = ["SignalException", "SignalScope", "signals_to_handle"]

_log = logging.getLogger("aiockpt.elastic")

_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_DEFAULT = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


class SignalException(Exception):  # noqa: N818 - torch's name for it
    """A signal asked this program to end; the children were stopped with it.

    Attributes:
        sigval: The signal. A program passes it on by ``signal.raise_signal`` under its default action.
        result: What came of the children all the same.
    """

    def __init__(self, msg: str, sigval: signal.Signals, result: RunProcsResult | None = None) -> None:
        super().__init__(msg, sigval, result)
        self.sigval = sigval
        self.result = result

    def __str__(self) -> str:
        return str(self.args[0])


def signals_to_handle(environ: Mapping[str, str]) -> list[signal.Signals]:
    """Return the signals that ``TORCHELASTIC_SIGNALS_TO_HANDLE`` names; a name that is none gets a WARNING."""
    found = []
    for name in filter(None, (part.strip() for part in environ.get(_VARIABLE, _DEFAULT).split(","))):
        try:
            found.append(signal.Signals[name])
        except KeyError:
            _log.warning("%s names %r, which is no signal of this system; it is left out", _VARIABLE, name)
    return found


class SignalScope:
    """Handlers for some signals, from ``install`` to ``restore``.

    Scopes of several contexts may overlap in any order: each gets every signal, and the handlers from before the first
    one are back after the last.
    """

    def __init__(self, signums: list[signal.Signals]) -> None:
        self._signums = signums
        self._before: dict[int, Any] = {}
        self._noted: deque[int] = deque()
        self._is_open = False
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Take over the signals; where this is not the main thread, only say so."""
        self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_open = True
        if threading.current_thread() is not threading.main_thread():
            _log.warning(
                "signals do not stop the children one by one: only the main thread may handle them\n"
                "why: the processes were started in thread %r\n"
                "next: start them in the main thread, or leave it: the guardian ends them when this program ends",
                threading.current_thread().name,
            )
            return
        for signum in self._signums:
            if signal.getsignal(signum) is signal.SIG_IGN:  # nohup, or a shell's background job: as it was asked for
                continue
            self._before[signum] = signal.signal(signum, self._note)

    @property
    def is_installed(self) -> bool:
        """Whether ``install`` was called and ``restore`` not yet."""
        return self._is_open

    def restore(self) -> None:
        """Put back what was there before; called by the main thread if it installed any."""
        self._is_open = False
        for signum, before in self._before.items():
            if signal.getsignal(signum) != self._note:
                continue  # a scope that was opened later ends later: it passes over this one when it does
            while isinstance(scope := getattr(before, "__self__", None), SignalScope) and not scope._is_open:
                before = scope._before.get(signum, signal.SIG_DFL)
            signal.signal(signum, before if before is not None else signal.SIG_DFL)
        if self._pipe is not None:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None

    async def received(self) -> AsyncIterator[signal.Signals]:
        """Yield every signal, in the order in which they came."""
        while self._pipe is not None:
            while self._noted:
                yield signal.Signals(self._noted.popleft())
            await anyio.wait_readable(self._pipe[0])
            with contextlib.suppress(BlockingIOError):
                os.read(self._pipe[0], 4096)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._pipe is not None and self._is_open:
            self._noted.append(signum)
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], b"!")
        outer = self._before.get(signum)
        if callable(outer) and isinstance(getattr(outer, "__self__", None), SignalScope):
            outer(signum, frame)
