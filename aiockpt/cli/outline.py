"""The tree of a checkpoint as people read it: dotted names nested again, layers that are alike shown once."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiockpt.cli.contents import form_of, nbytes_of_entry
from aiockpt.cli.screen import printable
from aiockpt.cli.value_text import items_of, value_text
from aiockpt.format.manifest import Manifest
from aiockpt.format.tree import OWN, PER_RANK, Node, children, is_blob, value_number

__all__ = ["Part", "Row", "Rows", "draw", "outline"]

_LEAST_ALIKE = 3
"""Two layers are shown as they are: folding them would save nothing."""
_MOST_CHILDREN = 40
"""Of one part; the rest is one row."""
_MOST_ROWS = 150
"""What people scroll through; a tree with more is drawn less deep."""
_VALUE_ROOM = 60
"""Characters of a value; the more, the fewer long ones are drawn as a row for each item."""
_ROW_ROOM = 56
"""Characters of a module's few tensors that are drawn in its row."""
_MOST_SEGMENTS = 40
"""Of a name that are nested; nobody's modules are deeper, and a name may have thousands of dots."""
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(slots=True)
class Part:
    """A container, a tensor or a value; or several alike that stand beside each other."""

    name: str
    """Its own; with the numbers of all in braces where it stands for several."""
    what: str = ""
    """Dtype and shape, or a value; what a container is."""
    tensors: int = 0
    """In it, tied ones once."""
    nbytes: int = 0
    """Of all that it stands for."""
    children: list[Part] = field(default_factory=list)
    count: int = 1
    """How many parts it stands for; ``what`` and ``children`` are those of one."""
    tail: str = ""
    """Names of the parts below it that have no neighbours, and are drawn in its row."""
    form: int = 0
    """Equal for parts that look the same but for their names."""
    shortened: bool = False
    """A value is not shown in full."""
    tensor: tuple[str, str] | None = None
    """Dtype and shape of a tensor."""


def outline(manifest: Manifest, value_room: int = _VALUE_ROOM) -> list[Part]:
    """Return the parts at the top of a state, with values in about ``value_room`` characters."""
    builder = _Builder(manifest, value_room)
    return [builder.top(name, node) for name, node in _top(manifest.plan.tree)]


def _top(tree: Node) -> Iterable[tuple[str, Node]]:
    return [("state", tree)] if isinstance(tree, int) or is_blob(tree) else children(tree)


class _Branch:
    """A node of a tree that is made of dotted names."""

    __slots__ = ("branches", "leaf")

    def __init__(self) -> None:
        self.leaf: Node | None = None
        self.branches: dict[str, _Branch] = {}

    def add(self, name: str, node: Node) -> None:
        branch = self
        for segment in name.split(".", _MOST_SEGMENTS):
            branch = branch.branches.setdefault(segment, _Branch())
        branch.leaf = node


