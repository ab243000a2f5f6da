"""Reading back: right bytes, damage named with file and place, and never a read error taken for damage."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import xxhash

from aiockpt.errors import CheckpointCorruptError, CheckpointError, ConfigError, StepNotFoundError, StorageError
from aiockpt.format.image import BLOCK_NBYTES, TensorSpec, lay_out
from aiockpt.format.manifest import FileRecord, Head, Plan, encode_manifest
from aiockpt.storage import readers
from aiockpt.storage.commit import retire
from aiockpt.storage.faults import FaultPoint, Faults
from aiockpt.storage.readers import AlignedBuffer, OpenCheckpoint, open_checkpoint
from aiockpt.storage.verify import verify_checkpoint
from aiockpt.testing.faults import ArmedFaults, FaultPlan, FaultRule
from tests.files import flip
from tests.storage.making import PLAIN, PLAIN_CONTENT, TENSORS, commit, content, opened, write_head

TWO_BLOCKS = BLOCK_NBYTES + 5000


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A committed checkpoint with one tensor file of one block, and one plain file."""
    return Path(commit(tmp_path, 3, number=1).path)


def read_all(path: Path, **options: object) -> bytes:
    """Read every block of the tensor file."""
    with open_checkpoint(str(path), **options) as checkpoint:  # type: ignore[arg-type]
        reader = checkpoint.file(0)
        buffer = AlignedBuffer()
        return b"".join(bytes(reader.read_block(k, buffer)) for k in range(reader.block_count))


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, TWO_BLOCKS])
def test_what_was_written_is_read(nbytes: int, tmp_path: Path) -> None:
    """Whole blocks and tails; header and manifest say where."""
    path = commit(tmp_path, 3, number=1, nbytes=nbytes).path
    assert read_all(Path(path)) == content(1, nbytes)
    with open_checkpoint(path) as checkpoint:
        reader = checkpoint.file(0)
        assert checkpoint.file(0) is reader
        assert checkpoint.manifest.head.step == 3
        assert checkpoint.header(0).tensors["w"].stop == reader.nbytes
        assert reader.block_nbytes == BLOCK_NBYTES
        start, stop = reader.block_range(reader.block_count - 1)
        assert start % 4096 == 0
        assert stop == reader.nbytes


def test_blocks_in_many_threads(tmp_path: Path) -> None:
    """Each with a buffer of its own."""
    path = commit(tmp_path, 3, number=1, nbytes=TWO_BLOCKS).path
    with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(4) as pool:
        reader = checkpoint.file(0)
        parts = list(pool.map(lambda k: bytes(reader.read_block(k % 2, AlignedBuffer())), range(8)))
    assert b"".join(parts[:2]) == content(1, TWO_BLOCKS)
    assert parts[:2] * 4 == parts


def test_direct_io_refused_at_open(step: Path) -> None:
    """The page cache will do."""
    faults = ArmedFaults(
        FaultPlan(rules=[FaultRule(point=FaultPoint.WORKER_OPEN_DIRECT, action="errno", errno=errno.EINVAL)])
    )
    with open_checkpoint(str(step), faults=faults) as checkpoint:
        assert checkpoint.file(0).buffered
        assert checkpoint.file(0).read_block(0, AlignedBuffer()) == content(1, 5000)


class _RefusesDirect(Faults):
    def __init__(self) -> None:
        self.refused = 0

    def at(self, point: FaultPoint, path: str = "") -> None:
        if point is FaultPoint.TRAINER_READ:
            self.refused += 1
            if self.refused == 1:
                raise OSError(errno.EINVAL, "not direct")


def test_direct_io_refused_at_a_read(step: Path) -> None:
    """The read is done again through the page cache."""
    faults = _RefusesDirect()
    assert read_all(step, faults=faults) == content(1, 5000)
    assert faults.refused > 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_errno_is_no_damage(code: int, step: Path) -> None:
    """A disk that cannot be read must not make anybody restore an older step."""
    rule = FaultRule(point=FaultPoint.TRAINER_READ, action="errno", errno=code)
    for read in (read_all, verify_checkpoint):
        with pytest.raises(StorageError) as caught:
            read(step, faults=ArmedFaults(FaultPlan(rules=[rule])))  # type: ignore[operator]
        assert caught.value.errno == code
        assert caught.value.path == str(step / TENSORS)


# ---- damage


def _cut(name: str, nbytes: int) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / name, nbytes)


def _gone(name: str) -> Callable[[Path], None]:
    return lambda step: os.unlink(step / name)


def _flipped(name: str, offset: int) -> Callable[[Path], None]:
    return lambda step: flip(step / name, offset)


