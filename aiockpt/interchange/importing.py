"""Files of other programs → a committed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import msgspec
import torch
from torch import nn

from aiockpt._version import __version__
from aiockpt.blocking import Checkpointer
from aiockpt.errors import StepExistsError
from aiockpt.format.names import step_name
from aiockpt.interchange.foreign_file import ForeignFile, refused
from aiockpt.interchange.new_run import unless_it_fails
from aiockpt.interchange.read_safetensors import TensorSet, open_directory, open_file
from aiockpt.interchange.read_torch import is_torch_file, load_torch
from aiockpt.planning.local import LocalPlan, plan_local
from aiockpt.state.collect import collect
from aiockpt.state.values import encode_values
from aiockpt.storage.run_record import check_run

__all__ = ["MODEL_PART", "Imported", "import_checkpoint"]

MODEL_PART = "model"
"""Where the tensors of a file that has no parts are put."""
_BRACE_AT = 8
"""Where the header of a safetensors file begins."""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What was read, and what it became."""

    source: str
    """Absolute."""
    kind: str
    """``safetensors`` or ``torch.save``."""
    run: str
    step: int
    path: str
    """Of the checkpoint."""
    parts: list[str]
    """Keys at the top of the state."""
    tensors: int
    nbytes: int
    """Of the tensors."""


class _Source:
    """A state, its tensors mapped, and what reads all of it."""

    def __init__(
        self, kind: str, state: Mapping[Any, Any], nbytes: int, read_through: Callable[[Callable[[int], None]], None]
    ) -> None:
        self.kind = kind
        self.state = state
        self.nbytes = nbytes
        self.read_through = read_through


def import_checkpoint(
    source: str,
    run: str,
    *,
    step: int,
    part: str | None = None,
    on_total: Callable[[int], None] = lambda nbytes: None,
    on_progress: Callable[[int], None] = lambda nbytes: None,
    on_saving: Callable[[], None] = lambda: None,
) -> Imported:
    """Save what other programs wrote as a checkpoint, which is then the newest of its run. None of it is executed.

    Tensors that have no parts (safetensors, a module's ``state_dict``) come below ``model``, as if a module of theirs
    had been saved under that key; any other ``torch.save`` file's dict is the state as it is. The checkpoint's metadata
    say where it came from. Memory: shared memory for all tensors, as for every save; the files are mapped.

    Args:
        source: A safetensors or ``torch.save`` file, or a directory of safetensors files with or without an index.
        run: The run directory; made where it is missing, and removed again where nothing comes of it.
        step: Training step; the run must not have it.
        part: The key at the top of the state under which all of it is put.
        on_total: Called once with the bytes that ``on_progress`` will count.
        on_progress: Called with the bytes read since the last call.
        on_saving: Called when all is read.

    Raises:
        ConfigError: The source is none, damaged, or needs code to be executed; or the run cannot be used.
        UnsupportedValueError: It holds what a checkpoint cannot.
        StepExistsError: The run has the step.
        StorageError: Something cannot be read or written.
        CheckpointError: As ``save()``.
    """
    source, run = os.path.abspath(source), os.path.abspath(run)
    _check_run(run, step)
    with ExitStack() as stack:
        found = _open(source, part or None, stack)
        plan = _check_state(found.state)
        on_total(found.nbytes)
        found.read_through(on_progress)
        on_saving()
        with unless_it_fails(run):
            path = _save(found, source, run, step)
    return Imported(
        source=source,
        kind=found.kind,
        run=run,
        step=step,
        path=path,
        parts=[str(key) for key in found.state],
        tensors=len(plan.sizes),
        nbytes=plan.data_nbytes,
    )


def _check_run(run: str, step: int) -> None:
    """Refuse what the run's own state would refuse later, before anything is read or made."""
    if not os.path.lexists(run):
        return
    check_run(run)
    path = f"{run}/{step_name(step)}"
    if os.path.lexists(path):
        raise StepExistsError(
            f"step {step} was not imported",
            why=f"{path} exists",
            next='give another step, or remove it first with "aiockpt rm"',
            step=step,
            path=path,
        )


def _check_state(state: Mapping[Any, Any]) -> LocalPlan:
    """Return the plan of the save; what a checkpoint cannot hold is found before anything is written."""
    collected = collect(state)
    encode_values(collected.values)
    return plan_local(collected.entries, collected.tree, collected.plain_files)


def _open(source: str, part: str | None, stack: ExitStack) -> _Source:
    if os.path.isdir(source):
        return _of_tensors(open_directory(source, stack), part)
    file = stack.enter_context(ForeignFile(source))
    if file.read(1, _BRACE_AT) == b"{":
        return _of_tensors(open_file(file), part)
    if is_torch_file(file):
        return _of_torch(file, part)
    raise refused(source, "it is neither a safetensors nor a torch.save file", "check the path")


def _of_tensors(found: TensorSet, part: str | None) -> _Source:
    state = {part or MODEL_PART: _Module(found.tensors, found.configs)}
    return _Source("safetensors", state, found.nbytes, found.read_through)


def _of_torch(file: ForeignFile, part: str | None) -> _Source:
    content = load_torch(file)
    state: Mapping[Any, Any]
    if _is_state_dict(content):
        state = {part or MODEL_PART: _Module(content, {})}
    elif part is not None:
        state = {part: content}
    elif isinstance(content, dict):
        state = content
    else:
        what = type(content).__qualname__
        raise refused(file.path, f"it holds a {what}, and a state is a dict", "give it a name, as in --part data")
    return _Source("torch.save", state, file.nbytes, file.read_through)


def _is_state_dict(content: object) -> bool:
    """Tell whether a dict is the tensors of one module by name, not a state of several parts."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in content.items()
    )


class _Module(nn.Module):
    """Tensors by name that are saved as those of a module, with the configuration files that stood beside them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], configs: Mapping[str, str]) -> None:
        super().__init__()
        self._named = dict(tensors)
        for name, text in configs.items():
            setattr(self, name.removesuffix(".json"), _Config(text))

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]  # called by collecting alone
        """Return the tensors."""
        return self._named


class _Config:
    """A configuration as its text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def to_json_string(self) -> str:
        """Return the text."""
        return self._text


def _save(found: _Source, source: str, run: str, step: int) -> str:
    """Save through the same path as a training loop; returns the path of the checkpoint."""
    metadata = {"imported": {"from": source, "kind": found.kind, "package": __version__}}
    with Checkpointer(run) as checkpointer:
        checkpointer.prepare(found.state)
        save = checkpointer.save(step, found.state, metadata=metadata)
        try:
            return save.result().path
        except BaseException:
            save.cancel()  # an interrupt would finish what is staged, as for a training loop
            raise
