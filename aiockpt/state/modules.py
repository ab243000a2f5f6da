"""Modules as named items: wrappers removed by type, and what it takes to load them again."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.names import Segments, dotted
from aiockpt.state.objects import call_state_dict
from aiockpt.state.values import is_text

__all__ = [
    "ModuleItems",
    "Place",
    "config_files",
    "has_load_hooks",
    "places",
    "raw_state_dict",
    "read_module",
    "unwrap",
]


class _Wrapper(NamedTuple):
    home: str
    """Module that defines the type; looked up only if it was imported, as no such object exists before."""
    type_name: str
    attribute: str
    """Where the wrapped module is, and the segment that stands for it in raw names."""
    keeps_segment: bool
    """Whether keys of ``state_dict()`` have the segment; some wrappers cut it off in a hook."""


_FSDP1 = _Wrapper(
    "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module", False
)
_WRAPPERS = (
    _Wrapper("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod", True),
    _Wrapper("torch.nn.parallel.distributed", "DistributedDataParallel", "module", True),
    _Wrapper("torch.nn.parallel.data_parallel", "DataParallel", "module", True),
    _Wrapper(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
        False,
    ),
    _FSDP1,
)


_FSDP2 = "torch.distributed.fsdp._fully_shard."
_DEFAULT_METADATA = {"version": 1}
"""Of a module that has no version of its own; left out of what is saved, as most modules have it."""
_DEFAULT_LOADS = (
    nn.Module._load_from_state_dict,
    # These two differ for checkpoints from before torch 0.4 alone, and ours carry the version.
    _NormBase._load_from_state_dict,
    _InstanceNorm._load_from_state_dict,
)


class Place(NamedTuple):
    """One place in a module's tree where a module that is no wrapper stands; a shared module has several."""

    module: nn.Module
    raw: str
    """Prefix of its keys in ``state_dict()``, with the dot: ``layers.0._orig_mod.``"""
    name: str
    """The same without wrappers: ``layers.0.``"""
    paths: tuple[str, ...]
    """Attribute paths of the wrappers around it and its own, which is the last, each with the dot: what
    ``_metadata`` goes by, also where a wrapper cuts its segment off the keys."""


@dataclass(slots=True)
class ModuleItems:
    """What a module's ``state_dict()`` holds, under names without wrappers."""

    module: nn.Module
    """Outer wrappers removed; ``load_state_dict`` is to be called on this one."""
    items: dict[str, Any]
    """By name: a tensor that is the live memory (a Parameter or buffer as it is), or extra state."""
    metadata: dict[str, dict[str, Any]] | None
    """The state dict's ``_metadata`` by module names without wrappers, aside from ``{"version": 1}``, which is what a
    module has that is not here; None where the state dict has none."""
    raw_names: dict[str, str]
    """By name: its key in ``module.state_dict()``."""
    needs_load_state_dict: bool
    """Copying into ``items`` is not enough to restore: some submodule loads in its own way, has load hooks or extra
    state, or an item is no live parameter or buffer."""
    places: list[Place]
    """Every place in the module's tree, wrappers left out."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the outer wrappers whose ``state_dict()`` only adds a segment to names.

    FSDP1 and activation wrappers stay where they are outermost: their hooks belong to the ``state_dict()`` call.
    """
    kinds = _wrapper_types()
    while (wrapper := _wrapper_of(module, kinds)) is not None and wrapper.keeps_segment:
        module = getattr(module, wrapper.attribute)
    return module


def places(module: nn.Module, path: Segments = ()) -> list[Place]:
    """Return every place below ``module``, shared modules at each of theirs, in the order of ``state_dict()``.

    Args:
        module: The root; it may be a wrapper itself.
        path: Where it stands in the state, for the error.

    Raises:
        UnsupportedValueError: A module holds itself, or is sharded over ranks by FSDP1.
    """
    found: list[Place] = []
    kinds = _wrapper_types()
    active: set[int] = set()

    def visit(module: nn.Module, raw: str, name: str, here: str, around: tuple[str, ...]) -> None:
        if id(module) in active:
            raise _holds_itself(module, path, name)
        active.add(id(module))
        wrapper = _wrapper_of(module, kinds) if kinds else None
        if wrapper is None:
            found.append(Place(module, raw, name, (*around, here)))
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(child, f"{raw}{child_name}.", f"{name}{child_name}.", f"{here}{child_name}.", ())
        else:
            if wrapper is _FSDP1 and getattr(module, "world_size", 1) > 1:
                raise _sharded(path, name)
            segment = f"{wrapper.attribute}."
            inner = raw + segment if wrapper.keeps_segment else raw
            visit(getattr(module, wrapper.attribute), inner, name, here + segment, (*around, here))
        active.discard(id(module))

    visit(module, "", "", "", ())
    return found