def _longer(step: Path) -> None:
    with open(step / TENSORS, "ab") as file:
        file.write(b"\0")


def _foreign_file(step: Path) -> None:
    """The tensor file of another save with the same sizes."""
    other = commit(step.parent, 4, number=2)
    shutil.copyfile(f"{other.path}/{TENSORS}", step / TENSORS)


def _directory_instead(step: Path) -> None:
    os.unlink(step / PLAIN)
    (step / PLAIN).mkdir()


def _folder_gone(step: Path) -> None:
    shutil.rmtree(step / "model")
    (step / "model").write_text("")


DAMAGE = {
    "manifest-gone": (_gone("manifest.json"), "manifest.json", None),
    "manifest-empty": (_cut("manifest.json", 0), "manifest.json", None),
    "manifest-cut": (_cut("manifest.json", 600), "manifest.json", 0),
    "manifest-head-flipped": (_flipped("manifest.json", 30), "manifest.json", None),
    "manifest-body-flipped": (_flipped("manifest.json", 400), "manifest.json", 0),
    "tensors-gone": (_gone(TENSORS), TENSORS, None),
    "tensors-empty": (_cut(TENSORS, 0), TENSORS, 0),
    "tensors-cut-in-header": (_cut(TENSORS, 100), TENSORS, 100),
    "tensors-cut-in-data": (_cut(TENSORS, 4096 + 4999), TENSORS, 4096 + 4999),
    "tensors-longer": (_longer, TENSORS, 4096 + 5000),
    "header-length-flipped": (_flipped(TENSORS, 0), TENSORS, 0),
    "header-text-flipped": (_flipped(TENSORS, 50), TENSORS, 0),
    "header-padding-flipped": (_flipped(TENSORS, 4095), TENSORS, 0),
    "data-flipped-first": (_flipped(TENSORS, 4096), TENSORS, 4096),
    "data-flipped-last": (_flipped(TENSORS, 4096 + 4999), TENSORS, 4096),
    "tensors-of-another-save": (_foreign_file, TENSORS, 0),
    "plain-gone": (_gone(PLAIN), PLAIN, None),
    "plain-flipped": (_flipped(PLAIN, 3), PLAIN, 0),
    "plain-cut": (_cut(PLAIN, 3), PLAIN, 3),
    "plain-is-a-directory": (_directory_instead, PLAIN, 17),
    "folder-is-a-file": (_folder_gone, TENSORS, None),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_with_its_place(kind: str, step: Path) -> None:
    """Verify names step, file and offset, both sums where there are two, and what to do."""
    damage, file, offset = DAMAGE[kind]
    damage(step)
    with pytest.raises(CheckpointCorruptError) as caught:
        verify_checkpoint(str(step))
    error = caught.value
    assert (error.step, error.file, error.offset) == (3, str(step / file), offset)
    assert error.why
    assert error.next
    assert error.expected != error.found or error.expected is None


def test_every_single_byte_counts(step: Path) -> None:
    """No byte of any file can change unseen."""
    for name in (TENSORS, PLAIN, "manifest.json"):
        size = (step / name).stat().st_size
        for offset in {*range(0, size, 61), size - 1}:
            flip(step / name, offset, offset % 8)
            with pytest.raises(CheckpointCorruptError):
                verify_checkpoint(str(step))
            flip(step / name, offset, offset % 8)
    assert verify_checkpoint(str(step)) == 4096 + 5000 + len(PLAIN_CONTENT)


def test_a_bad_block_is_named_by_its_offset(tmp_path: Path) -> None:
    """The others stay readable, and are not looked at where nobody asks for them."""
    path = Path(commit(tmp_path, 3, number=1, nbytes=TWO_BLOCKS).path)
    flip(path / TENSORS, 4096 + BLOCK_NBYTES + 17)
    with open_checkpoint(str(path)) as checkpoint:
        reader = checkpoint.file(0)
        assert reader.read_block(0, AlignedBuffer()) == content(1, BLOCK_NBYTES)
        with pytest.raises(CheckpointCorruptError) as caught:
            reader.read_block(1, AlignedBuffer())
    assert caught.value.offset == 4096 + BLOCK_NBYTES
    assert len(str(caught.value.expected)) == len(str(caught.value.found)) == 16
    assert str(caught.value.expected) in str(caught.value)
    assert str(caught.value.found) in str(caught.value)


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    """The read stops there; it does not wait for bytes that never come."""
    path = Path(commit(tmp_path, 3, number=1, nbytes=TWO_BLOCKS).path)
    with open_checkpoint(str(path)) as checkpoint:
        reader = checkpoint.file(0)
        os.truncate(path / TENSORS, 4096 + BLOCK_NBYTES + 100)
        with pytest.raises(CheckpointCorruptError, match="shorter") as caught:
            reader.read_block(1, AlignedBuffer())
    assert caught.value.offset == 4096 + BLOCK_NBYTES + 100


def test_a_manifest_of_another_step(step: Path) -> None:
    """A directory that was renamed by hand is not taken for the step that it claims."""
    step.rename(step.parent / "step-4")
    with pytest.raises(CheckpointCorruptError, match="it is the manifest of step 3"):
        open_checkpoint(str(step.parent / "step-4"))
    (step.parent / "step-4").rename(step.parent / "kept")
    assert verify_checkpoint(str(step.parent / "kept"))


def _write_hostile(directory: Path, header: bytes, data: bytes, data_start: int, *, nbytes: int = 0) -> None:
    """A checkpoint whose manifest is consistent with a file that we would never write."""
    directory.mkdir()
    (directory / "f").write_bytes(header + data)
    if nbytes:
        os.truncate(directory / "f", nbytes)
    head = Head(step=1, term=1, ordinal=1, save_id="ab", world_size=1, nbytes=1, created="2026", package="0")
    record = FileRecord(
        path="f",
        nbytes=nbytes or len(header + data),
        data_start=data_start,
        sum=xxhash.xxh3_128_hexdigest((header + data)[:data_start]),
    )
    plan = Plan(classes=[], names=[], entry_classes=[], entry_files=[], tree={})
    (directory / "manifest.json").write_bytes(
        encode_manifest(head, [record], values=b"[]", metadata=b"{}", plan=msgspec.json.encode(plan))
    )


IMAGE = lay_out([TensorSpec("w", "U8", (4,))]).header


@pytest.mark.parametrize(
    ("header", "data", "data_start"),
    [
        (IMAGE.replace(b"aiockpt.blocks", b"aiockpt.blokcs"), b"abcd", len(IMAGE)),
        (IMAGE.replace(b":16777216:", b":16777217:"), b"abcd", len(IMAGE)),
        (IMAGE.replace(b":16777216:", b":99999999:"), b"abcd", len(IMAGE)),
        (IMAGE, b"abcd" * 2048, 2 * len(IMAGE)),
        (b"\xff" * 4096, b"abcd", 4096),
    ],
    ids=["no-sums", "odd-blocks", "huge-blocks", "start-behind", "no-header"],
)
def test_hostile_headers(header: bytes, data: bytes, data_start: int, tmp_path: Path) -> None:
    """Also with a manifest that fits them: damage, never a crash or a huge allocation."""
    _write_hostile(tmp_path / "step-1", header, data, data_start)
    with pytest.raises(CheckpointCorruptError) as caught:
        verify_checkpoint(str(tmp_path / "step-1"))
    assert caught.value.step == 1
    assert caught.value.file == str(tmp_path / "step-1" / "f")


def test_headers_and_manifests_that_claim_to_be_huge(tmp_path: Path, step: Path) -> None:
    """Nothing is allocated by what a sparse file claims."""
    huge = 30_000 * 4096
    _write_hostile(tmp_path / "step-1", b"", b"", huge, nbytes=2 * huge)
    with pytest.raises(CheckpointCorruptError, match=f"would have {huge} bytes"):
        verify_checkpoint(str(tmp_path / "step-1"))
    os.truncate(step / "manifest.json", 3 << 30)
    with pytest.raises(CheckpointCorruptError, match="3221225472 bytes"):
        open_checkpoint(str(step))


# ---- not there


def test_no_such_step(step: Path) -> None:
    """A wrong step is no damage."""
    with pytest.raises(StepNotFoundError) as caught:
        open_checkpoint(str(step.parent / "step-99"))
    assert caught.value.step == 99
    assert caught.value.path == str(step.parent / "step-99")
    assert caught.value.next


def test_a_file_instead_of_a_step(tmp_path: Path) -> None:
    """A wrong path is the caller's."""
    (tmp_path / "step-1").write_text("")
    with pytest.raises(ConfigError):
        open_checkpoint(str(tmp_path / "step-1"))


def test_a_directory_that_cannot_be_opened(tmp_path: Path) -> None:
    """An errno is a StorageError."""
    (tmp_path / "step-1").symlink_to("step-1")
    with pytest.raises(StorageError) as caught:
        open_checkpoint(str(tmp_path / "step-1"))
    assert caught.value.errno == errno.ELOOP
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "manifest.json").symlink_to("manifest.json")
    with pytest.raises(StorageError):
        open_checkpoint(str(tmp_path / "step-2"))


