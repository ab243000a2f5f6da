"""Where rank 0 listens: on the interface that leads to the other ranks."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from aiockpt.coordinator import listener as module
from aiockpt.coordinator.listener import listen
from aiockpt.errors import WorkerStartError

LAN = (int(socket.AF_INET), ("127.0.0.7", 0))
"""Stands for an interface of this host that others reach; any address of the loopback can be listened at."""


class Elsewhere:
    """A TCPStore that says where it is."""

    def __init__(self, host: str) -> None:
        self.host, self.port = host, 29500


def address(store: Any) -> str:
    with listen(store) as listening:
        assert not os.get_inheritable(listening.fileno())
        host, port = listening.getsockname()[:2]
        socket.create_connection((host, port)).close()
        return str(host)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("::1", 1))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", *(["::1"] if has_ipv6() else [])])
def test_the_interface_towards_the_store(host: str) -> None:
    """Whatever prefixes the names of a group have."""
    server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    assert address(server) == host
    assert address(dist.PrefixStore("a/", dist.PrefixStore("b/", server))) == host


def test_the_loopback_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says localhost means it."""
    monkeypatch.setattr(dist, "TCPStore", Elsewhere)
    monkeypatch.setattr(module, "_default_routes", lambda: [LAN])
    assert address(Elsewhere("localhost")) in ("127.0.0.1", "::1")


def test_a_name_that_leads_to_the_loopback_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a host's own name to 127.0.1.1: other hosts would connect to themselves."""

    monkeypatch.setattr(module, "_ends", lambda host, port: [(int(socket.AF_INET), ("127.0.1.1", 0))])
    monkeypatch.setattr(module, "_is_loopback", lambda host: host in ("127.0.0.1", "127.0.1.1"))
    monkeypatch.setattr(module, "_default_routes", lambda: [LAN])
    monkeypatch.setattr(dist, "TCPStore", Elsewhere)
    assert address(Elsewhere("node-0")) == "127.0.0.7"
    monkeypatch.setattr(module, "_default_routes", lambda: [])
    assert address(Elsewhere("node-0")).startswith("127.0.")


@pytest.mark.parametrize("kind", ["hash", "file"])
def test_a_store_without_a_host(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be shared by hosts; without any network there is the loopback."""
    store = dist.HashStore() if kind == "hash" else dist.FileStore(str(tmp_path / "store"), 1)
    monkeypatch.setattr(module, "_default_routes", lambda: [LAN])
    assert address(store) == "127.0.0.7"
    monkeypatch.setattr(module, "_default_routes", lambda: [])
    assert address(store) == "127.0.0.1"


def test_the_default_route() -> None:
    """Of this host: at most one address for each family, none of them the loopback's."""
    ends = module._default_routes()
    assert len({family for family, _ in ends}) == len(ends) <= 2
    for family, (host, *_) in ends:
        assert not module._is_loopback(host)
        socket.socket(family).close()


def test_a_host_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it, and what to give."""
    monkeypatch.setattr(dist, "TCPStore", Elsewhere)
    with pytest.raises(WorkerStartError) as caught:
        listen(Elsewhere("nowhere.invalid"))  # type: ignore[arg-type]
    assert "nowhere.invalid" in caught.value.why
    assert "init_process_group" in caught.value.next
