"""One rank that does what the test says, a line of JSON each way: see ``crew``."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import torch

import aiockpt
from aiockpt import blocking
from tests.crash.arming import InFile

__all__ = ["serve"]

PATIENCE_SECONDS = 45.0


def serve(rank: int, address: str, directory: str, run: str, options: dict[str, Any]) -> None:
    """Open the run, and obey until the test hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        with connection.makefile("rw") as lines:
            lines.write(f"{rank}\n")
            lines.flush()
            me = _Rank(rank, directory, run, options)
            for line in lines:
                lines.write(json.dumps(me.obey(**json.loads(line))) + "\n")
                lines.flush()


class _Rank:
    def __init__(self, rank: int, directory: str, run: str, options: dict[str, Any]) -> None:
        self._rank = rank
        self._state: dict[str, Any] = {}
        self._set(0)
        policy = aiockpt.RestartPolicy(tries=1000, delays=(0.0,))
        keep = aiockpt.Latest(options.pop("keep", 2))
        self._ckpt = blocking.Checkpointer(run, keep=keep, restart=policy, **options)
        self._ckpt._coordinator.faults = InFile(f"{directory}/trainer-{rank}.json")
        self._ckpt._coordinator.worker_faults = ("tests.crash.arming:InFile", f"{directory}/worker-{rank}.json")

    def obey(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Do one thing; what is raised is a part of the answer."""
        try:
            return getattr(self, f"_{do}")(**arguments) or {"kind": "done"}
        except Exception as exc:  # noqa: BLE001  # it is for the test to judge
            kind, cause = type(exc).__name__, exc.__cause__
            fields = {name: getattr(exc, name, None) for name in ("rank", "errno", "phase")}
            return {"kind": kind, "text": str(exc), "cause": repr(cause), **fields}

    def _set(self, n: int) -> None:
        """Have the value ``n`` everywhere: in what is one rank's own, what all share, and what is plain."""
        own = torch.full((3000,), float(n) + self._rank / 8)
        self._state["own"] = aiockpt.PerRank({"w": own})
        # A name of its own makes each rank's plan another one, so that the hub asks each rank for its details.
        self._state["part"] = {f"of_{self._rank}": torch.full((9,), float(n))}
        self._state["same"] = {"w": torch.full((5000,), float(n)), "v": torch.full((7,), float(n))}
        self._state["n"] = n

    def _open(self) -> None:
        self._ckpt.open()

    def _save(self, step: int, n: int, overwrite: bool = False) -> dict[str, Any]:
        self._set(n)
        save = self._ckpt.save(step, self._state, overwrite=overwrite)
        assert save is not None
        return {"kind": "committed", "step": save.result(PATIENCE_SECONDS).step}

    def _restore(self) -> dict[str, Any]:
        self._set(-1)
        restored = self._ckpt.restore(self._state, strict=False)  # the parts of other ranks are not wanted
        if restored is None:
            return {"kind": "nothing"}
        n, own, same, part = (self._state[name] for name in ("n", "own", "same", "part"))
        own = own.value["w"]
        assert own.unique().tolist() == [n + self._rank / 8]
        assert same["w"].unique().tolist() == same["v"].unique().tolist() == [n]
        assert part[f"of_{self._rank}"].unique().tolist() == [n]
        return {"kind": "restored", "step": restored.step, "n": n}

    def _look(self) -> dict[str, Any]:
        statistics = self._ckpt.statistics()
        targets = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                targets.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:  # the listing's own
                continue
        return {"worker": statistics.worker_pid, "restarts": statistics.worker_restarts, "fds": sorted(targets)}

    def _close(self) -> None:
        self._ckpt.close()