class _Builder:
    """Makes parts of nodes; knows which tensors it has met, and which parts look the same."""

    def __init__(self, manifest: Manifest, value_room: int) -> None:
        self._manifest = manifest
        self._value_room = value_room
        self._met: set[int] = set()
        self._forms: dict[Hashable, int] = {}

    def top(self, name: str, node: Node) -> Part:
        """Return a part at the top, with a word on what it is."""
        part = self._part(printable(name), node)
        if part.children and isinstance(node, list) and node[0] == "module":
            part.what = "module"
        elif _is_optimizer(node):
            part.what = "optimizer"
        return part

    def _part(self, name: str, node: Node) -> Part:
        if isinstance(node, int) and node < 0:
            return self._value(name, self._manifest.values[value_number(node)])
        if isinstance(node, int) or is_blob(node):
            return self._tensor(name, node)
        if _is_optimizer(node):
            return self._optimizer(name, node)
        if isinstance(node, list) and node[0] == PER_RANK:
            return self._part(name, node[1])
        if isinstance(node, list) and node[0] == OWN:
            return Part(name, "of each rank its own", form=self._form(OWN))
        if isinstance(node, list) and node[0] in ("list", "tuple"):
            return self._container(name, [self._part(index, child) for index, child in children(node)])
        return self._dotted(name, node, self._part)

    def _tensor(self, name: str, node: Node) -> Part:
        entry = node if isinstance(node, int) else node[1]
        dtype, shape = form_of(self._manifest, entry)
        if not isinstance(node, int):
            dtype = f"numpy {printable(node[2])}" if node[0] == "ndarray" else node[0]
        known = entry in self._met
        self._met.add(entry)
        nbytes = 0 if known else nbytes_of_entry(self._manifest, entry)
        tensor = dtype, f"{list(shape)}, tied" if known else f"{list(shape)}"
        what = " ".join(tensor)
        return Part(name, what, int(not known), nbytes, form=self._form(what), tensor=tensor)

    def _optimizer(self, name: str, node: Node) -> Part:
        parts = [self._dotted("state", node["state"], self._moments)]
        for key, child in node.items():
            values = self._manifest.values[value_number(child)] if isinstance(child, int) and child < 0 else None
            if key == "param_groups" and (groups := _groups(values)) is not None:
                parts.append(self._container(key, groups, may_merge=False))
            elif key != "state":
                parts.append(self._part(key, child))
        return self._container(name, parts, may_merge=False)

    def _moments(self, name: str, node: Node) -> Part:
        """Return one row for an optimizer's state of one parameter."""
        if isinstance(node, int) or is_blob(node):
            return self._part(name, node)
        parts = [self._part(printable(key), child) for key, child in children(node)]
        return self._container(name, parts, row_room=None)

    def _value(self, name: str, encoded: Any) -> Part:
        text = value_text(encoded, self._value_room)
        items = items_of(encoded)
        shortened = len(text) > self._value_room or "… " in text
        if items is None or not shortened or not _is_worth_rows(encoded, items):
            return Part(name, text, form=self._form(text), shortened=shortened)
        parts = [self._value(key, item) for key, item in items[:_MOST_CHILDREN]]
        if len(items) > len(parts):
            parts.append(Part("…", f"{len(items) - len(parts)} more", shortened=True))
        return self._container(name, parts)

    def _dotted(self, name: str, node: Node, leaf: Callable[[str, Node], Part]) -> Part:
        """Return a mapping whose keys may be dotted names."""
        root = _Branch()
        for key, child in children(node):
            root.add(key, child)
        return self._container(name, list(self._branches(root, leaf)))

    def _branches(self, branch: _Branch, leaf: Callable[[str, Node], Part]) -> Iterator[Part]:
        for segment, below in branch.branches.items():
            if below.leaf is not None:
                yield leaf(printable(segment), below.leaf)
            if below.branches:
                yield self._container(printable(segment), list(self._branches(below, leaf)))

    def _container(
        self, name: str, parts: list[Part], *, may_merge: bool = True, row_room: int | None = _ROW_ROOM
    ) -> Part:
        """Return a part with parts in it, which are drawn in its own row where there is room.

        Args:
            name: Of the part.
            parts: In it.
            may_merge: Whether a part without neighbours is drawn in this one's row.
            row_room: Characters that tensors may take there; None for any number.
        """
        parts = _folded(parts)
        # What is numbered itself may be folded with its neighbours, as long as it stands for nothing but itself.
        if len(parts) == 1 and may_merge and not (parts[0].count > 1 and _NUMBERED.fullmatch(name)):
            (only,) = parts
            only.form = self._form((only.name, only.form, only.count))
            only.name, only.tail = name, f".{only.name}{only.tail}"
            return only
        part = Part(name, "" if parts else "empty", children=parts)
        part.tensors = sum(child.tensors for child in parts)
        part.nbytes = sum(child.nbytes for child in parts)
        if parts and may_merge and (row := _in_a_row(parts, row_room)):
            part.what, part.children = row, []
        part.form = self._form((part.what, *((child.name, child.form, child.count) for child in part.children)))
        return part

    def _form(self, look: Hashable) -> int:
        return self._forms.setdefault(look, len(self._forms))


def _is_optimizer(node: Node) -> bool:
    return (
        isinstance(node, dict)
        and node.keys() in ({"state", "param_groups"}, {"state", "param_groups", "shared"})
        and not isinstance(node["state"], int)
        and not is_blob(node["state"])
    )


def _in_a_row(parts: list[Part], room: int | None) -> str:
    """Return tensors as text for one row, the largest first; nothing where they need rows of their own."""
    forms: dict[str, dict[str, list[str]]] = {}
    for part in sorted(parts, key=lambda part: -part.nbytes):
        if part.tensor is None or part.count > 1 or part.tail:
            return ""
        dtype, shape = part.tensor
        # Nobody asks for the dtype of a step counter.
        of_dtype = forms.setdefault(dtype, {}) if shape != "[]" or not forms else next(iter(forms.values()))
        of_dtype.setdefault(shape, []).append(part.name)
    texts = [
        f"{dtype} " + ", ".join(f"{', '.join(names)} {shape}" for shape, names in shapes.items())
        for dtype, shapes in forms.items()
    ]
    text = "; ".join(texts)
    return text if room is None or len(text) <= room else ""


