"""The worker's side of the arena: makes it, adopts it, reads it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Callable, Iterator

from aiockpt.errors import ProtocolError, StorageError
from aiockpt.storage.faults import NO_FAULTS, FaultPoint, Faults
from aiockpt.worker.activity import Activity
from aiockpt.worker.memory import Room, keep_free, rooms, tightest

__all__ = ["PIECE_NBYTES", "ArenaMap", "allocate"]

PIECE_NBYTES = 64 << 20
"""Allocated in one system call: about 20 ms, so that a beat can say that it goes on."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; required where the sysctl vm.memfd_noexec is 2

_OOM_SCORE = "/proc/self/oom_score_adj"


class ArenaMap:
    """A read-only mapping of an arena. The one who asks for bytes says when they are no longer read."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Map and close ``fd``, also on failure.

        Raises:
            ProtocolError: The descriptor is no arena of that size.
            OSError: The mapping was refused.
        """
        try:
            _check(fd, nbytes)
            self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
            self._map.madvise(mmap.MADV_DONTDUMP)  # no core file as large as the training state
        finally:
            os.close(fd)
        self.nbytes = nbytes

    def view(self) -> memoryview:
        """Return the arena's bytes; the caller releases the view, and all cut from it, before ``close``."""
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap, which takes a moment: the last one to do so frees the memory.

        Raises:
            BufferError: A view was not released.
        """
        self._map.close()


def allocate(
    nbytes: int,
    *,
    capacity: int | None,
    activity: Activity,
    stop: Callable[[], bool] = lambda: False,
    faults: Faults = NO_FAULTS,
) -> int:
    """Make an arena whose every page is there, and return its descriptor.

    Blocks, 0.3 s a GiB. Under a memory control group nobody refuses an allocation: what breaks the limit is ended by
    the kernel. So the limits are looked at first, and while it allocates this process makes itself the one to be
    ended, before the trainer has the descriptor.

    Args:
        nbytes: Size in bytes, more than 0.
        capacity: Most bytes that the user allows.
        activity: Learns of every piece.
        stop: Asked between two pieces; True ends it.
        faults: Fault layer.

    Raises:
        StorageError: Refused, with figures; ``errno`` is ENOMEM, or EFBIG under a limit on file sizes.
        InterruptedError: ``stop`` said so.
    """
    if capacity is not None and nbytes > capacity:
        raise _refused(nbytes, f"capacity={capacity} allows {_mib(capacity)}", "raise capacity, or save less")
    found = rooms()
    room = tightest(found)
    if room is not None and nbytes > room.free - keep_free(room):
        raise _too_large(nbytes, room)
    with contextlib.ExitStack() as stack:
        try:
            fd = _memfd()
            stack.callback(os.close, fd)
            with _first_to_be_ended():
                faults.at(FaultPoint.WORKER_ALLOCATING)
                _fill(fd, nbytes, activity, stop)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            faults.at(FaultPoint.WORKER_RESERVED)
        except InterruptedError:
            raise
        except OSError as exc:
            raise _explain(nbytes, exc) from exc
        stack.pop_all()
    return fd


def _fill(fd: int, nbytes: int, activity: Activity, stop: Callable[[], bool]) -> None:
    for start in range(0, nbytes, PIECE_NBYTES):
        if stop():
            raise InterruptedError(errno.EINTR, "told to stop")
        with activity.operation("allocate the arena"):
            os.posix_fallocate(fd, start, min(PIECE_NBYTES, nbytes - start))


def _memfd() -> int:
    try:
        return os.memfd_create("aiockpt-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return os.memfd_create("aiockpt-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


@contextlib.contextmanager
def _first_to_be_ended() -> Iterator[None]:
    """Make this process the one that the kernel ends where memory runs out."""
    try:
        with open(_OOM_SCORE, encoding="ascii") as file:
            before = file.read()
        _write(_OOM_SCORE, "1000")
    except OSError:  # no /proc, or a security module: the limits were looked at anyway
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _write(_OOM_SCORE, before)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _check(fd: int, nbytes: int) -> None:
    size = os.fstat(fd).st_size
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if size != nbytes or seals & _SEALS != _SEALS:
        raise ProtocolError(
            "the descriptor that came with Adopt is no arena",
            why=f"it has {size} bytes and seals {seals:#x}; {nbytes} bytes and {_SEALS:#x} were announced",
        )


def _explain(nbytes: int, exc: OSError) -> StorageError:
    if exc.errno == errno.EFBIG:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return _refused(
            nbytes,
            f"the limit on file sizes (RLIMIT_FSIZE, ulimit -f) is {_mib(limit)}, and it holds for shared memory",
            "raise it before the trainer starts: ulimit -f unlimited",
            errno.EFBIG,
        )
    return _refused(nbytes, f"{exc.strerror} (errno {exc.errno})", "free memory, or save less")


def _too_large(nbytes: int, room: Room) -> StorageError:
    return _refused(
        nbytes,
        f"{room.source} leaves {_mib(room.free)} of {_mib(room.limit)}, of which {_mib(keep_free(room))} are kept free",
        "free memory, raise the memory limit of the job, or save less",
    )


def _refused(nbytes: int, why: str, next: str, number: int = errno.ENOMEM) -> StorageError:
    return StorageError(f"an arena of {_mib(nbytes)} was refused", why=why, next=next, errno=number)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
