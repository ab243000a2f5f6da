"""A process that failed: how it ended, by whose doing, and what it said."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from aiockpt.elastic.failures.error_data import NOT_AVAILABLE, ErrorData, read_error_file
from aiockpt.process_ends import describe_exit, name_of_signal

__all__ = ["Cause", "ProcessFailure"]

_SECOND_NS = 1_000_000_000
_RAW_SHOWN = 400
"""Characters of an unreadable error file that stand in the message."""

_HINT_CRASH = "a crash in native code: look at the end of its stderr for the stacks of its threads"
_HINTS_BY_SIGNAL: dict[int, str] = {
    signal.SIGKILL: "not sent by us: look in the kernel's log (dmesg) for the out-of-memory killer, then for an "
    "operator or job scheduler",
    signal.SIGBUS: f"{_HINT_CRASH}; SIGBUS is also how a full /dev/shm or a file cut short shows",
    signal.SIGPIPE: "it wrote to a pipe or socket that nobody reads any more",
    **dict.fromkeys((signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL), _HINT_CRASH),
}
_HINT_TRACEBACK = "to see its traceback here, decorate its main function with aiockpt.elastic.record"
_HINTS_BY_CODE: dict[int, str] = {
    2: "often a wrong argument on its command line: look at its stderr",
    126: "the program was found and could not be executed: look at its mode, and at the line #! in it",
    127: "a command was not found, or a shared library: look at its stderr",
    **{
        128 + number: f"a shell's way to say that a child of it was ended by {name_of_signal(number)}"
        for number in (1, 2, 6, 9, 11, 15)
    },
}


class Cause(StrEnum):
    """By whose doing a process failed."""

    OWN = "own"
    """Its own exit code, or a signal that we did not send."""
    STOPPED = "stopped"
    """We stopped it, as others had failed or the caller asked."""
    OUT_OF_MEMORY = "out_of_memory"
    """The kernel killed it as memory ran out."""
    NO_RESULT = "no_result"
    """It ended, with whatever exit code, without the value that it had to return."""
    GUARDIAN = "guardian"
    """The guardian that had started it died, and all its processes were ended."""


@dataclass
class ProcessFailure:
    """A failed process, with the attributes of torch's and what tells cause from consequence.

    Made once its end is known. Reads the error file, so make it in a thread; nothing that is found there raises.

    Args:
        local_rank: Its rank on this host.
        pid: Its process id.
        exitcode: Its exit code; negative for the signal that ended it.
        error_file: Where it would have written its error file; becomes ``"<N/A>"`` where there is none.
        cause: By whose doing it failed.
        detected_ns: When its end was noticed, ``CLOCK_MONOTONIC`` in ns; 0 for now.
        order: Its place among the ends that were noticed at the same time.
        sent_signal: The last signal that we sent it, if any.
        sent_ns: When the first was sent, ``CLOCK_MONOTONIC`` in ns; 0 if unknown or never.
        output_tail: The last lines that it printed.
        stacks: Of its threads, asked for before it was killed.
        hostname: Where it ran.

    Attributes:
        error_file_data: JSON of the error file; ``{"message": "<NONE>"}`` where there is none, or it is unreadable.
        message: As in the error file: a text, or a dict with the traceback at ``["extraInfo"]["py_callstack"]``; made
            up from how the process ended where the file has none.
        timestamp: Of the error, in seconds since the epoch; where the file has none, of its detection.
        failed_ns: When it failed, ``CLOCK_MONOTONIC`` in ns: as it recorded by itself, else ``detected_ns``.
        has_own_error: Whether it recorded an error, and did so before we sent it a signal.
        error_file_problem: What is wrong with the error file; empty where nothing is, or none is there.
        error_file_raw: Then: how the file begins.
    """

    local_rank: int
    pid: int
    exitcode: int
    error_file: str
    error_file_data: dict[str, Any] = field(init=False, repr=False)
    message: str | dict[str, Any] = field(init=False)
    timestamp: int = field(init=False)
    _: KW_ONLY
    cause: Cause = Cause.OWN
    detected_ns: int = 0
    order: int = 0
    sent_signal: int | None = None
    sent_ns: int = 0
    output_tail: str = field(default="", repr=False)
    stacks: str = field(default="", repr=False)
    hostname: str = field(default_factory=lambda: os.uname().nodename)
    failed_ns: int = field(init=False)
    has_own_error: bool = field(init=False)
    error_file_problem: str = field(init=False)
    error_file_raw: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.detected_ns = self.detected_ns or time.monotonic_ns()
        boot_ns = time.time_ns() - time.monotonic_ns()  # of the wall clock, when the monotonic one was 0
        found = read_error_file(self.error_file)
        if found is None:
            self.error_file = NOT_AVAILABLE
            found = ErrorData({"message": "<NONE>"}, "", None, None, "", "")
        self.error_file_data, self.message = found.data, found.message
        self.error_file_problem, self.error_file_raw = found.problem, found.raw
        detected = (self.detected_ns + boot_ns) // _SECOND_NS
        self.timestamp = detected if found.timestamp is None else found.timestamp
        self.failed_ns = min(self.detected_ns, _recorded_ns(found, boot_ns) or self.detected_ns)
        self.has_own_error = bool(found.message) and (self.cause is not Cause.STOPPED or self.failed_ns < self.sent_ns)
        if not self.message:
            self.message = self._made_up()

    def signal_name(self) -> str:
        """Return the name of the signal that ended it, ``"<N/A>"`` where none did or it has no name."""
        try:
            return signal.Signals(-self.exitcode).name if self.exitcode < 0 else NOT_AVAILABLE
        except ValueError:
            return NOT_AVAILABLE

    def timestamp_isoformat(self) -> str:
        """Return the time of the error as ``YYYY-MM-DD_HH:MM:SS``, local."""
        return datetime.fromtimestamp(self.timestamp).isoformat(sep="_")

    def text(self) -> str:
        """Return what there is to read: the traceback, else the message."""
        if isinstance(self.message, str):
            return self.message
        extra = self.message.get("extraInfo")
        stack = extra.get("py_callstack") if isinstance(extra, dict) else None
        text = self.message.get("message", NOT_AVAILABLE) if stack is None else stack
        return text if isinstance(text, str) else repr(text)

    def cause_in_words(self) -> str:
        """Return by whose doing it failed, as a clause."""
        ended = describe_exit(self.exitcode)
        match self.cause:
            case Cause.OWN:
                return ended
            case Cause.STOPPED:
                with_it = "" if self.sent_signal is None else f" with {name_of_signal(self.sent_signal)}"
                how = f"; it was ended by {name_of_signal(-self.exitcode)}" if self.exitcode < 0 else f"; {ended}"
                if self.sent_signal is not None and self.exitcode == -self.sent_signal:
                    how = ""
                before = "; it had failed before that" if self.has_own_error else ""
                return f"we stopped it{with_it}{how}{before}"
            case Cause.OUT_OF_MEMORY:
                return "the kernel killed it, as memory ran out"
            case Cause.NO_RESULT:
                return f"it did not return a value; {ended}"
            case Cause.GUARDIAN:
                return "the guardian that had started it died"

    def _made_up(self) -> str:
        """Say how it ended, for want of its own words; the first line of a signal is torch's."""
        if self.exitcode < 0:
            lines = [f"Signal {-self.exitcode} ({self.signal_name()}) received by PID {self.pid}"]
        else:
            lines = [f"Exit code {self.exitcode} of PID {self.pid}"]
            if self.exitcode > 0:  # as in torch, for those who read it to decide on a retry
                self.error_file_data["errorTraits"] = {"category": "system_terminated_error", "retryability": "False"}
        if self.error_file_problem:
            lines.append(f"why: unknown; of its error file {self.error_file}: {self.error_file_problem}")
            lines.append(f"it begins: {self.error_file_raw[:_RAW_SHOWN]!r}")
        if hint := self._hint():
            lines.append(f"next: {hint}")
        return "\n".join(lines)

    def _hint(self) -> str:
        match self.cause:
            case Cause.OUT_OF_MEMORY:
                return (
                    "give it more memory, or use less: smaller batches, fewer DataLoader workers; "
                    "/dev/shm and page cache of written files count too"
                )
            case Cause.NO_RESULT:
                return "look for os._exit, sys.exit or a crash in what it ran; a function must return to succeed"
            case Cause.STOPPED:
                return "look at the root cause; this one was stopped after it"
            case Cause.GUARDIAN:
                return "look in the kernel's log for what ended the guardian (memory, an operator)"
        if self.exitcode < 0:
            return _HINTS_BY_SIGNAL.get(-self.exitcode, "somebody else on this host sent that signal")
        return _HINTS_BY_CODE.get(self.exitcode, _HINT_TRACEBACK)


def _recorded_ns(found: ErrorData, boot_ns: int) -> int | None:
    """Return when an error was recorded on ``CLOCK_MONOTONIC``.

    Torch's files have whole seconds of the wall clock. The end of that second is taken: never too early, so that an
    error is not put before the death that caused it, and still seconds better than detection where a long teardown
    followed.
    """
    if found.monotonic_ns is not None:
        return found.monotonic_ns if found.monotonic_ns > 0 else None
    if found.timestamp is None:
        return None
    return max((found.timestamp + 1) * _SECOND_NS - boot_ns, 1)
