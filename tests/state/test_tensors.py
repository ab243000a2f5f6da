from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aiockpt.errors import UnsupportedValueError
from aiockpt.planning.local import Entry
from aiockpt.state.collect import collect
from tests.state.rebuild import round_trip, same


class Tagged(torch.Tensor):
    pass


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(3)


def _sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it beta
        return torch.eye(3).to_sparse_csr()


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)


def _nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "coo": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "csr": (_sparse_csr, "sparse"),
    "quantized": (_quantized, "qint8"),
    "nested": (lambda: _nested(torch.strided), "nested"),
    "jagged": (lambda: _nested(torch.jagged), "nested"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta"),
    "meta parameter": (lambda: nn.Parameter(torch.empty(3, device="meta")), "meta"),
    "fake": (_fake, "FakeTensor"),
    "lazy": (lambda: nn.UninitializedParameter(), "lazy"),
    "lazy buffer": (lambda: nn.UninitializedBuffer(), "lazy"),
    "subclass": (lambda: torch.ones(2).as_subclass(Tagged), "unknown tensor subclass"),
}
if torch.backends.mkldnn.is_available():
    REFUSED["mkldnn"] = (lambda: torch.ones(3).to_mkldnn(), "mkldnn")


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"a": [t]}, lambda t: Holder(t)], ids=["leaf", "list", "object"]
)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_plain_memory_is_refused_by_name(kind: str, wrap: Callable[[torch.Tensor], object]):
    """Sparse, quantized, nested, mkldnn, meta, fake, lazy tensors and subclasses are refused wherever they stand."""
    make, word = REFUSED[kind]
    live = make()
    with pytest.raises(UnsupportedValueError) as caught:
        collect({"x": wrap(live)})
    error = caught.value
    assert word in str(error)
    assert error.key is not None
    assert error.key.startswith("x")
    assert error.type_name is not None
    assert error.why
    assert error.next


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, object]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.value = state["value"]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_a_dtensor_of_one_rank_is_its_local_tensor(process_group: None):
    """With the shape of the whole; tied ones are one entry."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.ones(4, 2, requires_grad=True), mesh, [Shard(0)])
    collected = collect(
        {"x": {"w": weight, "v": weight.detach(), "u": distribute_tensor(torch.ones(3), mesh, [Replicate()])}}
    )
    assert collected.entries == [Entry(("x", "v"), "F32", (4, 2)), Entry(("x", "u"), "F32", (3,))]
    assert [type(tensor) for tensor in collected.tensors] == [torch.Tensor, torch.Tensor]
    assert collected.tensors[0].data_ptr() == weight._local_tensor.data_ptr()
    assert not collected.tensors[0].requires_grad


def test_a_tensor_inside_a_transform_is_refused():
    """A tensor that torch.func wraps has no memory of its own."""
    seen: list[str] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UnsupportedValueError, match=r"torch\.func") as caught:
            collect({"x": x})
        seen.append(str(caught.value.key))
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    torch.func.vmap(inside)(torch.ones(2, 3))
    assert seen == ["x", "x"]


base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
VIEWS = {
    "transposed": base.t(),
    "strided": base[::2, 1::3],
    "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
    "zero-size": torch.empty(0, 3),
    "zero-size transposed": torch.empty(0, 3).t(),
    "0-d": torch.tensor(2.5),
    "0-d view": base[1, 2],
    "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
    "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "conjugated 128": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128).conj(),
    "complex128 transposed": torch.arange(6).to(torch.complex128).reshape(2, 3).t(),
    "complex128 0-d": torch.tensor(1j, dtype=torch.complex128),
    "requires grad": torch.ones(3, requires_grad=True),
    "has a graph": torch.ones(3, requires_grad=True) * 2,
    "buffer": nn.Buffer(torch.ones(2)),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "zero tensor": torch._efficientzerotensor(3),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_every_plain_tensor_is_taken(kind: str):
    """Views of any strides, lazy conjugates and negatives, and tensors with a graph round-trip by value."""
    live = VIEWS[kind]
    collected = collect({"x": live})
    (tensor,) = collected.tensors
    assert not tensor.requires_grad
    assert not tensor.is_conj()
    assert not tensor.is_neg()
    assert tensor.layout is torch.strided
    back = round_trip({"x": live})["x"]
    expected = live.detach().resolve_conj().resolve_neg().clone()
    assert same(back, expected)
    lazy = live.is_conj() or live.is_neg() or live._is_zerotensor()
    assert collected.copies == ({0: live} if lazy else {})
    assert lazy or not live.numel() or tensor.data_ptr() == live.data_ptr()


def test_an_inference_tensor_is_taken():
    """A tensor made under inference_mode has plain memory."""
    with torch.inference_mode():
        live = torch.ones(3)
    assert same(round_trip({"x": live})["x"], torch.ones(3))


def test_a_tensor_whose_memory_was_freed_is_refused():
    """A storage of size 0 under a shape that is not empty must never be read."""
    live = torch.ones(3)
    live.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedValueError, match="memory was freed"):
        collect({"x": live})


def test_equal_views_of_one_folder_are_one_entry():
    """Tied tensors are stored once in a folder, under the first of their names, and stand at both places."""
    live = torch.arange(6.0).reshape(2, 3)
    collected = collect(
        {"a": {"z": live, "b": live, "y": live.view(2, 3), "t": live.t(), "half": live[:1]}, "c": {"x": live}}
    )
    assert [entry.segments for entry in collected.entries] == [("a", "b"), ("a", "t"), ("a", "half"), ("c", "x")]
    assert collected.tree == {"a": {"z": 0, "b": 0, "y": 0, "t": 1, "half": 2}, "c": {"x": 3}}


def test_zero_size_and_conjugated_tensors_are_never_tied():
    """A null pointer ties nothing, and a conjugate is not its base although it shares its memory."""
    live = torch.tensor([1 + 1j])
    collected = collect({"f": {"a": torch.empty(0), "b": torch.empty(0), "c": live, "d": live.conj()}})
    assert len(collected.entries) == 4


def test_tied_tensors_at_the_top_share_the_top_folder():
    """Tensors at the very top of the state belong to one folder."""
    live = torch.ones(2)
    assert collect({"b": live, "a": live}).tree == {"b": 0, "a": 0}
