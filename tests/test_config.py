"""Bad arguments, each with its error; good ones, normalised."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist

from aiockpt.config import Every, Latest, Options, RestartPolicy
from aiockpt.errors import ConfigError

TIMEOUTS = ["start_timeout", "stall_timeout", "io_timeout", "arrival_timeout", "linger_timeout", "close_timeout"]
NO_SECONDS: list[Any] = [0, -1, -0.5, math.nan, math.inf, -math.inf, 1e12, True, "60", b"60", [60], 1j]
NO_COUNT: list[Any] = [0, -1, 1.0, True, "3", None, math.nan, 1 << 63]


def refused(make: Callable[[], object]) -> ConfigError:
    """Return the ConfigError, after a look that it says what, why and next."""
    with pytest.raises(ConfigError) as caught:
        make()
    error = caught.value
    assert error.argument
    assert error.what
    assert error.why
    assert error.next
    assert str(error) == f"{error.what}\nwhy: {error.why}\nnext: {error.next}"
    assert error.what.startswith(error.argument)
    return error


class Silent:
    """Its text is user's code that fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.mark.parametrize("value", [10**5000, Silent(), "x" * 100_000], ids=["huge int", "no repr", "long"])
@pytest.mark.parametrize(
    "argument", ["capacity", "keep", "every", "snapshot", "restart", "io_timeout", "process_group", "replicated"]
)
def test_values_that_cannot_be_shown(argument: str, value: Any) -> None:
    """An argument whose text fails or floods is refused like others."""
    assert len(str(refused(lambda: Options.make("run", **{argument: value})))) < 500


def names(values: list[Any]) -> list[str]:
    return [repr(value) for value in values]


@pytest.mark.parametrize("argument", TIMEOUTS)
@pytest.mark.parametrize("value", NO_SECONDS, ids=names(NO_SECONDS))
def test_timeouts_are_positive_seconds(argument: str, value: Any) -> None:
    """A time-out that no wait could take is refused by its name, with what was given."""
    error = refused(lambda: Options.make("run", **{argument: value}))
    assert error.argument == argument
    assert repr(value) in error.why
    assert "None for no limit" in error.next


@pytest.mark.parametrize("argument", TIMEOUTS)
@pytest.mark.parametrize("value", [None, 1, 0.001, 1e9])
def test_timeouts_that_are_taken(argument: str, value: Any) -> None:
    """None is no limit; ints are as good as floats."""
    assert getattr(Options.make("run", **{argument: value}), argument) == value


@pytest.mark.parametrize("value", [v for v in NO_COUNT if v is not None], ids=repr)
def test_capacity_is_a_number_of_bytes(value: Any) -> None:
    """Capacity is a whole number of at least 1, or None."""
    assert refused(lambda: Options.make("run", capacity=value)).argument == "capacity"
    assert Options.make("run", capacity=1 << 30).capacity == 1 << 30


@pytest.mark.parametrize("value", ["Guarded", "", None, 1, ["guarded"], b"inline"], ids=repr)
def test_snapshot_is_one_of_two(value: Any) -> None:
    """The error names both modes."""
    error = refused(lambda: Options.make("run", snapshot=value))
    assert error.argument == "snapshot"
    assert "guarded" in error.next
    assert "inline" in error.next


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        ("keep", 3, "aiockpt.Latest"),
        ("keep", Every(steps=3), "aiockpt.Latest"),
        ("every", 100, "aiockpt.Every"),
        ("every", Latest(3), "aiockpt.Every"),
        ("restart", None, "aiockpt.RestartPolicy"),
        ("restart", 3, "aiockpt.RestartPolicy"),
    ],
)
def test_values_of_ours_are_asked_for_by_name(argument: str, value: Any, right: str) -> None:
    """A bare number is no policy; the error says which class to give."""
    error = refused(lambda: Options.make("run", **{argument: value}))
    assert error.argument == argument
    assert right in error.next


@pytest.mark.parametrize(
    "value", ["model.*", b"model.*", None, 3, {"model.*"}, iter(["a"])], ids=lambda value: type(value).__name__
)
def test_replicated_is_a_list(value: Any) -> None:
    """One text would be taken letter by letter, and a set has another order on each rank."""
    error = refused(lambda: Options.make("run", replicated=value))
    assert error.argument == "replicated"
    assert 'replicated=["model.*"]' in error.next


@pytest.mark.parametrize("value", [[""], [None], ["a", 3], [["a"]], [b"a"]], ids=repr)
def test_replicated_holds_globs(value: Any) -> None:
    """The one that is none is shown."""
    assert repr(value[-1]) in refused(lambda: Options.make("run", replicated=value)).why


def test_replicated_is_kept_as_a_tuple() -> None:
    """A list that its owner changes later changes nothing here."""
    globs = ["model.*"]
    options = Options.make("run", replicated=globs)
    globs.append("*")
    assert options.replicated == ("model.*",)
    assert Options.make("run").replicated == ()


