"""Damaged bytes: never restored; an older step or the right error instead."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    NoUsableCheckpointError,
    StateMismatchError,
    StorageError,
)
from aiockpt.restoring.apply import MIXED
from aiockpt.restoring.load import load_checkpoint
from aiockpt.storage.run_directory import Committed
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import write_step


def state(x: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((5, 7), x), "b": torch.full((3,), x, dtype=torch.float64)},
        "optimizer": {"m": torch.full((2,), x)},
        "epoch": int(x),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two good checkpoints, step 2 newer."""
    write_step(tmp_path, 1, state(1.0))
    write_step(tmp_path, 2, state(2.0))
    return tmp_path


FILES = [
    "manifest.json",
    "model/model-00001-of-00001.safetensors",
    "optimizer/model-00001-of-00001.safetensors",
    "model/model.safetensors.index.json",
]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_gives_the_older_step(file: str, run: Path):
    """Every byte of a manifest, a sample of the others, never a wrong value; what is not read may be damaged."""
    path = run / "step-2" / file
    good = path.read_bytes()
    good_states = {x: fingerprint(state(x)) for x in (1.0, 2.0)}
    places = (
        range(len(good)) if len(good) < 4096 else [*range(0, 700, 3), *range(700, 4096, 97), *range(4096, len(good))]
    )
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        live = state(0.0)
        outcome = restore(run, live)
        assert outcome is not None
        if file.endswith("index.json"):  # for other programs; no restore reads it
            assert outcome.step == 2
        else:
            assert (outcome.step, list(outcome.skipped)) == (1, [2]), place
        assert fingerprint(live) == good_states[float(outcome.step)], place
        if outcome.step == 1:
            with pytest.raises(CheckpointCorruptError) as caught:
                restore(run, state(0.0), step=2)
            assert caught.value.step == 2
            assert Path(str(caught.value.file)) == path
            assert caught.value.why