def test_a_newer_format(tmp_path: Path) -> None:
    """It says to upgrade."""
    write_head(tmp_path, 1)
    manifest = tmp_path / "step-1" / "manifest.json"
    head = manifest.read_bytes().split(b',"head_sum"')[0].replace(b'"format":1', b'"format":2')
    sum_of_head = xxhash.xxh3_64_hexdigest(head.removeprefix(b'{"head":')).encode()
    manifest.write_bytes(head + b',"head_sum":"' + sum_of_head + b'","x":1}')
    with pytest.raises(ConfigError, match="upgrade"):
        open_checkpoint(str(tmp_path / "step-1"))


@pytest.mark.parametrize("replaced", [False, True])
def test_retired_while_it_is_being_opened(replaced: bool, step: Path) -> None:
    """The reader waits for retention's lock, then finds the path gone, or another's."""
    manifest = os.open(step / "manifest.json", os.O_RDWR)
    fcntl.flock(manifest, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_checkpoint, str(step))
        assert not threading.Event().wait(0.05)
        assert not opening.done()
        step.rename(step.parent / ".trash.1")
        if replaced:
            commit(step.parent, 3, number=2)
        os.close(manifest)
        with pytest.raises(StepNotFoundError, match="it was re"):
            opening.result(30)


def test_a_lock_that_is_never_free(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some other program holds it: an error after a while, not a hang."""
    monkeypatch.setattr(readers, "_LOCK_SECONDS", 0.02)
    manifest = os.open(step / "manifest.json", os.O_RDWR)
    fcntl.flock(manifest, fcntl.LOCK_EX)
    with pytest.raises(StorageError) as caught:
        open_checkpoint(str(step))
    os.close(manifest)
    assert caught.value.errno == errno.EAGAIN


def test_a_file_that_goes_away_with_its_checkpoint(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed by force while it is opened: not there, instead of damaged."""
    monkeypatch.setattr(readers, "OPEN_AT_ONCE", 0)
    with open_checkpoint(str(step)) as checkpoint:
        shutil.rmtree(step)
        with pytest.raises(StepNotFoundError):
            checkpoint.file(0)
        commit(step.parent, 3, number=2)
        with pytest.raises(StepNotFoundError):
            checkpoint.file(0)


# ---- descriptors


def _many_files(tmp_path: Path, count: int) -> Path:
    """Hard links make a checkpoint of many files."""
    path = Path(commit(tmp_path, 3, number=1).path)
    with open_checkpoint(str(path)) as checkpoint:
        manifest = checkpoint.manifest
    record = manifest.files[0]
    files = []
    for number in range(count):
        name = f"model/{number}"
        os.link(path / TENSORS, path / name)
        files.append(msgspec.structs.replace(record, path=name))
    plan = msgspec.json.encode(Plan(classes=[], names=[], entry_classes=[], entry_files=[], tree={}))
    data = encode_manifest(manifest.head, files, values=b"[]", metadata=b"{}", plan=plan)
    (path / "manifest.json").write_bytes(data)
    return path


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    """The first ones are open at once, the others while they are read; all are closed at the end."""
    path = _many_files(tmp_path, 200)
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(str(path)) as checkpoint:
        assert len(os.listdir("/proc/self/fd")) == before + 64 + 2
        assert checkpoint.file(150).block_count == 1
        checkpoint.close_file(150)
        checkpoint.close_file(150)
        assert checkpoint.file(150).block_count == 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert verify_checkpoint(str(path)) == 200 * (4096 + 5000)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", DAMAGE)
def test_nothing_stays_open_after_an_error(kind: str, step: Path) -> None:
    """Whatever was found, and the checkpoint can be retired."""
    DAMAGE[kind][0](step)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        verify_checkpoint(str(step))
    assert len(os.listdir("/proc/self/fd")) == before
    fd = opened(step.parent)
    assert retire(fd, step.name) is not None
    os.close(fd)


def test_closing_twice(step: Path) -> None:
    """Harmless."""
    checkpoint: OpenCheckpoint = open_checkpoint(str(step))
    checkpoint.close()
    checkpoint.close()


def advice(buffer: AlignedBuffer) -> set[str]:
    """Return what the kernel was told of the memory of a buffer."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(area[1], 16) <= address < int(area[2], 16)
        elif found and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("the buffer is nowhere")


def test_blocks_are_read_into_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has them; where it does not, a buffer is as good."""
    assert ("hg" in advice(AlignedBuffer())) == os.path.exists("/sys/kernel/mm/transparent_hugepage")
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    buffer = AlignedBuffer(5000)
    buffer.view[:] = bytes(8192)
    assert "hg" not in advice(buffer)
