"""Bad input: a clear error with what, why and next step; nothing lost, nothing hangs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import aiockpt
from aiockpt import blocking
from tests.files import flip, make_read_only, small_disk
from tests.helpful import assert_helpful

pytestmark = pytest.mark.process

STATE: dict[str, Any] = {"model": {"w": torch.arange(30_000.0)}, "n": 1}


# ---- the run directory


def a_file(path: Path) -> None:
    path.write_text("hello")


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("hello")


def another_programs(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("x")


def newer(path: Path) -> None:
    path.mkdir()
    (path / "aiockpt.json").write_text('{"format": 99, "run_id": "x"}')


def not_json(path: Path) -> None:
    path.mkdir()
    (path / "aiockpt.json").write_text("no json")


@pytest.mark.parametrize("make", [a_file, below_a_file, another_programs, newer, not_json])
def test_run_directories_that_are_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Refused at open, with the path; what stands there is untouched."""
    run = tmp_path / "parent" / "run"
    run.parent.mkdir()
    make(run)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(aiockpt.ConfigError) as caught:
        blocking.Checkpointer(run).open()
    assert_helpful(caught.value, aiockpt.ConfigError, path=str(run), argument="run")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with small_disk(tmp_path / "disk", "4m") as path:
        yield path


def test_a_read_only_directory(disk: Path) -> None:
    """An errno of the operating system, at open."""
    make_read_only(disk)
    with pytest.raises(aiockpt.StorageError) as caught:
        blocking.Checkpointer(disk / "run").open()
    assert_helpful(caught.value, aiockpt.StorageError, errno=errno.EROFS, path=str(disk / "run"))


def test_a_full_disk(disk: Path) -> None:
    """That save fails alone, the checkpoint before it stands, and the next one that fits succeeds."""
    with blocking.Checkpointer(disk / "run") as ckpt:
        ckpt.save(0, STATE).result(60)
        with pytest.raises(aiockpt.StorageError) as caught:
            ckpt.save(1, {"w": torch.zeros(8 << 20, dtype=torch.uint8)}).result(60)
        assert_helpful(caught.value, aiockpt.StorageError, errno=errno.ENOSPC, step=1)
        assert str(caught.value.path).startswith(str(disk / "run"))
        ckpt.save(2, STATE).result(60)
        assert ckpt.steps() == [0, 2]
        assert ckpt.statistics().worker_restarts == 0


# ---- the state


class Colour(Enum):
    RED = 1


class Point(NamedTuple):
    x: int


BAD_STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "Tensor[float32]"),
    "meta": (lambda: torch.empty(3, device="meta"), "Tensor[float32]"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "Tensor[quint8]"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "NestedTensor[float32]",
    ),
    "complex32": (lambda: torch.ones(3, dtype=torch.complex32), "Tensor[complex32]"),
    "function": (lambda: len, "builtins.builtin_function_or_method"),
    "object": (lambda: object(), "builtins.object"),
    "enum": (lambda: Colour.RED, f"{__name__}.Colour"),
    "named tuple": (lambda: Point(1), f"{__name__}.Point"),
    "large value": (lambda: "x" * (9 << 20), "str"),
}
"""How to make them, and the type that the error names."""


@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about prototypes of the types refused here
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_that_cannot_be_saved(case: str, tmp_path: Path) -> None:
    """Refused by ``save()`` itself, naming key and type; nothing was begun and the slot is free."""
    make, type_name = BAD_STATES[case]
    value = make()
    with blocking.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(aiockpt.UnsupportedValueError) as caught:
            ckpt.save(0, {"a": {"b": value}})
        assert_helpful(caught.value, aiockpt.UnsupportedValueError, key="a.b", type_name=type_name)
        ckpt.save(0, STATE, when_busy="raise").result(60)


