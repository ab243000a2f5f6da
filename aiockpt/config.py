"""What a Checkpointer is told at its construction, checked: frozen values, keyword only."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, Self

import msgspec

from aiockpt.errors import ConfigError
from aiockpt.observing import Observer

__all__ = ["Every", "Latest", "Options", "RestartPolicy", "Snapshot"]

Snapshot = Literal["guarded", "inline"]

_LARGEST_COUNT = (1 << 63) - 1
_LONGEST_SECONDS = 1e9
"""32 years; the waits of the operating system take no infinity, and threads no more than 292 years."""


_TIMEOUTS = ("start_timeout", "stall_timeout", "io_timeout", "arrival_timeout", "linger_timeout", "close_timeout")


def _refuse(argument: str, why: str, next: str) -> ConfigError:
    return ConfigError(f"{argument} was refused", why=why, next=next, argument=argument)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # the user's code; and an int of 5,000 digits has no repr
        return f"a {type(value).__qualname__}"
    return text if len(text) <= 200 else text[:200] + "…"


def _check_count(argument: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_COUNT:
        raise _refuse(
            argument, f"{_shown(value)} is not a whole number of at least {least}", f"give {argument} an int >= {least}"
        )


def _check_number(argument: str, value: object, otherwise: str = "", *, or_zero: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value <= _LONGEST_SECONDS or (or_zero and value == 0)):  # type: ignore[operator]
        raise _refuse(argument, f"{_shown(value)} is not a finite positive number", f"give a number > 0{otherwise}")


def _check_observer(observer: object) -> None:
    if observer is None:
        return
    next = "give an object of a class that derives from aiockpt.Observer, or None"
    if isinstance(observer, type):
        raise _refuse("observer", f"{_shown(observer)} is a class, not an object of it", next)
    lacking = [name for name in ("started", "completed", "failed") if not callable(getattr(observer, name, None))]
    if lacking:
        raise _refuse("observer", f"{_shown(observer)} has no {lacking[0]}()", next)


def _check_group(group: object) -> None:
    if group is None:
        return
    next = "give what new_group() or mesh.get_group() returned on its members, or None for the default group"
    distributed = sys.modules.get("torch.distributed")  # whoever has a group has imported it; the worker never does
    if not isinstance(group, getattr(distributed, "ProcessGroup", ())):
        member = getattr(distributed, "GroupMember", None)
        if member is not None and group is member.NON_GROUP_MEMBER:
            raise _refuse("process_group", "this process is no member of it", next)
        raise _refuse("process_group", f"{_shown(group)} is no torch.distributed.ProcessGroup", next)
    assert distributed is not None
    try:
        distributed.get_rank(group)
    except ValueError as exc:  # destroyed, or made past torch.distributed
        raise _refuse("process_group", f"torch.distributed does not know it: {exc}", next) from exc


def _globs(value: object) -> tuple[str, ...]:
    next = 'give a list of globs over dotted names, as in replicated=["model.*"]'
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _refuse("replicated", f"{_shown(value)} is no list", next)
    for glob in value:
        if not isinstance(glob, str) or not glob:
            raise _refuse("replicated", f"{_shown(glob)} is no glob", next)
    return tuple(value)


def _absolute(run: object) -> str:
    try:
        path = os.fspath(run)  # type: ignore[call-overload]  # what has no path raises
        path.encode("utf-8")  # it travels to the worker, and into JSON, as text
        if path and "\0" not in path:
            return str(os.path.abspath(path))
        why = f"{_shown(run)} is not the path of a directory"
    except (TypeError, AttributeError, UnicodeEncodeError):  # bytes have no encode
        why = f"{_shown(run)} is not the path of a directory as text"
    except FileNotFoundError:
        why = f"{_shown(run)} is relative, and the working directory was removed"
    raise _refuse("run", why, 'give a path, as in Checkpointer("runs/exp1")')


class Latest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keep the newest ``n`` committed checkpoints; older ones are removed after a commit."""

    n: int

    def __post_init__(self) -> None:
        _check_count("Latest(n)", self.n)


