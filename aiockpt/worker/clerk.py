"""What rank 0's worker does in the run directory for all ranks: makes attempts, merges plans, commits."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import xxhash

from aiockpt import __version__
from aiockpt.errors import CheckpointError, SaveError, StepExistsError
from aiockpt.format.manifest import FileRecord, Head, encode_manifest, encode_own
from aiockpt.format.names import INDEX_NAME, attempt_name
from aiockpt.planning.contents import check_probes, check_tensors
from aiockpt.planning.global_plan import GlobalPlan, merge
from aiockpt.protocol.messages import BeginSave
from aiockpt.protocol.orders import CheckPlans, Commit, Compare, Drop, Look, MakeAttempt
from aiockpt.protocol.star import Ended
from aiockpt.protocol.terms import WireError
from aiockpt.storage.commit import make_attempt, publish, to_trash, write_manifest
from aiockpt.storage.direct import write_small
from aiockpt.storage.failures import storage_errors
from aiockpt.storage.faults import FaultPoint
from aiockpt.storage.run_directory import Committed, find_committed
from aiockpt.worker.failures import as_wire_error
from aiockpt.worker.save import Surroundings

__all__ = ["RunClerk"]

_log = logging.getLogger("aiockpt.worker")
_T = TypeVar("_T")


@dataclass(slots=True)
class _Work:
    """What the clerk keeps of one save from order to order."""

    name: str = ""
    """Of the attempt's directory; empty where none is open."""
    fd: int = -1
    plan: GlobalPlan | None = None
    values: bytes = b"[]"
    metadata: bytes = b"null"
    trash: list[str] = field(default_factory=list)


