"""Names of files and directories: safe, distinct, and read back as they were made."""

from __future__ import annotations

import os
import string
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.format import names
from aiockpt.format.names import (
    MANIFEST_NAME,
    MAX_STEP,
    Attempt,
    attempt_name,
    bad_name,
    dotted,
    file_name,
    meet_name,
    old_name,
    parse_attempt,
    parse_bad,
    parse_meet,
    parse_old,
    parse_step,
    parse_term,
    shard_name,
    sort_key,
    step_name,
    term_name,
    trash_name,
)

TEXTS = st.text(st.characters(), max_size=20) | st.text("./%~aA\0\\ü\udc80", max_size=6) | st.text("a.", min_size=190)
ODD = [
    "",
    ".",
    "..",
    "...",
    ".hidden",
    "a/b",
    "/",
    "../../etc/passwd",
    "a b",
    "a\tb\n",
    "\0",
    "%",
    "%2E",
    "%2e",
    "%state",
    "%~",
    "~",
    "-rf",
    "manifest.json",
    "Manifest.json",
    "manifest%2Ejson",
    "ü",
    "u\u0308",
    "\U0001f600",
    "\udcff",
    "CON",
    "state",
    "x" * 200,
    "x" * 201,
    "x" * 202,
    "ü" * 100,
    "ü" * 34,
    "." * 300,
]


def is_safe(name: str) -> bool:
    """Tell whether a name is one visible path component of plain ASCII that every file system takes."""
    allowed = set(string.ascii_letters + string.digits + "._-+@=%~")
    return 0 < len(name) <= 200 and set(name) <= allowed and not name.startswith(".") and name != MANIFEST_NAME


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_file_names_are_safe_and_distinct(first: str, second: str) -> None:
    """Any text is one path component, and two texts are two."""
    assert is_safe(file_name(first))
    assert (file_name(first) == file_name(second)) == (first == second)


def test_odd_names() -> None:
    """The odd ones all have names of their own, whatever they have in common."""
    found = {file_name(text) for text in ODD}
    assert len(found) == len(ODD)
    assert all(map(is_safe, found))
    assert "%state" not in found  # the planner's name for the folder of the top, where "state" is a key


@pytest.mark.parametrize("text", ["model", "optimizer_2", "layer-0.weight", "A+B=c@d", "x" * 200])
def test_plain_names_stay(text: str) -> None:
    """Others find the folder under its key."""
    assert file_name(text) == text


def test_long_names_differ_by_128_bits() -> None:
    """Over-long texts that begin alike are told apart by a checksum of the whole."""
    found = {file_name("x" * 300 + str(i)) for i in range(1000)}
    assert len(found) == 1000
    assert {len(name) for name in found} == {200}
    assert len({name[:166] for name in found}) == 1


@pytest.mark.parametrize("text", [*ODD, "x" * 5000])
def test_file_system_takes_them(tmp_path: Path, text: str) -> None:
    """A real directory with that name, with the prefix of a shard's file inside."""
    folder = tmp_path / file_name(text)
    folder.mkdir()
    assert os.listdir(tmp_path) == [folder.name]


STEPS = st.integers(0, MAX_STEP)
IDS = st.uuids().map(str) | st.uuids().map(lambda value: value.hex)


@settings(max_examples=100, deadline=None)
@given(STEPS, IDS, st.integers(0, 10**9 - 1))
def test_parsing_gives_back_what_was_named(step: int, save_id: str, attempt: int) -> None:
    """Each name is read as what it was made of, and by no other reader."""
    made: dict[Callable[[str], object], tuple[str, object]] = {
        parse_step: (step_name(step), step),
        parse_term: (term_name(step), step),
        parse_attempt: (attempt_name(step, save_id, attempt), Attempt(step, save_id, attempt)),
        parse_old: (old_name(step, save_id), Attempt(step, save_id, 0)),
        parse_bad: (bad_name(step, save_id), Attempt(step, save_id, 0)),
        parse_meet: (meet_name(f"{step:032x}"), f"{step:032x}"),
    }
    for parse, (name, parts) in made.items():
        assert parse(name) == parts
        for other in made.keys() - {parse}:
            assert other(name) is None
        assert parse(trash_name(name)) is None
        assert "/" not in name


