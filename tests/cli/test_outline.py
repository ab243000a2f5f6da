"""The tree that inspect draws: what is folded, what is nested, how deep it goes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from aiockpt.cli.outline import Part, draw, outline
from aiockpt.storage.readers import open_checkpoint
from tests.restoring.writing import write_step


def parts_of(run: Path, state: dict[str, Any]) -> list[Part]:
    with open_checkpoint(str(write_step(run, 1, state))) as checkpoint:
        return outline(checkpoint.manifest)


def text_of(parts: list[Part]) -> list[str]:
    """Return the drawing: depth as dots, label, what, times."""
    drawn = [
        f"{'.' * (len(row.lines) - 1)}{row.part.name}{row.part.tail}|{row.part.what}|{row.times}"
        for row in draw(parts).rows
    ]
    return [line.removesuffix("|1").removesuffix("|") for line in drawn]


def test_layers_that_are_alike_are_one(tmp_path: Path) -> None:
    """Also inside each other, and where some between them differ; two are left as they are."""

    def layer() -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(2, 3), "bias": torch.ones(3)}

    state = {
        "layers": {str(i): {"experts": [layer() for _ in range(4)]} for i in range(5)},
        "mixed": {f"block{i}": {"weight": torch.ones(9, 9)} if i == 2 else layer() for i in range(6)},
        "two": {str(i): layer() for i in range(2)},
    }
    assert text_of(parts_of(tmp_path, state)) == [
        "layers.{0..4}||5",
        ".experts.{0..3}|float32 weight [2, 3], bias [3]|20",
        "mixed",
        ".block{0..1,3..5}|float32 weight [2, 3], bias [3]|5",
        ".block2.weight|float32 [9, 9]",
        "two",
        ".0|float32 weight [2, 3], bias [3]",
        ".1|float32 weight [2, 3], bias [3]",
    ]


def test_what_is_folded_must_look_the_same(tmp_path: Path) -> None:
    """Another name inside, another value, another number of digits."""
    state = {
        "names": {str(i): {"w" if i else "v": torch.ones(2)} for i in range(4)},
        "values": [{"lr": lr, "w": torch.ones(1)} for lr in (0.1, 0.1, 0.1, 0.2)],
        "padded": {f"{i:02}": torch.ones(1) for i in range(12)},
        "sparse": {str(3 * i): torch.ones(1) for i in range(6)},
    }
    assert text_of(parts_of(tmp_path, state)) == [
        "names",
        ".0.v|float32 [2]",
        ".{1..3}.w|float32 [2]|3",
        "values",
        ".{0..2}||3",
        "..lr|0.1|3",
        "..w|float32 [1]|3",
        ".3",
        "..lr|0.2",
        "..w|float32 [1]",
        "padded.{00..11}|float32 [1]|12",
        "sparse.{0,3,6,…,15}|float32 [1]|6",
    ]


def test_dotted_names_are_nested(tmp_path: Path) -> None:
    """Of modules and of plain state dicts; a name may be a tensor's and a prefix."""
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    state = {"model": module, "flat": {"a": torch.ones(1), "a.b": torch.ones(2), "a.c.d": torch.ones(3)}}
    assert text_of(parts_of(tmp_path, state)) == [
        "model|module",
        ".0|float32 weight [2, 2], bias [2]",
        ".2|float32 weight [2, 2], bias [2]",
        "flat",
        ".a|float32 [1]",
        ".a",
        "..b|float32 [2]",
        "..c.d|float32 [3]",
    ]


