"""Write the error file: what ended a trainer, told to its supervisor.

Torch's format as a superset, so that each reads the other's files::

    {"message": {"message": "Type: text", "extraInfo": {"py_callstack": "...", "timestamp": "seconds"}},
     "aiockpt": {"schema": 1, "timestamp_ns": ..., "monotonic_ns": ..., "pid": ..., "hostname": "...",
                 "rank": ..., "local_rank": ..., "restart_count": ...,
                 "exception": {"type": ..., "message": ..., "notes": [...], "cause": {...}, "exceptions": [...]}}}

Standard library alone, and small: it runs in every child before the user's code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

from aiockpt.elastic.failures.error_data import NOT_AVAILABLE, SECTION, read_error_file

__all__ = ["ErrorHandler", "get_error_handler", "record", "worker_main"]

_log = logging.getLogger("aiockpt.elastic")

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SCHEMA = 1

# Characters. JSON in ASCII needs up to 12 bytes for one, and all of a file must stay below error_data.LARGEST_NBYTES:
# 8 Ki + 40 Ki + 16 * (512 + 4 * 256) are 72 Ki, 864 KiB at the worst.
_LONGEST_MESSAGE = 8 << 10
_LONGEST_TRACEBACK = 40 << 10
_MOST_EXCEPTIONS = 16
_LONGEST_TEXT = 512
_MOST_NOTES = 4
_LONGEST_NOTE = 256

_MARK = "_aiockpt_recorded_by"

_CO_COROUTINE = 0x80  # inspect.CO_COROUTINE; inspect itself takes longer to import than all that is imported here


class ErrorHandler:
    """Writes an exception, or a child's error file, to the error file of this process.

    That is the path in ``TORCHELASTIC_ERROR_FILE``, else in ``AIOCKPT_ERROR_FILE``; where neither names one, or the
    file cannot be written, the record goes to stderr as one line of JSON. Derive from it, override ``initialize`` or
    ``record_exception``, and give it to ``record``. None of its methods raises.
    """

    def initialize(self) -> None:
        """Prepare the process before the recorded code runs: crashes in native code print the stacks of all threads."""
        try:
            faulthandler.enable(all_threads=True)
        except Exception as exc:  # noqa: BLE001  # a replaced sys.stderr may raise anything
            _log.warning("no stacks will be printed at a crash in native code: %s: %s", type(exc).__name__, exc)

    def record_exception(self, e: BaseException) -> None:
        """Write an exception with its traceback, causes, notes and group members."""
        self._put(_as_data(e))

    def override_error_code_in_rootcause_data(
        self, rootcause_error_file: str, rootcause_error: dict[str, Any], error_code: int = 0
    ) -> None:
        """Put the exit code into what a child recorded: it cannot know its own where a signal ended it."""
        message = rootcause_error.get("message")
        if isinstance(message, dict):
            message["errorCode"] = error_code
        else:
            _log.warning(
                "the exit code %d is not added to what %s says: its message is no record of fields",
                error_code,
                rootcause_error_file,
            )

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Make a child's error file ours.

        Args:
            rootcause_error_file: Of the child; where it cannot be read, ours says so, with its beginning.
            error_code: Exit code of the child, 0 to leave it out.
        """
        found = read_error_file(rootcause_error_file)
        if found is None or found.problem:
            problem = f"why: {found.problem}\n{found.raw}" if found else "why: there is no such file"
            data = _message(f"the error file of a child, {rootcause_error_file}, was not understood", problem)
        else:
            data = found.data
        if error_code:
            self.override_error_code_in_rootcause_data(rootcause_error_file, data, error_code)
        _tell_of_earlier(self._get_error_file_path())
        self._put(data)

    def _get_error_file_path(self) -> str | None:
        return os.environ.get("TORCHELASTIC_ERROR_FILE") or os.environ.get("AIOCKPT_ERROR_FILE")

    def _put(self, data: dict[str, Any]) -> None:
        try:
            line = json.dumps(data)
        except RecursionError:  # a child's, nested as deep as can be read
            line = json.dumps(_message("what a child recorded is nested too deep to be passed on", ""))
        path = self._get_error_file_path()
        if path:
            try:
                _write_whole(path, line.encode("ascii"))
            except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
                _log.warning("the error file %s was not written: %s; its content goes to stderr", path, exc)
            else:
                return
        with contextlib.suppress(Exception):  # stderr may be None, closed or the user's own object
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def get_error_handler() -> ErrorHandler:
    """Return the handler that ``record`` uses where none is given."""
    return ErrorHandler()


@overload
def record(
    fn: Callable[_P, Coroutine[Any, Any, _R]], error_handler: ErrorHandler | None = None
) -> Callable[_P, Coroutine[Any, Any, _R | None]]: ...
@overload
def record(fn: Callable[_P, _R], error_handler: ErrorHandler | None = None) -> Callable[_P, _R | None]: ...
def record(fn: Callable[..., Any], error_handler: ErrorHandler | None = None) -> Callable[..., Any]:
    """Decorate the main function of a process, so that the exception that ends it is in its error file.

    The exception goes on as it came. ``SystemExit`` with code 0 becomes a return of None, with other codes it passes
    and nothing is written. Of a ``ChildFailedError``, torch's or ours, the root cause's own error file becomes that of
    this process. Coroutine functions are recorded as well.

    Args:
        fn: To be called once in a process.
        error_handler: Where to write; by default that of ``get_error_handler()``.
    """
    recording = _Recording(error_handler or get_error_handler())

    if getattr(getattr(fn, "__code__", None), "co_flags", 0) & _CO_COROUTINE:

        @wraps(fn)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                with recording:
                    return await fn(*args, **kwargs)
            except SystemExit as ended:
                if ended.code == 0:
                    return None
                raise

    else:

        @wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                with recording:
                    return fn(*args, **kwargs)
            except SystemExit as ended:
                if ended.code == 0:
                    return None
                raise

    return wrapper


