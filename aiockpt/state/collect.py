"""A nested state → tensors with names, values, and the tree that says where each stood."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted, file_name, sort_key
from aiockpt.format.tree import PER_RANK as PER_RANK_TAG
from aiockpt.format.tree import Node
from aiockpt.format.values import FACTORIES, MAX_DEPTH
from aiockpt.planning.local import Entry
from aiockpt.planning.placings import PER_RANK, UNDECLARED, Placing
from aiockpt.planning.sharding import Sharding
from aiockpt.state.checks import is_plain, refuse_tensor, resolve
from aiockpt.state.collected import Collected, Found
from aiockpt.state.dtypes import COMPLEX128, PACKED_F4, code_of, stored_form
from aiockpt.state.expected import expected_entries
from aiockpt.state.modules import ModuleItems, config_files, read_module
from aiockpt.state.objects import is_object, read_object
from aiockpt.state.optimizers import OptimizerItems, read_optimizer, refuse_sharded, uses_state_dict
from aiockpt.state.parameters import add_module_names, add_name
from aiockpt.state.per_rank import PerRank
from aiockpt.state.placing import Placer, placer_for
from aiockpt.state.ranks import ALONE, Ranks
from aiockpt.state.rng import RNG
from aiockpt.state.sharded import is_sharded, refuse_dtensor
from aiockpt.state.values import blob_tensor, encode_key, is_text, key_segment, too_deep

__all__ = ["Collected", "Found", "collect"]

SLOW_SECONDS = 1e-3
"""An object whose ``state_dict()`` takes longer is named: it holds up the training step in every save."""
_SLOW_SECONDS_PER_ITEM = 10e-6
"""What a module may take for each item beside that; torch's own takes about 2 µs."""
_new = tuple.__new__  # in half the time of a named tuple's own
_SCALARS = frozenset({type(None), bool, int, float, str, complex})


class _Where(Enum):
    MAPPING = auto()
    """In the user's own mappings: every key is a node, objects are taken."""
    LIST = auto()
    """In a list of the user's: parts without tensors are one value, objects are taken."""
    OBJECT = auto()
    """In the state of an object: parts without tensors are one value."""


def collect(state: Mapping[Any, Any], *, ranks: Ranks = ALONE, replicated: Sequence[str] = ()) -> Collected:
    """Read a state without changing anything: no copy, no gather, no optimizer step, no gradient buffer.

    The tree: a mapping of the user's is a container whose every key is a tensor, a value or a container of its own. A
    list or tuple is one value unless something in it is a tensor or an object. A module is
    ``["module", {name: node}, metadata]``. An optimizer is ``{"state": {parameter: {key: node}}, "param_groups":
    node}``, and ``"shared"`` beside these where it has state under keys that are no parameters. Any other object is the
    tree of its ``state_dict()``, in which the largest parts without tensors are one value each. A ``PerRank`` is
    ``["per_rank", node]``, and so is an ``RNG``.

    Args:
        state: Nested mappings; what stands in them is described in the documentation of ``save``.
        ranks: Those that save together.
        replicated: Names of plain tensors that are declared to be the same on all ranks.

    Raises:
        UnsupportedValueError: The state holds a tensor or an object that a checkpoint cannot; names its key. Values
            are looked at by ``encode_values``.
        ConfigError: One of ``replicated`` is no pattern, or fits no name of the state.
    """
    if not isinstance(state, Mapping) or is_object(state):
        raise UnsupportedValueError(
            f"a state is a mapping, not {type(state).__qualname__}",
            why="what it holds needs names",
            next='give a dict, as in save(step, {"model": model, "optimizer": optimizer})',
            key="",
            type_name=type(state).__qualname__,
        )
    collector = _Collector(placer_for(ranks, (replicated,) if isinstance(replicated, str) else tuple(replicated)))
    try:
        return collector.finish(collector.mapping(state, (), 0))
    except RecursionError as exc:
        raise too_deep(state, ()) from exc