def read_module(module: nn.Module, path: Segments = ()) -> ModuleItems:
    """Read a module through its ``state_dict()``, hooks included; nothing is copied or gathered by us.

    Args:
        module: Any module, wrapped or not.
        path: Where it stands in the state, for errors.

    Raises:
        UnsupportedValueError: A lazy parameter has no shape yet, a module holds itself, ``state_dict()`` raised or
            has keys that are no text, or two items have the same name once wrappers are removed.
    """
    module = unwrap(module)
    all_places = places(module, path)
    _refuse_uninitialized(all_places, path)
    with torch.no_grad():
        # keep_vars: the live tensors, known by identity. An override of the outermost need not take it.
        arguments = {} if _is_overridden(type(module), "state_dict") else {"keep_vars": True}
        state = call_state_dict(module, path, **arguments)
    raw_metadata = getattr(state, "_metadata", None)
    rename = _renamer(all_places)
    items: dict[str, Any] = {}
    raw_names: dict[str, str] = {}
    for raw, item in state.items():
        if not is_text(raw):
            raise _no_text(raw, path)
        name = rename(raw)
        if name in items:
            raise _collision(path, name, raw_names[name], raw)
        items[name] = item
        raw_names[name] = raw
    return ModuleItems(
        module=module,
        items=items,
        metadata=_canonical_metadata(raw_metadata, all_places),
        raw_names=raw_names,
        needs_load_state_dict=_needs_load_state_dict(module, all_places, items),
        places=all_places,
    )