def cut(path: Path, nbytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(nbytes)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: cut(path, 0),
    "cut by one": lambda path: cut(path, path.stat().st_size - 1),
    "cut in half": lambda path: cut(path, path.stat().st_size // 2),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "removed": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "the older step's": lambda path: shutil.copy(str(path).replace("step-2", "step-1"), path),
    "another file's": lambda path: shutil.copy(
        path.parents[1] / ("optimizer" if "model/" in str(path) else "model") / path.name
        if path.suffix == ".safetensors"
        else path.parent / FILES[1],
        path,
    ),
}


@pytest.mark.parametrize("file", FILES[:3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_give_the_older_step_or_are_named(damage: str, file: str, run: Path, caplog: Any):
    """Cut, extended, removed, swapped: newest falls back with a warning, an explicit step raises."""
    DAMAGES[damage](run / "step-2" / file)
    live = state(0.0)
    outcome = restore(run, live)
    assert outcome is not None
    assert outcome.step == 1
    assert list(outcome.skipped) == [2]
    assert fingerprint(live) == fingerprint(state(1.0))
    assert "step 2 is passed over" in caplog.text
    ways = [(run, 2), (run / "step-2", None)]
    if (run / "step-2" / "manifest.json").is_dir():
        ways.pop()  # without the run around it that is an errno, EISDIR, and proves nothing
    for path, step in ways:
        with pytest.raises(CheckpointCorruptError) as caught:
            restore(path, state(0.0), step=step)
        error = caught.value
        assert error.step == 2
        assert Path(str(error.file)) == run / "step-2" / file
        assert error.why
        assert error.next
    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(run, step=2)
    assert load_checkpoint(run)["epoch"] == 1


def flip_data(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def test_a_bad_block_says_where_and_both_checksums(run: Path, caplog: Any):
    """In the error's fields and in the warning; offset is that of the block in its file."""
    path = run / "step-2" / FILES[1]
    flip_data(path)
    with pytest.raises(CheckpointCorruptError) as caught:
        restore(run, state(0.0), step=2)
    error = caught.value
    assert (error.offset, error.file, error.step) == (4096, str(path), 2)
    assert error.expected != error.found
    restore(run, state(0.0))
    for part in (str(path), "offset 4096", str(error.expected), str(error.found)):
        assert part in caplog.text


def test_bad_ones_are_handed_over_before_the_next_is_opened(run: Path):
    """The run's writer renames them; the reason comes with them."""
    flip_data(run / "step-2" / FILES[2])
    seen: list[tuple[int, str]] = []

    def on_bad(committed: Committed, error: CheckpointCorruptError) -> None:
        seen.append((committed.step, str(error.file)))
        os.rename(committed.path, run / f".bad-step-{committed.step}.{committed.save_id}")

    outcome = restore(run, state(0.0), on_bad=on_bad)
    assert outcome is not None
    assert outcome.step == 1
    assert seen == [(2, str(run / "step-2" / FILES[2]))]
    again = restore(run, state(0.0), on_bad=on_bad)
    assert again is not None
    assert again.skipped == {}
    assert len(seen) == 1


def test_an_explicit_step_is_not_handed_over(run: Path):
    """Who names a step decides what happens to it."""
    flip_data(run / "step-2" / FILES[2])
    with pytest.raises(CheckpointCorruptError):
        restore(run, state(0.0), step=2, on_bad=lambda *_: pytest.fail("called"))


def test_if_none_is_good_that_is_an_error_and_never_a_new_start(run: Path):
    """It names each step with its reason, and says that the live state is mixed where it is."""
    flip_data(run / "step-1" / FILES[1])
    (run / "step-2" / FILES[1]).unlink()
    with pytest.raises(NoUsableCheckpointError) as caught:
        restore(run, state(0.0))
    assert sorted(caught.value.skipped or ()) == [1, 2]
    assert "missing" in (caught.value.skipped or {})[2]
    assert caught.value.path == str(run)
    (run / "step-1" / "manifest.json").write_bytes(b"{}")
    (run / "step-2" / "manifest.json").unlink()
    with pytest.raises(NoUsableCheckpointError) as caught:
        restore(run, state(0.0))
    assert sorted(caught.value.skipped or ()) == [1, 2]
    assert MIXED not in str(caught.value)


def damage_second_file(run: Path, step: int) -> None:
    """Damage what is read last, so that live tensors changed before."""
    flip_data(run / f"step-{step}" / FILES[2])


@pytest.mark.parametrize("case", ["explicit", "none left", "older does not fit", "cannot be read"])
def test_a_state_that_is_left_mixed_is_called_so(case: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    """After a bad block where nothing older follows, or it does not fit."""
    damage_second_file(run, 2)
    expected: type[CheckpointError] = CheckpointCorruptError
    options: dict[str, Any] = {"threads": 1}
    if case == "explicit":
        options["step"] = 2
    elif case == "none left":
        shutil.rmtree(run / "step-1")
        expected = NoUsableCheckpointError
    elif case == "older does not fit":
        shutil.rmtree(run / "step-1")
        write_step(run, 1, state(1.0) | {"more": torch.ones(1)}, ordinal=0)
        expected = StateMismatchError
    else:
        read = os.preadv

        def broken(fd: int, *args: Any) -> int:
            if "step-1" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(5, "EIO")
            return read(fd, *args)

        monkeypatch.setattr(os, "preadv", broken)
        expected = StorageError
    live = state(0.0)
    with pytest.raises(expected) as caught:
        restore(run, live, **options)
    assert live["model"]["w"][0, 0] == 2.0
    assert live["epoch"] == 0
    assert MIXED in str(caught.value)
    assert "Nothing live was changed" not in str(caught.value)


def test_an_older_step_that_lacks_what_was_overwritten_does_not_fit(run: Path):
    """With strict=False too: a tensor of the bad step would stay in a state that counts as the older one."""
    bad = write_step(run, 3, {"a": {"extra": torch.ones(2)}} | state(3.0))
    flip_data(bad / FILES[2])
    live = {"a": {"extra": torch.zeros(2)}} | state(0.0)
    with pytest.raises(StateMismatchError, match="has overwritten") as caught:
        restore(run, live, strict=False, threads=1)
    assert caught.value.missing == ("a.extra",)
    assert MIXED in str(caught.value)
    live = {"a": {"extra": torch.zeros(2)}} | state(0.0)
    outcome = restore(run, live, strict=False, exclude="a", threads=1)
    assert outcome is not None
    assert outcome.step == 2
    assert live["a"]["extra"].tolist() == [0, 0]


def test_optimizer_state_that_the_older_step_lacks_is_removed(run: Path):
    """So it is no mixture, although the bad step overwrote it."""
    shutil.rmtree(run)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    objects = {"m": model, "o": optimizer, "z": {"t": torch.ones(1)}}
    write_step(run, 1, objects)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    flip_data(write_step(run, 2, objects) / "z" / Path(FILES[1]).name)
    outcome = restore(run, objects, threads=1)
    assert outcome is not None
    assert (outcome.step, len(optimizer.state)) == (1, 0)


def test_what_is_found_before_the_first_block_leaves_the_state_alone(run: Path):
    """Headers and manifest are checked first, of all files that are needed."""
    path = run / "step-2" / FILES[2]
    flip_data(path, 20)
    live = state(0.0)
    with pytest.raises(CheckpointCorruptError) as caught:
        restore(run, live, step=2)
    assert fingerprint(live) == fingerprint(state(0.0))
    assert MIXED not in str(caught.value)


@pytest.mark.parametrize("errno", [5, 13, 116])
def test_what_cannot_be_read_is_never_an_older_step(errno: int, run: Path, monkeypatch: pytest.MonkeyPatch):
    """EIO, EACCES, ESTALE are no proof of corruption."""
    read = os.preadv

    def broken(fd: int, *args: Any) -> int:
        if "step-2" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno, os.strerror(errno))
        return read(fd, *args)

    monkeypatch.setattr(os, "preadv", broken)
    live = state(0.0)
    with pytest.raises(StorageError) as caught:
        restore(run, live)
    assert caught.value.errno == errno
    assert str(caught.value.path).startswith(str(run / "step-2"))
    assert fingerprint(live) == fingerprint(state(0.0))


def test_a_failing_handover_stops_the_restore(run: Path):
    """Its error goes on; with a note where live tensors changed."""
    damage_second_file(run, 2)

    def on_bad(committed: Committed, error: CheckpointCorruptError) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as caught:
        restore(run, state(0.0), on_bad=on_bad, threads=1)
    assert caught.value.__notes__ == [MIXED]