class _Collector:
    """Walks one state once; optimizers are read last, when all parameters have names."""

    def __init__(self, placer: Placer) -> None:
        self.result = Collected(placer=placer)
        self._placer = placer
        self._several = placer.ranks.world > 1
        self._placing: Placing = UNDECLARED
        """Of the plain tensors that are being met."""
        self._names: dict[int, str] = {}
        self._optimizers: list[tuple[Optimizer, Segments, dict[str, Node], Placing]] = []
        self._at: dict[int, int] = {}
        """By address: the first entry there. No address is used again meanwhile, as every entry's tensor is held."""
        self._also_at: dict[int, list[int]] = {}
        """By address: further entries there, which differ in folder, dtype, shape, placing or strides."""
        self._kept: list[torch.Tensor] = []
        """DTensors that have no memory here, known by identity instead of their address."""
        self._shardings: dict[str | None, dict[int, Sharding]] = {}
        """By folder: the shardings of its DTensors, by identity."""

    def finish(self, tree: Node) -> Collected:
        """Read the optimizers and return everything."""
        result = self.result
        for optimizer, path, node, placing in self._optimizers:
            self._placing = placing
            self._fill_optimizer(optimizer, path, node)
        self._widen()
        result.tree = tree
        self._placer.declare(result.entries, _other_names(result))
        return result

    def _widen(self) -> None:
        """Put what lies on a slice of a mesh on all of it: other slices hold the same."""
        wider = {
            folder: found
            for folder, shardings in self._shardings.items()
            if (found := self._placer.widen(shardings.values()))
        }
        if not wider:
            return
        entries = self.result.entries
        for number, entry in enumerate(entries):
            wide = wider.get(_folder(entry.segments), {}).get(id(entry.placing))
            if wide is not None:
                entries[number] = Entry(*entry[:4], wide)

    def mapping(self, item: Mapping[Any, Any], path: Segments, depth: int) -> Node:
        """Return the node of a mapping of the user's, where each key is a node of its own."""
        nodes: list[tuple[Any, Node]] = []
        tensor = torch.Tensor
        for key, child in item.items():
            here = (*path, key if is_text(key) else key_segment(key, path))
            if type(child) is tensor and not child.requires_grad:
                nodes.append((key, self._tensor(child, here)))
                continue
            node = self._part(child, here, depth + 1, _Where.MAPPING)
            nodes.append((key, self._value(child, here) if node is None else node))
        return mapping_node(item, nodes, path)

    def _part(self, item: Any, path: Segments, depth: int, where: _Where) -> Node | None:
        """Return the node of ``item``, or None where it has neither tensors nor objects: the caller makes a value."""
        kind = type(item)
        if kind in _SCALARS:
            return None
        if isinstance(item, torch.Tensor):
            if where is not _Where.OBJECT:
                add_name(self._names, item, dotted(path))
            return self._tensor(item, path)
        if depth > MAX_DEPTH:
            raise too_deep(item, path)
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            if where is _Where.MAPPING:
                return self.mapping(item, path, depth)
            segments = [key_segment(key, path) for key in item]
            nodes = self._parts(list(item.values()), segments, path, depth, where)
            return None if nodes is None else mapping_node(item, list(zip(item, nodes, strict=True)), path)
        if kind is list or kind is tuple:
            nodes = self._parts(item, range(len(item)), path, depth, where)
            return None if nodes is None else [kind.__name__, nodes]
        if where is not _Where.OBJECT:
            if kind is PerRank:
                return self._own(item.value, path, depth, where)
            if kind is RNG and self._placing != PER_RANK:
                return self._own(item, path, depth, where)
            if (node := self._object(item, path)) is not None:
                return node
        return self._blob(item, path)

    def _own(self, item: Any, path: Segments, depth: int, where: _Where) -> Node:
        """Return the node of what this rank has for itself; inside of such a thing the mark means nothing."""
        outer, self._placing = self._placing, PER_RANK
        node = self._part(item, path, depth + 1, where)
        node = self._value(item, path) if node is None else node
        self._placing = outer
        return node if outer == PER_RANK else [PER_RANK_TAG, node]

    def _parts(
        self, items: Sequence[Any], segments: Iterable[Any], path: Segments, depth: int, where: _Where
    ) -> list[Node] | None:
        inner = _Where.LIST if where is _Where.MAPPING else where
        paths = [(*path, str(segment)) for segment in segments]
        nodes = [self._part(item, here, depth + 1, inner) for item, here in zip(items, paths, strict=True)]
        if all(node is None for node in nodes):
            return None
        return [
            self._value(item, here) if node is None else node
            for item, here, node in zip(items, paths, nodes, strict=True)
        ]

    def _value(self, item: Any, path: Segments) -> Node:
        values = self.result.values
        values.append((path, item))
        return -len(values)

    def _whole(self, item: Any, path: Segments) -> Node:
        """Return the node of something inside an object: a tree where there are tensors, else one value."""
        node = self._part(item, path, 0, _Where.OBJECT)
        return self._value(item, path) if node is None else node

    def _blob(self, item: Any, path: Segments) -> Node | None:
        blob = blob_tensor(item, path)
        if blob is None:
            return None
        (tag, _, *rest), tensor = blob
        number = self._tensor(tensor, path)
        if tag != "ndarray":
            self.result.copies[number] = item
        return [tag, number, *rest]

    def _tensor(self, tensor: torch.Tensor, path: Segments) -> int:
        result = self.result
        number = len(result.entries)
        placing = self._placing
        whole = None
        met = tensor
        if not is_plain(tensor):
            if is_sharded(tensor):
                tensor, whole, placing = self._local(tensor, path)
            if not is_plain(tensor):
                result.copies[number] = tensor
                tensor = resolve(tensor, path)
        if tensor.requires_grad:
            tensor = tensor.detach()
        shape = tuple(tensor.shape) if whole is None else whole
        dtype = tensor.dtype
        code = code_of(dtype)
        mark = ""
        if code is None or code == PACKED_F4:
            form = stored_form(dtype, shape)
            if form is None:
                raise refuse_tensor(tensor, path, f"safetensors has no {dtype} of shape {list(shape)}")
            code, shape, mark = form
            if mark == COMPLEX128:
                tensor = torch.view_as_real(tensor)
        address = tensor.data_ptr()
        if not address:
            if tensor.numel():
                raise refuse_tensor(tensor, path, "its memory was freed: its storage has been resized to 0")
            if whole is not None:  # elsewhere it may have memory, and be tied
                address = -id(met)
                self._kept.append(met)
        if address and number not in result.copies:
            first = self._at.setdefault(address, number)
            if first != number:
                known = self._tied(first, address, Entry(path, code, shape, mark, placing), tensor)
                if known is not None:
                    return known
                self._also_at.setdefault(address, []).append(number)
        result.entries.append(_new(Entry, (path, code, shape, mark, placing)))
        result.tensors.append(tensor)
        return number

    def _local(self, tensor: torch.Tensor, path: Segments) -> tuple[torch.Tensor, tuple[int, ...], Placing]:
        """Return a DTensor's memory on this rank, the shape of the whole, and the placing of its entry."""
        local, whole, placing = self._placer.local(tensor, path)
        if placing is None:
            return local, whole, self._placing
        if self._placing == PER_RANK:
            why = "it is one tensor of several ranks, and stands in a PerRank, which each rank saves for itself"
            raise refuse_dtensor(tensor, path, why, "take it out of the PerRank")
        self._shardings.setdefault(_folder(path), {})[id(placing)] = placing
        return local, whole, placing

    def _tied(self, first: int, address: int, entry: Entry, tensor: torch.Tensor) -> int | None:
        """Return the entry of the same folder, memory, dtype, shape and strides; it gets the first of the names."""
        entries = self.result.entries
        numbers: list[int] = [first, *self._also_at.get(address, ())]
        for number in numbers:
            known = entries[number]
            if (
                known[1:] == entry[1:]
                and _folder(known.segments) == _folder(entry.segments)
                and self.result.tensors[number].stride() == tensor.stride()
            ):
                if sort_key(entry.segments) < sort_key(known.segments):
                    entries[number] = entry
                return number
        return None

    def _object(self, item: Any, path: Segments) -> Node | None:
        if isinstance(item, nn.Module):
            return self._module(item, path)
        if isinstance(item, Optimizer):
            refuse_sharded(item, path)
            if not uses_state_dict(item):
                node: dict[str, Node] = {}
                self._optimizers.append((item, path, node, self._placing))
                return node
            self.result.objects.append(Found(path, item, OptimizerItems(item, uses_state_dict=True)))
        elif not is_object(item):
            return None
        else:
            self.result.objects.append(Found(path, item, None))
        start = time.perf_counter()
        state = read_object(item, path)
        self._note_time(path, time.perf_counter() - start, SLOW_SECONDS)
        return self._whole(state, path)

    def _note_time(self, path: Segments, seconds: float, allowed: float) -> None:
        if seconds > allowed:
            self.result.slow[dotted(path)] = seconds

    def _module(self, module: nn.Module, path: Segments) -> Node:
        start = time.perf_counter()
        read = read_module(module, path)
        allowed = SLOW_SECONDS + _SLOW_SECONDS_PER_ITEM * len(read.items)
        self._note_time(path, time.perf_counter() - start, allowed)
        self.result.objects.append(Found(path, module, read))
        add_module_names(self._names, read.places, path)
        for name, content in config_files(module).items():
            if len(path) == 1:  # a folder is a top-level key: only there can others find it
                self.result.plain_files[f"{file_name(path[0])}/{name}"] = content
        if self._several and self._placing is UNDECLARED:
            items = self._replicated_items(module, read, path)
        else:
            items = {
                name: self._tensor(item, (*path, name))
                if isinstance(item, torch.Tensor)
                else self._whole(item, (*path, name))
                for name, item in read.items.items()
            }
        metadata = None if read.metadata is None else self._value(read.metadata, (*path, "_metadata"))
        return ["module", items, metadata]

    def _replicated_items(self, module: nn.Module, read: ModuleItems, path: Segments) -> dict[str, Node]:
        """Return the nodes of a module's items, some of which may be declared to be the same on several ranks."""
        declared = self._placer.of_module(module, path)
        self.result.replicas |= declared.by_parameter
        items: dict[str, Node] = {}
        for name, item in read.items.items():
            here = (*path, name)
            if not isinstance(item, torch.Tensor):
                items[name] = self._whole(item, here)
                continue
            if declared.by_address and is_plain(item):
                self._placing = declared.by_address.get(item.data_ptr(), UNDECLARED)
            items[name] = self._tensor(item, here)
            self._placing = UNDECLARED
        return items

    def _fill_optimizer(self, optimizer: Optimizer, path: Segments, node: dict[str, Node]) -> None:
        read = read_optimizer(optimizer, self._names, path)
        self.result.objects.append(Found(path, optimizer, read))
        node["state"] = states = {}
        outer, replicas = self._placing, self.result.replicas
        for name, state in read.state.items():
            if replicas and outer is UNDECLARED:
                self._placing = replicas.get(id(read.params[name]), UNDECLARED)
            states[name] = self._apart(state, (*path, "state", name))
        self._placing = outer
        node["param_groups"] = self._whole(read.groups, (*path, "param_groups"))
        if read.shared:
            node["shared"] = self._apart(read.shared, (*path, "shared"))

    def _apart(self, state: Any, path: Segments) -> Node:
        """Return a container that has a node for each key of an optimizer's state, tensors or not."""
        if not isinstance(state, dict):
            return self._whole(state, path)
        nodes = []
        for key, item in state.items():
            here = (*path, key if is_text(key) else key_segment(key, path))
            nodes.append((key, self._tensor(item, here) if type(item) is torch.Tensor else self._whole(item, here)))
        return mapping_node(state, nodes, path)