def raw_state_dict(
    read: ModuleItems, items: Mapping[str, Any], metadata: Mapping[str, dict[str, Any]] | None
) -> OrderedDict[str, Any]:
    """Return what ``read.module.load_state_dict`` takes, with the metadata that the hooks of older versions look for.

    Args:
        read: Of the live module, whose wrappers the keys get; they need not be those of the saved one.
        items: By name without wrappers; a name that the live module lacks keeps its place in the tree.
        metadata: As saved, by name without wrappers.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    raws = {place.name: place.raw for place in read.places}
    for name, item in items.items():
        raw = read.raw_names.get(name)
        if raw is None:
            prefix = _longest(raws, name)
            raw = name if prefix is None else raws[prefix] + name[len(prefix) :]
        state[raw] = item
    if metadata is not None:
        raw_metadata: OrderedDict[str, dict[str, Any]] = OrderedDict()
        for place in read.places:
            entry = metadata.get(place.name.removesuffix("."), _DEFAULT_METADATA)
            raw_metadata.update({path.removesuffix("."): dict(entry) for path in place.paths})
        state._metadata = raw_metadata  # type: ignore[attr-defined]  # torch's own convention
    return state


def has_load_hooks(module: nn.Module) -> bool:
    """Tell whether code of others runs before the module loads.

    Those of ``fully_shard`` aside: they give sharded parameters back to the module, as ``state_dict()`` has done.
    """
    hooks = (getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith(_FSDP2) for hook in hooks)


def config_files(module: nn.Module) -> dict[str, bytes]:
    """Return ``config.json`` and ``generation_config.json`` of a module that has them, as transformers reads them."""
    kinds = _wrapper_types()
    while (wrapper := _wrapper_of(module, kinds)) is not None:
        module = getattr(module, wrapper.attribute)
    files = {}
    for attribute in ("config", "generation_config"):
        to_json = getattr(getattr(module, attribute, None), "to_json_string", None)
        if callable(to_json) and isinstance(text := to_json(), str):
            files[f"{attribute}.json"] = text.encode()
    return files


def _wrapper_types() -> list[tuple[type, _Wrapper]]:
    kinds = []
    for wrapper in _WRAPPERS:
        kind = getattr(sys.modules.get(wrapper.home), wrapper.type_name, None)
        if isinstance(kind, type):
            kinds.append((kind, wrapper))
    return kinds


def _wrapper_of(module: nn.Module, kinds: list[tuple[type, _Wrapper]]) -> _Wrapper | None:
    for kind, wrapper in kinds:
        if isinstance(module, kind):
            return wrapper
    return None


def _is_overridden(kind: type[nn.Module], method: str) -> bool:
    return getattr(kind, method) is not getattr(nn.Module, method)


def _renamer(all_places: list[Place]) -> Callable[[str], str]:
    if all(len(place.paths) == 1 and place.raw == place.name for place in all_places):
        return lambda raw: raw
    names: dict[str, str] = {}
    for place in all_places:
        names.update(dict.fromkeys(place.paths, place.name))
    names.update({place.raw: place.name for place in all_places})

    def rename(raw: str) -> str:
        prefix = _longest(names, raw)
        return raw if prefix is None else names[prefix] + raw[len(prefix) :]

    return rename


def _longest(prefixes: Mapping[str, Any], name: str) -> str | None:
    """Return the longest of ``prefixes`` (each empty or ending in a dot) that ``name`` begins with."""
    end = name.rfind(".") + 1
    while end and name[:end] not in prefixes:
        end = name.rfind(".", 0, end - 1) + 1
    return name[:end] if name[:end] in prefixes else None


def _canonical_metadata(raw_metadata: Any, all_places: list[Place]) -> dict[str, dict[str, Any]] | None:
    if not isinstance(raw_metadata, Mapping):
        return None
    metadata: dict[str, dict[str, Any]] = {}
    for place in all_places:
        entry = raw_metadata.get(place.paths[-1].removesuffix("."))  # the module's own, not its wrappers'
        if entry is not None and entry != _DEFAULT_METADATA:
            metadata[place.name.removesuffix(".")] = dict(entry)
    return metadata


def _refuse_uninitialized(all_places: list[Place], path: Segments) -> None:
    for place in all_places:
        for name, tensor in _live(place.module):
            if torch.nn.parameter.is_lazy(tensor):
                key = dotted((*path, place.name + name))
                raise UnsupportedValueError(
                    f"{key!r} cannot be saved: it is a lazy parameter or buffer without a shape",
                    why="its module was never called",
                    next="run one forward pass before the first save",
                    key=key,
                    type_name=type(tensor).__qualname__,
                )


def _live(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for group in (module._parameters, module._buffers):
        for name, tensor in group.items():
            if tensor is not None:
                yield name, tensor


def _needs_load_state_dict(module: nn.Module, all_places: list[Place], items: Mapping[str, Any]) -> bool:
    if _is_overridden(type(module), "load_state_dict"):
        return True
    live: set[int] = set()
    aliases: set[tuple[Any, ...]] = set()
    for place in all_places:
        own = place.module
        if (
            type(own)._load_from_state_dict not in _DEFAULT_LOADS
            or _is_overridden(type(own), "set_extra_state")
            or has_load_hooks(own)
            or own._load_state_dict_post_hooks
        ):
            return True
        live.update(map(id, own._parameters.values()))
        live.update(map(id, own._buffers.values()))
    for item in items.values():
        if id(item) in live:
            continue
        if not isinstance(item, torch.Tensor):
            return True
        if not aliases:
            aliases = {_alias(tensor) for place in all_places for _, tensor in _live(place.module)}
        if _alias(item) not in aliases:
            return True
    return False


def _alias(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _holds_itself(module: nn.Module, path: Segments, name: str) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{dotted(path)!r} cannot be saved: module {name.removesuffix('.')!r} holds itself",
        why="its state_dict() would not end",
        next="keep the reference to the outer module out of the module tree, in a list for example",
        key=dotted((*path, name.removesuffix("."))),
        type_name=type(module).__qualname__,
    )


def _sharded(path: Segments, name: str) -> UnsupportedValueError:
    key = dotted((*path, name.removesuffix("."))) if name else dotted(path)
    return UnsupportedValueError(
        f"{key!r} cannot be saved: a FullyShardedDataParallel module on more than one rank",
        why="its parameters are cut over the ranks, and its state_dict() is a collective",
        next="save an unsharded model",
        key=key,
        type_name="FullyShardedDataParallel",
    )


def _no_text(raw: object, path: Segments) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{dotted(path)!r} cannot be saved: its state_dict() has the key {raw!r}",
        why="a module's items are named by text that UTF-8 can hold",
        next="use text keys there, or save that part as a dict of its own",
        key=dotted(path),
        type_name=type(raw).__qualname__,
    )


def _collision(path: Segments, name: str, first: str, second: str) -> UnsupportedValueError:
    key = dotted((*path, name))
    return UnsupportedValueError(
        f"two items of a module have the name {key!r}",
        why=f"{first!r} and {second!r} are the same once wrappers are removed",
        next="rename one of the submodules",
        key=repr(first),
        other_key=repr(second),
    )
