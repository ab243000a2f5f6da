"""What docs/limits.md says of sandboxes: a missing system call is named at open, and nothing is left."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.support import ROOT, run_script

pytestmark = pytest.mark.process

NUMBERS = {
    "x86_64": {"pidfd_open": 434, "pidfd_send_signal": 424, "waitid": 247, "memfd_create": 319},
    "aarch64": {"pidfd_open": 434, "pidfd_send_signal": 424, "waitid": 95, "memfd_create": 279},
}

SCRIPT = """
    import ctypes, errno, os, struct, sys

    def forbid(number, code):
        # Load the number of the call; that one fails with the code, all others go on.
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
        libc = ctypes.CDLL(None, use_errno=True)
        for arguments in ((38, 1, 0, 0, 0), (22, 2, described, 0, 0)):  # no new privileges; a seccomp filter
            if libc.prctl(*arguments):
                sys.exit(f"no seccomp: {os.strerror(ctypes.get_errno())}")

    forbid(int(sys.argv[1]), getattr(errno, sys.argv[2]))
    import aiockpt
    from aiockpt.coordinator.system_needs import check_system
    try:
        if len(sys.argv) == 4:
            aiockpt.blocking.Checkpointer(sys.argv[3]).open()
        else:
            check_system()  # imports no torch
    except aiockpt.ConfigError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("pidfd_open", "EPERM"),  # as the profile of Docker before 20.10 does
        ("pidfd_open", "ENOSYS"),  # as Linux before 5.3 does
        ("waitid", "EINVAL"),  # as Linux 5.3 does
        ("pidfd_send_signal", "EPERM"),
        ("memfd_create", "EPERM"),
    ],
)
def test_a_refused_system_call(call: str, code: str) -> None:
    """The error names the call, and what to change."""
    what, why, next_step = refusal(call, code).splitlines()
    assert what == "aiockpt does not run here"
    assert why.startswith(f"why: {call}: ")
    assert "Linux 5.4" in next_step
    assert "seccomp" in next_step


def test_opening_where_a_call_is_refused(tmp_path: Path) -> None:
    """It is the first thing that open() looks at: the run is not touched. The page shows this very error."""
    said = refusal("pidfd_open", "EPERM", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert f"```\n{said}```\n" in (ROOT / "docs/limits.md").read_text()


def refusal(call: str, code: str, *arguments: object) -> str:
    """Return what a process says in which this call fails with this code."""
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        pytest.skip(f"the numbers of system calls on {platform.machine()} are not known here")
    done = run_script(SCRIPT, numbers[call], code, *arguments)
    if done.stderr.startswith("no seccomp"):
        pytest.skip(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