def _groups(values: Any) -> list[Part] | None:
    """Return a row for each of an optimizer's parameter groups: what is set, and how many parameters have it."""
    if not isinstance(values, list) or not all(
        isinstance(v, dict) and isinstance(v.get("params"), list) for v in values
    ):
        return None
    rows = []
    for index, group in enumerate(values):
        texts = [f"{len(group['params'])} params"]
        texts += [
            f"{printable(key)} {value_text(item, 24)}"
            for key, item in sorted(group.items(), key=lambda item: item[0] != "lr")
            if key != "params" and item is not None and item is not False
        ]
        rows.append(Part(str(index), ", ".join(texts), shortened=True))
    return rows


def _is_worth_rows(encoded: Any, items: list[tuple[str, Any]]) -> bool:
    """Tell whether a long value is easier to read with a row for each item: mappings, and what holds such."""
    if isinstance(encoded, dict) and "~tuple" not in encoded:
        return True
    return any(isinstance(item, dict) and "~tuple" not in item and items_of(item) is not None for _, item in items)


def _folded(parts: list[Part]) -> list[Part]:
    """Return the parts with those that are alike but for a number at the end of their names as one."""
    groups: dict[Hashable, list[tuple[str, Part]]] = {}
    for index, part in enumerate(parts):
        match = _NUMBERED.fullmatch(part.name) if part.count == 1 else None
        key: Hashable = (match[1], part.form) if match else index
        groups.setdefault(key, []).append((match[2] if match else "", part))
    folded = []
    for key, group in groups.items():
        numbers, members = [number for number, _ in group], [part for _, part in group]
        if isinstance(key, tuple) and len(group) >= _LEAST_ALIKE:
            one = members[0]
            one.name = f"{key[0]}{{{_ranges(numbers)}}}"
            one.count = len(members)
            one.tensors = sum(part.tensors for part in members)
            one.nbytes = sum(part.nbytes for part in members)
            folded += members[1:]
    gone = set(map(id, folded))
    return [part for part in parts if id(part) not in gone]


def _ranges(numbers: list[str]) -> str:
    """Return numbers as a shell would take them in braces: ``0..11``, or ``0,4,8,…``."""
    runs: list[list[str]] = []
    for number in sorted(numbers, key=int):
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return ",".join(texts) if len(texts) <= 4 else ",".join((*texts[:3], f"…,{texts[-1]}"))


class Row(NamedTuple):
    """A line of the drawing."""

    lines: tuple[bool, ...]
    """Per level above: whether another part follows there; the last is the row's own."""
    part: Part
    times: int
    """How often the part stands in the checkpoint, by all that are alike above it."""
    is_folded: bool
    """What is in it is not shown."""


class Rows(NamedTuple):
    """A drawing."""

    rows: list[Row]
    folded: int
    """Parts whose content is not shown, and parts that are not shown themselves."""


def draw(parts: list[Part]) -> Rows:
    """Return the rows of a tree, as deep as the screen stays readable."""
    depth = 1
    drawn = Rows(*_draw(parts, depth))
    while drawn.folded:
        deeper = Rows(*_draw(parts, depth + 1))
        if len(deeper.rows) > _MOST_ROWS or len(deeper.rows) == len(drawn.rows):
            break
        drawn, depth = deeper, depth + 1
    return drawn


def _draw(parts: list[Part], depth: int) -> tuple[list[Row], int]:
    rows: list[Row] = []
    folded = 0

    def add(parts: list[Part], lines: tuple[bool, ...], times: int) -> None:
        nonlocal folded
        shown = parts if len(parts) <= _MOST_CHILDREN + 1 else parts[:_MOST_CHILDREN]
        for part in shown:
            here = (*lines, part is not shown[-1] or len(shown) < len(parts))
            hidden = bool(part.children) and len(here) >= depth
            folded += hidden
            rows.append(Row(here, part, times * part.count, hidden))
            if not hidden:
                add(part.children, here, times * part.count)
        if len(shown) < len(parts):
            rest = parts[len(shown) :]
            folded += len(rest)
            more = Part("…", f"{len(rest)} more", sum(p.tensors for p in rest), sum(p.nbytes for p in rest))
            rows.append(Row((*lines, False), more, times, is_folded=True))

    add(parts, (), 1)
    return rows, folded