def test_keys_that_collide(tmp_path: Path) -> None:
    """Both keys are named."""
    with blocking.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(aiockpt.UnsupportedValueError) as caught:
            ckpt.save(0, {"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}})
        assert_helpful(caught.value, aiockpt.UnsupportedValueError)
        assert {caught.value.key, caught.value.other_key} == {"['a', 'b.c']", "['a', 'b', 'c']"}
        ckpt.save(0, STATE, when_busy="raise").result(60)


# ---- bytes on disk


def truncate(path: Path, to: float) -> None:
    os.truncate(path, int(path.stat().st_size * to))


DATA = "model/model-00001-of-00001.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "manifest gone": lambda step: (step / "manifest.json").unlink(),
    "manifest empty": lambda step: truncate(step / "manifest.json", 0),
    "manifest cut": lambda step: truncate(step / "manifest.json", 0.7),
    "manifest head flipped": lambda step: flip(step / "manifest.json", 30),
    "manifest tail flipped": lambda step: flip(step / "manifest.json", (step / "manifest.json").stat().st_size - 20),
    "manifest hostile": lambda step: (step / "manifest.json").write_bytes(b'{"head":' + b"[" * 100_000),
    "data gone": lambda step: (step / DATA).unlink(),
    "data cut": lambda step: truncate(step / DATA, 0.5),
    "data grown": lambda step: os.truncate(step / DATA, (step / DATA).stat().st_size + 4096),
    "data flipped": lambda step: flip(step / DATA, 60_000),
    "header length flipped": lambda step: flip(step / DATA, 6),
    "header flipped": lambda step: flip(step / DATA, 40),
    "swapped with another step's": lambda step: shutil.copyfile(step.parent / "step-0" / DATA, step / DATA),
}


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    """A run with steps 0 and 1 of different content."""
    with blocking.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(0, {"model": {"w": torch.zeros(30_000)}, "n": 0}).result(60)
        ckpt.save(1, {"model": {"w": torch.ones(30_000)}, "n": 1}).result(60)
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: str, two_steps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, the older one restored, the bad one renamed and kept; asked for by step it is an error."""
    DAMAGES[damage](two_steps / "step-1")
    target: dict[str, Any] = {"model": {"w": torch.full((30_000,), 7.0)}, "n": 7}
    with pytest.raises(aiockpt.CheckpointCorruptError) as caught:
        blocking.restore(two_steps, target, step=1)
    name = "manifest.json" if damage.startswith("manifest") else DATA
    assert_helpful(caught.value, aiockpt.CheckpointCorruptError, step=1, file=str(two_steps / "step-1" / name))
    with blocking.Checkpointer(two_steps) as ckpt:
        restored = ckpt.restore(target)
        assert restored is not None
        assert restored.step == 0
        assert list(restored.skipped) == [1]
        assert target["n"] == 0
        assert target["model"]["w"].eq(0).all()
        assert ckpt.steps() == [0]
        ckpt.save(1, STATE).result(60)
    assert "step 1" in caplog.text
    assert any(name.startswith(".bad-step-1.") for name in os.listdir(two_steps))


def test_no_good_checkpoint_is_an_error(two_steps: Path) -> None:
    """Never a silent start at step 0."""
    for step in (0, 1):
        flip(two_steps / f"step-{step}" / DATA, 60_000)
    target = {"model": {"w": torch.zeros(30_000)}, "n": 0}
    with pytest.raises(aiockpt.NoUsableCheckpointError) as caught:
        blocking.restore(two_steps, target)
    assert_helpful(caught.value, aiockpt.NoUsableCheckpointError, path=str(two_steps))
    assert sorted(caught.value.skipped or {}) == [0, 1]


def test_a_step_that_is_not_there(two_steps: Path) -> None:
    """The error has the step."""
    for call in (lambda: blocking.load(two_steps, step=5), lambda: blocking.restore(two_steps, {"n": 0}, step=5)):
        with pytest.raises(aiockpt.StepNotFoundError) as caught:
            call()
        assert_helpful(caught.value, aiockpt.StepNotFoundError, step=5, path=str(two_steps))


def test_a_state_that_does_not_fit(two_steps: Path) -> None:
    """One error lists all of it, and nothing live was changed."""
    target: dict[str, Any] = {"model": {"w": torch.full((3,), 7.0), "extra": torch.ones(2)}, "m": 5}
    with pytest.raises(aiockpt.StateMismatchError) as caught:
        blocking.restore(two_steps, target)
    assert_helpful(caught.value, aiockpt.StateMismatchError, step=1, missing=("model.extra", "m"), unexpected=("n",))
    (mismatched,) = caught.value.mismatched or ()
    assert mismatched.startswith("model.w: ")
    assert target["model"]["w"].eq(7).all()


# ---- CUDA


def test_calls_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the state is read: torch does not give the state of a generator meanwhile."""

    class Unreadable:
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError("the state was read")

        load_state_dict = state_dict

    with blocking.Checkpointer(tmp_path / "run") as checkpointer:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for call in (
            lambda: checkpointer.save(1, {"o": Unreadable()}),
            lambda: checkpointer.prepare({"o": Unreadable()}),
        ):
            with pytest.raises(aiockpt.errors.ConfigError, match="captured") as caught:
                call()
            assert_helpful(caught.value, aiockpt.errors.ConfigError)
        monkeypatch.undo()
        checkpointer.save(1, STATE).result()