class RunClerk:
    """See ``star_hub.Clerk``.

    Args:
        surroundings: Of rank 0's worker.
        world: How many ranks there are.
        begin_of: Returns how rank 0 began a save, or None where it has not.
    """

    def __init__(self, surroundings: Surroundings, *, world: int, begin_of: Callable[[int], BeginSave | None]) -> None:
        self._s = surroundings
        self._world = world
        self._begin_of = begin_of
        self._works: dict[int, _Work] = {}

    async def look(self, order: Look) -> Ended | None:
        """See ``star_hub.Clerk``."""

        def look() -> Ended | None:
            with storage_errors("a checkpoint was not looked for", self._s.run.path):
                self._s.faults.at(FaultPoint.WORKER_LOOKING)
            known = find_committed(self._s.run.fd, self._s.run.path, order.step)
            if known is None or known.save_id != order.save_id:
                return None
            return Ended(n=order.n, path=known.path, nbytes=known.nbytes)

        try:
            return await self._do(f"look for step {order.step}", look)
        except CheckpointError as exc:
            return Ended(n=order.n, error=as_wire_error(exc))

    async def make(self, order: MakeAttempt) -> WireError | None:
        """See ``star_hub.Clerk``."""
        work = self._works.setdefault(order.n, _Work())
        name = attempt_name(order.step, order.save_id, order.attempt)

        def make() -> None:
            self._put_away(work)
            if order.attempt:  # of an earlier worker of this rank, which its trainer has moved away, or of ours
                self._to_trash(attempt_name(order.step, order.save_id, order.attempt - 1), work)
            self._s.run.open_attempt()
            work.name = name
            try:
                work.fd = make_attempt(self._s.run.fd, name, (), faults=self._s.faults)
            except BaseException:
                self._s.run.close_attempt()
                raise

        try:
            await self._do(f"make {name}", make)
        except CheckpointError as exc:
            return as_wire_error(exc)
        finally:
            self._sweep(work)
        return None

    async def check(self, order: CheckPlans) -> tuple[WireError, int | None] | dict[int, list[str]]:
        """See ``star_hub.Clerk``."""

        def check() -> GlobalPlan:
            self._s.faults.at(FaultPoint.WORKER_CHECKING)
            return merge(order.bodies, order.ranks_of, world=self._world)

        try:
            plan = await self._do("", check)
        except CheckpointError as exc:
            ranks = getattr(exc, "ranks", None)
            return as_wire_error(exc), ranks[0] if ranks else None
        self._works.setdefault(order.n, _Work()).plan = plan
        return plan.extra_folders()

    async def compare(self, order: Compare) -> WireError | None:
        """See ``star_hub.Clerk``."""
        work = self._works[order.n]
        plan, details = work.plan, order.details
        assert plan is not None, "plans are checked before contents"

        def compare() -> bytes:
            self._s.faults.at(FaultPoint.WORKER_COMPARING)
            values = {
                digest: {rank: details[rank].values for rank in ranks if rank in details}
                for digest, ranks in order.ranks_of.items()
            }
            plan.check_values(values)
            check_tensors({rank: said.sums for rank, said in details.items()})
            check_probes({rank: said.probes for rank, said in details.items()})
            return plan.merge_values({digest: said[min(said)] for digest, said in values.items()})

        try:
            work.values = await self._do("", compare)
        except CheckpointError as exc:
            return as_wire_error(exc)
        work.metadata = details[min(details)].metadata
        return None

    async def commit(self, order: Commit) -> Ended:
        """See ``star_hub.Clerk``."""
        work = self._works.pop(order.n)
        begin = self._begin_of(order.n)
        assert begin is not None, "all ranks have written"
        began_at = time.monotonic()
        try:
            records = await self._do(f"write the manifest of {work.name}", lambda: self._write(order, work, begin))
            known, trash = await self._do(f"publish {work.name}", lambda: self._publish(order, work, begin))
            work.trash += trash
        except CheckpointError as exc:
            error = as_wire_error(exc)
            if error.kind != "unknown_commit":
                await self._remove(work)
            else:
                await self._do("", lambda: self._close(work))
            return Ended(n=order.n, error=error)
        await self._do("", lambda: self._close(work))
        seconds = time.monotonic() - began_at
        pruned = await self._s.in_thread(lambda: self._s.prune(begin.prune))
        work.trash += pruned.values()
        self._sweep(work)
        with contextlib.suppress(OSError):  # nothing is tried here that an errno could be about
            self._s.faults.at(FaultPoint.WORKER_BEFORE_REPORT, work.name)
        nbytes = sum(record.nbytes for record in records if record.data_start)
        return Ended(n=order.n, path=known.path, nbytes=nbytes, timings={"commit": seconds}, pruned=list(pruned))

    async def drop(self, order: Drop) -> None:
        """See ``star_hub.Clerk``."""
        work = self._works.pop(order.n, _Work())
        work.name = work.name or attempt_name(order.step, order.save_id, order.attempt)
        await self._remove(work)

    # ---- in a thread

    def _write(self, order: Commit, work: _Work, begin: BeginSave) -> list[FileRecord]:
        plan = work.plan
        assert plan is not None, "plans are checked before a commit"
        with storage_errors("a manifest was not begun", work.name):
            self._s.faults.at(FaultPoint.WORKER_FILES_DURABLE, work.name)
        self._refuse_standing(begin, order.save_id)
        said = [order.written[rank] for rank in range(self._world)]
        records = [record for written in said for record in written.files]
        # Readers count a rank's tensor files: what is written here comes behind them.
        records += [self._write_index(work.fd, folder, plan, records) for folder in plan.folders]
        head = Head(
            step=begin.step,
            term=self._s.run.term,
            ordinal=begin.ordinal,
            save_id=order.save_id,
            world_size=self._world,
            nbytes=sum(record.nbytes for record in records if record.data_start),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            package=__version__,
        )
        data = encode_manifest(
            head,
            records,
            values=work.values,
            metadata=work.metadata,
            plan=plan.encode(records),
            own=encode_own([written.own for written in said], [written.rank_values for written in said]),
        )
        folders = sorted({record.path.partition("/")[0] for record in records if "/" in record.path})
        write_manifest(work.fd, data, folders, faults=self._s.faults)
        return records

    def _write_index(self, fd: int, folder: str, plan: GlobalPlan, records: Sequence[FileRecord]) -> FileRecord:
        content = plan.index_json(folder, records)
        path = f"{folder}/{INDEX_NAME}"
        with storage_errors("a folder was not made", folder, fd=fd), contextlib.suppress(FileExistsError):
            os.mkdir(folder, dir_fd=fd)  # where every tensor of a folder is empty, nobody has made it
        write_small(fd, path, content, point=FaultPoint.WORKER_BLOCK_WRITE, faults=self._s.faults)
        return FileRecord(path=path, nbytes=len(content), data_start=0, sum=xxhash.xxh3_128_hexdigest(content))

    def _refuse_standing(self, begin: BeginSave, save_id: str) -> None:
        """Say early what publishing would say."""
        known = find_committed(self._s.run.fd, self._s.run.path, begin.step)
        if known is not None and known.save_id != save_id and not begin.overwrite:
            raise StepExistsError(
                f"the run has a checkpoint of step {begin.step}",
                why=f"{known.path} was committed earlier",
                next="save another step, or pass overwrite=True",
                step=begin.step,
                path=known.path,
            )

    def _publish(self, order: Commit, work: _Work, begin: BeginSave) -> tuple[Committed, list[str]]:
        return publish(
            self._s.run.fd,
            work.name,
            run=self._s.run.path,
            step=begin.step,
            save_id=order.save_id,
            term=self._s.run.term,
            overwrite=begin.overwrite,
            faults=self._s.faults,
        )

    def _put_away(self, work: _Work) -> None:
        """Move the attempt that is open out of the way: no late file of a rank is ever published with the next."""
        if work.name:
            self._to_trash(work.name, work)
            self._close(work)

    def _to_trash(self, name: str, work: _Work) -> None:
        with storage_errors("an attempt was not moved away", name, fd=self._s.run.fd):
            trash = to_trash(self._s.run.fd, name)
        if trash is not None:
            work.trash.append(trash)

    def _close(self, work: _Work) -> None:
        fd, work.fd = work.fd, -1
        if fd >= 0:
            os.close(fd)
            self._s.run.close_attempt()

    # ---- in the loop

    async def _remove(self, work: _Work) -> None:
        """Rename an attempt away, so that nothing can publish it, and have it deleted."""

        def remove() -> None:
            try:
                with storage_errors("an attempt was not moved away", work.name, fd=self._s.run.fd):
                    self._s.faults.at(FaultPoint.WORKER_DROPPING, work.name)
                self._to_trash(work.name, work)
            finally:
                self._close(work)

        try:
            await self._do(f"remove {work.name}", remove)
        except CheckpointError as exc:
            _log.warning("%s is left in the run, and removed by the next job there\n%s", work.name, exc)
        self._sweep(work)

    def _sweep(self, work: _Work) -> None:
        trash, work.trash = work.trash, []
        for name in trash:
            self._s.sweeper.add(name)

    async def _do(self, what: str, call: Callable[[], _T]) -> _T:
        """Run what blocks; whatever it raises comes as a CheckpointError."""

        def run() -> _T:
            with self._s.activity.operation(what) if what else contextlib.nullcontext():
                return call()

        try:
            return await self._s.in_thread(run)
        except CheckpointError:
            raise
        except Exception as exc:
            _log.exception("the worker of rank 0 met an error that it does not know")
            raise SaveError("the worker of rank 0 failed", why=f"{type(exc).__name__}: {exc}") from exc
