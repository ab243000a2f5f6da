"""What trainers find in their environment and arguments, and the port of their store."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from aiockpt.elastic.trainer_env import held_port, substitute_local_rank, trainer_envs
from aiockpt.errors import ConfigError
from tests.waiting import PATIENCE_SECONDS


def envs(nprocs: int = 2, *, environ: Mapping[str, str] | None = None, **arguments: Any) -> dict[int, dict[str, str]]:
    given: dict[str, Any] = {"master_port": 29500, "run_id": "exp"} | arguments
    return trainer_envs(nprocs, environ=MappingProxyType(dict(environ or {})), **given)


def refused(call: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    assert all((caught.value.what, caught.value.why, caught.value.next))
    return caught.value


def test_variables() -> None:
    """Each rank finds what torchrun sets for a group on one host, and its rank on the host (R-MP-44)."""
    found = envs(2, role="trainer")
    assert list(found) == [0, 1]
    assert found[1] == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "AIOCKPT_PHYSICAL_LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "trainer",
        "ROLE_RANK": "1",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "exp",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "1",
    }


def test_nccl_setting_is_kept() -> None:
    """What the user set for NCCL's errors stays (R-MP-44)."""
    found = envs(1, environ={"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"})
    assert found[0]["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


@pytest.mark.parametrize(
    ("nprocs", "environ", "threads"),
    [(1, {}, None), (2, {}, "1"), (1, {"OMP_NUM_THREADS": "8"}, "8"), (2, {"OMP_NUM_THREADS": "8"}, "8")],
)
def test_threads(nprocs: int, environ: dict[str, str], threads: str | None) -> None:
    """The number of threads is passed on, and is 1 where several ranks share a host and nobody said (R-MP-46)."""
    assert [env.get("OMP_NUM_THREADS") for env in envs(nprocs, environ=environ).values()] == [threads] * nprocs


def test_own_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own environment is not changed (E-105, R-MP-46)."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    trainer_envs(4, environ=os.environ, master_port=1, run_id="exp", virtual_local_rank=True)
    assert dict(os.environ) == before


def test_real_local_rank() -> None:
    """Without virtual ranks all see the GPUs that we see, and know them by their rank (R-MP-44)."""
    found = envs(2, environ={"CUDA_VISIBLE_DEVICES": "4,5"})
    assert [(env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) for env in found.values()] == [("0", "4,5"), ("1", "4,5")]
    assert "CUDA_VISIBLE_DEVICES" not in envs(2)[0]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["0", "1"]),
        ("4,5", ["4", "5"]),
        (" 4 , 5 ,6", ["4", "5"]),
        ("GPU-8932f937,MIG-GPU-b6/0/1", ["GPU-8932f937", "MIG-GPU-b6/0/1"]),
    ],
)
def test_virtual_local_rank(visible: str | None, devices: list[str]) -> None:
    """Each rank sees the GPU at its place in our list as its only one, and its true rank beside (R-MP-44)."""
    found = envs(2, environ={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, virtual_local_rank=True)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found.values()] == devices
    assert [env["LOCAL_RANK"] for env in found.values()] == ["0", "0"]
    assert [env["RANK"] for env in found.values()] == ["0", "1"]
    assert [env["AIOCKPT_PHYSICAL_LOCAL_RANK"] for env in found.values()] == ["0", "1"]


@pytest.mark.parametrize(
    ("visible", "rank", "count"),
    [
        *((visible, 0, "no devices") for visible in ("", " ", "-1", ",1")),
        *((visible, 1, "only 1 device") for visible in ("4", "4,", "4,-1,5")),
    ],
)
def test_too_few_devices(visible: str, rank: int, count: str) -> None:
    """A rank for which our list has no GPU is an error with the rank and the list, an empty list too (R-MP-44)."""
    error = refused(lambda: envs(2, environ={"CUDA_VISIBLE_DEVICES": visible}, virtual_local_rank=True))
    assert error.argument == "virtual_local_rank"
    assert f"rank {rank} " in error.why
    assert repr(visible) in error.why
    assert error.why.endswith(count)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [("nprocs", {"nprocs": 0}), ("nprocs", {"nprocs": -1}), ("run_id", {"run_id": "a\0b"}), ("role", {"role": "\0"})],
)
def test_bad_arguments(argument: str, arguments: dict[str, Any]) -> None:
    """What no process can be started with is refused by name (R-MP-44)."""
    assert refused(lambda: envs(**arguments)).argument == argument


