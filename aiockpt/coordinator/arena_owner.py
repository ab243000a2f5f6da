"""The trainer's hold on the arena: asked of the worker, populated, kept across workers."""

from __future__ import annotations

import os
from concurrent.futures import Future

import anyio
import anyio.to_thread
import torch

from aiockpt.coordinator.failures import arena_too_large
from aiockpt.errors import CheckpointError, StorageError
from aiockpt.protocol.messages import Adopt, Reserve, Reserved
from aiockpt.staging.arena import ArenaView
from aiockpt.worker.link import Link

__all__ = ["ArenaOwner"]


class ArenaOwner:
    """Owns the arena's view and descriptor. Runs in the coordinator's loop, but for ``view``, which is any thread's.

    Only who has the slot may ask for an arena: growing drops the old one first.
    """

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._link: Link | None = None
        self._up = anyio.Event()
        self._over: CheckpointError | None = None
        self._answer: Future[int] | None = None
        self._answered = anyio.Event()
        self._limiter = anyio.CapacityLimiter(1)
        self._stopping = False
        self._asked = 0
        self.view: ArenaView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        view = self.view  # once: another thread may ask while the loop drops it
        return view.nbytes if view else 0

    @property
    def is_pinned(self) -> bool:
        """Whether it is registered with CUDA."""
        view = self.view
        return view is not None and view.cuda_registered

    async def ensure(self, nbytes: int, cuda_device: torch.device | None) -> ArenaView:
        """Return an arena of at least ``nbytes``, faulted in and, where ``cuda_device`` is to copy into it, pinned.

        Raises:
            StorageError: ENOMEM with figures; training lives.
            CheckpointError: There is no worker any more.
        """
        if self.view is not None and self.view.nbytes >= nbytes:
            return self.view
        self._drop()
        link = await self._wait_link()
        self._answer = Future()
        self._answered = anyio.Event()
        self._asked = nbytes
        link.send(Reserve(nbytes=nbytes, capacity=self._capacity))
        await self._answered.wait()
        answer, self._answer = self._answer, None  # an error that we held would hold its traceback: the user's frames
        fd = answer.result()
        view = ArenaView(fd, nbytes)
        try:
            await anyio.to_thread.run_sync(self._fault_in, view, cuda_device, limiter=self._limiter)
        except BaseException:
            view.close()
            raise
        self.view = view
        return view

    def _fault_in(self, view: ArenaView, cuda_device: torch.device | None) -> None:
        view.populate(lambda: self._stopping)
        if cuda_device is not None:
            view.register_cuda(cuda_device)

    async def _wait_link(self) -> Link:
        while self._link is None:
            if self._over is not None:
                raise self._over.copy()
            await self._up.wait()
        return self._link

    def worker_up(self, link: Link) -> None:
        """Hand the arena, if there is one, to a new worker."""
        self._link = link
        if self.view is not None:
            link.send(Adopt(nbytes=self.view.nbytes), os.dup(self.view.fd))
        self._wake()

    def worker_says(self, message: Reserved, fds: list[int]) -> None:
        """Take the answer to ``Reserve``."""
        if self._answer is None or self._answer.done():
            for fd in fds:
                os.close(fd)
            return
        if message.error is not None or not fds:
            error = message.error
            why = error.why if error else "the worker sent no descriptor"
            if error is None:
                refused = arena_too_large(message.nbytes, why)
            else:
                refused = StorageError(error.what, why=why, next=error.next, errno=error.errno, path=error.path)
            self._answer.set_exception(refused)
        else:
            self._answer.set_result(fds[0])
        self._answered.set()

    def worker_down(self, error: CheckpointError) -> None:
        """The worker died: while it allocated, that means that the arena was too large."""
        self._link = None
        if self._answer is not None and not self._answer.done():
            why = f"the worker died while it allocated: {error.why}"
            self._answer.set_exception(arena_too_large(self._asked, why))
            self._answered.set()

    def over(self, error: CheckpointError) -> None:
        """There will be no worker; who waits for one gets ``error``."""
        self._over = error
        self.worker_down(error)
        self._wake()

    def close(self) -> None:
        """Unmap and close; nobody copies any more."""
        self._stopping = True
        self._drop()

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited, leave the parent's arena alone."""
        if self.view is not None:
            self.view.forget_in_child()

    def _drop(self) -> None:
        if self.view is not None:
            self.view.close()
            self.view = None

    def _wake(self) -> None:
        self._up.set()
        self._up = anyio.Event()
