"""A process that has torch imported and forks the ranks of one job after another: a rank starts in 20 ms, not in 3 s.

Commands come by standard input, a line of JSON each: ``{"world": 4, "code": "…", "args": […], "directory": "…"}``.
Answers go to standard output: ``{"pids": […]}``, then for each end ``{"pid": …, "status": …}`` (negative: a signal).
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

import torch
import torch._dynamo  # this and what follows once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import aiockpt

START_SECONDS = 60.0


def main() -> None:
    """Serve until standard input ends; what still runs then is killed."""
    running: dict[int, int] = {}
    commands = b""
    while True:
        readable, _, _ = select.select([0, *running.values()], [], [])
        for pid, pidfd in list(running.items()):
            if pidfd in readable:
                _, status = os.waitpid(pid, 0)
                os.close(running.pop(pid))
                say({"pid": pid, "status": os.waitstatus_to_exitcode(status)})
        if 0 in readable:
            data = os.read(0, 1 << 20)
            if not data:
                break
            *lines, commands = (commands + data).split(b"\n")
            for line in lines:
                pids = start(json.loads(line))
                running |= {pid: os.pidfd_open(pid) for pid in pids}
                say({"pids": pids})
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def say(answer: dict[str, Any]) -> None:
    """Answer in one line."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def start(job: dict[str, Any]) -> list[int]:
    """Fork the ranks."""
    listener = socket.create_server(("127.0.0.1", 0))
    pids = []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            run(rank, job, listener)
        pids.append(pid)
    listener.close()
    return pids


def run(rank: int, job: dict[str, Any], listener: socket.socket) -> None:
    """Be one rank: its output goes to files, its namespace has ``rank``, ``world``, ``args``, ``torch``, ``dist``."""
    status = 1
    try:
        os.close(0)
        for number, name in ((1, "out"), (2, "err")):
            fd = os.open(f"{job['directory']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, number)
            os.close(fd)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115  # to the end
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115  # to the end
        faulthandler.enable()
        port = listener.getsockname()[1]
        own = listener.detach()
        if rank:
            os.close(own)
        store = dist.TCPStore("127.0.0.1", port, job["world"], rank == 0, master_listen_fd=own if rank == 0 else None)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["world"])
        names = {"rank": rank, "world": job["world"], "args": job["args"], "torch": torch, "dist": dist}
        exec(compile(job["code"], f"<rank {rank}>", "exec"), names | {"aiockpt": aiockpt, "__name__": "__main__"})
        dist.destroy_process_group()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001  # the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
