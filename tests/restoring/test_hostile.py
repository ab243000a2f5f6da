"""Manifests with right checksums that lie: refused as damage, before anything changes or is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn, optim

from aiockpt.errors import CheckpointCorruptError, CheckpointError, StateMismatchError
from aiockpt.format.manifest import decode_manifest
from aiockpt.restoring.load import load_checkpoint
from tests.restoring.restoring import fingerprint, restore
from tests.restoring.writing import plan_of, rewrite_manifest, write_step


def deep(depth: int, leaf: Any) -> Any:
    node = leaf
    for _ in range(depth):
        node = {"d": node}
    return node


BIG = 1 << 62
PLANS: dict[str, dict[str, Any]] = {
    "another dtype": {"classes": [["I32", [4], ""]]},
    "another shape": {"classes": [["F32", [2, 2], ""]]},
    "huge": {"classes": [["F32", [1 << 40], ""]]},
    "huge and empty": {"classes": [["F32", [0, BIG, BIG], ""]]},
    "sub-byte": {"classes": [["F4", [3], ""]]},
    "unknown mark": {"classes": [["F32", [4], "C64"]]},
    "no pair": {"classes": [["F64", [4], "C128"]]},
    "another name": {"names": ["nobody"]},
    "a plain file": {"entry_files": [1]},
    "unknown tag": {"tree": {"x": {"t": 0}, "v": ["set", [["k", -1]]]}},
    "unhashable key": {"tree": {"x": {"t": 0}, "v": ["dict", [[["a"], -1]]]}},
    "bad key": {"tree": {"x": {"t": 0}, "v": ["dict", [[{"~bytes": 5}, -1]]]}},
    "no blob": {"tree": {"x": {"t": 0}, "v": ["ndarray", 0, "O"]}},
    "short blob": {"tree": {"x": {"t": 0}, "v": ["BytesIO", 0]}},
    "deep": {"tree": {"x": {"t": 0}, "v": deep(600, -1)}},
    "a number as tree": {"tree": 0},
    "a list as tree": {"tree": ["list", [0]]},
}


@pytest.mark.parametrize("change", PLANS)
@pytest.mark.parametrize("mmap", [False, True])
def test_loading_refuses_a_lying_plan(change: str, mmap: bool, tmp_path: Path):
    """As corruption, which names the manifest."""
    step = write_step(tmp_path, 1, {"x": {"t": torch.ones(4)}, "v": 1})
    rewrite_manifest(step, plan=PLANS[change])
    with pytest.raises(CheckpointCorruptError) as caught:
        load_checkpoint(step, mmap=mmap)
    assert str(caught.value.file) == str(step / "manifest.json")
    assert caught.value.why


@pytest.mark.parametrize("change", PLANS)
def test_restoring_past_a_lying_plan_takes_the_older_step(change: str, tmp_path: Path):
    """Or says that it does not fit; never another error, and nothing live changes by the lie."""
    write_step(tmp_path, 1, {"x": {"t": torch.ones(4)}, "v": 1})
    step = write_step(tmp_path, 2, {"x": {"t": torch.full((4,), 2.0)}, "v": 2})
    rewrite_manifest(step, plan=PLANS[change])
    live: dict[str, Any] = {"x": {"t": torch.zeros(4)}, "v": 0}
    try:
        outcome = restore(tmp_path, live)
    except StateMismatchError:
        assert fingerprint(live) == fingerprint({"x": {"t": torch.zeros(4)}, "v": 0})
        return
    assert outcome is not None
    assert outcome.step == 1
    assert live["x"]["t"].tolist() == [outcome.step] * 4


@pytest.mark.parametrize(
    "groups",
    [
        5,
        [5],
        [{}],
        [{"params": 5}],
        [{"params": {"~tuple": []}}],
        {"~tuple": []},
        [{"params": [["x"]]}],
    ],
    ids=str,
)
def test_lying_parameter_groups_are_refused(groups: Any, tmp_path: Path):
    """Groups that are none."""
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = write_step(tmp_path, 1, {"o": optimizer, "m": model})
    number = -plan_of(step).tree["o"]["param_groups"] - 1
    values = decode_manifest((step / "manifest.json").read_bytes(), file="").values
    values[number] = groups
    rewrite_manifest(step, values=values)
    with pytest.raises((CheckpointCorruptError, StateMismatchError)):
        restore(step, {"o": optimizer, "m": model})


@pytest.mark.parametrize("value", [{"~nothing": 1}, {"~numpy": ["<f4", "AAAA"]}, {"~datetime": "x"}, {"~Size": "x"}])
def test_a_bad_value_is_found_before_anything_changes(value: Any, tmp_path: Path):
    """Also one of the metadata."""
    step = write_step(tmp_path, 1, {"x": torch.ones(2), "v": 1})
    live = {"x": torch.zeros(2), "v": 0}
    rewrite_manifest(step, values=[value])
    with pytest.raises(CheckpointCorruptError):
        restore(step, live)
    rewrite_manifest(step, values=[1], metadata=value)
    with pytest.raises(CheckpointCorruptError):
        restore(step, live)
    assert live["v"] == 0
    assert live["x"].tolist() == [0, 0]


def test_a_path_that_leads_out_is_not_followed(tmp_path: Path):
    """Neither up nor to the root."""
    step = write_step(tmp_path, 1, {"x": torch.ones(2)})
    manifest = decode_manifest((step / "manifest.json").read_bytes(), file="")
    for path in ("../other", "/etc/passwd", "state/../../x"):
        files = [msgspec.structs.replace(record, path=path) for record in manifest.files]
        rewrite_manifest(step, files=files)
        with pytest.raises(CheckpointError):
            restore(step, {"x": torch.zeros(2)})
        (step / "manifest.json").unlink()
        write_step(tmp_path, 1, {"x": torch.ones(2)})
