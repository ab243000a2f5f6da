"""With several ranks a rank stages blocks of its local tensors, and touches nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import TornSnapshotError
from aiockpt.format.names import dotted
from aiockpt.planning.local import Entry, LocalPlan
from aiockpt.planning.placings import PER_RANK, UNDECLARED, Placing
from aiockpt.planning.sharding import Cut, Sharding
from aiockpt.state.collect import Collected
from tests.planning.files import arena_of
from tests.restoring.ranked import as_rank, cut_by
from tests.staging.rig import PATIENCE_SECONDS, Rig, raw

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]


def expected(plan: LocalPlan, collected: Collected, whole: dict[str, torch.Tensor], rank: int) -> Iterator[bytes]:
    """Yield the bytes of each part, taken out of the whole tensors."""
    for part in plan.parts:
        entry = collected.entries[part.entry]
        tensor = whole[dotted(entry.segments)]
        if tensor.dtype is torch.complex128:
            tensor = torch.view_as_real(tensor)
        if isinstance(entry.placing, Sharding) and math.prod(part.shape):
            coordinate = entry.placing.coordinate(rank)
            assert coordinate is not None
            chunks = entry.placing.chunks(entry.shape, coordinate)
            chunk = next(one for one in chunks if one.local_offsets == part.local_offsets)
            assert chunk.shape == part.shape
            for dim, (first, length) in enumerate(zip(chunk.offsets, chunk.shape, strict=True)):
                tensor = tensor.narrow(dim, first, length)
        yield raw(tensor)


def check(rig: Rig, collected: Collected, whole: dict[str, torch.Tensor], rank: int) -> None:
    """See that the slot has what it must: headers, blocks, and zeros between them."""
    assert rig.plan is not None
    assert rig.arena is not None
    assert rig.plan.parts
    slot = raw(rig.arena.bytes_at(0, rig.plan.arena_nbytes))
    assert slot == arena_of(rig.plan, list(expected(rig.plan, collected, whole, rank)))


SHARDINGS: list[Placing] = [
    Sharding((4,), (0, 1, 2, 3), (Cut(0, 0),)),
    Sharding((4,), (0, 1, 2, 3), (Cut(0, 1),)),
    Sharding((4,), (0, 1, 2, 3), (Cut(0, 0, 3),)),
    Sharding((2, 2), (0, 1, 2, 3), (Cut(0, 0, 2), Cut(1, 1, 3))),
    Sharding((2, 2), (3, 1, 2, 0), (Cut(1, 0),)),
    Sharding((2, 2), (0, 1, 2, 3), ()),
    UNDECLARED,
    PER_RANK,
]
TENSORS = st.lists(
    st.tuples(
        st.sampled_from(range(len(SHARDINGS))),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple),
        st.booleans(),
    ),
    max_size=8,
)


@given(TENSORS, st.integers(0, 3))
def test_the_slot_has_this_ranks_blocks(
    tensors: list[tuple[int, torch.dtype, tuple[int, ...], bool]], rank: int
) -> None:
    """Of any cut, dtype and strides."""
    whole: dict[str, torch.Tensor] = {}
    placings: dict[str, Placing] = {}
    for number, (kind, dtype, shape, turned) in enumerate(tensors):
        values = torch.arange(math.prod(shape)).reshape(shape[::-1] if turned else shape)
        values = values.to(torch.float32).to(dtype) if dtype is torch.float8_e4m3fn else values.to(dtype)
        name = f"x.{number}"
        whole[name] = values.permute(*reversed(range(len(shape)))) if turned else values
        placings[name] = SHARDINGS[kind]
    state = {"x": {name.removeprefix("x."): tensor for name, tensor in whole.items()}, "epoch": 1}
    collected = as_rank(state, lambda name, _: placings[name], rank)
    if any(placing == PER_RANK for placing in placings.values()):
        nodes = collected.tree["x"]
        for name, placing in placings.items():
            if placing == PER_RANK:
                nodes[name.removeprefix("x.")] = ["per_rank", nodes[name.removeprefix("x.")]]
    rig = Rig(rank=rank, world=4)
    try:
        staging = rig.stage_collected(collected)
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.answers == [None]
        if rig.plan is not None and rig.plan.parts:
            check(rig, collected, whole, rank)
        assert rig.plan is not None
        reported = dict(rig.progress)
        for number, image in enumerate(rig.plan.files):
            assert reported[number] == image.nbytes
    finally:
        rig.close()


def test_two_elements_in_a_byte(make_rig: Callable[..., Rig]) -> None:
    """Shapes are those of the file, which counts elements; torch counts bytes."""
    sharding = Sharding((2,), (0, 1), (Cut(0, 0, 3),))
    values = torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 4)
    coordinate = sharding.coordinate(1)
    assert coordinate is not None
    rows = [chunk.offsets[0] for chunk in sharding.chunks((6, 8), coordinate)]
    local = values[rows].view(torch.float4_e2m1fn_x2)
    entry = Entry(("w",), "F4", (6, 8), "", sharding)
    rig = make_rig(rank=1, world=2)
    assert rig.stage_collected(Collected(entries=[entry], tensors=[local], tree={"w": 0})).wait(PATIENCE_SECONDS)
    assert rig.plan is not None
    assert rig.arena is not None
    assert len(rig.plan.parts) == 3
    staged = [raw(rig.arena.bytes_at(*place)) for place in zip(rig.plan.offsets, rig.plan.sizes, strict=True)]
    assert staged == [raw(values[row]) for row in rows]


def test_what_other_ranks_stage_is_not_touched(make_rig: Callable[..., Rig]) -> None:
    """Nor are its bytes made for it in the slot."""
    rig = make_rig(rank=1, world=2)
    whole = {f"x.{number}": torch.full((1000,), float(number)) for number in range(6)}
    state = {"x": {name.removeprefix("x."): tensor for name, tensor in whole.items()}}
    collected = as_rank(state, cut_by((2,)), 1)
    plan = rig.plans.plan(collected.entries, collected.tree, {})
    mine = {part.entry for part in plan.parts}
    assert len(mine) == 3
    for number in range(6):
        if number not in mine:
            collected.tensors[number] = cast("torch.Tensor", None)
    staging = rig.stage_collected(collected)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    check(rig, collected, whole, 1)


class Owned:
    """A rank with blocks of rows of a tensor that an optimizer owns, which are copied late."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.sharding = Sharding((2,), (0, 1), (Cut(0, 0, 3),))
        self.whole = {"w": torch.randn(30, 100)}
        local = as_rank(self.whole, lambda *_: self.sharding, rig_rank(rig)).tensors[0]
        self.param = torch.nn.Parameter(local)
        self.optimizer = torch.optim.SGD([self.param], lr=0.0)
        self.param.grad = torch.ones_like(self.param)
        assert rig.stage_collected(self.collected()).wait(PATIENCE_SECONDS)

    def collected(self) -> Collected:
        """Return the state with the live local tensor."""
        entry = Entry(("w",), "F32", (30, 100), "", self.sharding)
        return Collected(entries=[entry], tensors=[self.param.detach()], tree={"w": 0})

    def stage(self) -> Any:
        """Stage behind a step, so that the optimizer is known."""
        self.optimizer.step()
        return self.rig.stage_collected(self.collected())


def rig_rank(rig: Rig) -> int:
    return rig.plans._rank


@pytest.fixture
def owned(make_rig: Callable[..., Rig]) -> Owned:
    return Owned(make_rig(rank=1, world=2))


def test_blocks_that_an_optimizer_owns_are_copied_late(owned: Owned) -> None:
    """Each by itself: its step waits for all of them."""
    with owned.rig.held() as gate:
        staging = owned.stage()
        assert owned.rig.plan is not None
        assert len(owned.rig.plan.parts) == 3
        assert staging.lazy_nbytes == owned.rig.plan.data_nbytes == 15 * 400
        gate.set()
        owned.optimizer.param_groups[0]["lr"] = 1.0
        owned.optimizer.step()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    check(owned.rig, owned.collected(), owned.whole, 1)


def test_a_torn_block_is_named_by_its_tensor(owned: Owned) -> None:
    """Once, however many of its blocks changed; it is copied at once from then on."""
    with owned.rig.held():
        staging = owned.stage()
        owned.param.data.add_(1)
    staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    assert staging.error.keys == ("w",)
    assert owned.stage().lazy_nbytes == 0
