"""The output of all children of a context: descriptors for them, and what becomes of what they print."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.to_thread

from aiockpt.elastic.printing.last_words import end_of_file
from aiockpt.elastic.printing.lines import needles
from aiockpt.elastic.printing.log_writer import LogFeed, LogWriter
from aiockpt.elastic.printing.logs import check_filters
from aiockpt.elastic.printing.output_statistics import OutputStatistics
from aiockpt.elastic.printing.pipe_reader import PipeReader
from aiockpt.elastic.printing.sinks import Console, Cursor, LogFile, open_log
from aiockpt.elastic.printing.teed_stream import TeedStream
from aiockpt.errors import StorageError

__all__ = ["Destinations", "Output"]

_log = logging.getLogger("aiockpt.elastic")

_PIPE_NBYTES = 1 << 20
"""The kernel's default limit for one pipe: what a child can print before it waits for a busy event loop."""
_ALL_PIPES_NBYTES = 32 << 20
"""Half of what the kernel lets one user have by default; beyond that new pipes of that user get 8 KiB."""
_CONSOLE_SECONDS = 1.0
"""Kept for the console at the end, where a stuck disk takes the time of ``finish``; at most a quarter of it."""
_REPORT_SECONDS = 1.0
"""For the log to take what could not be written: it may go to the very console that is stuck."""


class Destinations(Protocol):
    """Where the streams of each rank go; ``LogsDest`` is one."""

    @property
    def stdouts(self) -> Mapping[int, str]:
        """The file by rank; "" is the console as it is, ``os.devnull`` nowhere."""

    @property
    def stderrs(self) -> Mapping[int, str]:
        """The same for stderr."""

    @property
    def tee_stdouts(self) -> Mapping[int, str]:
        """Has the ranks that are shown on the console, with prefixes, beside going to the file in ``stdouts``."""

    @property
    def tee_stderrs(self) -> Mapping[int, str]:
        """The same for stderr."""

    @property
    def filtered_stdout(self) -> str:
        """The file for the lines of all those ranks that the filters choose."""

    @property
    def filtered_stderr(self) -> str:
        """The same for stderr."""


@dataclass(frozen=True)
class _Side:
    """What stdout, or stderr, of all ranks have in common."""

    name: str
    descriptor: int
    files: Mapping[int, str]
    teed: Mapping[int, str]
    filters: Sequence[str]
    filtered_path: str


