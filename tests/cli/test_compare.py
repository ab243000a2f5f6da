"""What of two checkpoints is compared, and how far tensors are apart: against torch on whole tensors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.cli import compare_tensors
from aiockpt.cli.compare import Comparison, Difference, compare
from aiockpt.cli.compare_tensors import Reader, difference
from aiockpt.errors import CheckpointCorruptError
from aiockpt.restoring.selection import Selection
from aiockpt.storage.readers import open_checkpoint
from tests.restoring.writing import write_step

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)


def saved(run: Path, *states: dict[str, Any], metadata: tuple[Any, ...] = (None, None)) -> Path:
    for step, state in enumerate(states, 1):
        write_step(run, step, state, metadata=metadata[step - 1])
    return run


def compared(run: Path, names: Selection | None = None) -> Comparison:
    with open_checkpoint(str(run / "step-1")) as a, open_checkpoint(str(run / "step-2")) as b:
        return compare(a.manifest, b.manifest, names or Selection())


def differences(run: Path) -> dict[str, Difference | None]:
    with (
        open_checkpoint(str(run / "step-1")) as a,
        open_checkpoint(str(run / "step-2")) as b,
        ThreadPoolExecutor(1) as pool,
    ):
        found = compare(a.manifest, b.manifest, Selection())
        readers = Reader(a), Reader(b)
        return {pair.name: difference(pair, *readers, pool, None) for pair in found.pairs}


def test_every_dtype(tmp_path: Path) -> None:
    """Maximum, norm and count as torch has them in float64."""
    torch.manual_seed(0)
    a: dict[str, torch.Tensor] = {str(dtype): (torch.rand(37, 3) * 8 + 1).to(dtype) for dtype in FLOATS}
    b = {name: tensor.clone() for name, tensor in a.items()}
    for dtype in FLOATS:
        b[str(dtype)][3:9] = (torch.rand(6, 3) * 8 + 1).to(dtype)
    for dtype in INTEGERS:
        a[str(dtype)] = torch.randint(0, 100, (50,)).to(dtype)
        b[str(dtype)] = torch.cat((a[str(dtype)][:40], torch.randint(0, 100, (10,)).to(dtype)))
    a["bool"], b["bool"] = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    for dtype in (torch.complex64, torch.complex128):
        a[str(dtype)] = torch.randn(5, 7, dtype=dtype)
        b[str(dtype)] = a[str(dtype)] + torch.eye(5, 7)
    found = differences(saved(tmp_path / "run", a, b))
    assert found.keys() == a.keys()
    for name, item in found.items():
        assert item is not None
        wide = torch.complex128 if "complex" in name else torch.float64
        x, y = a[name].to(wide), b[name].to(wide)
        assert (item.elements, item.unequal) == (x.numel(), int((x != y).sum())), name
        assert item.max_abs == float((x - y).abs().max()), name
        assert item.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-12), name
        assert item.dtype == str(a[name].dtype).removeprefix("torch.")


def test_large_integers_are_not_rounded(tmp_path: Path) -> None:
    """Beyond 2**53 float64 has not every integer; a difference of one is one all the same."""
    big = torch.tensor([2**62, -(2**62), 5, -(2**63)])
    a = {
        "signed": big,
        "unsigned": torch.tensor([2**63 + 4, 7], dtype=torch.uint64),
        "far": torch.tensor([-(2**63)] * 2),
    }
    b = {
        "signed": big + torch.tensor([1, 0, 0, 0]),
        "unsigned": torch.tensor([2**63 + 1, 7], dtype=torch.uint64),
        "far": torch.tensor([2**63 - 1, -(2**63)]),
    }
    found = differences(saved(tmp_path / "run", a, b))
    results = {name: (item.unequal, item.max_abs) for name, item in found.items() if item is not None}
    assert results == {"signed": (1, 1.0), "unsigned": (1, 3.0), "far": (1, 2.0**64)}


def test_float4(tmp_path: Path) -> None:
    """Two elements in a byte, each with its own value."""
    a, b = (torch.tensor([[code, 0x70]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for code in (0x21, 0xA7))
    (item,) = differences(saved(tmp_path / "run", {"w": a}, {"w": b})).values()
    assert item is not None
    # 0.5 → 6.0 and 1.0 → -1.0, beside 0.0 and 6.0 that stay
    assert (item.elements, item.unequal, item.max_abs) == (4, 2, 5.5)
    assert item.relative == pytest.approx(math.sqrt(5.5**2 + 2**2) / math.sqrt(0.5**2 + 1 + 36))


def test_nan_and_infinity(tmp_path: Path) -> None:
    """NaN are counted and left out of the figures; equal infinities are equal, others are infinitely far apart."""
    nan, inf = math.nan, math.inf
    a = {
        "became": torch.tensor([1.0, 2.0, 3.0]),
        "stayed": torch.tensor([nan, 1.0]),
        "same_inf": torch.tensor([inf, 3.0]),
        "new_inf": torch.tensor([1.0, 4.0]),
        "from_zero": torch.zeros(2),
        "complex": torch.tensor([complex(nan, 1), 1 + 1j]),
    }
    b = {
        "became": torch.tensor([1.0, nan, 4.0]),
        "stayed": torch.tensor([nan, 2.0]),
        "same_inf": torch.tensor([inf, 6.0]),
        "new_inf": torch.tensor([1.0, -inf]),
        "from_zero": torch.tensor([0.0, 1.0]),
        "complex": torch.tensor([complex(nan, 1), 1 + 2j]),
    }
    found = differences(saved(tmp_path / "run", a, b))
    figures = {
        name: (item.unequal, item.max_abs, item.nan_a, item.nan_b) for name, item in found.items() if item is not None
    }
    assert figures == {
        "became": (2, 1.0, 0, 1),
        "stayed": (1, 1.0, 1, 1),
        "same_inf": (1, 3.0, 0, 0),
        "new_inf": (1, inf, 0, 0),
        "from_zero": (1, 1.0, 0, 0),
        "complex": (1, 1.0, 1, 1),
    }
    relative = {name: item.relative for name, item in found.items() if item is not None}
    assert relative["same_inf"] == 1.0
    assert relative["became"] == pytest.approx(1 / math.sqrt(10))
    assert relative["from_zero"] == inf


def test_bits_that_are_no_value(tmp_path: Path) -> None:
    """The sign of a zero, and the payload of a NaN: not the same bytes, and no element is unequal."""
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = {"zero": torch.tensor([0.0, 1.0]), "nan": quiet[:1].clone()}
    b = {"zero": torch.tensor([-0.0, 1.0]), "nan": quiet[1:].clone()}
    found = differences(saved(tmp_path / "run", a, b))
    assert [item and (item.unequal, item.max_abs, item.relative) for item in found.values()] == [(0, 0.0, 0.0)] * 2


def test_equal_tensors_have_no_difference(tmp_path: Path) -> None:
    """Empty ones, NaN and tied ones too; each tied pair is compared once."""
    w = torch.tensor([1.0, math.nan])
    state = {"model": {"a": w, "b": w}, "empty": torch.empty(0, 3), "flag": torch.tensor(True)}
    assert differences(saved(tmp_path / "run", state, state)) == {"model.a": None, "empty": None, "flag": None}


def test_one_element_is_told(tmp_path: Path) -> None:
    """A step counter, a complex one, one that became NaN."""
    a = {"step": torch.tensor(3), "c": torch.tensor([1 + 1j]), "loss": torch.tensor(1.5), "two": torch.ones(2)}
    b = {"step": torch.tensor(4), "c": torch.tensor([1 - 1j]), "loss": torch.tensor(math.nan), "two": torch.zeros(2)}
    found = differences(saved(tmp_path / "run", a, b))
    told = {name: (str(item.a), str(item.b)) for name, item in found.items() if item is not None}
    assert told == {"step": ("3", "4"), "c": ("(1+1j)", "(1-1j)"), "loss": ("1.5", "nan"), "two": ("None", "None")}


def test_in_parts_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors over many parts and blocks, at places that are multiples of neither."""
    monkeypatch.setattr(compare_tensors, "_PART_NBYTES", 1 << 12)
    torch.manual_seed(0)
    a = {"first": torch.randn(7), "long": torch.randn(5_000_003), "other": torch.randn(1021)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["long"][4_300_000:4_300_100] += 1
    b["other"][-1] += 2
    found = differences(saved(tmp_path / "run", a, b))
    assert found["first"] is None
    long, other = found["long"], found["other"]
    assert long is not None
    assert other is not None
    assert long.unequal == 100
    assert long.relative == pytest.approx(float((a["long"] - b["long"]).double().norm() / a["long"].double().norm()))
    assert (other.unequal, other.max_abs) == (1, float((b["other"].double() - a["other"].double()).abs().max()))


def test_damage_is_found(tmp_path: Path) -> None:
    """Bytes are verified before they are compared: a flipped bit is no difference."""
    run = saved(tmp_path / "run", {"w": torch.ones(3000)}, {"w": torch.ones(3000)})
    (file,) = (run / "step-2").glob("state/*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x00")
    with pytest.raises(CheckpointCorruptError) as caught:
        differences(run)
    assert (caught.value.file, caught.value.step) == (str(file), 2)


def test_forms_and_values(tmp_path: Path) -> None:
    """What came, what went, what is another kind of thing, and the smallest named part of each changed value."""
    a = {
        "gone": torch.ones(2),
        "shape": torch.ones(2),
        "dtype": torch.ones(2),
        "kind": torch.ones(2),
        "blob": b"x" * 5000,
        "count": 1,
        "same": [1, 2],
        "flag": 1,
        "deep": {"keep": 1, "lr": [0.1, 0.2], "old": 3},
        "groups": [{"lr": 0.1}, {"lr": 0.2}],
    }
    b = {
        "new": torch.ones(2),
        "value": 5,
        "shape": torch.ones(3),
        "dtype": torch.ones(2).half(),
        "kind": 1,
        "blob": b"x" * 6000,
        "count": 2,
        "same": [1, 2],
        "flag": True,
        "deep": {"keep": 1, "lr": [0.1, 0.3], "new": 4},
        "groups": [{"lr": 0.1}, {"lr": 0.3}],
    }
    run = saved(tmp_path / "run", a, b, metadata=({"loss": 1.0, "tag": "x"}, {"loss": 2.0, "tag": "x"}))
    found = compared(run)
    assert [(item.name, item.form) for item in found.removed] == [("gone", "float32 [2]"), ("deep.old", "value")]
    assert [(item.name, item.form) for item in found.added] == [
        ("new", "float32 [2]"),
        ("value", "value"),
        ("deep.new", "value"),
    ]
    assert [(item.name, item.a, item.b) for item in found.changed] == [
        ("shape", "float32 [2]", "float32 [3]"),
        ("dtype", "float32 [2]", "float16 [2]"),
        ("kind", "float32 [2]", "value"),
        ("blob", "bytes [5000]", "bytes [6000]"),
    ]
    assert [(item.name, item.a, item.b) for item in found.values] == [
        ("count", 1, 2),
        ("flag", 1, True),
        ("deep.lr", [0.1, 0.2], [0.1, 0.3]),
        ("groups.1.lr", 0.2, 0.3),
    ]
    assert found.equal_values == 2
    assert [(item.name, item.a, item.b) for item in found.metadata] == [("loss", 1.0, 2.0)]
    chosen = compared(run, Selection("deep"))
    assert ([item.name for item in chosen.values], chosen.changed, chosen.metadata) == (["deep.lr"], [], [])
