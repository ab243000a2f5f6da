"""torch.save and torch.load(weights_only=True), both ways."""

from __future__ import annotations

import datetime
import os
import pickle
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aiockpt
import aiockpt.blocking
from aiockpt.errors import ConfigError, UnsupportedValueError
from aiockpt.interchange.exporting import export_checkpoint
from aiockpt.interchange.importing import import_checkpoint
from tests.interop.states import assert_bit_equal, every_dtype
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step
from tests.support import Training


def load(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)


def export(tmp_path: Path, state: Any, to: str = "state.pt", **options: Any) -> Any:
    """Export a state and return what torch loads."""
    step = write_step(tmp_path / "run", 1, state)
    exported = export_checkpoint(str(step), str(tmp_path / to), **options)
    return load(tmp_path / to), exported


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_it_loads_every_dtype(suffix: str, tmp_path: Path) -> None:
    """complex128, float4 and E8M0 too."""
    state = every_dtype() | {
        "complex128": torch.randn(2, 3, dtype=torch.complex128),
        "scalar.complex128": torch.tensor(1 + 2j, dtype=torch.complex128),
        "f4": torch.randint(0, 256, (3, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "e8m0": torch.randint(0, 255, (5,), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    found, exported = export(tmp_path, {"model": state, "other": torch.ones(2)}, f"m.{suffix}", part="model")
    assert_bit_equal(found, state)
    assert (exported.kind, exported.converted) == ("torch.save", {})


def test_each_tensor_has_its_own_bytes_in_the_file(tmp_path: Path) -> None:
    """A small part of a large state makes a small file."""
    state = {"large": torch.ones(1 << 18), "small": {"x": torch.ones(4)}}
    export(tmp_path, state, part="small")
    assert (tmp_path / "state.pt").stat().st_size < 10_000


def test_a_module_and_an_optimizer(tmp_path: Path) -> None:
    """A part is what load_state_dict takes."""
    training = Training()
    training.step()
    found, _ = export(tmp_path, training.state)
    fresh = Training(seed=1)
    fresh.model.load_state_dict(found["model"])
    assert_bit_equal(fresh.model.state_dict(), training.model.state_dict())
    assert found["progress"] == training.progress


PERMITTED: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": 1 << 200,
    "float": float("inf"),
    "complex": 1j,
    "text": "é\udc80",
    "bytes": b"\x00\xff",
    "long bytes": b"ab" * 5000,
    "list": [1, [2]],
    "tuple": (1, (2,)),
    "dict": {1: 2, (1, "a"): 3, None: 4},
    "set": {1, (2, 3)},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("aab"),
    "size": torch.Size([1, 2]),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda:1"),
    "tensors": [torch.ones(2), (torch.zeros(1), None)],
}


def test_values_that_are_permitted(tmp_path: Path) -> None:
    """Come back as they are, types and all."""
    found, exported = export(tmp_path, {"values": PERMITTED})
    tensors = found["values"].pop("tensors")
    expected = {key: value for key, value in PERMITTED.items() if key != "tensors"}
    assert found["values"] == expected
    assert {key: type(value) for key, value in found["values"].items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert torch.equal(tensors[1][0], torch.zeros(1))
    assert exported.converted == {}


CONVERTED: dict[str, tuple[Any, Any]] = {
    "defaultdict": (defaultdict(list, a=[1]), {"a": [1]}),
    "frozenset": (frozenset({1}), {1}),
    "frozenset in a set": ({frozenset({1})}, {(1,)}),
    "BytesIO": (BytesIO(b"x"), b"x"),
    "long BytesIO": (BytesIO(b"x" * 5000), b"x" * 5000),
    "datetime": (datetime.datetime(2024, 1, 2), "2024-01-02T00:00:00"),
    "path": ({"in": [Path("a/b")]}, {"in": ["a/b"]}),
    "path as a key": ({Path("a"): 1}, {"a": 1}),
    "np.float64": (np.float64(0.5), 0.5),
    "np.bool": (np.bool_(True), True),
    "np.longdouble": (np.longdouble(0.5), 0.5),
    "np.datetime64": (np.datetime64("2024-01-02"), "2024-01-02"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_values_that_are_not_permitted_become_what_comes_nearest(name: str, tmp_path: Path) -> None:
    """And the export names each."""
    value, expected = CONVERTED[name]
    found, exported = export(tmp_path, {"values": {"x": value}, "y": 1})
    assert found["values"]["x"] == expected
    assert type(found["values"]["x"]) is type(expected)
    assert [key for key in exported.converted if key.startswith("values.x")] == list(exported.converted) != []


def test_numpy_arrays_become_tensors(tmp_path: Path) -> None:
    """Wherever they stand."""
    found, exported = export(tmp_path, {"buffer": {"a": np.arange(6.0).reshape(2, 3), "b": [np.ones(2), 1]}})
    assert torch.equal(found["buffer"]["a"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    assert torch.equal(found["buffer"]["b"][0], torch.ones(2, dtype=torch.float64))
    assert list(exported.converted) == ["buffer.a", "buffer.b.0"]


@pytest.mark.parametrize(
    ("value", "why"), [(1 << 3000, "permits no such value"), ({Path("a"): 1, "a": 2}, "two of its keys are the same")]
)
def test_what_has_no_form_there_is_refused(value: Any, why: str, tmp_path: Path) -> None:
    """By name; nothing is written."""
    with pytest.raises(UnsupportedValueError, match=why) as caught:
        export(tmp_path, {"model": torch.ones(1), "values": {"x": value}})
    assert caught.value.key == "values.x"
    assert os.listdir(tmp_path) == ["run"]


def test_tied_tensors_share_their_memory(tmp_path: Path) -> None:
    """In the file and when it is loaded."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    found, _ = export(tmp_path, {"model": model}, part="model")
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()


# ---- the other way


def imported(tmp_path: Path, content: Any, *, part: str | None = None, **options: Any) -> dict[str, Any]:
    """Save by torch, import, and load."""
    torch.save(content, tmp_path / "theirs.pt", **options)
    import_checkpoint(str(tmp_path / "theirs.pt"), str(tmp_path / "mine"), step=0, part=part)
    return aiockpt.blocking.load(tmp_path / "mine")


@pytest.mark.process
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_we_read_a_state_dict(zipped: bool, tmp_path: Path) -> None:
    """It restores into the module that it is of."""
    saved, fresh = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    imported(tmp_path, saved.state_dict(), _use_new_zipfile_serialization=zipped)
    restored = restore(tmp_path / "mine", {"model": fresh})
    assert_bit_equal(fresh.state_dict(), saved.state_dict())
    assert restored is not None
    assert restored.metadata["imported"]["kind"] == "torch.save"


@pytest.mark.process
def test_we_read_a_training_checkpoint(tmp_path: Path) -> None:
    """Its parts keep their keys; what it has of an optimizer is for the optimizer's own load_state_dict."""
    training, fresh = Training(), Training(seed=1)
    training.step()
    content = {
        "model_state_dict": training.model.state_dict(),
        "optimizer_state_dict": training.optimizer.state_dict(),
        "epoch": 3,
        "best": (0.5, {1, 2}),
        "bits": every_dtype(),
    }
    found = imported(tmp_path, content)
    assert (found["epoch"], found["best"]) == (3, (0.5, {1, 2}))
    assert_bit_equal(found["bits"], content["bits"])
    restore(tmp_path / "mine", {"model_state_dict": fresh.model}, include="model_state_dict")
    fresh.optimizer.load_state_dict(found["optimizer_state_dict"])
    assert fingerprint(fresh.state)[0] == fingerprint(training.state)[0]


@pytest.mark.process
def test_a_state_goes_out_and_comes_back(tmp_path: Path) -> None:
    """Module and optimizer restore from it as from the checkpoint itself."""
    training, fresh = Training(), Training(seed=1)
    training.step()
    state, live = ({"model": each.model, "optimizer": each.optimizer} for each in (training, fresh))
    step = write_step(tmp_path / "run", 1, state)
    export_checkpoint(str(step), str(tmp_path / "state.pt"))
    import_checkpoint(str(tmp_path / "state.pt"), str(tmp_path / "mine"), step=1)
    restore(tmp_path / "mine", live)
    assert fingerprint(live) == fingerprint(state)


@pytest.mark.process
def test_a_part_names_what_has_no_names(tmp_path: Path) -> None:
    """A lone tensor, or a dict that would have been taken for a state."""
    assert torch.equal(imported(tmp_path, torch.arange(3), part="data")["data"], torch.arange(3))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["zip", "before 1.6", "bare", "module", "numpy"])
def test_pickled_code_is_refused_and_not_executed(how: str, tmp_path: Path) -> None:
    """One that names what it would have called, without torch's advice how to call it; no run is made."""
    file, mark = tmp_path / "theirs.pt", tmp_path / "mark"
    match how:
        case "bare":
            file.write_bytes(pickle.dumps(Evil(mark), protocol=2))
        case "module":
            torch.save(nn.Linear(2, 2), file)
        case "numpy":
            torch.save({"x": torch.ones(1), "loss": np.float64(0.5)}, file)
        case _:
            torch.save({"x": torch.ones(1), "evil": Evil(mark)}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ConfigError, match="nothing was executed") as caught:
        import_checkpoint(str(file), str(tmp_path / "runs" / "mine"), step=0)
    assert "False" not in str(caught.value)
    assert os.listdir(tmp_path) == ["theirs.pt"]


def test_the_environment_cannot_allow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's variable that turns weights_only off is for calls that do not ask for it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"evil": Evil(tmp_path / "mark")}, tmp_path / "theirs.pt")
    with pytest.raises(ConfigError, match="nothing was executed"):
        import_checkpoint(str(tmp_path / "theirs.pt"), str(tmp_path / "mine"), step=0)
    assert os.listdir(tmp_path) == ["theirs.pt"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([torch.ones(1)], "it holds a list"),
        (torch.ones(1), "it holds a Tensor"),
        ({"x": torch.ones(2).to_sparse()}, "'model.x' cannot be saved"),
        ({"x": bytearray(b"x")}, "'x' cannot be saved"),
        ({"x": {"y": torch.nn.Parameter(torch.ones(1)), "z": bytearray(1)}}, "'x.z' cannot be saved"),
    ],
)
def test_what_no_checkpoint_holds_is_refused(content: Any, why: str, tmp_path: Path) -> None:
    """Before anything is written."""
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises((ConfigError, UnsupportedValueError), match=why):
        import_checkpoint(str(tmp_path / "theirs.pt"), str(tmp_path / "mine"), step=0)
    assert os.listdir(tmp_path) == ["theirs.pt"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Wherever they end, in one line that is torch's own words at most."""
    torch.save({"x": torch.ones(100)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    for length in (0, 3, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "theirs.pt").write_bytes(data[:length])
        with pytest.raises(ConfigError) as caught:
            import_checkpoint(str(tmp_path / "theirs.pt"), str(tmp_path / "mine"), step=0)
        assert "\n" not in caught.value.why
        assert len(caught.value.why) < 400
    assert not (tmp_path / "mine").exists()
