"""A checkpoint as a fresh nested dict, without a live state."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from aiockpt.errors import StepNotFoundError
from aiockpt.format.names import Segments, dotted
from aiockpt.format.tree import Node, is_blob, walk
from aiockpt.restoring.candidates import Candidates, OnBad, first_good, of_step
from aiockpt.restoring.checkpoint_view import CheckpointView
from aiockpt.restoring.mapped import FileMaps
from aiockpt.restoring.plan import Plan
from aiockpt.restoring.read import READ_THREADS, Reading, never
from aiockpt.restoring.selection import Patterns, Selection
from aiockpt.storage.readers import OpenCheckpoint

__all__ = ["load_checkpoint", "read_entry", "selected"]


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    include: Patterns = None,
    mmap: bool = False,
    on_bad: OnBad | None = None,
    should_stop: Callable[[], bool] = never,
    threads: int = READ_THREADS,
) -> dict[str, Any]:
    """Return what a checkpoint holds, in containers of the types that were saved.

    A module is a dict of its tensors by name. An optimizer is ``{"state": {parameter name: …}, "param_groups": […]}``.
    Any other object is what its ``state_dict()`` was. Tensors are on the CPU; tied ones share memory.

    Args:
        path: A run, or one step's directory.
        step: The step to load; None takes the newest good one.
        include: Patterns of dotted names, see ``Selection``; a list or tuple is taken as a whole.
        mmap: Map the files privately instead of reading them: only headers are checked, and bytes are read when they
            are used. Tensors that are cut over the files of several ranks are read.
        on_bad: As in ``restore_run``.
        should_stop: Asked between blocks.
        threads: That read at once.

    Raises:
        StepNotFoundError: There is no such step, or no checkpoint at all.
        CheckpointError: As ``restore_run``.
    """
    selection = Selection(include)
    candidates = Candidates(path, step, on_bad=on_bad)

    def use(checkpoint: OpenCheckpoint) -> dict[str, Any]:
        view = CheckpointView(checkpoint.manifest, f"{checkpoint.path}/manifest.json")
        tree = selected(view, selection)
        plan = Plan(view)
        if mmap:
            maps = FileMaps(checkpoint, view)
            entries = {entry for entry, _ in view.entries_below(tree)}
            tensors = {
                entry: maps.tensor(entry) if view.sharding_of(entry) is None else plan.read_fresh(entry)
                for entry in entries
            }
            Reading(checkpoint, view, (), plan.fresh).run(threads=threads, should_stop=should_stop)
            return _as_dict(view, view.build(tree, tensors))
        part = plan.fresh_part(tree)
        view.decode_needed()
        Reading(checkpoint, view, (), plan.fresh).run(threads=threads, should_stop=should_stop)
        plan.build()
        return _as_dict(view, part.value)

    def load_next() -> dict[str, Any] | None:
        checkpoint = candidates.open_next()
        if checkpoint is None:
            candidates.none_left()
            return None
        with checkpoint, of_step(checkpoint.manifest.head.step):
            return use(checkpoint)

    found = first_good(candidates, load_next)
    if found is None:
        raise StepNotFoundError(
            f"{os.path.abspath(os.fspath(path))} has no checkpoint yet",
            why="nothing was saved there",
            next="save first, or give the path of another run",
            path=os.path.abspath(os.fspath(path)),
        )
    return found


def read_entry(checkpoint: OpenCheckpoint, view: CheckpointView, entry: int) -> torch.Tensor:
    """Return one tensor, whole, wherever its parts lie.

    Raises:
        CheckpointCorruptError: A header or a block is not the one that was written.
        StorageError: Something cannot be read.
    """
    plan = Plan(view)
    tensor = plan.read_fresh(entry)
    Reading(checkpoint, view, (), plan.fresh).run()
    return tensor


def _as_dict(view: CheckpointView, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise view.corrupt("its tree is no mapping")
    return value


def selected(view: CheckpointView, selection: Selection) -> Node:
    """Return the tree without what is not selected.

    Raises:
        ConfigError: An include pattern fits no name.
    """
    tree = view.plan.tree
    if selection.everything:
        return tree
    selection.refuse_idle(view.names_below(tree, ()))
    kept = _pruned(view, tree, (), selection)
    return {} if kept is None else kept


def _pruned(view: CheckpointView, node: Node, path: Segments, selection: Selection) -> Node | None:
    """Return the tree without what is not selected; None where nothing is left."""
    children = None if isinstance(node, int) or is_blob(node) else view.mapping(node)
    if children is None:
        names = (dotted(segments) for segments, _ in walk(node, path))
        return node if any(selection.takes_whole(name) for name in names) else None
    kept = [(child.key, _pruned(view, child.node, (*path, child.segment), selection)) for child in children]
    pairs = [(key, child) for key, child in kept if child is not None]
    if not pairs:
        return None
    if isinstance(node, dict):
        return dict(pairs)
    return [node[0], dict(pairs), node[2]] if node[0] == "module" else [node[0], [list(pair) for pair in pairs]]