def test_limits() -> None:
    """The highest step has a name; a UUID has one as attempt."""
    assert parse_step(step_name(MAX_STEP)) == MAX_STEP
    save_id = str(uuid.UUID(int=0))
    assert parse_attempt(attempt_name(0, save_id, 0)) == Attempt(0, save_id, 0)


FOREIGN = [
    "",
    "step-",
    "step-x",
    "step--1",
    "step-1.0",
    "step-1 ",
    " step-1",
    "step-1\n",
    "Step-1",
    "step_1",
    "step-\u0661",
    "step-1/",
    "step-" + "1" * 20,
    ".step-1",
    ".step-1.",
    ".step-1..0",
    ".step-1.XYZ.0",
    ".step-1.../x.0",
    ".step-1.ab.",
    ".step-1.ab.0\n",
    ".step-x.ab.0",
    ".old.step-1",
    ".old.step-1.",
    ".old.step-1.ab/..",
    ".bad-step-1",
    ".bad-step-1.ab\n",
    ".bad-step-1." + "a" * 65,
    ".term-",
    ".term-x",
    ".term-1\n",
    "term-1",
    ".meet-",
    ".meet-" + "a" * 31,
    ".meet-" + "a" * 33,
    ".meet-" + "A" * 32,
    ".meet-" + "a" * 32 + "\n",
    ".trash.step-1",
    "manifest.json",
    ".lock",
]


@pytest.mark.parametrize("name", FOREIGN, ids=ascii)
def test_foreign_names(name: str) -> None:
    """What we did not name is nobody's: it is neither read nor removed."""
    for parse in (parse_step, parse_term, parse_attempt, parse_old, parse_bad, parse_meet):
        assert parse(name) is None


@pytest.mark.parametrize("digits", ["012", "00", "0000000000000000012", str(MAX_STEP + 1), "9" * 19], ids=str)
def test_a_number_has_one_spelling(digits: str) -> None:
    """Two directories are never one step: zeros in front, and numbers that no step has, make a foreign name."""
    assert parse_step(f"step-{digits}") is None
    assert parse_term(f".term-{digits}") is None
    assert parse_attempt(f".step-{digits}.ab.0") is None
    assert parse_attempt(f".step-1.ab.{digits}") is None
    assert parse_old(f".old.step-{digits}.ab") is None
    assert parse_bad(f".bad-step-{digits}.ab") is None


def test_shard_names() -> None:
    """As transformers names them, from 1."""
    assert shard_name(0, 1) == "model-00001-of-00001.safetensors"
    assert shard_name(41, 123_456) == "model-00042-of-123456.safetensors"
    assert shard_name(2, 4, part=2) == "model-00003-of-00004.2.safetensors"
    assert shard_name(2, 4, extra=True) == "model-00003-of-00004.extra.safetensors"
    assert shard_name(2, 4, part=3, extra=True) == "model-00003-of-00004.extra.3.safetensors"


def test_dotted() -> None:
    """Segments joined, whatever is in them."""
    assert dotted(("model", "layers.0", "weight")) == "model.layers.0.weight"
    assert dotted(()) == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.text(st.characters(), max_size=4), max_size=3).map(tuple), max_size=6))
def test_sort_key(paths: list[tuple[str, ...]]) -> None:
    """Any segments can be sorted, by bytes, and different ones have different keys."""
    ordered = sorted(paths, key=sort_key)
    assert sorted(ordered, key=sort_key) == ordered
    assert len({sort_key(path) for path in paths}) == len(set(paths))
    assert sort_key(("a", "b")) < sort_key(("a.b",))


def test_all_is_complete() -> None:
    """Everything public of the module is offered."""
    public = {name for name, value in vars(names).items() if getattr(value, "__module__", "") == names.__name__}
    assert {name for name in public if not name.startswith("_")} <= set(names.__all__)
