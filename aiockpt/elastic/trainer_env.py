"""What the trainers of one host find in their environment and arguments, decided without touching our own."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from string import Template
from typing import Any

from aiockpt.errors import ConfigError

__all__ = ["DEVICES", "held_port", "substitute_local_rank", "trainer_envs", "visible_devices"]

MASTER_ADDR = "127.0.0.1"
"""Never the host's name: what that resolves to is a matter of the host's configuration, and the ranks are all here."""

DEVICES = "CUDA_VISIBLE_DEVICES"
"""Names the GPUs that a process sees."""


def trainer_envs(
    nprocs: int,
    *,
    environ: Mapping[str, str],
    master_port: int,
    run_id: str,
    role: str = "default",
    virtual_local_rank: bool = False,
) -> dict[int, dict[str, str]]:
    """Return the variables of each rank of a group that lives on this host alone, by local rank.

    They are what ``torchrun`` sets, and lie over what the trainers inherit. ``AIOCKPT_PHYSICAL_LOCAL_RANK`` is the
    rank on this host whatever ``LOCAL_RANK`` says.

    Args:
        nprocs: Number of ranks, at least 1.
        environ: The environment that the trainers inherit; it is read and never changed.
        master_port: Port on which rank 0 serves the store, see ``held_port``.
        run_id: Names the run, for log directories and rendezvous.
        role: What the ranks are called.
        virtual_local_rank: Each rank sees its own GPU alone, as device 0 (CUDA only).

    Raises:
        ConfigError: No ranks, a value that no environment takes, or with ``virtual_local_rank`` a
            ``CUDA_VISIBLE_DEVICES`` with fewer devices than ranks.
    """
    if nprocs < 1:
        raise _refuse("nprocs", f"{nprocs} trainers are none", "give a number of at least 1")
    for argument, value in (("run_id", run_id), ("role", role)):
        if "\0" in value:
            raise _refuse(argument, f"{value!r} holds a null character, which ends a variable", "give one without")
    common = {
        "WORLD_SIZE": str(nprocs),
        "LOCAL_WORLD_SIZE": str(nprocs),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": role,
        "ROLE_WORLD_SIZE": str(nprocs),
        "MASTER_ADDR": MASTER_ADDR,
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    if "OMP_NUM_THREADS" in environ:
        common["OMP_NUM_THREADS"] = environ["OMP_NUM_THREADS"]
    elif nprocs > 1:
        common["OMP_NUM_THREADS"] = "1"  # else each rank starts a thread for every core of the host
    if not virtual_local_rank and DEVICES in environ:
        common[DEVICES] = environ[DEVICES]
    envs = {}
    for rank in range(nprocs):
        own = {"RANK": str(rank), "ROLE_RANK": str(rank), "AIOCKPT_PHYSICAL_LOCAL_RANK": str(rank)}
        if virtual_local_rank:
            own |= {"LOCAL_RANK": "0", DEVICES: _device(rank, environ.get(DEVICES))}
        else:
            own["LOCAL_RANK"] = str(rank)
        envs[rank] = common | own
    return envs


def visible_devices(listed: str) -> list[str]:
    """Return the GPUs that a value of ``CUDA_VISIBLE_DEVICES`` names, in its order."""
    devices = []
    for entry in listed.split(","):
        if entry.strip() in ("", "-1"):  # CUDA sees no device from the first invalid one on
            break
        devices.append(entry.strip())
    return devices


def _device(rank: int, visible: str | None) -> str:
    """Return what names the GPU of a rank; ``visible`` is the list that we were given, None if none."""
    if visible is None:
        return str(rank)
    devices = visible_devices(visible)
    if rank < len(devices):
        return devices[rank]
    count = f"only {len(devices)}" if devices else "no"
    raise _refuse(
        "virtual_local_rank",
        f"rank {rank} has no GPU: {DEVICES}={visible!r} names {count} device{'s' if len(devices) != 1 else ''}",
        f"name a device for each rank in {DEVICES}, unset it, or start fewer ranks",
    )


def substitute_local_rank(args: Iterable[Any], rank: int) -> tuple[Any, ...]:
    """Return the arguments with ``${local_rank}`` replaced in those that are text.

    ``string.Template`` does it, as in ``torchrun``: ``$local_rank`` is replaced too, ``$$`` is a plain dollar, and
    what looks like another name stays as it is.
    """
    return tuple(Template(arg).safe_substitute(local_rank=rank) if isinstance(arg, str) else arg for arg in args)


@contextmanager
def held_port() -> Iterator[int]:
    """Hold a free TCP port for a server in another process, which binds it while we still hold it.

    A port that is asked for, closed and passed on may be given to somebody else in between. So it stays bound, with
    ``SO_REUSEADDR`` and without listening: the kernel gives it to nobody who takes any port, neither for ``bind`` nor
    for ``connect``, and still lets one who names it and sets ``SO_REUSEADDR``, as torch's ``TCPStore`` does, bind it
    and listen. It is bound on all addresses, for that is what ``TCPStore`` binds: one that is free on 127.0.0.1 alone
    may be the near end of a connection on another address, and the store would be refused.

    Raises:
        OSError: The host has no free port.
    """
    with _bound() as holder:
        yield holder.getsockname()[1]


def _bound() -> socket.socket:
    """Return a socket bound to a free port, for IPv6 and IPv4 at once where the host has both."""
    kinds = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")] if socket.has_ipv6 else [(socket.AF_INET, "0.0.0.0")]
    for family, address in kinds:
        holder = None
        try:
            holder = socket.socket(family, socket.SOCK_STREAM)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            holder.bind((address, 0))
        except OSError:  # IPv6 may be compiled in and switched off
            if holder is not None:
                holder.close()
            if family == socket.AF_INET:
                raise
        else:
            return holder
    raise AssertionError("the last kind returns or raises")


def _refuse(argument: str, why: str, next: str) -> ConfigError:
    return ConfigError(f"{argument} was refused", why=why, next=next, argument=argument)
