"""The tree of errors, walked: whatever is added to it is tested by being there."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

import aiockpt
from aiockpt import errors
from aiockpt.errors import CheckpointError, SaveError, StepExistsError, StorageError

VALUES: dict[str, Any] = {
    "errno": errno.ENOSPC,
    "step": 1200,
    "busy_step": 1100,
    "exit_status": -9,
    "restarts": 3,
    "offset": 4096,
    "timeout": 2.5,
    "window": 300.0,
    "keys": ("model.a", "model.b"),
    "missing": ("a",),
    "unexpected": ("b",),
    "mismatched": ("c",),
    "rank": 3,
    "ranks": (0, 3),
    "skipped": {1200: "bad block"},
}

BUILTIN_BASES: dict[str, tuple[type[BaseException], ...]] = {
    "ConfigError": (ValueError,),
    "UsageError": (RuntimeError,),
    "UnsupportedValueError": (TypeError,),
    "SaveTimeoutError": (TimeoutError,),
    "StepExistsError": (FileExistsError, OSError),
    "StorageError": (OSError,),
    "StepNotFoundError": (LookupError,),
}

PARENTS = {
    "SaveBusyError": "SaveError",
    "SaveCancelledError": "SaveError",
    "SaveTimeoutError": "SaveError",
    "StepExistsError": "SaveError",
    "StorageError": "SaveError",
    "CommitUnknownError": "SaveError",
    "PlanMismatchError": "SaveError",
    "PeerFailedError": "SaveError",
    "WorkerStartError": "WorkerError",
    "WorkerExitedError": "WorkerError",
    "RestartLimitError": "WorkerError",
    "StepNotFoundError": "RestoreError",
    "CheckpointCorruptError": "RestoreError",
    "NoUsableCheckpointError": "RestoreError",
}


def tree(root: type[CheckpointError] = CheckpointError) -> Iterator[type[CheckpointError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def make(cls: type[CheckpointError]) -> CheckpointError:
    fields = {name: VALUES.get(name, f"<{name}>") for name in cls.FIELDS}
    error = cls("step 1200 was not saved", why="the disk is full", next="free some space", **fields)
    error.add_note("a note")
    return error


def facts(error: CheckpointError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in type(error).FIELDS}
    return fields | {"what": error.what, "why": error.why, "next": error.next, "notes": error.__notes__}


EVERY = pytest.mark.parametrize("cls", list(tree()), ids=lambda cls: cls.__name__)


def test_all_names_the_tree() -> None:
    """What the module offers is the tree, and the package offers the same."""
    names = {cls.__name__ for cls in tree()}
    assert set(errors.__all__) == names
    assert names <= set(aiockpt.__all__)
    assert all(getattr(aiockpt, name) is getattr(errors, name) for name in names)


@EVERY
def test_bases(cls: type[CheckpointError]) -> None:
    """Code that knows only the builtin error, or only the branch, catches it; and it knows no other builtin."""
    expected = BUILTIN_BASES.get(cls.__name__, ())
    assert all(issubclass(cls, base) for base in expected)
    for other in (ValueError, RuntimeError, TypeError, OSError, LookupError, TimeoutError):
        assert issubclass(cls, other) == any(issubclass(base, other) for base in expected)
    parent = getattr(errors, PARENTS.get(cls.__name__, "CheckpointError"))
    assert cls is CheckpointError or parent in cls.__bases__


@EVERY
def test_says_what_why_next(cls: type[CheckpointError]) -> None:
    """The text has three parts, one line each; a traceback shows them."""
    assert str(make(cls)) == "step 1200 was not saved\nwhy: the disk is full\nnext: free some space"
    assert str(cls("nothing more is known")) == "nothing more is known"
    assert make(cls).args == ("step 1200 was not saved",)


@EVERY
def test_fields(cls: type[CheckpointError]) -> None:
    """The facts are in fields; those not given are None; a field that the class has not is refused."""
    assert all(getattr(cls("x"), name) is None for name in cls.FIELDS)
    assert set(cls.FIELDS) <= set(cls.__annotations__)
    with pytest.raises(TypeError, match="no_such_field"):
        cls("x", no_such_field=1)


@EVERY
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(cls: type[CheckpointError], protocol: int) -> None:
    """An error crosses a process boundary with fields and notes."""
    error = make(cls)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is cls
    assert facts(again) == facts(error)
    assert str(again) == str(error)


@EVERY
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, CheckpointError.copy])
def test_copies(cls: type[CheckpointError], copier: Any) -> None:
    """A copy is equal, another object, without the traceback, and gets notes of its own."""
    error = make(cls)
    try:
        raise error
    except CheckpointError:
        again = copier(error)
    assert type(again) is cls
    assert again is not error
    assert facts(again) == facts(error)
    assert again.__traceback__ is None
    again.add_note("another")
    assert error.__notes__ == ["a note"]


def test_os_errors_have_what_code_for_os_errors_reads() -> None:
    """``errno``, ``strerror`` and ``filename`` are those of the builtin errors."""
    full = StorageError("x", errno=errno.ENOSPC, path="/runs/a")
    assert (full.errno, full.filename) == (errno.ENOSPC, "/runs/a")
    assert full.strerror == "No space left on device"
    assert StorageError("x").strerror is None
    exists = StepExistsError("x", step=3, path="/runs/a/step-3")
    assert (exists.errno, exists.filename) == (errno.EEXIST, "/runs/a/step-3")
    assert pickle.loads(pickle.dumps(exists)).errno == errno.EEXIST


def test_a_cause_stays_with_the_error_that_was_raised() -> None:
    """The copy that is raised elsewhere has no cause of its own; the raiser says ``from``."""
    try:
        raise SaveError("x") from OSError(5, "y")
    except SaveError as error:
        assert error.copy().__cause__ is None
        assert isinstance(error.__cause__, OSError)
