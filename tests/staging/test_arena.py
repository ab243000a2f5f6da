"""The trainer's mapping of the arena."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch

from aiockpt.errors import StorageError, UsageError
from aiockpt.staging import arena as arena_module
from aiockpt.staging.arena import ArenaView
from tests.staging.rig import make_arena
from tests.support import run_script


def test_bytes_are_shared_with_the_descriptor() -> None:
    """What is written here, another mapping of the same memory sees."""
    arena = make_arena(8192)
    arena.write(10, b"abc")
    assert os.pread(arena.fd, 3, 10) == b"abc"
    os.pwrite(arena.fd, b"xyz", 4096)
    assert arena.bytes_at(4096, 3).tolist() == list(b"xyz")
    arena.typed(4096, torch.int32, (2, 3)).copy_(torch.arange(6).view(2, 3))
    assert os.pread(arena.fd, 24, 4096) == torch.arange(6, dtype=torch.int32).numpy().tobytes()
    arena.close()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 1, 1)])
def test_typed_views_are_contiguous(shape: tuple[int, ...]) -> None:
    """Views of any shape lie without holes from their offset on."""
    arena = make_arena(4096)
    view = arena.typed(64, torch.float64, shape)
    assert view.shape == shape
    assert view.is_contiguous()
    assert not view.numel() or view.data_ptr() == arena.address + 64
    arena.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (4096, 1), (0, 4097), (4000, 97), (0, -1)])
def test_no_range_outside(offset: int, nbytes: int) -> None:
    """Nothing outside of the arena is ever given out or written."""
    arena = make_arena(4096)
    with pytest.raises(ValueError, match="arena of 4096"):
        arena.bytes_at(offset, nbytes)
    with pytest.raises(ValueError, match="arena of 4096"):
        arena.write(4096 - 2, b"abc")
    with pytest.raises(ValueError, match="cannot lie"):
        arena.typed(2, torch.float32, (1,))
    arena.close()


def test_populate_keeps_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages become present; what was there stays."""
    monkeypatch.setattr(arena_module, "_POPULATE_NBYTES", 8192)
    arena = make_arena(5 * 4096)
    arena.write(4096, b"abc")
    assert arena.populate()
    assert os.pread(arena.fd, 5, 4096) == b"abc\0\0"
    arena.close()


def test_populate_stops_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """``stop`` is asked before each piece."""
    monkeypatch.setattr(arena_module, "_POPULATE_NBYTES", 4096)
    arena = make_arena(5 * 4096)
    answers = iter([False, False, True])
    assert not arena.populate(lambda: next(answers))
    arena.close()


def refusing(code: int, times: int = 1_000_000) -> Any:
    import ctypes

    left = [times]

    def madvise(address: int, nbytes: int, advice: int) -> int:
        if left[0] == 0:
            return 0
        left[0] -= 1
        ctypes.set_errno(code)
        return -1

    return madvise