def worker_main() -> _Recording:
    """Record what ends the main part of a trainer, as a context manager or, like ``record``, as a decorator.

    As a context manager it lets every exception go on, ``SystemExit`` with code 0 too: the lines behind the block must
    not run then.
    """
    return _Recording(get_error_handler())


class _Recording:
    """Records the exception that leaves its block."""

    def __init__(self, handler: ErrorHandler) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.initialize()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):  # not SystemExit and KeyboardInterrupt, as in torch
            return
        if getattr(error, _MARK, None) == os.getpid():  # by a record within this one, perhaps with the user's handler
            return
        try:
            setattr(error, _MARK, os.getpid())  # the pid, since exceptions are pickled to other processes
            if callable(getattr(error, "get_first_failure", None)):
                self._pass_on(error)
            else:
                self._handler.record_exception(error)
        except Exception:  # noqa: BLE001  # the handler may be the user's; the first exception is the one that must be seen
            _log.exception("%s was not recorded", kind.__name__ if kind else "")

    @overload
    def __call__(self, fn: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, Coroutine[Any, Any, _R | None]]: ...
    @overload
    def __call__(self, fn: Callable[_P, _R]) -> Callable[_P, _R | None]: ...
    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return record(fn, self._handler)

    def _pass_on(self, error: Any) -> None:
        """Take over the root cause of a ``ChildFailedError``, known by its method: importing torch takes seconds."""
        rank, failure = error.get_first_failure()
        if failure.error_file != NOT_AVAILABLE:
            self._handler.dump_error_file(failure.error_file, failure.exitcode)
        else:
            _log.warning(
                "rank %s failed without an error file; decorate its main function with aiockpt.elastic.record "
                "to see the traceback",
                rank,
            )


def _as_data(error: BaseException) -> dict[str, Any]:
    try:
        where = error.__traceback__
        while where is not None and where.tb_frame.f_code.co_filename == __file__:
            where = where.tb_next  # the wrapper's own frame says nothing
        stack = "".join(traceback.format_exception(type(error), error, where))
        data = _message(f"{type(error).__name__}: {_text(error)}", stack)
        data[SECTION]["exception"] = _tree(error, [])
    except Exception as trouble:  # noqa: BLE001  # no memory, or an exception class that breaks the formatting
        data = _message(type(error).__name__, f"its traceback cannot be shown: {type(trouble).__name__}")
    return data


def _message(message: str, stack: str) -> dict[str, Any]:
    now_ns = time.time_ns()
    return {
        "message": {
            "message": _cut(message, _LONGEST_MESSAGE),
            "extraInfo": {
                "py_callstack": _cut(stack, _LONGEST_TRACEBACK),
                "timestamp": str(now_ns // 1_000_000_000),
            },
        },
        SECTION: {
            "schema": _SCHEMA,
            "timestamp_ns": now_ns,
            "monotonic_ns": time.monotonic_ns(),
            "pid": os.getpid(),
            "hostname": os.uname().nodename,
            "rank": _number("RANK"),
            "local_rank": _number("LOCAL_RANK"),
            "restart_count": _number("TORCHELASTIC_RESTART_COUNT"),
        },
    }


def _tree(error: BaseException, seen: list[BaseException]) -> dict[str, Any]:
    """Return an exception with its causes and members, each once and 16 in all: chains may be circles."""
    seen.append(error)
    found: dict[str, Any] = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": _cut(_text(error), _LONGEST_TEXT),
    }
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        found["notes"] = [_cut(_text(note), _LONGEST_NOTE) for note in notes[:_MOST_NOTES]]

    def is_left(other: BaseException) -> bool:
        return len(seen) < _MOST_EXCEPTIONS and not any(other is one for one in seen)

    if error.__cause__ is not None and is_left(error.__cause__):
        found["cause"] = _tree(error.__cause__, seen)
    if isinstance(error, BaseExceptionGroup):
        found["exceptions"] = [_tree(member, seen) for member in error.exceptions if is_left(member)]
    return found


def _text(thing: object) -> str:
    try:
        return str(thing)
    except Exception:  # noqa: BLE001  # it is the user's __str__
        return f"<{type(thing).__name__} that cannot be shown>"


def _cut(text: str, longest: int) -> str:
    """Leave out the middle of what is too long: what was called is at the start, what was raised at the end."""
    if len(text) <= longest:
        return text
    mark = f"\n... {len(text) - longest} characters left out ...\n"
    start = longest // 4
    return text[:start] + mark + text[len(text) - (longest - start - len(mark)) :]


def _number(name: str) -> int | None:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


def _tell_of_earlier(path: str | None) -> None:
    """Log an error file that will be replaced: a child that inherited our path may have written it."""
    earlier = read_error_file(path) if path else None
    if earlier is not None:
        _log.warning(
            "%s exists and is overwritten; it said: %s",
            path,
            earlier.raw if earlier.problem else json.dumps(earlier.data)[:_LONGEST_MESSAGE],
        )


def _write_whole(path: str, content: bytes) -> None:
    """Put a file in place whole or not at all, whenever this process is killed.

    Raises:
        OSError: Nothing is at ``path`` that was not there before.
    """
    beside = f"{path}.{os.getpid()}.tmp"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)  # before the rename: else the name may survive a crash of the host without the bytes
        finally:
            os.close(fd)
        os.rename(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
