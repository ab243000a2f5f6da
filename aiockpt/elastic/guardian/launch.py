"""One child: spawned by the guardian itself, in a session of its own, with no Python in between.

``posix_spawn`` takes a fraction of a millisecond, where a fork with Python in the child takes 2.4, and a group of 64
waits for each. It leaves no room for a parent-death signal, so a program does not die by itself where the guardian is
killed: the supervisor ends it then. The process of a function sets that signal itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Child", "launch"]


class Child:
    """A launched child: its pid, held back from reuse until ``reap``, and its pidfd."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def exit_status(self) -> int | None:
        """Return the exit status of a child that has ended, negative for a signal; it stays a zombie.

        As long as it is one, its pid stands for its process group and for nothing else.
        """
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def signal(self, signum: int, *, leader_only: bool) -> None:
        """Signal the child's process group, or itself; harmless where nobody is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if leader_only:
                signal.pidfd_send_signal(self.pidfd, signum)
            else:
                os.killpg(self.pid, signum)

    def reap(self) -> None:
        """Let go of the pid if the child has ended."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        os.close(self.pidfd)


def launch(message: dict[str, Any], descriptors: Sequence[int]) -> tuple[Child, str | None]:
    """Launch one child as a ``launch`` message says.

    Args:
        message: See ``wire``.
        descriptors: Its stdout, its stderr, and those that it inherits; the caller closes them behind this.

    Returns:
        The child, and why it runs on all processors though some were asked for.

    Raises:
        OSError: The operating system refused, the program is none, or these processors cannot be had.
        ValueError: A NUL in an argument or in the environment.
    """
    stdout, stderr, *inherited = descriptors
    for fd in inherited:
        os.set_inheritable(fd, True)
    env = dict(message["env"])
    env.update((name, str(fd)) for name, fd in zip(message["inherits"], inherited, strict=True))
    with _on_processors(message["cpus"], is_optional=message["cpus_optional"]) as unbound:
        pid = os.posix_spawn(
            message["executable"],
            message["argv"],
            env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, stdout, 1),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores, and a child would inherit that
        )
    return Child(message["rank"], pid), unbound


@contextlib.contextmanager
def _on_processors(cpus: list[int] | None, *, is_optional: bool) -> Iterator[str | None]:
    """Run on these processors meanwhile: a child inherits them, and what is wrong with them shows before it is."""
    before = os.sched_getaffinity(0)
    unbound = None
    if cpus is not None:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as exc:
            if not is_optional:
                raise
            unbound = str(exc)
    try:
        yield unbound
    finally:
        if cpus is not None and unbound is None:
            os.sched_setaffinity(0, before)
