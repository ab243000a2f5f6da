"""Files that lie, and directories that do not fit together: one error, and no run is made."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import aiockpt.blocking
from aiockpt.errors import CheckpointError, ConfigError, UnsupportedValueError
from aiockpt.interchange.importing import import_checkpoint
from tests.format.headers import header, tensor
from tests.format.test_hostile_headers import FALSE_SUMS, LIES
from tests.restoring.writing import write_step


def refused(source: Path, why: str = "not imported|cannot be saved") -> CheckpointError:
    """Return the error that an import is answered with, after a look that nothing was made."""
    run = source.parent / "run"
    with pytest.raises((ConfigError, UnsupportedValueError), match=why) as caught:
        import_checkpoint(str(source), str(run), step=0)
    assert not run.exists()
    assert len(str(caught.value)) < 2000
    return caught.value


def put(directory: Path, files: dict[str, Any]) -> Path:
    """Make a directory: tensors, JSON, or bytes by file name."""
    directory.mkdir()
    for name, content in files.items():
        match content:
            case bytes():
                (directory / name).write_bytes(content)
            case dict() if name.endswith(".safetensors"):
                safetensors.torch.save_file(content, directory / name)
            case _:
                (directory / name).write_text(json.dumps(content))
    return directory


X, Y = torch.arange(3.0), torch.arange(4)


@pytest.mark.parametrize(("text", "data_nbytes"), LIES.values(), ids=LIES.keys())
def test_lies(text: Any, data_nbytes: int, tmp_path: Path) -> None:
    """What a header must not say."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(header(text) + bytes(data_nbytes))
    refused(file)


@pytest.mark.parametrize("text", FALSE_SUMS.values(), ids=FALSE_SUMS.keys())
def test_false_checksums(text: str, tmp_path: Path) -> None:
    """Of the kind that our own files carry."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(header({"__metadata__": {"aiockpt.blocks": text}, "a": tensor()}) + bytes(4))
    refused(file)


@pytest.mark.parametrize(
    "claims",
    {
        "half a byte in each row": {"a": tensor(0, 3, dtype="F4", shape=[2, 3])},
        "half a byte": {"a": tensor(0, 1, dtype="F4", shape=[])},
        "strides beyond 64 bits": {"a": tensor(0, 0, shape=[0, 1 << 40, 1 << 40])},
        "a name that nobody can read": {"x" * 20_000: tensor(0, 0, shape=[0])},
        "two names that read the same": {"a\udc80": tensor(0, 0, shape=[0])},
    }.items(),
    ids=lambda item: item[0],
)
def test_tensors_that_torch_or_a_checkpoint_has_not(claims: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Safetensors allows them, or nearly."""
    data_nbytes = max(claim["data_offsets"][1] for claim in claims[1].values())
    file = tmp_path / "m.safetensors"
    file.write_bytes(header(json.dumps(claims[1])) + bytes(data_nbytes))
    refused(file)


