"""Figures of the design page: ``python -m pytest tests/staging -m timing -s`` on an idle machine."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from aiockpt.staging.stager import Thresholds
from aiockpt.state.collect import collect
from tests.staging.rig import PATIENCE_SECONDS, Rig, make_arena
from tests.staging.test_guard import our_hooks
from tests.staging.test_optimizers import make_model, train

pytestmark = [pytest.mark.timing, pytest.mark.slow]

ROUNDS = 15


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])


def make_gpt() -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """1.9 GiB with AdamW's state, 1,208 tensors of which 302 are scalars."""
    width = 700
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(32_000, width),
            "positions": nn.Embedding(1024, width),
            "blocks": nn.ModuleList([Block(width) for _ in range(25)]),
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return {"model": model, "optimizer": optimizer}, optimizer


def best_of(run: Callable[[], Any], rounds: int = 7) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return min(took)


def memcpy_floor(nbytes: int = 1 << 30) -> float:
    """Bytes a second: the best of one thread, two threads, torch, into shared memory that is faulted in."""
    arena = make_arena(nbytes)
    arena.populate()
    source = torch.ones(nbytes, dtype=torch.uint8)
    address = source.data_ptr()
    piece = 8 << 20

    def move(start: int) -> None:
        ctypes.memmove(arena.address + start, address + start, piece)

    starts = range(0, nbytes, piece)
    with ThreadPoolExecutor(2) as pool:
        took = min(
            best_of(lambda: [move(start) for start in starts]),
            best_of(lambda: list(pool.map(move, starts))),
            best_of(lambda: arena.bytes_at(0, nbytes).copy_(source)),
        )
    arena.close()
    return nbytes / took


def measure(rig: Rig, state: dict[str, Any], between: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the median seconds of ``stage`` and of all copying, and the last Staging."""
    held, staged = [], []
    for _ in range(ROUNDS):
        between()
        collected = collect(state)
        began = time.perf_counter()
        staging = rig.stage_collected(collected)
        held.append(time.perf_counter() - began)
        assert staging.wait(PATIENCE_SECONDS), staging.error
        staged.append(staging.staged_s)
        del collected
    return statistics.median(held[2:]), statistics.median(staged[2:]), staging


def say(*words: object) -> None:
    print(*words)  # noqa: T201


def test_a_guarded_state_of_2_gib(make_rig: Callable[..., Rig]) -> None:
    """``stage`` holds its caller for milliseconds, whatever the size."""
    state, optimizer = make_gpt()
    held, staged, last = measure(make_rig(thresholds=Thresholds()), state, optimizer.step)
    rate = last.lazy_nbytes / staged / 1e9
    say(f"\nguarded, {last.lazy_nbytes / 2**30:.2f} GiB: returns after {held * 1e3:.2f} ms")
    say(f"all copied after {staged * 1e3:.0f} ms, {rate:.1f} GB/s")
    assert held <= 6e-3


def test_an_inline_state_of_2_gib(make_rig: Callable[..., Rig]) -> None:
    """All copied before the return, at the speed of memcpy."""
    state, optimizer = make_gpt()
    optimizer.step()
    floor = memcpy_floor()
    held, _, last = measure(make_rig(snapshot="inline", thresholds=Thresholds()), state, lambda: None)
    rate = last.inline_nbytes / held
    say(f"\ninline, {last.inline_nbytes / 2**30:.2f} GiB: returns after {held * 1e3:.1f} ms")
    say(f"{rate / 1e9:.1f} GB/s, the floor is {floor / 1e9:.1f}")
    assert rate * 1.15 >= floor


def test_ten_thousand_small_tensors(make_rig: Callable[..., Rig]) -> None:
    """Small tensors cost about a microsecond and a half each."""
    state = {"t": {str(i): torch.randn(1024) for i in range(10_000)}}
    held, _, _ = measure(make_rig(snapshot="inline", thresholds=Thresholds()), state, lambda: None)
    say(f"\n10,000 tensors of 4 KiB: {held * 1e3:.1f} ms")
    assert held <= 20e-3


def test_the_hook(rig: Rig) -> None:
    """With nothing pending a step pays about a microsecond."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    rig.save({"model": model})
    train(model, optimizer)
    (hook,) = our_hooks()
    took = best_of(lambda: [hook(optimizer, (), {}) for _ in range(1000)], 20) / 1000
    say(f"\nthe hook with nothing pending: {took * 1e6:.2f} us")
    assert took < 5e-6


def test_populating(make_rig: Callable[..., Rig]) -> None:
    """Faulting in pages that the worker has allocated already."""
    import os

    arena = make_arena(1 << 30)
    os.posix_fallocate(arena.fd, 0, arena.nbytes)
    began = time.perf_counter()
    arena.populate()
    say(f"\npopulate after fallocate: {arena.nbytes / (time.perf_counter() - began) / 1e9:.1f} GB/s")
    arena.close()