def _other_names(collected: Collected) -> Iterator[Segments]:
    """Yield the names of a state that are no tensors, or none yet: of values, and of what optimizers will have."""
    yield from (path for path, _ in collected.values)
    yield from (entry.segments for entry in expected_entries(collected))


def _folder(path: Segments) -> str | None:
    return path[0] if len(path) > 1 else None


def mapping_node(item: Mapping[Any, Any], nodes: list[tuple[Any, Node]], path: Segments) -> Node:
    """Return the node of a mapping: a JSON object where it is a plain dict with text keys, else a tagged list."""
    tag = "dict"
    if type(item) is OrderedDict:
        tag = "OrderedDict"
    elif type(item) is defaultdict:
        tag = "defaultdict"
        if item.default_factory is not None:
            factory = next((name for name, made in FACTORIES.items() if made is item.default_factory), None)
            if factory is None:
                raise UnsupportedValueError(
                    f"{dotted(path)!r} cannot be saved: a defaultdict of {item.default_factory!r}",
                    why=f"its default factory is none of {', '.join(FACTORIES)}",
                    next="turn it into a dict",
                    key=dotted(path),
                    type_name="collections.defaultdict",
                )
            tag = f"defaultdict:{factory}"
    if tag == "dict":
        plain = dict(nodes)
        if all(map(is_text, plain)):
            return plain
    return [tag, [[encode_key(key, path), node] for key, node in nodes]]
