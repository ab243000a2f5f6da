"""The count of out-of-memory kills, on made-up trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt.elastic.failures.out_of_memory import OomCounter

V2 = "31 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
OTHERS = (
    "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def make(root: Path, cgroup: str, mounts: str, files: dict[str, int]) -> OomCounter:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, count in files.items():
        set_count(root / name, count)
    return OomCounter(root)


def set_count(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"low 0\noom 77\noom_kill {count}\noom_group_kill 5\n")


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        (
            "0::/a/b\n",
            V2.format(top="/"),
            {"sys/fs/cgroup/a/b/memory.events": 3, "sys/fs/cgroup/a/memory.events": 9},
            3,
        ),
        ("0::/a/b/c\n", V2.format(top="/"), {"sys/fs/cgroup/a/memory.events": 4}, 4),
        ("0::/docker/x\n", V2.format(top="/docker/x"), {"sys/fs/cgroup/memory.events": 5}, 5),
        ("0::/docker/x/y\n", V2.format(top="/docker/x"), {"sys/fs/cgroup/y/memory.events": 6}, 6),
        ("0::/../z\n", V2.format(top="/"), {"sys/fs/cgroup/memory.events": 7, "sys/fs/z/memory.events": 1}, 7),
        ("4:cpu,memory:/a\n0::/\n", OTHERS + V1.format(top="/"), {"sys/fs/cgroup/memory/a/memory.oom_control": 8}, 8),
        ("0::/\n", V2.format(top="/"), {"proc/vmstat": 11}, 11),
        ("4:memory:/a\n", OTHERS, {}, 0),
        ("", "", {}, 0),
    ],
    ids=["nearest", "above", "container", "below-container", "moved-out", "v1", "host", "not-mounted", "nothing"],
)
def test_the_nearest_that_counts(
    tmp_path: Path, cgroup: str, mounts: str, files: dict[str, int], expected: int
) -> None:
    """The count is that of the nearest cgroup with the memory controller, of v1 or v2, else the host's (R-MP-18)."""
    assert make(tmp_path, cgroup, mounts, files).kills() == expected


def test_it_is_read_at_each_call(tmp_path: Path) -> None:
    """A kill in between shows as a difference, and a file that is gone as none (R-MP-18)."""
    counter = make(tmp_path, "0::/a\n", V2.format(top="/"), {"sys/fs/cgroup/a/memory.events": 3})
    events = tmp_path / "sys/fs/cgroup/a/memory.events"
    before = counter.kills()
    set_count(events, 4)
    assert counter.kills() - before == 1
    events.unlink()
    assert counter.kills() == 0


def test_blanks_in_the_mount_point(tmp_path: Path) -> None:
    """A mount point with a blank is found (R-MP-18)."""
    mount = "31 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw"
    assert make(tmp_path, "0::/a\n", mount, {"my groups/a/memory.events": 2}).kills() == 2


def test_it_never_raises_here() -> None:
    """On the host of this test there is a count (R-MP-18)."""
    assert OomCounter().kills() >= 0
