"""The process in which one supervisor is measured: a line of JSON for each group to run, two lines in answer.

The processes of functions import this module too, as the main one of their parent: it imports little before ``main``.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from bench.trainees import Work, work_of

__all__ = ["Job", "held", "main"]

_PR_SET_PDEATHSIG = 1


class Job(NamedTuple):
    """A group to run to its end."""

    work: Work
    log_dir: str
    tee: bool
    """Whether stdout goes to file and console, or to the console alone and unseen."""


def held() -> dict[str, int]:
    """Return what this process holds."""
    # One of the descriptors is that of the listing itself.
    return {"threads": len(os.listdir("/proc/self/task")), "fds": len(os.listdir("/proc/self/fd")) - 1}


def main(argv: list[str] | None = None) -> None:
    """Serve until ``close`` or end-of-file.

    The first answer for a group comes when the supervisor has started it, the second when it is over.
    """
    import argparse
    import ctypes
    import json
    import signal

    from bench.entrants import load_class

    parser = argparse.ArgumentParser()
    parser.add_argument("--place", required=True)
    parser.add_argument("--console", required=True)
    parser.add_argument("--reply-fd", type=int, required=True)
    args = parser.parse_args(argv)
    os.set_inheritable(args.reply_fd, False)
    # Where the measuring process is killed: both supervisors then stop their groups, and would wait for ever otherwise.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.dup2(console := os.open(args.console, os.O_WRONLY), 1)
    os.close(console)
    supervisor = load_class(args.place)()
    with os.fdopen(args.reply_fd, "w", buffering=1) as replies:

        def tell(**answer: Any) -> None:
            print(json.dumps(answer), file=replies)

        tell()
        for line in sys.stdin:
            if line == "close\n":
                break
            asked = json.loads(line)
            log_dir, tee = asked.pop("log_dir"), asked.pop("tee")
            tell(**supervisor.run(Job(work_of(**asked), log_dir, tee), tell))
        tell()


if __name__ == "__main__":
    main()
