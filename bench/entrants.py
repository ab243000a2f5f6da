"""Who is measured: each system in each of its cases, with the class that measures it. Imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["INTERFERENCES", "OURS", "RANKS", "RESTORES", "SAVES", "SMALLS", "Entry", "Key", "load_class"]


class Key(NamedTuple):
    """Names one row: a system in one of its cases."""

    system: str
    case: str


class Entry(NamedTuple):
    """Says how a row is measured."""

    place: str
    """Class of a Saver or Restorer, ``module:name``."""
    state: str = "gpt"
    """What it saves, as ``bench.state.make_state`` names it."""


OURS = "aiockpt"
"""The system that the others are measured beside: first in each of the tables below."""

SAVES: Mapping[Key, Entry] = {
    Key(OURS, "guarded"): Entry("bench.ours:Guarded"),
    Key(OURS, "inline"): Entry("bench.ours:Inline"),
    Key(OURS, "first save after prepare"): Entry("bench.ours:FirstSave"),
    Key("torch.save", "fsync"): Entry("bench.peers.torch_save:TorchSave"),
    Key("safetensors", "save_file, fsync"): Entry("bench.peers.safetensors_file:SafetensorsSave"),
    Key("dcp.save", "default"): Entry("bench.peers.dcp_sync:DcpSave"),
    Key("dcp.async_save thread", "default"): Entry("bench.peers.dcp_thread:DcpThread"),
    Key("dcp.async_save thread", "kept stager"): Entry("bench.peers.dcp_thread:DcpThreadKeptStager"),
    Key("dcp.async_save process", "shared-memory stager"): Entry("bench.peers.dcp_process:DcpProcess"),
    Key("torch_checkpointing", "async, buffered"): Entry("bench.peers.torch_checkpointing_manager:ManagerSave"),
    Key("torchsnapshot", "async_take"): Entry("bench.peers.torchsnapshot_take:AsyncTake"),
}

SMALLS: Mapping[Key, Entry] = {
    Key(OURS, "tensors"): Entry("bench.ours:Guarded", "tensors"),
    Key(OURS, "module and optimizer"): Entry("bench.ours:Guarded", "parameters"),
    **{key: Entry(entry.place, "tensors") for key, entry in SAVES.items() if key.system != OURS},
}

RESTORES: Mapping[Key, Entry] = {
    Key(OURS, "in place, verified"): Entry("bench.ours:Restore"),
    Key("torch.load", "fresh dict"): Entry("bench.peers.torch_save:TorchLoad"),
    Key("safetensors", "load_file, fresh dict"): Entry("bench.peers.safetensors_file:SafetensorsLoad"),
    Key("dcp.load", "in place"): Entry("bench.peers.dcp_sync:DcpLoad"),
    Key("torch_checkpointing", "in place"): Entry("bench.peers.torch_checkpointing_manager:ManagerLoad"),
    Key("torchsnapshot", "in place"): Entry("bench.peers.torchsnapshot_take:SnapshotRestore"),
}

_SYNCHRONOUS = frozenset({"torch.save", "safetensors", "dcp.save"})

INTERFERENCES: Mapping[Key, Entry] = {
    key: entry
    for key, entry in SAVES.items()
    if key.system not in _SYNCHRONOUS and not entry.place.endswith(":FirstSave")
}
"""Those whose saves go on while training steps run."""

RANKS: Mapping[Key, Entry] = {
    Key(system, case): Entry(place, case)
    for case in ("sharded", "replicated")
    for system, place in (
        (OURS, "bench.ours:AmongRanks"),
        ("dcp.async_save process", "bench.peers.dcp_process:DcpAmongRanks"),
        ("torch_checkpointing", "bench.peers.torch_checkpointing_manager:ManagerSave"),
    )
}
"""Jobs of several ranks; the case is how the state lies on them, as ``bench.rank_state`` makes it."""


def load_class(place: str) -> type[Any]:
    """Import the class that ``module:name`` says; ImportError is for the caller to report."""
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found
