"""Which stream of which rank: from text, and as a map of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.elastic.printing.std import Std, normalise, to_map
from aiockpt.errors import ConfigError


def test_flags() -> None:
    """The four values are bit flags and plain ints (R-MP-32)."""
    assert [int(flag) for flag in (Std.NONE, Std.OUT, Std.ERR, Std.ALL)] == [0, 1, 2, 3]
    assert Std.OUT | Std.ERR == Std.ALL
    assert Std.OUT in Std.ALL
    assert Std.OUT not in Std.ERR
    with pytest.raises(ValueError, match="4"):
        Std(4)


@pytest.mark.parametrize(("text", "flag"), [("0", Std.NONE), ("1", Std.OUT), ("2", Std.ERR), ("3", Std.ALL)])
def test_one_for_all(text: str, flag: Std) -> None:
    """One digit is for all ranks (R-MP-32)."""
    assert Std.from_str(text) is flag


def test_by_rank() -> None:
    """Ranks are named with any number of digits (E-47, R-MP-32)."""
    assert Std.from_str("0:3,1:0,10:1,128:2") == {0: Std.ALL, 1: Std.NONE, 10: Std.OUT, 128: Std.ERR}
    assert Std.from_str("10:1") == {10: Std.OUT}


@pytest.mark.parametrize("text", ["0:1,0:2", "1:1,01:1", "7:3,0:0,7:3"])
def test_rank_named_twice(text: str) -> None:
    """A rank that is named twice is an error, also where both say the same (E-47, R-MP-32)."""
    with pytest.raises(ConfigError, match="is named twice") as caught:
        Std.from_str(text)
    assert caught.value.next


NO_STD: list[Any] = [
    *("", "4", "11", "-1", "0:1,", ",0:1", "0:1,,1:1", "0:1,2", "2,0:1", "0:4", "0:", ":1", "0:1:1", "a", "0: 1", " 1"),
    *("1\n", "0:1\n", "\u0661", "\u0661:1", "0:11", "9" * 5000 + ":1", "-1:1", "1.0", None, 3, b"1"),
]


@pytest.mark.parametrize("text", NO_STD, ids=lambda text: ascii(text)[:16])
def test_anything_else(text: Any) -> None:
    """What is neither is an error that is a ValueError and shows what can be given (R-MP-32)."""
    with pytest.raises(ValueError, match="was refused") as caught:
        Std.from_str(text)
    assert isinstance(caught.value, ConfigError)
    assert "0:3,10:1" in caught.value.next
    assert len(str(caught.value)) < 1000


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 10**9 - 1), st.sampled_from(Std), min_size=1))
def test_text_of_a_map(ranks: dict[int, Std]) -> None:
    """Each map can be written as text (R-MP-32)."""
    assert Std.from_str(",".join(f"{rank}:{int(flag)}" for rank, flag in ranks.items())) == ranks


@settings(deadline=None)
@given(st.text(alphabet="0123:,", max_size=12))
def test_text_is_taken_or_refused(text: str) -> None:
    """No text brings up anything but flags or a ConfigError (R-MP-32)."""
    try:
        found = Std.from_str(text)
    except ConfigError:
        return
    assert isinstance(found, Std) or all(isinstance(flag, Std) for flag in found.values())


def test_map_of_one_value() -> None:
    """One value is for all ranks, given as a flag or a plain int (E-48, R-MP-33)."""
    assert to_map(Std.OUT, 2) == {0: Std.OUT, 1: Std.OUT}
    assert to_map(3, 2) == {0: Std.ALL, 1: Std.ALL}
    assert all(isinstance(flag, Std) for flag in to_map(3, 2).values())


def test_map_of_a_map() -> None:
    """Ranks that a map does not name have none, and the ranks come in order (R-MP-33)."""
    found = to_map({2: Std.OUT, 1: 3}, 4)
    assert list(found.items()) == [(0, Std.NONE), (1, Std.ALL), (2, Std.OUT), (3, Std.NONE)]
    assert isinstance(found[1], Std)
    assert to_map({}, 2) == {0: Std.NONE, 1: Std.NONE}


def test_rank_out_of_range() -> None:
    """A map that names a rank that does not exist is an error (E-48, R-MP-33)."""
    with pytest.raises(ConfigError, match="names rank 5, and the ranks of this host are 0 to 1") as caught:
        to_map({0: Std.OUT, 5: Std.OUT}, 2, argument="tee")
    assert caught.value.argument == "tee"


NO_FLAGS: list[Any] = [-1, 4, True, "1", None, 1.0, {0: 4}, {0: "1"}, {0: None}, {-1: 1}, {"0": 1}, {True: 1}, [1]]


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
def test_no_flags(value: Any) -> None:
    """What is no flag, or no rank, is an error (E-48, R-MP-33)."""
    with pytest.raises(ConfigError, match="redirects was refused"):
        to_map(value, 2, argument="redirects")


def test_map_is_new() -> None:
    """A map that the caller changes later changes nothing (R-MP-33)."""
    given = {0: Std.OUT}
    taken = normalise(given)
    given[0] = Std.ERR
    assert taken == {0: Std.OUT}