def test_local_rank_in_arguments() -> None:
    """``${local_rank}`` is replaced in text alone, and other names stay as they are (R-MP-45)."""
    args = ("--rank=${local_rank}", "$local_rank", 7, None, b"${local_rank}", "$other ${one} $", "$$5", "100%")
    assert substitute_local_rank(args, 12) == (
        *("--rank=12", "12", 7, None, b"${local_rank}", "$other ${one} $", "$5", "100%"),
    )


IP_LOCAL_PORT_RANGE = 51  # of Linux 6.3; not named by the socket module of 3.11


def narrowed(family: socket.AddressFamily, port: int, *, reuse: bool) -> socket.socket:
    """Return a socket whose choice of ports is this one alone."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    try:
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError:
        made.close()
        pytest.skip("this kernel cannot narrow the choice of ports")
    return made


@pytest.mark.process
@pytest.mark.parametrize("reuse", [False, True], ids=["plain", "reuseaddr"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::"])
def test_held_port_is_given_to_nobody(address: str, reuse: bool) -> None:
    """Whoever takes any port is not given the one that is held, though it is the only one to choose from (R-MP-44)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        held_port() as port,
        narrowed(family, port, reuse=reuse) as other,
        pytest.raises(OSError, match=r"Address already in use|Cannot assign"),  # the latter without IPv6
    ):
        other.bind((address, 0))


@pytest.mark.process
def test_port_that_is_no_longer_held() -> None:
    """A port is free again when it is no longer held (R-MP-44)."""

    def given_again() -> bool:
        with held_port() as port:
            pass
        with narrowed(socket.AF_INET, port, reuse=False) as other:
            try:
                other.bind(("127.0.0.1", 0))
            except OSError:  # somebody else was faster
                return False
            return bool(other.getsockname()[1] == port)

    assert any(given_again() for _ in range(20))


@pytest.mark.process
def test_held_port_is_no_end_of_a_connection() -> None:
    """No connection is given the port that is held as its near end (R-MP-44)."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        held_port() as port,
        narrowed(socket.AF_INET, port, reuse=False) as other,
        pytest.raises(OSError, match="assign"),
    ):
        other.connect(server.getsockname())


@pytest.mark.process
def test_held_ports_differ() -> None:
    """Ports that are held at the same time differ, and none of them listens (R-MP-44)."""
    with held_port() as first, held_port() as second:
        assert first != second
        for port in (first, second):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))


STORE = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
other = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
store.set("key", "value")
print(other.get("key").decode(), store.port)
"""


@pytest.mark.process
def test_held_port_serves_torchs_store() -> None:
    """torch's store of another process binds the port while it is held, also after one that died (R-MP-44)."""
    with held_port() as port:
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", STORE, str(port)],
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
            assert done.stdout.split() == ["value", str(port)], done.stderr


GROUP = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(dist.get_rank(), dist.get_world_size(), int(total))
dist.destroy_process_group()
"""


@pytest.mark.process
def test_group_by_the_environment() -> None:
    """Trainers meet by what they find in their environment alone (R-MP-44)."""
    with held_port() as port:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", GROUP],
                env={**os.environ, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for env in trainer_envs(2, environ=os.environ, master_port=port, run_id="a/b").values()
        ]
        try:
            ended = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
                process.communicate()
    assert [out.split() for out, _ in ended] == [["0", "2", "2"], ["1", "2", "2"]], ended
