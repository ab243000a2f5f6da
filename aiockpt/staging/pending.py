"""The copies of one save that are still to be made, and what an optimizer must wait for.

The thread that steps an optimizer and the thread that copies meet here, under one condition.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Lazy", "Owner", "PendingCopies", "uncounted"]


class Lazy:
    """A tensor that is copied after ``save()`` returned; holds its memory until then."""

    __slots__ = (
        "address",
        "checked",
        "nbytes",
        "on_host",
        "owners",
        "part",
        "position",
        "storage",
        "storage_address",
        "storage_nbytes",
        "tensor",
        "version",
        "wrapper",
        "wrapper_version",
    )

    def __init__(
        self,
        part: int,
        position: int,
        tensor: torch.Tensor,
        nbytes: int,
        address: int,
        owners: tuple[Owner, ...],
        wrapper: torch.Tensor | None,
    ) -> None:
        self.part = part
        """Its number in the plan."""
        self.position = position
        """Place in the plan's file order."""
        self.nbytes = nbytes
        self.address = address
        self.on_host = tensor.is_cpu
        self.owners = owners
        self.tensor: torch.Tensor | None = tensor
        self.version = tensor._version
        self.storage: torch.UntypedStorage | None = tensor.untyped_storage()
        self.storage_address = self.storage.data_ptr()
        self.storage_nbytes = self.storage.nbytes()
        self.wrapper = wrapper
        self.wrapper_version = 0 if wrapper is None else wrapper._version
        self.checked = False

    def in_place(self) -> bool:
        """Whether the held storage still has its memory: one that was resized has freed it."""
        storage = self.storage
        return (
            storage is not None
            and storage.data_ptr() == self.storage_address
            and storage.nbytes() == self.storage_nbytes
        )

    def intact(self) -> bool:
        """Whether no counted write happened since the call."""
        return (
            self.in_place()
            and self.tensor is not None
            and self.tensor._version == self.version
            and (self.wrapper is None or self.wrapper._version == self.wrapper_version)
        )

    def release(self) -> None:
        """Let go of the memory."""
        self.tensor = self.storage = self.wrapper = None


class Owner:
    """One optimizer with copies pending."""

    __slots__ = ("events", "identity", "lazies", "on_device", "on_host", "parameter_count", "reference")

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.identity = id(optimizer)
        self.reference = None if optimizer is None else weakref.ref(optimizer)
        self.parameter_count = 0 if optimizer is None else count_parameters(optimizer)
        self.lazies: list[Lazy] = []
        self.on_host = 0
        """CPU tensors not staged yet."""
        self.on_device = 0
        """CUDA tensors not staged yet."""
        self.events: dict[torch.device, Any] = {}
        """Per device the event behind the last copy of this owner's tensors."""


def count_parameters(optimizer: Optimizer) -> int:
    """Return how many parameters the optimizer has in all groups."""
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _nobody(error: Exception | None) -> None:
    pass


def uncounted(seconds: float) -> None:
    """Take a waiting time that nobody asks for."""