@pytest.mark.parametrize("claim", [1, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_huge_lengths_cost_nothing(claim: int, tmp_path: Path) -> None:
    """Also where the file is large enough for them, with a hole in it."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", claim) + b"{")
    os.truncate(file, 1 << 42)
    refused(file)


@pytest.mark.process
def test_a_large_header(tmp_path: Path) -> None:
    """10,000 tensors, more than a megabyte of names."""
    claims = {f"{'layer.' * 20}{i}": tensor(4 * i, 4 * i + 4) for i in range(10_000)}
    data = torch.arange(10_000, dtype=torch.float32)
    (tmp_path / "m.safetensors").write_bytes(header(claims) + data.numpy().tobytes())
    imported = import_checkpoint(str(tmp_path / "m.safetensors"), str(tmp_path / "run"), step=0)
    assert imported.tensors == 10_000
    found = aiockpt.blocking.load(tmp_path / "run")["model"]
    assert torch.equal(torch.cat(list(found.values())), data)


@pytest.mark.process
def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    """safetensors sorts by item size, others need not."""
    claims = {"a": tensor(0, 1, dtype="U8", shape=[1]), "b": tensor(1, 13, shape=[3])}
    (tmp_path / "m.safetensors").write_bytes(header(claims) + b"\x07" + X.numpy().tobytes())
    import_checkpoint(str(tmp_path / "m.safetensors"), str(tmp_path / "run"), step=0)
    found = aiockpt.blocking.load(tmp_path / "run")["model"]
    assert (found["a"].tolist(), found["b"].tolist()) == ([7], [0.0, 1.0, 2.0])


def test_damage_in_a_file_of_ours_is_found(tmp_path: Path) -> None:
    """The checksums in its header are compared, and the error says where."""
    step = write_step(tmp_path / "mine", 1, {"model": {"x": torch.ones(1 << 20), "y": X}})
    (file,) = (step / "model").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(step / "model", "the checksum of the .* bytes from 4096 on is not the one in its header")


INDEX = "model.safetensors.index.json"
SETS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "no safetensors file"),
    "a tensor in two files": ({"a.safetensors": {"x": X}, "b.safetensors": {"x": X}}, "in another file"),
    "a file that is missing": ({INDEX: {"weight_map": {"x": "a.safetensors"}}}, "does not exist"),
    "a tensor that is missing": (
        {INDEX: {"weight_map": {"x": "a.safetensors"}}, "a.safetensors": {"y": X}},
        "no tensor 'x', which the index",
    ),
    "an index that leads out": ({INDEX: {"weight_map": {"x": "../m.safetensors"}}}, "leads out"),
    "an index that leads to the root": ({INDEX: {"weight_map": {"x": "/etc/passwd"}}}, "leads out"),
    "an index with a zero byte": ({INDEX: {"weight_map": {"x": "a\0b"}}}, "leads out"),
    "an index that is a list": ({INDEX: []}, "no index"),
    "an index without a map": ({INDEX: {"weights": {}}}, "no index"),
    "an index of numbers": ({INDEX: {"weight_map": {"x": 1}}}, "no index"),
    "an index that is deep": ({INDEX: b"[" * 100_000}, "no index"),
    "an index that is no text": ({INDEX: b"\xff"}, "no UTF-8"),
    "an index of nothing": ({INDEX: {"weight_map": {}}}, "no safetensors file"),
    "two indices": ({INDEX: {"weight_map": {}}, f"other.{INDEX}": {"weight_map": {}}}, "several indices"),
    "a configuration that is no text": ({"model.safetensors": {"x": X}, "config.json": b"\xff"}, "no UTF-8"),
    "other files": ({"pytorch_model.bin": b"PK"}, "give its torch.save file itself"),
    "an empty file": ({"model.safetensors": b""}, "less than the 8"),
}


@pytest.mark.parametrize(("files", "why"), SETS.values(), ids=SETS.keys())
def test_directories_that_do_not_fit(files: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Each for its own reason."""
    refused(put(tmp_path / "theirs", files), why)


def test_odd_files(tmp_path: Path) -> None:
    """What is missing, waits for ever, or is something else."""
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "no regular file")
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "text").write_text("hello there, this is text")
    refused(tmp_path / "text", "neither a safetensors nor a torch.save file")
    refused(tmp_path / "text" / "below", "does not exist")
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(CheckpointError):
        import_checkpoint(str(tmp_path / "loop"), str(tmp_path / "run"), step=0)


def test_runs_and_steps_are_no_sources(tmp_path: Path) -> None:
    """The error says which folder to give."""
    step = write_step(tmp_path / "mine", 1, {"model": {"x": X}})
    assert "step-0/model" in refused(tmp_path / "mine", "no safetensors file").next
    with pytest.raises(ConfigError, match="no safetensors file") as caught:
        import_checkpoint(str(step), str(tmp_path / "run"), step=0)
    assert f"{step}/model" in caught.value.next


@pytest.mark.process
def test_sets_that_fit(tmp_path: Path) -> None:
    """Files without an index, an index with files it does not name, links as in a cache of downloads."""
    plain = put(tmp_path / "plain", {"a.safetensors": {"x": X}, "b.safetensors": {"y": Y}})
    indexed = put(
        tmp_path / "indexed",
        {INDEX: {"weight_map": {"x": "a.safetensors"}}, "a.safetensors": {"x": X, "y": Y}, "z.safetensors": {"x": Y}},
    )
    single = put(tmp_path / "single", {"model.safetensors": {"x": X, "y": Y}, "adapter_model.safetensors": {"x": Y}})
    links = put(tmp_path / "links", {})
    os.symlink("../single/model.safetensors", links / "model.safetensors")
    for step, directory in enumerate((plain, indexed, single, links)):
        import_checkpoint(str(directory), str(tmp_path / "run"), step=step, part="theirs")
        found = aiockpt.blocking.load(tmp_path / "run")["theirs"]
        assert (found["x"].tolist(), found["y"].tolist()) == (X.tolist(), Y.tolist())
