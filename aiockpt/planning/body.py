"""What a rank says of its plan to the others: columns, the same bytes on every rank of an SPMD job.

No rank, no address and no list of chunks is in it, and nothing of what ranks have for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from aiockpt.errors import ProtocolError
from aiockpt.format.dtypes import nbytes_of
from aiockpt.format.placings import ShardingRecord, check_placing
from aiockpt.format.tree import Node, check_tree
from aiockpt.planning.entries import Entry, unfit
from aiockpt.planning.placings import Placing, sharding_of
from aiockpt.planning.shares import share_out

__all__ = ["Body", "Columns", "class_columns", "decode_body", "encoding"]

Class = tuple[str, list[int], str]
"""(dtype in the file, shape of the whole tensor in the file, mark)."""


class Body(msgspec.Struct, frozen=True, array_like=True):
    """The bytes, as msgpack; every list but ``tree``'s is of numbers, text, or a few rows."""

    classes: list[Class]
    placings: list[ShardingRecord | None]
    """None is undeclared."""
    folders: list[str]
    names: list[str]
    """Per entry: its name in its file."""
    entry_classes: list[int]
    entry_placings: list[int]
    entry_folders: list[int]
    values: int
    """How many values the tree has."""
    tree: Node


class Columns:
    """A body as planning reads it: with the shares that follow from it.

    Args:
        body: Of columns that fit each other.
        placings: Those of the body where they are known already.
    """

    def __init__(self, body: Body, placings: Sequence[Placing] | None = None) -> None:
        self.body = body
        self.placings: Sequence[Placing] = (
            [None if record is None else sharding_of(record) for record in body.placings]
            if placings is None
            else placings
        )
        self.class_nbytes = [nbytes_of(dtype, shape) for dtype, shape, _ in body.classes]
        folders = body.folders
        self.keys = [(folders[at], name) for at, name in zip(body.entry_folders, body.names, strict=True)]

    def replicas(self) -> list[int]:
        """Return which replica of each entry is written."""
        sizes = [self.class_nbytes[kind] for kind in self.body.entry_classes]
        return share_out(self.keys, sizes, self.placings, self.body.entry_placings)


_decoder = msgspec.msgpack.Decoder(Body)


def class_columns(entries: Iterable[Entry]) -> tuple[list[Class], list[int]]:
    """Return the distinct classes in the order in which they are met, and the number of each entry's."""
    distinct: dict[tuple[str, tuple[int, ...], str], int] = {}
    numbers = [distinct.setdefault(entry[1:4], len(distinct)) for entry in entries]
    return [(dtype, list(shape), mark) for dtype, shape, mark in distinct], numbers


@contextmanager
def encoding() -> Iterator[None]:
    """Turn what an encoder raises for a tree into an error that says so.

    Raises:
        UnsupportedValueError: A key is no UTF-8, or the tree is nested too deep.
    """
    try:
        yield
    except UnicodeEncodeError as exc:
        raise unfit(exc.object, "text with lone surrogates has no UTF-8") from exc
    except RecursionError as exc:
        raise unfit("state", "it is nested too deep for Python's stack") from exc


def decode_body(data: bytes, *, world: int) -> Columns:
    """Read a body and check that its columns fit each other.

    Raises:
        ProtocolError: It is none.
    """
    try:
        body = _decoder.decode(data)
        columns = [
            (body.entry_classes, len(body.classes)),
            (body.entry_placings, len(body.placings)),
            (body.entry_folders, len(body.folders)),
        ]
        for column, limit in columns:
            if len(column) != len(body.names) or (column and not (min(column) >= 0 and max(column) < limit)):
                raise ValueError("its columns do not fit each other")
        for record in body.placings:
            if record is not None:
                check_placing(record, world=world)
        for kind, placing in set(zip(body.entry_classes, body.entry_placings, strict=True)):
            record = body.placings[placing]
            if record is not None and any(dim >= len(body.classes[kind][1]) for _, dim, _ in record.cuts):
                raise ValueError("a tensor is cut in a dimension that it does not have")
        check_tree(body.tree, entries=len(body.names), values=body.values)
        return Columns(body)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("a rank sent a plan that cannot be read", why=str(exc)) from exc
