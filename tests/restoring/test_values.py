"""What stands in the user's own containers, and objects with a state of their own."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiockpt.restoring.apply import MIXED
from tests.restoring.restoring import restore
from tests.restoring.writing import write_step

VALUES: list[Any] = [
    None,
    True,
    -(1 << 70),
    float("nan"),
    complex(1, float("inf")),
    "text",
    b"short",
    bytes(range(256)) * 40,
    [1, (2, {"a": {3}})],
    {"nested": {1: 2}},
    OrderedDict(b=1, a=2),
    Counter("hello"),
    defaultdict(list, x=[1]),
    frozenset({1}),
    datetime(2024, 1, 1, tzinfo=UTC),
    Path("/x"),
    torch.Size([1, 2]),
    torch.bfloat16,
    torch.device("cpu"),
    np.float32(1.5),
    np.arange(6).reshape(2, 3),
    np.array(["a", "bcd"]),
    [np.zeros(2), torch.ones(1)],
    (torch.ones(1), "beside"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_with_their_types(value: Any, tmp_path: Path):
    """Whatever stood there before."""
    write_step(tmp_path, 1, {"deep": {"x": value}})
    inner: dict[str, Any] = {"x": None}
    live = {"deep": inner}
    restore(tmp_path, live)
    assert live["deep"] is inner
    assert type(inner["x"]) is type(value)
    assert repr(inner["x"]) == repr(value)


def test_streams_come_back_at_their_position(tmp_path: Path):
    """Small and large."""
    saved = {"small": BytesIO(b"abc"), "large": BytesIO(bytes(10_000))}
    saved["large"].seek(77)
    write_step(tmp_path, 1, saved)
    live: dict[str, Any] = {"small": None, "large": BytesIO()}
    restore(tmp_path, live)
    assert live["small"].getvalue() == b"abc"
    assert len(live["large"].getvalue()) == 10_000
    assert live["large"].tell() == 77


def test_arrays_of_the_same_form_are_overwritten_in_place(tmp_path: Path):
    """Others are replaced, as are read-only ones."""
    write_step(tmp_path, 1, {"a": np.arange(3), "b": np.arange(3), "c": np.arange(3)})
    same, read_only = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    read_only.flags.writeable = False
    live = {"a": same, "b": np.zeros(9), "c": read_only}
    restore(tmp_path, live)
    assert live["a"] is same
    assert all(array.tolist() == [0, 1, 2] for array in live.values())


def test_lists_and_tuples_with_tensors_are_gone_into(tmp_path: Path):
    """Tensors in place, values beside them replaced; of a tuple, the tuple."""

    def state(x: float) -> dict[str, Any]:
        return {
            "list": [torch.full((2,), x), x, {"k": torch.full((1,), x), "v": [x]}],
            "tuple": (torch.full((2,), x), x, ([x], (torch.full((1,), x), x))),
        }

    write_step(tmp_path, 1, state(5.0))
    live = state(0.0)
    tensors = [live["list"][0], live["list"][2]["k"], live["tuple"][0], live["tuple"][2][1][0]]
    containers = [live["list"], live["list"][2]]
    restore(tmp_path, live)
    assert repr(live) == repr(state(5.0))
    assert tensors[0] is live["list"][0]
    assert tensors[2] is live["tuple"][0]
    assert all(tensor.eq(5).all() for tensor in tensors)
    assert containers[0] is live["list"]
    assert containers[1] is live["list"][2]


def test_a_growing_history_of_values_is_replaced(tmp_path: Path):
    """A list without live tensors is one value, whatever its length."""
    write_step(tmp_path, 1, {"losses": [1.0, 2.0, 3.0], "arrays": [np.ones(1), np.ones(2)], "t": [torch.ones(1)]})
    live: dict[str, Any] = {"losses": [0.0], "arrays": [], "t": []}
    restore(tmp_path, live)
    assert live["losses"] == [1.0, 2.0, 3.0]
    assert [len(array) for array in live["arrays"]] == [1, 2]
    assert live["t"][0].tolist() == [1.0]


class Stateful:
    """Any object of the user's; it may keep what it is given."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.asked = 0

    def state_dict(self) -> Any:
        self.asked += 1
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_objects_get_fresh_values(tmp_path: Path):
    """Whatever their state was; tensors inside are new, and tied ones share memory."""
    shared = torch.arange(4)
    state = {"t": shared, "again": [shared], "n": {"x": (1, 2)}, "blob": bytes(5000), 3: None}
    write_step(tmp_path, 1, {"object": Stateful(state), "list": [Stateful(5)]})
    live, other = Stateful(), Stateful()
    restore(tmp_path, {"object": live, "list": [other]})
    assert repr(live.state) == repr(state)
    assert live.state["t"] is live.state["again"][0]
    assert other.state == 5
    assert live.asked == 0


def test_what_an_object_raises_goes_on_as_it_is(tmp_path: Path):
    """With a note that names the object and says that the state is mixed."""
    trouble = KeyError("mine")

    class Bad(Stateful):
        def load_state_dict(self, state: Any) -> None:
            raise trouble

    write_step(tmp_path, 1, {"bad": Stateful(1), "x": torch.ones(1)})
    with pytest.raises(KeyError) as caught:
        restore(tmp_path, {"bad": Bad(), "x": torch.zeros(1)})
    assert caught.value is trouble
    assert any("'bad'" in note and MIXED in note for note in trouble.__notes__)


def test_generators_are_set_last(tmp_path: Path):
    """Loading another object may draw from them."""
    from aiockpt.state.rng import RNG

    class Draws(Stateful):
        def load_state_dict(self, state: Any) -> None:
            torch.rand(3)

    write_step(tmp_path, 1, {"a_rng": RNG(), "z": Draws(1)})
    expected = torch.rand(2)
    restore(tmp_path, {"a_rng": RNG(), "z": Draws()})
    assert torch.equal(torch.rand(2), expected)
