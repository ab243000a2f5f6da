"""Random number generators as one object of the state."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import Any

import msgspec
import torch

__all__ = ["RNG"]


class RNG(msgspec.Struct, frozen=True, kw_only=True):
    """The global random number generators: Python's, numpy's (if imported), torch's for CPU and each CUDA device.

    It holds nothing; put ``RNG()`` into the state, and it reads and sets the process's generators.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator that the process has."""
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            state["numpy"] = numpy.random.get_state()
        # Before it is initialized no CUDA generator was used, and a look would make a context.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators to ``state``; those of numpy and CUDA where both the state and the process have them."""
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"].cpu())
        if "numpy" in state:
            # It was in use when the state was saved, so the program is about to import it again.
            with contextlib.suppress(ModuleNotFoundError):
                import numpy as np

                np.random.set_state(state["numpy"])
        devices = state.get("cuda", [])
        if devices and torch.cuda.is_available():
            for device in range(min(len(devices), torch.cuda.device_count())):
                torch.cuda.set_rng_state(devices[device].cpu(), device)
