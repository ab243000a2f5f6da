"""Which limits an allocation counts against, from trees of files that look like a machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiockpt.worker.memory import Room, keep_free, rooms, tightest

MIB = 1 << 20
MEMINFO = "MemTotal:       1048576 kB\nMemFree:         1000 kB\nMemAvailable:    524288 kB\n"


def machine(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> list[Room]:
    texts = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return rooms(str(root))


def v2_group(path: str, **values: object) -> dict[str, str]:
    return {f"sys/fs/cgroup{path}/memory.{name}": f"{value}\n" for name, value in values.items()}


V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_the_machine_alone(tmp_path: Path) -> None:
    """No control groups at all."""
    assert machine(tmp_path, "", "", {}) == [Room("MemAvailable", 1024 * MIB, 512 * MIB)]


def test_nothing_is_known(tmp_path: Path) -> None:
    """No /proc: nothing is refused by it."""
    assert rooms(str(tmp_path)) == []
    assert tightest([]) is None


def test_version_2_looks_at_every_group_above(tmp_path: Path) -> None:
    """The tightest may be any of them; memory.high counts; file pages that can be dropped are free."""
    found = machine(
        tmp_path,
        "0::/job.slice/step\n",
        V2_MOUNT,
        {
            **v2_group(
                "/job.slice/step", max="max", high=300 * MIB, current=200 * MIB, stat=f"inactive_file {50 * MIB}"
            ),
            **v2_group("/job.slice", max=400 * MIB, high="max", current=250 * MIB, stat="anon 5\n"),
            **v2_group(""),
        },
    )
    directory = f"{tmp_path}/sys/fs/cgroup/job.slice"
    assert found[1:] == [
        Room(f"{directory}/step/memory.high", 300 * MIB, 150 * MIB),
        Room(f"{directory}/memory.max", 400 * MIB, 150 * MIB),
    ]
    assert tightest(found) == found[1]


def test_version_1(tmp_path: Path) -> None:
    """No limit is a huge number there; usage and file pages include the groups below."""
    base = "sys/fs/cgroup/memory"
    found = machine(
        tmp_path,
        "9:name=systemd:/\n4:memory:/job/step\n0::/\n",
        V1_MOUNT,
        {
            f"{base}/job/step/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/job/step/memory.usage_in_bytes": f"{5 * MIB}\n",
            f"{base}/job/memory.limit_in_bytes": f"{100 * MIB}\n",
            f"{base}/job/memory.usage_in_bytes": f"{60 * MIB}\n",
            f"{base}/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n",
        },
    )
    assert found[1:] == [Room(f"{tmp_path}/{base}/job/memory.limit_in_bytes", 100 * MIB, 50 * MIB)]


@pytest.mark.parametrize(
    ("path", "mounted"),
    [("/", "/"), ("/docker/abc", "/docker/abc"), ("/../../elsewhere", "/"), ("/other", "/docker/abc")],
)
def test_in_a_container_the_mount_s_top_is_our_group(tmp_path: Path, path: str, mounted: str) -> None:
    """Namespaces and bind mounts show the group at the top of what is mounted."""
    found = machine(
        tmp_path,
        f"0::{path}\n",
        V2_MOUNT.replace(" / /sys", f" {mounted} /sys"),
        v2_group("", max=64 * MIB, high="max", current=MIB, stat=""),
    )
    assert found[1:] == [Room(f"{tmp_path}/sys/fs/cgroup/memory.max", 64 * MIB, 63 * MIB)]


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    """mountinfo writes it as an octal escape."""
    found = machine(
        tmp_path,
        "0::/\n",
        V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/c\\040group "),
        {"sys/fs/c group/memory.max": str(64 * MIB), "sys/fs/c group/memory.current": "0"},
    )
    assert [room.source for room in found[1:]] == [f"{tmp_path}/sys/fs/c group/memory.max"]


def test_what_is_kept_free() -> None:
    """A twentieth, within bounds."""
    assert keep_free(Room("x", 100 * MIB, 0)) == 32 * MIB
    assert keep_free(Room("x", 2000 * MIB, 0)) == 100 * MIB
    assert keep_free(Room("x", 1 << 50, 0)) == 1 << 30


def test_this_machine() -> None:
    """Something is known of it."""
    assert rooms()[0].source == "MemAvailable"
    assert all(room.limit > 0 for room in rooms())
