"""What came of a group, from how its processes ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from aiockpt.elastic.failures.process_failure import Cause
from aiockpt.elastic.failures.verdict import judge
from aiockpt.elastic.group import Group
from aiockpt.elastic.launching.programs import Programs
from aiockpt.elastic.printing.logs import LogsDest
from aiockpt.elastic.results import RunProcsResult


def judged(group: Group, directory: Path, *, oom_kills: int = 0) -> RunProcsResult:
    ranks = range(group.nprocs)
    empty = dict.fromkeys(ranks, "")
    logs = LogsDest(empty, empty, {}, {}, empty, "", "")
    return judge(
        group,
        Programs(empty, "program", dict.fromkeys(ranks, ())),
        logs,
        private_error_file=lambda rank: str(directory / f"error_{rank}.json"),
        output_tail=lambda rank: f"last words of {rank}",
        oom_kills=oom_kills,
        unreaped=(),
    )


@pytest.mark.parametrize(
    ("exitcode", "oom_kills", "cause"),
    [(-9, 1, Cause.OUT_OF_MEMORY), (-9, 0, Cause.OWN), (-11, 1, Cause.OWN), (1, 1, Cause.OWN)],
)
def test_the_kernels_counter_tells_memory_from_other_kills(
    tmp_path: Path, exitcode: int, oom_kills: int, cause: Cause
) -> None:
    """A SIGKILL that we did not send is for want of memory where the kernel has counted one (R-MP-18)."""
    group = Group(1, owes_value=False)
    group.launch(0, 100)
    group.end(0, exitcode, 7, has_value=False)
    assert judged(group, tmp_path, oom_kills=oom_kills).failures[0].cause is cause


def test_what_we_killed_was_not_killed_by_the_kernel(tmp_path: Path) -> None:
    """Our own SIGKILL stays ours, whatever was counted meanwhile (E-46)."""
    group = Group(2, owes_value=False)
    group.launch(0, 100)
    group.launch(1, 101)
    group.end(0, 3, 7, has_value=False)
    group.sent([1], signal.SIGKILL, 8)
    group.end(1, -9, 9, has_value=False)
    result = judged(group, tmp_path, oom_kills=1)
    assert {rank: failure.cause for rank, failure in result.failures.items()} == {0: Cause.OWN, 1: Cause.STOPPED}
    assert result.failures[1].output_tail == "last words of 1"


def test_an_error_without_a_file_in_the_logs_is_read_all_the_same(tmp_path: Path) -> None:
    """Its private file goes with the guardian, so no path to it is told (R-MP-40)."""
    (tmp_path / "error_0.json").write_text('{"message": "what happened", "timestamp": 1}')
    group = Group(1, owes_value=False)
    group.launch(0, 100)
    group.end(0, 1, 7, has_value=False)
    failure = judged(group, tmp_path).failures[0]
    assert (failure.message, failure.error_file) == ("what happened", "<N/A>")