@pytest.mark.parametrize("value", [0, "WORLD", dist.ProcessGroup, object()], ids=["0", "text", "class", "object"])
def test_process_group_is_one(value: Any) -> None:
    """What is none is shown; the error says where to get one."""
    error = refused(lambda: Options.make("run", process_group=value))
    assert error.argument == "process_group"
    assert "new_group" in error.next


def test_process_group_of_others() -> None:
    """``new_group`` gives a mark to who is no member."""
    assert "no member" in refused(lambda: Options.make("run", process_group=dist.GroupMember.NON_GROUP_MEMBER)).why


def test_process_group_that_lives() -> None:
    """It is taken while it is initialised, and refused once it is destroyed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert Options.make("run", process_group=group).process_group is group
        own = dist.new_group([0])
        assert Options.make("run", process_group=own).process_group is own
    finally:
        dist.destroy_process_group()
    for gone in (group, own):
        assert "torch.distributed" in refused(lambda gone=gone: Options.make("run", process_group=gone)).why


def test_options_import_no_torch() -> None:
    """A group cannot be given before torch is there, so it is looked for there."""
    code = """
        import sys
        from aiockpt.config import Options
        from aiockpt.errors import ConfigError
        Options.make("run")
        try:
            Options.make("run", process_group=object())
        except ConfigError:
            print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


NO_RUN: list[Any] = ["", "a\0b", b"bytes", None, 7, ["run"], "surrogate\udc80"]


@pytest.mark.parametrize("run", NO_RUN, ids=names(NO_RUN))
def test_run_is_a_path(run: Any) -> None:
    """What is no path as text is refused before anything is made."""
    error = refused(lambda: Options.make(run))
    assert error.argument == "run"
    assert repr(run) in error.why


def test_run_in_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path needs a working directory; an absolute one does not."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "working directory was removed" in refused(lambda: Options.make("run")).why
    assert Options.make(tmp_path).run == str(tmp_path)


def test_run_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later ``chdir`` moves no run; text and ``os.PathLike`` are alike."""
    monkeypatch.chdir(tmp_path)
    assert Options.make("a/../b/").run == Options.make(Path("b")).run == os.path.join(tmp_path, "b")


@pytest.mark.parametrize("value", NO_COUNT, ids=names(NO_COUNT))
def test_latest_is_a_count(value: Any) -> None:
    """Keeping nothing would remove the checkpoint that was just made."""
    assert refused(lambda: Latest(value)).argument == "Latest(n)"


@pytest.mark.parametrize("value", [v for v in NO_COUNT if v is not None], ids=repr)
def test_every_steps(value: Any) -> None:
    """Steps are a whole number of at least 1."""
    assert refused(lambda: Every(steps=value)).argument == "Every(steps)"


@pytest.mark.parametrize("value", NO_SECONDS, ids=names(NO_SECONDS))
def test_every_minutes(value: Any) -> None:
    """Minutes are positive; there is no "no limit" here, and the error offers none."""
    error = refused(lambda: Every(minutes=value))
    assert error.argument == "Every(minutes)"
    assert "None" not in error.next


def test_every_needs_one() -> None:
    """An ``Every`` of nothing would never be due."""
    assert refused(Every).argument == "Every()"
    assert Every(minutes=0.5, steps=3) == Every(steps=3, minutes=0.5)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("tries", value) for value in (-1, 1.5, True, "3", None)),
        *(("window", value) for value in NO_SECONDS),
        *(("window", value) for value in (None,)),
        *(("delays", value) for value in ((), [], [0.5], None, 1.0, "1", (0.5, -1), (math.nan,), (math.inf,), (True,))),
        *(("delays", value) for value in ((None,), ("1",))),
    ],
)
def test_restart_policy(argument: str, value: Any) -> None:
    """A policy that could not be followed is refused at once, not at the first death."""
    assert refused(lambda: RestartPolicy(**{argument: value})).argument == f"RestartPolicy({argument})"


def test_restart_delays_repeat_the_last() -> None:
    """The first restart is immediate by default; later ones wait longer, then as long as the last."""
    policy = RestartPolicy(delays=(0, 1.5))
    assert [policy.delay(n) for n in range(4)] == [0, 1.5, 1.5, 1.5]
    assert RestartPolicy().delay(0) == 0
    assert RestartPolicy(tries=0).tries == 0


@pytest.mark.parametrize("value", [Latest(3), Every(steps=3), RestartPolicy(), Options.make("run")], ids=repr)
def test_configuration_is_frozen(value: msgspec.Struct) -> None:
    """Nobody changes what a coordinator was told."""
    field = value.__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(value, field, getattr(value, field))
    assert hash(value) == hash(msgspec.structs.replace(value))
