"""The plan cache: a loop over one state plans once, and never goes by an old plan."""

from __future__ import annotations

import json
import time

import pytest

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.tree import Node
from aiockpt.planning.local import Entry, PlanCache
from tests.planning.files import tree_of


def many(count: int) -> tuple[list[Entry], Node]:
    entries = [Entry(("optimizer", f"layers.{i}.weight", "exp_avg"), "F32", (32, 32)) for i in range(count)]
    return entries, tree_of(entries)


def test_ten_thousand_entries() -> None:
    """A plan of 10,000 tensors takes well under a second, the second time almost nothing."""
    entries, tree = many(10_000)
    cache = PlanCache()
    start = time.perf_counter()
    plan = cache.plan(entries, tree, {})
    first = time.perf_counter() - start
    again, tree_again = many(10_000)
    start = time.perf_counter()
    assert cache.plan(again, tree_again, {}) is plan
    second = time.perf_counter() - start
    assert first < 0.8  # 0.05 alone
    assert second < 0.08  # 0.001 alone
    assert cache.misses == 1


def test_cache_hits_and_misses() -> None:
    """The plan is made again when anything changes, and only then."""
    cache = PlanCache()
    entries, tree = many(3)
    plan = cache.plan(entries, tree, {})
    assert cache.plan(list(entries), json.loads(json.dumps(tree)), {}) is plan
    for misses, (changed, changed_tree, plain) in enumerate(
        [
            (*many(2), {}),
            ([*entries[:2], entries[2]._replace(shape=(1024,))], tree, {}),
            (entries, tree | {"lr": -1}, {}),
            (entries, tree, {"optimizer/config.json": b"{}"}),
            (entries, tree, {"optimizer/config.json": b"{ }"}),
            (entries, tree, {}),
        ],
        start=2,
    ):
        cache.plan(changed, changed_tree, plain)
        assert cache.misses == misses


def test_cache_tells_keys_of_different_types_apart() -> None:
    """1, 1.0 and True are equal for Python, and three keys for a checkpoint."""
    cache = PlanCache()
    entries = [Entry(("m", "1"), "F32", (2,))]
    plans = [cache.plan(entries, {"m": ["dict", [[key, 0]]]}, {}) for key in (1, True, 1.0, "1")]
    assert cache.misses == 4
    assert len({plan.digest for plan in plans}) == 4


def test_cache_sees_a_tree_that_was_changed_in_place() -> None:
    """A caller that reuses its lists is not given the old plan."""
    cache = PlanCache()
    entries, tree = many(2)
    old = cache.plan(entries, tree, {})
    tree["lr"] = -1
    entries[0] = entries[0]._replace(dtype="I32")
    assert cache.plan(entries, tree, {}).digest != old.digest


def test_cache_after_an_error() -> None:
    """A state that was refused leaves the last plan as it was."""
    cache = PlanCache()
    entries, tree = many(2)
    plan = cache.plan(entries, tree, {})
    with pytest.raises(UnsupportedValueError):
        cache.plan([*entries, entries[0]], tree, {})
    assert cache.plan(entries, tree, {}) is plan
    assert cache.misses == 1
