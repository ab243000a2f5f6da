"""Streams and events without a device: what is enqueued runs later, in any order that the waits allow.

Some tensors on the CPU are made to pass for a device's. Every operation on them is put into the queue of the current
stream, and ``run`` takes from the queues by chance, so that a wait that is missing somewhere is found by some seed.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class Event:
    def __init__(self) -> None:
        self.recorded = 0
        self.reached = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def reach() -> None:
            self.reached = number

        stream.enqueue(reach)


class Stream:
    device = DEVICE

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        FakeCuda.streams.append(self)

    def enqueue(self, work: Callable[[], None]) -> None:
        self.queue.append((lambda: True, work))

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.queue.append((lambda: event.reached >= number, lambda: None))

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class FakeCuda(TorchDispatchMode):
    """Entered, it stands for one CUDA device; ``patch`` puts it in the place of ``torch.cuda``."""

    streams: list[Stream]

    def __init__(self) -> None:
        super().__init__()
        FakeCuda.streams = []
        self._memory: dict[int, torch.UntypedStorage] = {}
        self._current = threading.local()
        self._passing = False
        self._default = Stream()

    def patch(self, patcher: pytest.MonkeyPatch) -> None:
        arange, tensor = torch.arange, torch.Tensor
        patcher.setattr(torch, "arange", lambda *args, device, **options: self.put(arange(*args, **options)))
        for name, fake in {
            "Stream": Stream,
            "Event": Event,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "device": lambda device: nullcontext(),
            "cudart": _Cudart,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: False,
        }.items():
            patcher.setattr(torch.cuda, name, fake)
        real = tensor.device.__get__  # type: ignore[attr-defined]
        patcher.setattr(tensor, "is_cuda", property(self.has), raising=False)
        patcher.setattr(tensor, "is_cpu", property(lambda t: not self.has(t)), raising=False)
        patcher.setattr(tensor, "device", property(lambda t: DEVICE if self.has(t) else real(t)), raising=False)

    # ---- memory of the device

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let a tensor pass for one of the device; its memory is never used again."""
        storage = tensor.untyped_storage()
        self._memory[storage.data_ptr()] = storage
        return tensor

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

    # ---- streams

    @property
    def current(self) -> Stream:
        return getattr(self._current, "stream", self._default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def run(self, seed: int = 0) -> None:
        """Run everything that was enqueued, each time the next of some stream that does not wait."""
        chance = random.Random(seed)
        while queues := [stream.queue for stream in FakeCuda.streams if stream.queue]:
            ready = [queue for queue in queues if queue[0][0]()]
            assert ready, "the streams wait for each other"
            # Several of one stream in a row: else all streams would come forward side by side.
            queue = chance.choice(ready)
            for _ in range(chance.choice((1, 10, 1000))):
                if not queue or not queue[0][0]():
                    break
                queue.popleft()[1]()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let operations happen at once."""
        before, self._passing = self._passing, True
        try:
            yield
        finally:
            self._passing = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        schema = func._schema
        is_view = bool(schema.returns) and schema.returns[0].alias_info is not None and not schema.is_mutable
        if self._passing or is_view or not any(self.has(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if schema.is_mutable:

            def write() -> None:
                with (
                    self.passing(),
                    torch.no_grad(),
                    torch.autograd._unsafe_preserve_version_counter(args[0]),
                ):  # counted at the call
                    func(*args, **kwargs)

            self.current.enqueue(write)
            return args[0]
        made = self.put(func(*args, **kwargs))

        def fill() -> None:
            with self.passing(), torch.no_grad():
                made.copy_(func(*args, **kwargs))

        self.current.enqueue(fill)
        return made


class _Cudart:
    """Registers whatever it is given."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0