class PendingCopies:
    """What one save still has to copy.

    Args:
        owners: All optimizers that are certain to call ``enter`` before they write, also those without lazy tensors.
        stall_timeout: Seconds that ``enter`` waits without any copy made; None is no limit.
        on_failure: Called when the save must fail: with None when that time is over, else with what went wrong.
        on_wait: Called with the seconds that an ``enter`` had to wait.

    Thread-safety: any thread may call anything; ``enter`` is for threads that are about to write.
    """

    def __init__(
        self,
        owners: Iterable[Owner],
        *,
        stall_timeout: float | None,
        on_failure: Callable[[Exception | None], None],
        on_wait: Callable[[float], None] = uncounted,
    ) -> None:
        self._stall_timeout = stall_timeout
        self._on_failure = on_failure
        self._on_wait = on_wait
        self._changed = threading.Condition()
        self._owners = {owner.identity: owner for owner in owners}
        self._all = Owner(None)
        self._moves = 0
        self.stopped = False
        """Nothing more is to be copied."""
        self.torn: set[int] = set()
        """Numbers of the parts whose counters or storage changed too early."""

    @property
    def lazies(self) -> list[Lazy]:
        """All of them, in file order."""
        return self._all.lazies

    def add(self, lazy: Lazy) -> None:
        """Add a copy to be made, in file order; before the guard knows of this object."""
        for owner in (*lazy.owners, self._all):
            owner.lazies.append(lazy)
            if lazy.on_host:
                owner.on_host += 1
            else:
                owner.on_device += 1

    def add_event(self, device: torch.device, event: Any, lazies: Iterable[Lazy]) -> None:
        """Say which event lies behind the copies of these tensors; later calls replace earlier ones."""
        for lazy in lazies:
            for owner in (*lazy.owners, self._all):
                owner.events[device] = event

    def enter(self, optimizer: Optimizer | None, *, capturing: bool = False) -> None:
        """Return when ``optimizer`` may write: its CPU tensors are copied, the current streams wait for the others.

        Args:
            optimizer: None, or one that owns none of the copies, waits for all: it may own the same parameters.
            capturing: The current stream records a CUDA graph, which no event from outside may enter: the thread
                waits for CUDA tensors too.
        """
        try:
            owner = self._owner_of(optimizer)
            with self._changed:
                self._check(owner.lazies)
            if not capturing:
                for device, event in owner.events.items():
                    torch.cuda.current_stream(device).wait_event(event)
            if not self.stopped and (owner.on_host or (capturing and owner.on_device)):
                began = time.perf_counter()
                self._wait(owner, for_device=capturing)
                self._on_wait(time.perf_counter() - began)
        except Exception as exc:  # noqa: BLE001  # training goes on; the save must not, nobody waited for it
            self._on_failure(exc)

    def wait_copied(self) -> None:
        """Return when every copy is made, or the save failed by ``stall_timeout``; a write may follow."""
        with self._changed:
            self._check(self._all.lazies)
        self._wait(self._all, for_device=True)

    def _owner_of(self, optimizer: Optimizer | None) -> Owner:
        owner = self._owners.get(id(optimizer))
        if owner is None or optimizer is None or owner.reference is None or owner.reference() is not optimizer:
            return self._all
        # A parameter added since may be one that another optimizer owned at the call.
        return owner if count_parameters(optimizer) == owner.parameter_count else self._all

    def _check(self, lazies: Iterable[Lazy]) -> None:
        # From here on this optimizer's writes bump the counters rightly (on CUDA while the copy still runs).
        for lazy in lazies:
            if lazy.storage is not None and not lazy.checked:
                lazy.checked = True
                if not lazy.intact():
                    self.torn.add(lazy.part)

    def _wait(self, owner: Owner, *, for_device: bool) -> None:
        with self._changed:
            while not self.stopped and (owner.on_host or (for_device and owner.on_device)):
                moves = self._moves
                if not self._changed.wait(self._stall_timeout) and moves == self._moves:
                    break
            else:
                return
        self._on_failure(None)

    def moved(self) -> None:
        """Say that bytes were copied: what progresses is not stalled."""
        self._moves += 1  # read under the condition only after a time-out, a lost update there costs one more wait

    def staged(self, lazies: Iterable[Lazy]) -> None:
        """Say that these are copied: check what was not checked at the hook, let their memory go, wake who waits."""
        with self._changed:
            for lazy in lazies:
                if not lazy.checked and not lazy.intact():
                    self.torn.add(lazy.part)
                lazy.checked = True
                lazy.release()
                for owner in (*lazy.owners, self._all):
                    if lazy.on_host:
                        owner.on_host -= 1
                    else:
                        owner.on_device -= 1
                lazy.owners = ()
            self._moves += 1
            self._changed.notify_all()

    def tear(self, lazy: Lazy) -> None:
        """Say that a tensor cannot be copied any more because its memory is gone."""
        with self._changed:
            self.torn.add(lazy.part)
            lazy.checked = True

    def stop(self) -> None:
        """Free everyone who waits: the save failed or ended."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def release(self) -> None:
        """Let all memory go, the events, and the save; after the last copy, or when none will be made."""
        self._on_failure = _nobody
        for owner in (*self._owners.values(), self._all):
            owner.events = {}  # in a forked child their destructor would end the process
        for lazy in self._all.lazies:
            lazy.release()