def test_populate_on_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the advice is unknown, pages are touched instead, and keep their bytes."""
    arena = make_arena(3 * 4096)
    arena.write(4096, b"abc")
    monkeypatch.setattr(arena_module, "_madvise", refusing(errno.EINVAL))
    assert arena.populate()
    assert os.pread(arena.fd, 3, 4096) == b"abc"
    arena.close()


def test_populate_goes_on_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """EINTR is no failure."""
    arena = make_arena(4096)
    monkeypatch.setattr(arena_module, "_madvise", refusing(errno.EINTR, 2))
    assert arena.populate()
    arena.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EFAULT])
def test_populate_without_memory(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """No pages: a StorageError with figures, instead of a SIGBUS at the first write."""
    arena = make_arena(4096)
    monkeypatch.setattr(arena_module, "_madvise", refusing(code))
    with pytest.raises(StorageError, match=r"4,096 bytes.*0 were ready") as caught:
        arena.populate()
    assert caught.value.errno == code
    assert "MemAvailable is" in str(caught.value)
    arena.close()


def test_a_mapping_that_is_refused_closes_the_descriptor() -> None:
    """The descriptor is owned from the call on."""
    fd = os.open("/", os.O_RDONLY)
    with pytest.raises(StorageError, match="not mapped") as caught:
        ArenaView(fd, 4096)
    assert caught.value.errno in (errno.ENODEV, errno.EACCES)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close_is_idempotent_and_final() -> None:
    """Afterwards nothing is given out."""
    arena = make_arena(4096)
    fd = arena.fd
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for use in (lambda: arena.bytes_at(0, 1), lambda: arena.write(0, b"a"), arena.hold):
        with pytest.raises(UsageError, match="closed"):
            use()


def mapped(address: int) -> bool:
    with open("/proc/self/maps", encoding="ascii") as file:
        return any(line.startswith(f"{address:x}-") for line in file)


def test_a_holder_keeps_the_mapping_over_close() -> None:
    """A copy in flight never writes into memory that is gone."""
    arena = make_arena(4096)
    view = arena.bytes_at(0, 4096)
    with arena.held():
        arena.close()
        assert mapped(arena.address)
        view.fill_(1)
    assert not mapped(arena.address)


@pytest.mark.process
def test_a_forked_child_has_nothing_of_it() -> None:
    """The mapping is not inherited; ``forget_in_child`` closes the descriptor, and the parent's stays usable."""
    done = run_script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import torch
        from tests.staging.rig import Rig, live
        from aiockpt.staging.arena import ArenaView
        from aiockpt.errors import UsageError

        model = torch.nn.Linear(40, 40)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = {"model": model, "optimizer": optimizer}
        rig = Rig()
        def train():
            model(torch.ones(2, 40)).sum().backward()
            optimizer.step()
        for _ in range(2):
            train()
            rig.save(state)
        train()
        expected = live(state)
        with rig.held():
            staging = rig.stage(state)
            assert staging.lazy_nbytes > 0
            fd = rig.arena.fd
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    maps = open("/proc/self/maps").read()
                    assert f"{rig.arena.address:x}-" not in maps, "the mapping was inherited"
                    rig.arena.forget_in_child()
                    rig.stager.forget_in_child()
                    try:
                        os.fstat(fd)
                    except OSError:
                        pass
                    else:
                        raise AssertionError("the descriptor is open")
                    train()  # waits for nothing
                    try:
                        rig.stage(state)
                    except UsageError as error:
                        assert "forked" in str(error)
                    else:
                        raise AssertionError("a save in the child")
                    rig.close()
                    # A Checkpointer of the child's own works.
                    own = Rig()
                    for _ in range(3):
                        own.save(state)
                        assert own.staged(state) == live(state)
                        train()
                    own.close()
                    status = 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
        assert staging.wait(30), staging.error
        assert rig.staged(state) == expected
        rig.close()
        print("fine")
        """
    )
    assert done.stdout == "fine\n", done.stderr


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return any(line.startswith(f"{address:x}-") for line in maps)


def test_memory_that_cuda_does_not_pin(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One warning says what that costs, and the arena serves as it is."""
    monkeypatch.setattr(arena_module, "pin", lambda address, nbytes, device: "out of memory (CUDA error 2)")
    arena = make_arena(8192)
    for _ in range(2):
        arena.register_cuda(torch.device("cuda", 1))
    assert not arena.cuda_registered
    (record,) = caplog.records
    assert "8,192 bytes" in record.getMessage()
    assert "cuda:1" in record.getMessage()
    assert "out of memory" in record.getMessage()
    arena.write(0, b"abc")
    arena.close()


@pytest.mark.parametrize("lets_go", [True, False])
def test_memory_is_unmapped_only_when_cuda_has_forgotten_it(lets_go: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to a later mapping of the same address would go to the old pages."""
    pinned: list[int] = []
    monkeypatch.setattr(arena_module, "pin", lambda address, nbytes, device: pinned.append(address))

    def unpin(address: int, device: torch.device) -> bool:
        assert is_mapped(address)
        return lets_go

    monkeypatch.setattr(arena_module, "unpin", unpin)
    arena = make_arena(12 * 4096)
    arena.register_cuda(torch.device("cuda", 0))
    assert arena.cuda_registered
    assert pinned == [arena.address]
    arena.close()
    assert is_mapped(arena.address) is not lets_go
    if not lets_go:
        arena_module._munmap(arena.address, arena.nbytes)
