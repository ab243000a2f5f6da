"""What ``statistics()`` returns: frozen records of figures."""

from __future__ import annotations

import msgspec

__all__ = ["Durations", "Phases", "Rate", "Statistics"]


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """How long something took, over all times that it happened."""

    count: int = 0
    total_s: float = 0.0
    last_s: float = 0.0
    max_s: float = 0.0

    def plus(self, seconds: float) -> Durations:
        """Return these with one more."""
        return Durations(
            count=self.count + 1,
            total_s=self.total_s + seconds,
            last_s=seconds,
            max_s=max(self.max_s, seconds),
        )


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes over time."""

    nbytes: int = 0
    """All bytes."""
    seconds: float = 0.0
    """The time that they took."""
    last_gbps: float = 0.0
    """GB/s (10**9 bytes a second) of the last time."""
    gbps: float = 0.0
    """GB/s over all times."""

    def plus(self, nbytes: int, seconds: float) -> Rate:
        """Return this with one more transfer."""
        all_nbytes, all_seconds = self.nbytes + nbytes, self.seconds + seconds
        return Rate(
            nbytes=all_nbytes,
            seconds=all_seconds,
            last_gbps=_gbps(nbytes, seconds),
            gbps=_gbps(all_nbytes, all_seconds),
        )


def _gbps(nbytes: int, seconds: float) -> float:
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds by phase, of every save that came so far; the names are those of ``Saved.timings``."""

    blocked: Durations = Durations()
    """From the call of ``save()`` to its return: what training stood still, but for ``guard_wait``."""
    staged: Durations = Durations()
    """From the call until everything was copied and checked."""
    durable: Durations = Durations()
    """From the call to the commit."""
    wait: Durations = Durations()
    """``save()`` waited for the save before it; counts those that had to."""
    collect: Durations = Durations()
    """``save()`` read the state and laid out the files."""
    reserve: Durations = Durations()
    """``save()`` waited for shared memory; counts those that had to (``prepare`` is there to avoid it)."""
    stage: Durations = Durations()
    """Copying into shared memory, partly behind the training thread."""
    write: Durations = Durations()
    """The worker wrote, from the first file's creation to the last block; beside ``stage`` as bytes come in."""
    sync: Durations = Durations()
    """The worker waited until the files were durable."""
    commit: Durations = Durations()
    """The worker wrote the manifest and made the checkpoint visible."""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures since ``open()``, as of one moment. Sizes are bytes, times seconds."""

    committed: int
    """Saves that became a checkpoint."""
    failed: int
    """Saves that ended without one, or with an outcome that nobody knows; cancelled ones are not among them."""
    torn: int
    """Of the failed ones, those whose state was changed while it was copied (``TornSnapshotError``)."""
    cancelled: int
    """Saves that were cancelled, or abandoned by ``close()``."""
    skipped: int
    """Saves that ``when_busy="skip"`` left out."""
    retried: int
    """Times that a save was begun again because its worker died."""
    in_flight: int
    """Saves that have no outcome yet."""
    buffered: int
    """Of the committed ones, those that were written through the page cache because direct I/O was refused."""
    plans: int
    """Layouts of files made; a loop over one state makes one."""
    last_step: int | None
    """Step of the newest commit; None before the first."""
    last_committed_at: float | None
    """When that was, in seconds since 1970 by the machine's clock."""

    staged_nbytes: int
    """Bytes copied into shared memory, by saves whose copying ended well."""
    written_nbytes: int
    """Bytes that workers wrote, also for saves that failed or were begun again."""
    committed_nbytes: int
    """Bytes of the files of committed saves."""
    phases: Phases
    guard_wait: Durations
    """How long ``optimizer.step()`` waited for what was still being copied; counts the steps that had to. On CUDA it
    is the stream that waits, which costs the thread nothing and is not seen here."""
    stage_rate: Rate
    """Of ``stage``."""
    write_rate: Rate
    """Of ``write`` and ``sync`` together, of committed saves; as slow as staging where that is slower."""

    arena_capacity: int | None
    """The most that may be taken, ``capacity=``; None is no limit."""
    arena_nbytes: int
    """Shared memory held now."""
    arena_used_nbytes: int
    """What of it the save takes that is using it; 0 while none does."""
    arena_pinned: bool
    """Whether it is registered with CUDA."""

    worker_pid: int | None
    """None while there is no worker."""
    worker_private_nbytes: int | None
    """The worker's own memory beside the arena, as of the last second; None where that is not known."""
    worker_restarts: int
    """Workers started again."""
    dropped_answers: int
    """Answers of the worker for a save that was not open."""
    dropped_spans: int
    """Spans that the observer was not told of because it fell behind; parts of them are not counted."""