class Every(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When ``due()`` gives a reason by itself."""

    steps: int | None = None
    """Steps between two saves: due where ``(step + 1) % steps == 0``."""
    minutes: float | None = None
    """Minutes since the last save began, or since open."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise _refuse("Every()", "it has neither steps nor minutes", "give one, as in Every(minutes=10)")
        if self.steps is not None:
            _check_count("Every(steps)", self.steps)
        if self.minutes is not None:
            _check_number("Every(minutes)", self.minutes)


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often, and how fast, a dead worker is started again."""

    tries: int = 3
    """Restarts within ``window``; one more death is a RestartLimitError."""
    window: float = 300.0
    """Seconds after which a restart is forgotten."""
    delays: tuple[float, ...] = (0.0, 0.5, 2.0)
    """Seconds to wait before the first, second, … restart within the window; the last one repeats. The first is
    immediate: most deaths are single."""

    def __post_init__(self) -> None:
        _check_count("RestartPolicy(tries)", self.tries, 0)
        _check_number("RestartPolicy(window)", self.window)
        if not isinstance(self.delays, tuple) or not self.delays:
            raise _refuse(
                "RestartPolicy(delays)", f"{_shown(self.delays)} is no tuple of seconds", "give one, as in (0, 0.5)"
            )
        for delay in self.delays:
            _check_number("RestartPolicy(delays)", delay, ", or 0 for at once", or_zero=True)

    def delay(self, restarts: int) -> float:
        """Seconds before the next restart when ``restarts`` lie within the window already."""
        return self.delays[min(restarts, len(self.delays) - 1)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of a Checkpointer, normalised; timeouts are seconds, ``None`` is no limit."""

    run: str
    """Absolute path of the run directory."""
    keep: Latest | None = None
    """Retention; None keeps all."""
    every: Every | None = None
    """What ``due()`` goes by; None leaves it to ``request_save``."""
    snapshot: Snapshot = "guarded"
    """``guarded`` copies optimizer-owned tensors behind the training thread, ``inline`` copies all in ``save()``."""
    capacity: int | None = None
    """Most bytes of shared memory that the arena may take."""
    process_group: Any = None
    """The ranks that save together; None is the default group where torch.distributed is initialised, else this one."""
    replicated: tuple[str, ...] = ()
    """Globs over dotted names of plain tensors that are equal on all ranks, and written once."""
    restart: RestartPolicy = RestartPolicy()
    """When a dead worker is started again."""
    observer: Observer | None = None
    """What is told of the spans of this run; None costs nothing."""
    start_timeout: float | None = 60.0
    """For the worker to come up."""
    stall_timeout: float | None = 60.0
    """For a sign of life: the worker's beat, with several ranks also the trainer's (so longer than native code holds
    Python's lock in one go), a pending copy that an optimizer waits for."""
    io_timeout: float | None = 600.0
    """For one write, sync or rename to progress."""
    arrival_timeout: float | None = 600.0
    """For all ranks to call ``save()``, once one has; longer than the longest evaluation that only some of them do."""
    linger_timeout: float | None = 60.0
    """How long a worker may outlive its trainer to finish what was staged."""
    close_timeout: float | None = 600.0
    """For the whole of ``close()``."""

    @classmethod
    def make(cls, run: str | os.PathLike[str], *, replicated: Sequence[str] = (), **arguments: Any) -> Self:
        """Check and normalise the constructor's arguments.

        Raises:
            ConfigError: Names the argument, what was given, and what is taken.
        """
        options = cls(run=_absolute(run), replicated=_globs(replicated), **arguments)
        options._check()
        return options

    def _check(self) -> None:
        for argument, kind in (("keep", Latest), ("every", Every)):
            value = getattr(self, argument)
            if value is not None and not isinstance(value, kind):
                raise _refuse(
                    argument, f"{_shown(value)} is no {kind.__name__}", f"give aiockpt.{kind.__name__}(…), or None"
                )
        if not isinstance(self.snapshot, str) or self.snapshot not in ("guarded", "inline"):
            raise _refuse("snapshot", f"{_shown(self.snapshot)} is unknown", 'give "guarded" or "inline"')
        if self.capacity is not None:
            _check_count("capacity", self.capacity)
        _check_group(self.process_group)
        if not isinstance(self.restart, RestartPolicy):
            raise _refuse("restart", f"{_shown(self.restart)} is no RestartPolicy", "give aiockpt.RestartPolicy(…)")
        _check_observer(self.observer)
        for argument in _TIMEOUTS:
            value = getattr(self, argument)
            if value is not None:
                _check_number(argument, value, ", in seconds, or None for no limit")
