"""Replicas are compared by a few elements of each, an eighth of the tensors at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from aiockpt.errors import SaveTimeoutError
from aiockpt.planning.local import PlanCache
from aiockpt.planning.placings import UNDECLARED, only_of, replicated
from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.staging.probes import PROBE_TURNS, Prober, group_of
from aiockpt.state.collect import Collected
from tests.restoring.ranked import as_rank
from tests.staging.fake_cuda import FakeCuda

HSDP = Sharding((2, 2), (0, 1, 2, 3), (Cut(1, 0),))


class OnRank:
    """One rank that probes a state at each save."""

    def __init__(self, rank: int, placing_of: Any) -> None:
        self.rank = rank
        self.placing_of = placing_of
        self.plans = PlanCache(rank=rank, world=4)
        self.prober = Prober(rank)

    def collected(self, state: Any) -> Collected:
        return as_rank(state, self.placing_of, self.rank)

    def probe(self, state: Any, number: int) -> dict[str, dict[str, str]]:
        collected = self.collected(state)
        plan = self.plans.plan(collected.entries, collected.tree, collected.plain_files)
        return self.prober.take(plan, collected, number, step=number).result()


def tensors(count: int) -> dict[str, torch.Tensor]:
    return {f"{number:02}": torch.randn(7, 100) for number in range(count)}


def test_a_replica_that_drifted_is_found_within_eight_saves() -> None:
    """And named; also by a rank that does not write it."""
    state = {"x": tensors(20)}
    ranks = [OnRank(rank, lambda *_: replicated(4)) for rank in range(4)]
    drifted = {"x": state["x"] | {"13": state["x"]["13"] + 1e-3}}
    found = []
    for number in range(40, 40 + PROBE_TURNS):
        answers = [one.probe(drifted if one.rank == 2 else state, number) for one in ranks]
        assert answers[0] == answers[1] == answers[3]
        (mine,), (other,) = answers[0].values(), answers[2].values()
        assert 2 <= len(mine) <= 3
        assert mine.keys() == other.keys()
        found += [name for name in mine if mine[name] != other[name]]
    assert found == ["x.13"]


def test_only_what_is_declared_is_probed() -> None:
    """Neither shards without a replica, nor what one rank alone has to say, nor what is compared whole."""
    kinds = {
        "x.cut": Sharding((4,), (0, 1, 2, 3), (Cut(0, 0),)),
        "x.first": only_of(0),
        "x.free": UNDECLARED,
        "x.hsdp": HSDP,
        "x.empty": replicated(4),
    }
    state = {"x": {name[2:]: torch.ones(0 if "empty" in name else 8) for name in kinds}}
    one = OnRank(3, lambda name, _: kinds[name])
    names = [name for number in range(8) for group in one.probe(state, number).values() for name in group]
    assert names == ["x.hsdp"]


def test_groups_are_the_ranks_that_hold_the_same() -> None:
    """HSDP: those of one column; the text is the same on each of them, and on no other."""
    groups = [group_of(HSDP, rank) for rank in range(4)]
    assert groups[0] == groups[2] != groups[1] == groups[3]
    assert group_of(HSDP._replace(ranks=(4, 5, 6, 7)), 4) not in groups
    assert group_of(HSDP, 4) is None
    assert group_of(replicated(1), 0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    """Ranks with other memory formats look at the same elements."""
    values = (torch.arange(3 * 5 * 16 * 16) % 2).reshape(3, 5, 16, 16).to(torch.float32).to(dtype)
    turned = values.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    gaps = torch.stack([values.view(torch.uint8)] * 2, dim=-1)[..., 0] if dtype is torch.bool else turned
    one = OnRank(0, lambda *_: replicated(4))
    collected = [one.collected({"x": tensor}) for tensor in (values, turned, gaps)]
    collected[1].tensors[0] = turned if dtype is not torch.complex128 else torch.view_as_real(turned)
    collected[2].tensors[0] = gaps.bool() if dtype is torch.bool else collected[1].tensors[0]
    plan = one.plans.plan(collected[0].entries, collected[0].tree, {})
    for number in (0, 8, 80):
        first, *others = [one.prober.take(plan, some, number, step=0).result() for some in collected]
        assert all(other == first for other in others)
        assert len(first) == 1


def test_it_is_taken_at_the_call() -> None:
    state = {"x": torch.zeros(1000)}
    one = OnRank(0, lambda *_: replicated(4))
    before = one.probe(state, 0)
    collected = one.collected(state)
    collected.tensors[0] = state["x"]
    plan = one.plans.plan(collected.entries, collected.tree, {})
    probe = one.prober.take(plan, collected, 0, step=0)
    state["x"].add_(1)
    assert probe.result() == before != one.probe(state, 0)


def test_a_device_sends_them_without_a_wait(cuda: FakeCuda) -> None:
    """What the caller's stream does later is not seen, what it did before is."""
    one = OnRank(0, lambda *_: replicated(4))
    live = cuda.put(torch.zeros(1000))
    expected = one.probe({"x": torch.ones(1000)}, 0)
    collected = one.collected({"x": torch.zeros(1000)})
    collected.tensors[0] = live
    plan = one.plans.plan(collected.entries, collected.tree, {})
    one.prober.prepare(plan, collected)
    live.add_(1)
    probe = one.prober.take(plan, collected, 0, step=7)
    live.add_(1)
    with pytest.raises(SaveTimeoutError, match="step 7"):
        probe.result(timeout=0.01)
    cuda.run()
    assert probe.result(timeout=10) == expected
    second = one.prober.take(plan, collected, 0, step=8)
    third = one.prober.take(plan, collected, 0, step=9)  # while the one before has not arrived
    cuda.run()
    assert third.result(timeout=10) != expected
    assert second.result(timeout=10) == third.result()
    one.prober.close()
    one.prober.close()
    one.prober.prepare(plan, collected)
    one.prober.close()


def test_1500_tensors_take_a_moment() -> None:
    state = {f"{number:04}": torch.zeros(64, 64) for number in range(1500)}
    one = OnRank(0, lambda *_: replicated(4))
    collected = one.collected(state)
    plan = one.plans.plan(collected.entries, collected.tree, {})
    one.prober.take(plan, collected, 0, step=0)
    seconds = []
    for number in range(30):
        began = time.perf_counter()
        one.prober.take(plan, collected, number, step=0)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005, seconds  # 0.6 ms beside other work
