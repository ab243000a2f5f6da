"""Small plans, and what a stager and a worker make of them: the slot, then the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import xxhash

from aiockpt.format.image import BLOCK_NBYTES, fill_sums
from aiockpt.format.manifest import Plan
from aiockpt.format.tree import Node
from aiockpt.planning.local import Entry, LocalPlan, plan_local

__all__ = ["arena_of", "body_of", "files_of", "plan_of", "tree_of"]


def tree_of(entries: Sequence[Entry]) -> Node:
    """Return the tree of nested dicts that the entries' segments make."""
    tree: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        node = tree
        for segment in entry.segments[:-1]:
            node = node.setdefault(segment, {})
        node[entry.segments[-1]] = number
    return tree


def arena_of(plan: LocalPlan, contents: Sequence[bytes]) -> bytes:
    """Return the slot as a stager fills it."""
    arena = bytearray(plan.arena_nbytes)
    for offset, text in plan.texts:
        arena[offset : offset + len(text)] = text
    for offset, content in zip(plan.offsets, contents, strict=True):
        arena[offset : offset + len(content)] = content
    return bytes(arena)


def files_of(plan: LocalPlan, arena: bytes) -> dict[str, bytes]:
    """Return the files as a worker writes them, checksums filled in."""
    files = {}
    for image in plan.files:
        content = bytearray(arena[image.offset : image.offset + image.nbytes])
        if image.data_start:
            header = content[: image.data_start]
            starts = range(image.data_start, image.nbytes, BLOCK_NBYTES)
            sums = [xxhash.xxh3_64_intdigest(content[start : start + BLOCK_NBYTES]) for start in starts]
            fill_sums(header, image.sums_at, sums)
            content[: image.data_start] = header
        files[image.path] = bytes(content)
    return files


def plan_of(*paths: str, **options: Any) -> LocalPlan:
    """Return the plan of small tensors at slash-separated paths."""
    entries = [Entry(tuple(path.split("/")), "F32", (2,)) for path in paths]
    return plan_local(entries, tree_of(entries), **options)


def body_of(plan: LocalPlan) -> Plan:
    body = dict(plan.texts)[plan.body_offset]
    assert len(body) == plan.body_nbytes
    return msgspec.json.decode(body, type=Plan)
