"""What a reader makes of a collected state: fresh objects, by way of the encoded values."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import msgspec
import torch

from aiockpt.format.tree import Node, is_blob
from aiockpt.format.values import FACTORIES
from aiockpt.state.collect import Collected, collect
from aiockpt.state.dtypes import COMPLEX128
from aiockpt.state.values import blob_value, decode_all, decode_key, encode_values

FILE = "manifest.json"


def rebuild(collected: Collected) -> Any:
    """Return the state as nested fresh objects; a module is its dict of items."""
    text = encode_values(collected.values)
    values = decode_all(msgspec.json.decode(text), FILE)
    tree = msgspec.json.decode(msgspec.json.encode(collected.tree))

    def tensor(number: int) -> torch.Tensor:
        live = collected.tensors[number]
        fresh = live.clone(memory_format=torch.contiguous_format)
        return torch.view_as_complex(fresh) if collected.entries[number].mark == COMPLEX128 else fresh

    def build(node: Node) -> Any:
        if isinstance(node, int):
            return tensor(node) if node >= 0 else values[-node - 1]
        if is_blob(node):
            return blob_value(node, tensor(node[1]))
        if isinstance(node, dict):
            return {key: build(child) for key, child in node.items()}
        tag = node[0]
        if tag in ("list", "tuple"):
            return {"list": list, "tuple": tuple}[tag](build(child) for child in node[1])
        if tag == "per_rank":
            return build(node[1])
        if tag == "module":
            return {key: build(child) for key, child in node[1].items()}
        pairs = [(decode_key(key, FILE), build(child)) for key, child in node[1]]
        if tag == "OrderedDict":
            return OrderedDict(pairs)
        if tag == "dict":
            return dict(pairs)
        kind, _, factory = tag.partition(":")
        assert kind == "defaultdict", tag
        return defaultdict(FACTORIES[factory] if factory else None, pairs)

    return build(tree)


def round_trip(state: Any) -> Any:
    return rebuild(collect(state))


def same(first: Any, second: Any) -> bool:
    """Tell whether two values are equal with their types, tensors and arrays bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.detach()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(second.detach().contiguous().reshape(-1).view(torch.uint8))
        )
    if type(first).__module__ == "numpy" and hasattr(first, "dtype"):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, (float, complex)):
        return repr(first) == repr(second)
    if hasattr(first, "getvalue"):
        return first.getvalue() == second.getvalue() and first.tell() == second.tell()
    return bool(first == second)