class Output:
    """What the children of one context print.

    A stream that is only redirected gets its file's own descriptor: nothing of it passes through here. One that is
    teed gets a pipe, which is read on the event loop; one thread writes the files and one the console, both only where
    something is teed, so that a slow one of them holds up neither the other, nor the loop, nor a child.
    For each stream and place up to 16 MiB may wait; what is more is dropped, whole lines at a time, counted, and marked
    where it is missing. A file that cannot be written, on a full disk for example, is named in the log once and tried
    again every second.

    Args:
        name: Of the context; with the rank it is the prefix of a line on the console: ``[name0]:``.
        logs: Where the streams go. The directories are there.
        nprocs: How many ranks.
        prefixes: Other prefixes, by rank.
        stdout_filters: Lines of teed streams that contain one of these also go to ``logs.filtered_stdout``.
        stderr_filters: The same for stderr.

    Thread-safety: one thread, the event loop's, but for ``open`` and ``tail``, which block and may run in another
    while nothing else does.
    """

    def __init__(
        self,
        name: str,
        logs: Destinations,
        *,
        nprocs: int,
        prefixes: Mapping[int, str] | None = None,
        stdout_filters: Sequence[str] = (),
        stderr_filters: Sequence[str] = (),
    ) -> None:
        self._nprocs = nprocs
        self._logs = logs
        self._prefixes = {
            rank: (prefixes or {}).get(rank, f"[{name}{rank}]:").encode(errors="replace") for rank in range(nprocs)
        }
        self._sides = (
            _Side("stdout", 1, logs.stdouts, logs.tee_stdouts, stdout_filters, logs.filtered_stdout),
            _Side("stderr", 2, logs.stderrs, logs.tee_stderrs, stderr_filters, logs.filtered_stderr),
        )
        self._console = LogWriter("aiockpt-console", report=_log.warning)
        self._files = LogWriter("aiockpt-log-files", report=self._report)
        self._streams: dict[tuple[str, int], TeedStream] = {}
        self._reader = PipeReader(report=self._report)
        self._given: dict[int, tuple[int, int]] = {}
        self._copies: dict[int, list[int]] = {rank: [] for rank in range(nprocs)}
        """Descriptors that are the child's and still ours too."""
        self._devnull = -1
        self._is_finished = False

    # Before the children run

    def open(self) -> None:
        """Open files and pipes and start the threads: all, or nothing. Blocks.

        Raises:
            StorageError: The operating system refused; ``path`` says which file.
            ConfigError: A path is none, or there are filters and no file for them.
        """
        out, err = self._sides
        check_filters(self._logs, stdout_filters=out.filters, stderr_filters=err.filters)
        try:
            cursor, pipe_nbytes = Cursor(), self._pipe_nbytes()
            outs, errs = (self._open_side(side, cursor, pipe_nbytes) for side in self._sides)
            self._given = {rank: (outs[rank], errs[rank]) for rank in range(self._nprocs)}
            if self._streams:
                self._start_writers()
        except BaseException:
            self.close()
            raise

    def descriptors(self, rank: int) -> tuple[int, int]:
        """Return what the child gets as its descriptors 1 and 2; ours 1 and 2 where it prints to the console itself."""
        return self._given[rank]

    def release(self, rank: int) -> None:
        """Close our copies of what the child has by now; without this its streams have no end. Idempotent."""
        for descriptor in self._copies.pop(rank, ()):
            os.close(descriptor)

    # While they run

    async def run(self) -> None:
        """Read until all pipes are at their end, or ``finish`` is called; returns at once where nothing is teed.

        Cancellation: nothing that was read is lost; ``finish`` reads the rest.
        """
        await self._reader.run()

    async def finish(self, timeout: float) -> None:
        """Read and write what is left, once the children are gone, and close all.

        All that was printed before the call is in files and on the console then, unless ``timeout`` seconds were not
        enough: what is missing is counted and logged (which takes a second more where the log is stuck too).
        Descendants that hold a pipe open are not waited for. Idempotent.

        Cancellation: what is not written yet is dropped by ``close``.
        """
        if self._is_finished:
            return
        self._is_finished = True
        deadline = anyio.current_time() + timeout
        await self._reader.stop()
        await self._reader.drain(deadline)
        for stream in self._streams.values():
            stream.end()
        if self._streams:
            left = max(0.0, deadline - anyio.current_time())
            await anyio.to_thread.run_sync(
                self._end_writers, left, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
            )
        self.close()

    def close(self) -> None:
        """Close all descriptors and end the threads; without ``finish`` what is not written yet is dropped. Idempotent.

        ``run`` must be over. Blocks up to 2 s where a thread is stuck that ``finish`` did not wait for.
        """
        self._reader.close()
        for rank in list(self._copies):
            self.release(rank)
        devnull, self._devnull = self._devnull, -1
        if devnull >= 0:
            os.close(devnull)
        self._given = {}
        self._files.close()
        self._console.close()

    # What was seen

    def tail(self, rank: int) -> str:
        """Return the last lines of a rank, up to 64 KiB of its stderr, and then as much of its stdout.

        Nothing of what goes to the console unseen. Blocks where a stream is only redirected: its file is read.
        """
        found = {}
        for side in reversed(self._sides):
            stream = self._streams.get((side.name, rank))
            path = side.files.get(rank, "")
            if stream is not None:
                text = stream.last_words.text()
            else:
                text = end_of_file(path) if path not in ("", os.devnull) else ""
            if text:
                found[side.name] = text if text.endswith("\n") else text + "\n"
        if len(found) == 1:
            return next(iter(found.values()))
        return "".join(f"{name}:\n{text}" for name, text in found.items())

    def statistics(self) -> OutputStatistics:
        """Return the numbers as they are now."""
        return OutputStatistics(
            streams=tuple(stream.statistics() for stream in self._streams.values()),
            errors=dict(self._reader.errors + self._files.errors + self._console.errors),
        )

    # Opening

    def _pipe_nbytes(self) -> int:
        pipes = sum(rank in side.teed for side in self._sides for rank in range(self._nprocs))
        return min(_PIPE_NBYTES, _ALL_PIPES_NBYTES // max(1, pipes))

    def _open_side(self, side: _Side, cursor: Cursor, pipe_nbytes: int) -> list[int]:
        console = Console(side.name, getattr(sys, side.name), cursor)
        self._console.add(console)
        filtered: LogFile | None = None
        if side.filters:
            filtered = self._log_file(side.filtered_path)
        return [
            self._open_teed(side, rank, console, filtered, pipe_nbytes)
            if rank in side.teed
            else self._open_plain(side, rank)
            for rank in range(self._nprocs)
        ]

    def _open_plain(self, side: _Side, rank: int) -> int:
        path = side.files.get(rank, "")
        if path == "" and _is_open(side.descriptor):
            return side.descriptor
        if path in ("", os.devnull):
            if self._devnull < 0:
                self._devnull = open_log(os.devnull)
            return self._devnull
        descriptor = open_log(path)
        self._copies[rank].append(descriptor)
        return descriptor

    def _open_teed(self, side: _Side, rank: int, console: Console, filtered: LogFile | None, pipe_nbytes: int) -> int:
        path, prefix = side.files.get(rank, ""), self._prefixes[rank]
        what = f"rank {rank} {side.name}"
        shown = self._console.feed(console, prefix=prefix, on_gap=partial(self._drops, what, console.name))

        def feed(file: LogFile, prefix: bytes) -> LogFeed:
            return self._files.feed(
                file,
                prefix=prefix,
                on_gap=partial(self._drops, what, file.name),
                on_mark=partial(_tell_of_gap, shown, self._prefixes[rank], file.name),
            )

        file = feed(self._log_file(path), b"") if path not in ("", os.devnull) else None
        ours, theirs = _open_pipe(pipe_nbytes)
        self._copies[rank].append(theirs)
        self._streams[side.name, rank] = stream = TeedStream(
            rank,
            side.name,
            ours,
            prefix=prefix,
            file=file,
            console=shown,
            filtered=feed(filtered, prefix) if filtered is not None else None,
            needles=needles(side.filters),
        )
        self._reader.add(stream)
        return theirs

    def _log_file(self, path: str) -> LogFile:
        file = LogFile(path, open_log(path))
        self._files.add(file)
        return file

    def _start_writers(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # what the program said before shall come before; no more than that
                stream.flush()
        try:
            self._files.start()
            self._console.start()
        except RuntimeError as exc:
            raise StorageError(
                "no thread was started to write the output of the children",
                why=str(exc),
                next="raise the limit of processes and threads",
                errno=errno.EAGAIN,
            ) from exc

    # Ending

    def _end_writers(self, timeout: float) -> None:
        """End both threads and log what is missing; blocks, in a thread of its own."""
        deadline = time.monotonic() + timeout
        unwritten = self._files.end(timeout - min(_CONSOLE_SECONDS, timeout / 4))
        unwritten |= self._console.end(max(0.0, deadline - time.monotonic()))
        if unwritten or any(stream.lines_dropped or stream.unread_nbytes for stream in self.statistics().streams):
            # In a thread that may be left behind, as the log may go to the very console that is stuck.
            told = threading.Thread(
                target=self._tell_of_missing, args=(unwritten, timeout), name="aiockpt-log-report", daemon=True
            )
            told.start()
            told.join(_REPORT_SECONDS)

    def _tell_of_missing(self, unwritten: Mapping[str, int], timeout: float) -> None:
        for name, nbytes in unwritten.items():
            _log.warning("%d bytes of output were not written to %s within %g s", nbytes, name, timeout)
        for stream in self.statistics().streams:
            if stream.lines_dropped or stream.unread_nbytes:
                _log.warning(
                    "of the %d lines of rank %d %s these are missing: %d in its file, %d on the console, "
                    "%d in the file of the filters; and %d bytes were not read",
                    stream.lines_read,
                    stream.rank,
                    stream.stream,
                    stream.file_lines_dropped,
                    stream.console_lines_dropped,
                    stream.filtered_lines_dropped,
                    stream.unread_nbytes,
                )

    # Telling

    def _report(self, *message: Any) -> None:
        """Log a warning from the thread that may be held up by the console anyway; the log may go there."""
        self._console.call(partial(_log.warning, *message))

    def _drops(self, what: str, where: str, why: str) -> None:
        self._report(
            "lines of %s are dropped from %s\nwhy: %s\nnext: let it print less, or to a faster place", what, where, why
        )


def _tell_of_gap(console: LogFeed, prefix: bytes, path: str, text: str) -> None:
    console.put(prefix + f"[aiockpt: {text}; they are missing in {path}]\n".encode(errors="replace"))


def _open_pipe(nbytes: int) -> tuple[int, int]:
    """Return the end that we read, which does not block, and the end that the child writes."""
    try:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
    except OSError as exc:
        raise StorageError(
            "no pipe was opened for the output of a child",
            why=f"{exc.strerror} (errno {exc.errno})",
            next="raise the limit that is named, or tee fewer streams",
            errno=exc.errno,
        ) from exc
    os.set_blocking(ours, False)
    with contextlib.suppress(OSError):  # refused where the user has too many; then it stays as it is
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, nbytes)
    return ours, theirs


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
