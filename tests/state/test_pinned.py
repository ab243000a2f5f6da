"""Pinning memory, as far as it goes without a GPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from aiockpt.state.pinned import pin, unpin

DEVICE = torch.device("cuda", 3)


class Cudart:
    """Answers with codes, and notes who asked."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.current: torch.device | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.threads: list[threading.Thread] = []

    @contextmanager
    def device(self, device: torch.device) -> Any:
        self.current = device
        yield
        self.current = None

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address, nbytes, self.current))
        self.threads.append(threading.current_thread())
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, self.current))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:
        return "out of memory"


def cudart_that_says(monkeypatch: pytest.MonkeyPatch, code: int) -> Cudart:
    cudart = Cudart(code)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", cudart.device)
    return cudart


def test_pinned_in_the_context_of_a_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is named in each thread that calls CUDA: else device 0 would get a context."""
    cudart = cudart_that_says(monkeypatch, 0)
    assert pin(4096, 8192, DEVICE) is None
    assert unpin(4096, DEVICE)
    assert cudart.calls == [("register", 4096, 8192, DEVICE), ("unregister", 4096, DEVICE)]


def test_a_refusal_is_a_reason_and_stays_in_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps a thread's last error, and torch would raise it at the thread's next kernel."""
    cudart = cudart_that_says(monkeypatch, 2)
    assert pin(4096, 8192, DEVICE) == "out of memory (CUDA error 2)"
    assert not unpin(4096, DEVICE)
    assert not cudart.threads[0].is_alive()
    assert cudart.threads[0] is not threading.current_thread()


def test_what_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that a failed kernel has broken raises from every call."""

    def broken() -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "device", lambda device: broken())
    assert pin(4096, 8192, DEVICE) == "device-side assert triggered"
    assert not unpin(4096, DEVICE)
