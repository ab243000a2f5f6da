"""Placings: their records in the manifest, and which are one."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.format.placings import MAX_RANKS, ShardingRecord, check_placing
from aiockpt.planning.division import first_owner, seat_of
from aiockpt.planning.placings import PER_RANK, Placing, intern_placings, replicated, sharding_of, sharding_record
from aiockpt.planning.sharding import Cut, Sharding


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    count = math.prod(mesh)
    step, first = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    ranks = tuple(range(first, first + step * count, step))
    ranks = draw(st.just(ranks) | st.permutations(ranks).map(tuple))
    dims = draw(st.permutations(range(len(mesh))))[: draw(st.integers(0, len(mesh)))]
    return Sharding(mesh, ranks, tuple(Cut(at, draw(st.integers(0, 2)), draw(st.integers(1, 3))) for at in dims))


@given(shardings())
def test_records(sharding: Sharding) -> None:
    """There and back by way of JSON; a record passes its own check, and not in a smaller world."""
    record = msgspec.json.decode(msgspec.json.encode(sharding_record(sharding)), type=ShardingRecord)
    assert sharding_of(record) == sharding
    assert record.replicas == sharding.replicas
    world = max(sharding.ranks) + 1
    check_placing(record, world=world)
    with pytest.raises(ValueError, match="mesh"):
        check_placing(record, world=world - 1)


@pytest.mark.parametrize(
    ("mesh", "ranks"),
    [
        ((4096,), range(4096)),
        ((64,), range(7, 4096, 64)),
        ((64, 64), range(4096)),
        ((2, 2), (0, 2, 1, 3)),
        ((2, 1, 3), (5, 6, 7, 105, 106, 107)),
        ((1,), (9,)),
    ],
)
def test_regular_meshes_are_short(mesh: tuple[int, ...], ranks: range | tuple[int, ...]) -> None:
    """A mesh that a job makes is a few numbers, however many ranks it has."""
    sharding = Sharding(mesh, tuple(ranks), ())
    record = sharding_record(sharding)
    assert not record.ranks
    assert len(msgspec.json.encode(record)) < 80
    assert sharding_of(record) == sharding


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh": [2], "ranks": [0]},
        {"mesh": [2], "ranks": [0, 0]},
        {"mesh": [2], "ranks": [0, 8]},
        {"mesh": [2]},
        {"mesh": [9], "strides": [1]},
        {"mesh": [2], "strides": [1, 1]},
        {"mesh": [2], "strides": [1], "ranks": [0, 1]},
        {"mesh": [2, 2], "strides": [1, 1]},
        {"mesh": [2, 3], "strides": [2, 1]},
        {"mesh": [2], "strides": [1], "first": 7},
        {"mesh": [2], "ranks": [0, 1], "cuts": [(1, 0, 1)]},
        {"mesh": [2], "ranks": [0, 1], "cuts": [(0, 0, 1), (0, 1, 1)]},
        {"mesh": [MAX_RANKS] * 64, "strides": [1] * 64},
    ],
)
def test_meshes_that_are_none(fields: dict[str, object]) -> None:
    """Refused without making what they claim."""
    record = ShardingRecord(**fields)  # type: ignore[arg-type]  # the values are what is wrong
    with pytest.raises(ValueError, match="mesh"):
        check_placing(record, world=8)


@pytest.mark.parametrize(
    "text",
    [
        '{"mesh":[]}',
        '{"mesh":[0]}',
        '{"mesh":[-1]}',
        '{"mesh":[1048577]}',
        '{"mesh":[1],"strides":[0]}',
        '{"mesh":[1],"cuts":[[0,0,0]]}',
        '{"mesh":[1],"cuts":[[0,-1,1]]}',
        '{"mesh":[1],"cuts":[[0,0,1048577]]}',
        '{"mesh":[1],"ranks":[-1]}',
        "{}",
    ],
)
def test_numbers_that_are_none(text: str) -> None:
    """Refused by the decoder."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=ShardingRecord)


@given(shardings(), st.integers(0, 30))
def test_seats_and_owners(sharding: Sharding, replica: int) -> None:
    """Who writes what by the rule of ``owners``, found without listing all of them."""
    replica %= sharding.replicas
    owners = {rank: coordinate for coordinate, rank in sharding.owners(replica)}
    for rank in sharding.ranks:
        seat = seat_of(sharding, rank)
        assert seat is not None
        assert (seat.replica == replica) == (rank in owners)
        assert seat.coordinate == sharding.coordinate(rank)
    first = first_owner(sharding, replica)
    assert not any(owners[first][cut.mesh_dim] for cut in sharding.cuts)
    assert seat_of(sharding, max(sharding.ranks) + 1) is None


def test_equal_placings_have_one_number() -> None:
    """Also where they are other objects, and where their ranks are."""
    again = Sharding((2,), (0, 1), ())
    placings: list[Placing] = [None, replicated(2), PER_RANK, again, replicated(2), None, PER_RANK, replicated(3)]
    assert intern_placings(placings) == ([None, again, PER_RANK, replicated(3)], [0, 1, 2, 1, 1, 0, 2, 3])
