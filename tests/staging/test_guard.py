"""The process-wide hook."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

from aiockpt.staging import guard
from aiockpt.staging.ownership import Ownership
from aiockpt.staging.pending import Lazy, Owner, PendingCopies
from tests.staging.rig import Rig
from tests.staging.test_optimizers import make_model, train


def our_hooks() -> list[Any]:
    return [hook for hook in _global_optimizer_pre_hooks.values() if hook.__module__ == guard.__name__]


def test_one_hook_for_the_process(make_rig: Callable[..., Rig]) -> None:
    """However many Stagers save, torch calls one function of ours."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        rig = make_rig()
        for _ in range(2):
            train(model, optimizer)
            rig.save({"model": model})
    assert len(our_hooks()) == 1


def test_optimizers_are_kept_weakly(rig: Rig) -> None:
    """What was seen stepping may still be collected."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rig.save({"model": model})
    train(model, optimizer)
    assert optimizer in guard._guard.fired
    before = len(guard._guard.fired)
    del optimizer
    gc.collect()
    assert len(guard._guard.fired) < before


def test_an_optimizer_that_cannot_be_hashed_still_steps(rig: Rig) -> None:
    """Our hook never raises into a step."""

    class Odd(torch.optim.SGD):
        __hash__ = None  # type: ignore[assignment]

    model = make_model()
    optimizer = Odd(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer)
        assert rig.save({"model": model}).lazy_nbytes == 0


def test_a_failure_while_waiting_fails_the_save_not_the_step() -> None:
    """Whatever goes wrong in the wait, the step goes on, and the save hears of it."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    owner = Owner(optimizer)
    failures: list[Exception | None] = []
    pending = PendingCopies([owner], stall_timeout=1.0, on_failure=failures.append)
    lazy = Lazy(0, 0, parameter.detach(), 16, parameter.data_ptr(), (owner,), None)
    pending.add(lazy)
    lazy.storage = "no storage"  # type: ignore[assignment]
    pending.enter(optimizer)
    assert [type(failure) for failure in failures] == [AttributeError]


def test_dtensor_like_wrappers_count_with_both_counters() -> None:
    """A wrapper's own data pointer is 0: the local tensor is what is owned, and both counters are watched."""

    class Wrapper(torch.Tensor):
        _local_tensor: torch.Tensor

    local = torch.zeros(600)
    wrapper = torch.zeros(600).as_subclass(Wrapper)
    wrapper._local_tensor = local
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups[0]["params"] = [wrapper]
    ownership = Ownership([optimizer], at_least=1)
    span = ownership.find(local.data_ptr(), local.nbytes)
    assert span is not None
    assert span[2] is wrapper
    assert ownership.find(wrapper.data_ptr(), wrapper.nbytes) is None
    lazy = Lazy(0, 0, local.detach(), local.nbytes, local.data_ptr(), span[1], span[2])
    assert lazy.intact()
    torch.Tensor.add_(wrapper, 1.0)
    assert not lazy.intact()


def test_ranges_inside_and_across_what_is_owned() -> None:
    """A slice of a parameter is owned by it; what reaches beyond is not."""
    flat = torch.zeros(1000)
    left, right = torch.nn.Parameter(flat[:500]), torch.nn.Parameter(flat[500:900])
    optimizers = [torch.optim.SGD([left], lr=0.1), torch.optim.SGD([right, left], lr=0.1)]
    ownership = Ownership(optimizers, at_least=1)
    address = flat.data_ptr()
    span = ownership.find(address, 2000)
    assert span is not None
    assert [owner.identity for owner in span[1]] == [id(optimizer) for optimizer in optimizers]
    assert ownership.find(address + 40, 100) is not None
    assert ownership.find(address + 2000, 1600) is not None
    assert ownership.find(address, 2004) is None
    assert ownership.find(address + 3600, 4) is None
    assert ownership.find(address - 4, 4) is None


def test_an_optimizer_that_cannot_be_read_is_not_guarded() -> None:
    """A tensor that refuses its pointer leaves its optimizer out, and only that one."""
    sparse = torch.zeros(600).to_sparse()
    good = torch.zeros(600)
    bad = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    bad.param_groups[0]["params"] = [good, sparse]
    ownership = Ownership([bad], at_least=0)
    assert not ownership
    assert ownership.owners == []
    assert ownership.find(good.data_ptr(), good.nbytes) is None
