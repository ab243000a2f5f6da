"""Where the workers of the other ranks reach rank 0's: a listening socket on the interface that leads to them."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from aiockpt.errors import WorkerStartError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # a torch without distributed has none

__all__ = ["listen"]

_BACKLOG = 4096
"""Connections that the kernel may hold: all ranks come at once."""
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses for documentation: the routes to them are those to everywhere. Nothing is ever sent."""


def listen(store: Store) -> socket.socket:
    """Return a socket that listens at a free port, on the interface that the route to the store's host takes.

    The ranks reach that host, so that network joins them; the name of this host says nothing: it is 127.0.0.1 in many
    containers, and 127.0.1.1 on Debian. The interface of the default route is taken where the store has no host (a file
    may be shared by hosts), or a name that leads to the loopback here and hardly anywhere else; the loopback where
    there is no other. Blocks while a name is looked up.

    Returns:
        Not inheritable; the caller closes it. Its address is ``getsockname()[:2]``.

    Raises:
        WorkerStartError: No address of this host can be listened at.
    """
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]  # torch does not say that it exports it
        store = store.underlying_store
    host, port = "", 0
    if isinstance(store, dist.TCPStore):  # type: ignore[attr-defined]  # likewise
        host, port = store.host, store.port
    try:
        family, address = _local_end(host, port)
        return socket.create_server((address[0], 0, *address[2:]), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise WorkerStartError(
            "the ranks' workers were not connected: rank 0 cannot listen for them",
            why=f"on the interface towards {host or 'other hosts'}: {exc}",
            next="give init_process_group an address of rank 0's host that the other hosts reach, too",
        ) from exc


def _local_end(host: str, port: int) -> tuple[int, Any]:
    """Return family and address of this host's end of a way to ``host``."""
    ends = _ends(host, port) if host else []
    if _is_loopback(host):
        return ends[0]
    if all(_is_loopback(address[0]) for _, address in ends):
        ends = _default_routes() + ends
    return min(ends, key=lambda end: _is_loopback(end[1][0]), default=(socket.AF_INET, ("127.0.0.1", 0)))


def _ends(host: str, port: int) -> list[tuple[int, Any]]:
    """Return this host's ends of all ways to ``host``, at least one."""
    ends = []
    error = OSError(f"{host} has no address")
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        try:
            ends.append((int(family), _route(family, kind, address)))
        except OSError as exc:  # such as IPv6 where there is none
            error = exc
    if not ends:
        raise error
    return ends


def _default_routes() -> list[tuple[int, Any]]:
    ends: list[tuple[int, Any]] = []
    for host in _ELSEWHERE:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            ends.append((family, _route(family, socket.SOCK_DGRAM, (host, 1))))
        except OSError:
            continue
    return ends


def _route(family: int, kind: int, address: Any) -> Any:
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: chooses the route, and sends nothing
        return probe.getsockname()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