def test_an_optimizer_has_a_row_for_a_parameter_and_a_group(tmp_path: Path) -> None:
    """Whatever it keeps of each; of a group what is set."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    drawn = text_of(parts_of(tmp_path, {"model": model, "optimizer": optimizer, "sgd": torch.optim.SGD([model.bias])}))
    assert drawn[:6] == [
        "model|float32 weight [2, 3], bias [2]",
        "optimizer|optimizer",
        ".state.model",
        "..weight|float32 exp_avg, exp_avg_sq [2, 3], step []",
        "..bias|float32 exp_avg, exp_avg_sq [2], step []",
        ".param_groups",
    ]
    assert drawn[6].startswith("..0|1 params, lr 0.1, betas (0.9, 0.999), eps 1e-08, weight_decay 0.01")
    assert "weight_decay 0.0" in drawn[7]
    assert drawn[8:10] == ["sgd|optimizer", ".state|empty"]


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    """The second name says so and adds nothing."""
    w = torch.ones(4)
    (part,) = parts_of(tmp_path, {"m": {"a": w, "b": w, "text": "x"}})
    assert (part.tensors, part.nbytes) == (1, 16)
    assert text_of([part]) == ["m", ".a|float32 [4]", ".b|float32 [4], tied", ".text|'x'"]


def test_what_is_stored_as_a_tensor_and_is_none(tmp_path: Path) -> None:
    """Arrays by numpy's dtype, bytes, streams; at the very top, too."""
    state = {"array": np.zeros((2, 3)), "bytes": b"x" * 5000, "stream": BytesIO(b"y" * 6000), "names": np.array(["ab"])}
    assert text_of(parts_of(tmp_path, state)) == [
        "array|numpy <f8 [2, 3]",
        "bytes|bytes [5000]",
        "stream|BytesIO [6000]",
        "names|numpy <U2 [1, 8]",
    ]


def test_long_values_have_a_row_for_each_item(tmp_path: Path) -> None:
    """Mappings, and lists of mappings; a long list of numbers is cut."""
    state = {
        "short": {"inner": [1, {"a": 2}]},
        "config": [{"name": "x" * 30, "path": "y" * 30}, {"steps": list(range(1000))}],
    }
    parts = parts_of(tmp_path, state)
    assert text_of(parts) == [
        "short.inner|[1, {a: 2}]",
        "config",
        ".0",
        "..name|" + repr("x" * 30),
        "..path|" + repr("y" * 30),
        ".1.steps|[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, … 1000 items]",
    ]


def test_ten_thousand_tensors_stay_readable(tmp_path: Path) -> None:
    """Whatever their names: as deep as 150 rows go, and of a wide part the first 40."""
    torch.manual_seed(0)
    sizes = torch.randint(1, 50, (10_000,)).tolist()
    letters = [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(10_000)]
    wide = {f"{name}": torch.ones(size) for name, size in zip(letters, sizes, strict=True)}
    deep: dict[str, Any] = {}
    for name, size in list(zip(letters, sizes, strict=True))[:2000]:
        deep.setdefault(name[1], {}).setdefault(name[0], {})[name[2]] = torch.ones(size)
    for state in ({"deep": deep}, {name: wide[name] for name in letters[:500]}):
        drawing = draw(parts_of(tmp_path / next(iter(state)), state))
        assert 15 < len(drawing.rows) <= 150
        assert drawing.folded > 0
    shown = draw(parts_of(tmp_path / "shown", {"wide": wide})).rows
    assert (len(shown), shown[-1].part.what) == (42, "9960 more")
    assert shown[0].part.tensors == 10_000


def test_a_name_of_a_thousand_dots(tmp_path: Path) -> None:
    """Is nested as far as names usually are."""
    name = ".".join(["a"] * 1000)
    (row, *_) = draw(parts_of(tmp_path, {"m": {name: torch.ones(1)}})).rows
    assert row.part.name + row.part.tail == f"m.{name}"


def test_what_is_of_each_rank(tmp_path: Path) -> None:
    """Is named as such; alone it is what it is."""
    with open_checkpoint(str(write_step(tmp_path, 1, {"w": torch.ones(2)}))) as checkpoint:
        plan = msgspec.structs.replace(
            checkpoint.manifest.plan, tree={"rng": ["own", "rng"], "loader": ["per_rank", {"w": 0}]}
        )
        parts = outline(msgspec.structs.replace(checkpoint.manifest, plan=plan))
    assert text_of(parts) == ["rng|of each rank its own", "loader.w|float32 [2]"]


def test_an_empty_state(tmp_path: Path) -> None:
    """Nothing to draw, and containers that hold nothing."""
    assert draw(parts_of(tmp_path / "a", {})).rows == []
    assert text_of(parts_of(tmp_path / "b", {"a": {}, "b": []})) == ["a|empty", "b|[]"]
