"""The tensors of a large model with AdamW, by name alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator

from aiockpt.format.tree import Node
from aiockpt.planning.local import Entry
from aiockpt.planning.placings import PER_RANK, Placing

__all__ = ["state_of", "tensors_of"]

_PARTS = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.gate", "mlp.down")
Tensor = tuple[tuple[str, ...], str, tuple[int, ...]]


def tensors_of(count: int, *, prefix: str = "") -> Iterator[Tensor]:
    """Yield path, dtype and shape of ``count`` parameters with two states each: 3 entries a parameter."""
    for number in range(count):
        layer, part = divmod(number, len(_PARTS))
        name = f"{prefix}layers.{layer}.{_PARTS[part]}.weight"
        shape = (8192, 4096)
        yield ("model", name), "BF16", shape
        yield ("optimizer", "state", f"model.{name}", "exp_avg"), "F32", shape
        yield ("optimizer", "state", f"model.{name}", "exp_avg_sq"), "F32", shape


def state_of(count: int, placing: Placing, *, prefix: str = "") -> tuple[list[Entry], Node]:
    """Return entries and tree of a state of ``count`` parameters, with two values and a generator's state."""
    entries = [Entry(path, dtype, shape, "", placing) for path, dtype, shape in tensors_of(count, prefix=prefix)]
    tree: dict[str, Node] = {}
    for number, entry in enumerate(entries):
        node = tree
        for segment in entry.segments[:-1]:
            node = node.setdefault(segment, {})
        node[entry.segments[-1]] = number
    tree["model"] = ["module", tree["model"], None]
    tree["step"] = -1
    tree["rng"] = ["per_rank", {"torch": len(entries), "python": -2}]
    return [*entries, Entry(("rng", "torch"), "U8", (5056,), "", PER_RANK)], tree
