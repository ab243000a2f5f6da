"""Pinning of memory of this process, so that CUDA copies to and from it without the thread that asked for the copy."""

from __future__ import annotations

import threading

import torch

__all__ = ["pin", "unpin"]

_PORTABLE = 1  # for every device, not only the one in whose context it is registered


def pin(address: int, nbytes: int, device: torch.device) -> str | None:
    """Register whole pages with CUDA, in one piece: a copy that crosses from one registration to the next is refused.

    The call happens in a thread of its own. A refusal stays that thread's last CUDA error, and torch would raise it at
    the next kernel that the thread launches.

    Args:
        address: Of memory that stays mapped until ``unpin``.
        nbytes: Of it; made present already, or this takes the page faults.
        device: One that is in use: a thread's device is at first number 0, where the call would make a context.

    Returns:
        None where it is pinned, else why CUDA refused: copies are slower then, and as right.
    """
    refused: list[str | None] = ["the thread did not get to it"]

    def register() -> None:
        try:
            with torch.cuda.device(device):
                cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no annotation here
                code = cudart.cudaHostRegister(address, nbytes, _PORTABLE)
                refused[0] = f"{cudart.cudaGetErrorString(code)} (CUDA error {int(code)})" if int(code) else None
        except Exception as exc:  # noqa: BLE001  # the caller decides what a refusal means
            refused[0] = str(exc)

    thread = threading.Thread(target=register, name="aiockpt-pin")
    thread.start()
    try:
        thread.join()
    except BaseException:  # an interrupt: the caller will not hear whether it is pinned
        thread.join()
        if refused[0] is None:
            unpin(address, device)
        raise
    return refused[0]


def unpin(address: int, device: torch.device) -> bool:
    """Take back what ``pin`` did.

    Returns:
        Whether CUDA forgot the memory; else it must stay mapped, as copies to a later mapping of the same address would
        go to the old pages.
    """
    try:
        with torch.cuda.device(device):
            code = torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]  # torch has no annotation here
    except Exception:  # noqa: BLE001  # a context that a failed kernel has broken raises from everything
        return False
    return int(code) == 0
