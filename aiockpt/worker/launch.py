"""The command line that starts a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import aiockpt
from aiockpt.errors import WorkerStartError

__all__ = ["BOOT", "PACKAGE_PATH", "command", "import_path", "standard_library"]

PACKAGE_PATH = os.path.realpath(os.path.dirname(aiockpt.__file__))
"""Directory of this package; both ends of the wire compare it."""

# Signals come first: batch systems send theirs to every process, and imports take most of the start.
BOOT = """\
import signal
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
import json, sys
sys.path[:] = json.loads(sys.argv[3])["path"]
from aiockpt.worker.boot import main
main(sys.argv[1:])
"""


def command(socket_fd: int, trainer_pidfd: int, *, faults: tuple[str, str] | None = None) -> list[str]:
    """Return the arguments of a worker's process.

    It is to be started with both descriptors in ``pass_fds``, in a session of its own, with ``/dev/null`` as stdin
    and stdout, and the non-blocking end of a pipe as stderr. ``__main__`` of this program is not imported by it.

    Args:
        socket_fd: The worker's end of a stream ``socketpair``.
        trainer_pidfd: A pidfd of this process. The worker watches it: end-of-file alone fails where forked children
            hold the socket, and a pidfd that the worker opened itself could be of whoever adopted it.
        faults: For tests: (``module:function``, text); the function makes the worker's fault layer of the text.

    Raises:
        WorkerStartError: This interpreter does not know its own executable.
    """
    if not sys.executable:
        raise WorkerStartError(
            "the checkpoint worker was not started",
            why="sys.executable is empty: this program embeds Python without saying where its executable is",
            next="set sys.executable to a Python that has aiockpt",
        )
    options = {"path": import_path(), "faults": faults}
    # -P: a file random.py in the working directory must not be imported by the child.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return [sys.executable, "-P", *flags, "-c", BOOT, str(socket_fd), str(trainer_pidfd), json.dumps(options)]


def standard_library() -> list[str]:
    """Return where this interpreter has its standard library."""
    library = os.path.dirname(os.__file__)
    return [library, os.path.join(library, "lib-dynload")]


def import_path() -> list[str]:
    """Return the trainer's ``sys.path``, absolute, with the standard library first.

    The child has another working directory. The standard library comes first for the reason of ``-P``: a script's
    folder stands before it in the trainer, whose standard modules were imported before that mattered.
    """
    entries = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    standard = standard_library()
    return sorted(dict.fromkeys(entries), key=lambda entry: entry not in standard)
