"""What ``stage`` copies, tells and refuses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiockpt.errors import ConfigError, SaveTimeoutError, TornSnapshotError, UsageError
from aiockpt.format.image import parse_header
from aiockpt.staging import stager as stager_module
from aiockpt.staging.stager import Thresholds
from aiockpt.state.collect import collect
from tests.staging.rig import PATIENCE_SECONDS, SMALL, Rig, live, make_arena
from tests.staging.test_optimizers import make_model, train

DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


def filled(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    wanted: torch.dtype = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    data = torch.randint(0, 2 if dtype == "bool" else 256, (count * wanted.itemsize,), dtype=torch.uint8)
    return data.view(wanted).view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_inline_and_late(rig: Rig, dtype: str) -> None:
    """All bit patterns of all dtypes arrive, whichever way they are copied."""
    tensors = [
        filled(dtype, (64, 48)),
        filled(dtype, (64, 48)).t(),
        filled(dtype, (3,)),
        filled(dtype, (64, 65))[:, 1:],
    ]
    state = {"t": dict(zip("abcd", tensors, strict=True))}
    rig.save(state)
    assert rig.staged(state) == live(state)
    # An optimizer that never does anything makes the contiguous one guarded.
    owner = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    owner.state[owner.param_groups[0]["params"][0]]["held"] = tensors[0]
    owner.step()
    expected = live(state)
    staging = rig.stage(state)
    assert staging.lazy_nbytes == tensors[0].nbytes
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected
    owner.step()
    with rig.held():
        staging = rig.stage(state)
        tensors[0].untyped_storage().fill_(1)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 12_000), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]), min_size=12),
    lazy=st.lists(st.booleans(), min_size=12),
    strided=st.lists(st.booleans(), min_size=12),
    helped=st.booleans(),
)
def test_any_state_arrives_and_is_told_in_order(
    make_rig: Callable[..., Rig],
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    dtypes: list[torch.dtype],
    lazy: list[bool],
    strided: list[bool],
    helped: bool,
) -> None:
    """Any mix of sizes, dtypes, strides and ways to copy: equal bytes, every file told to its end, never backwards."""
    monkeypatch.setattr(stager_module, "_HELPED_NBYTES", 0 if helped else 1 << 40)
    rig = make_rig()
    tensors = []
    for size, dtype, is_strided in zip(sizes, dtypes, strided, strict=False):
        tensor = torch.randint(0, 100, (size, 2)).to(dtype)
        tensors.append(tensor[:, 0] if is_strided else tensor)
    folders = {"a": tensors[::2], "b": tensors[1::2]}
    state = {name: {str(i): t for i, t in enumerate(some)} for name, some in folders.items()}
    owner = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    owner.state[owner.param_groups[0]["params"][0]]["held"] = [
        t for t, is_lazy in zip(tensors, lazy, strict=False) if is_lazy
    ]
    for _ in range(2):
        owner.step()
        rig.save(state)
        assert rig.staged(state) == live(state)
        assert rig.plan is not None
        check_progress(rig)
    rig.close()


def check_progress(rig: Rig) -> None:
    assert rig.plan is not None
    seen: dict[int, int] = {}
    for file, upto in rig.progress:
        assert upto > seen.get(file, -1), "a file was told backwards or twice"
        seen[file] = upto
    assert seen == {file: image.nbytes for file, image in enumerate(rig.plan.files)}


def test_progress_is_told_by_blocks(rig: Rig) -> None:
    """Within a large tensor progress grows by whole blocks, on the copy thread, before the answer."""
    state = {"m": {"w": torch.randn(100_000), "x": torch.randn(10)}}
    threads = set()
    order: list[Any] = []

    def on_progress(file: int, upto: int) -> None:
        threads.add(threading.current_thread().name)
        order.append((file, upto))

    staging = rig.stage(state, on_progress=on_progress, on_done=order.append)
    assert staging.wait(PATIENCE_SECONDS)
    assert threads == {"aiockpt-copy"}
    assert order[-1] is None
    assert rig.plan is not None
    image = rig.plan.files[0]
    told = [upto for file, upto in order[:-1] if file == 0]
    assert len(told) >= (image.nbytes - image.data_start) // SMALL.block_nbytes
    assert told[-1] == image.nbytes


def test_texts_are_written_when_asked(rig: Rig) -> None:
    """Headers, plain files and the plan's body lie in the arena; without ``write_texts`` they stay as they were."""
    state = {"m": {"w": torch.randn(100)}}
    rig.save(state)
    assert rig.plan is not None
    assert rig.arena is not None
    image = rig.plan.files[0]
    data = rig.arena.bytes_at(image.offset, image.nbytes).numpy().tobytes()
    header = parse_header(data, file=image.path, file_nbytes=image.nbytes)
    assert list(header.tensors) == ["w"]
    for offset, text in rig.plan.texts:
        assert rig.arena.bytes_at(offset, len(text)).numpy().tobytes() == text
    rig.arena.write(0, b"\0" * 16)
    rig.save(state)
    assert rig.arena.bytes_at(0, 16).sum() == 0
    check_progress(rig)


def test_default_thresholds(make_rig: Callable[..., Rig]) -> None:
    """Late are tensors from 64 KiB on, if they are together more than 1 MiB."""
    rig = make_rig(thresholds=Thresholds())
    sizes = {"small": 16_383, "just": 16_384, "large": 300_000}
    parameters = {name: torch.nn.Parameter(torch.randn(size)) for name, size in sizes.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    optimizer.step()
    rig.save({"p": parameters})
    optimizer.step()
    assert rig.save({"p": parameters}).lazy_nbytes == 4 * (16_384 + 300_000)
    optimizer.step()
    some = {name: parameters[name] for name in ("small", "just")}
    assert rig.save({"p": some}).lazy_nbytes == 0


def test_small_late_copies_go_together(rig: Rig) -> None:
    """Hundreds of late tensors arrive, and each is checked."""
    parameters = {f"{i:03}": torch.nn.Parameter(torch.randn(256 + i)) for i in range(300)}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    state = {"p": parameters}
    optimizer.step()
    rig.save(state)
    optimizer.step()
    expected = live(state)
    with rig.held():
        staging = rig.stage(state)
        assert staging.lazy_nbytes == sum(p.nbytes for p in parameters.values())
        parameters["123"].data.zero_()
        parameters["250"].untyped_storage().resize_(0)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    assert staging.error.keys == ("p.123", "p.250")
    arrived = rig.staged({"p": {name: torch.zeros(p.shape) for name, p in parameters.items()}})
    assert all(arrived[name] == expected[name] for name in expected if name not in ("p.123", "p.250"))


def test_inference_mode_around_the_call(rig: Rig) -> None:
    """A save inside ``inference_mode`` leaves nothing behind that a later one cannot write to."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer)
    with torch.inference_mode():
        rig.save(state)
    for _ in range(2):
        train(model, optimizer)
        rig.save(state)
        assert rig.staged(state) == live(state)


def test_a_new_plan_and_arena(rig: Rig) -> None:
    """Another state goes by another plan into another arena; nothing of the old layout is used."""
    for size in (100, 5000, 50):
        state = {"m": {str(i): torch.randn(size) for i in range(3)}}
        rig.save(state)
        assert rig.staged(state) == live(state)


def test_prepare_makes_the_layout(rig: Rig) -> None:
    """After ``prepare`` the first save makes no views."""
    state = {"m": {str(i): torch.randn(10) for i in range(3)}}
    collected = collect(state)
    plan = rig.plans.plan(collected.entries, collected.tree, collected.plain_files)
    rig.plan, rig.arena = plan, make_arena(plan.arena_nbytes)
    rig.stager.prepare(plan, collected, rig.arena)
    layout = rig.stager._layout
    assert layout is not None
    assert layout._missing == 0
    staging = rig.stage(state, write_texts=True)
    assert staging.wait(PATIENCE_SECONDS)
    assert rig.stager._layout is layout
    assert rig.staged(state) == live(state)


def test_a_failing_on_progress_fails_the_save(rig: Rig) -> None:
    """What the owner raises is the save's failure; the thread serves the next save."""
    state = {"m": {"w": torch.randn(5000)}}

    def on_progress(file: int, upto: int) -> None:
        raise KeyError("mine")

    staging = rig.stage(state, on_progress=on_progress)
    assert not staging.wait(PATIENCE_SECONDS)
    assert [repr(answer) for answer in rig.answers] == ["KeyError('mine')"]
    rig.save(state)


def test_a_failing_on_done_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A bug in the answer's receiver is logged; the save is over all the same."""
    state = {"m": {"w": torch.randn(5000)}}

    def on_done(error: BaseException | None) -> None:
        raise KeyError("mine")

    with caplog.at_level(logging.ERROR, "aiockpt.staging"):
        staging = rig.stage(state, on_done=on_done)
        assert staging.wait(PATIENCE_SECONDS)
    assert "mine" in caplog.text
    rig.save(state)


def test_an_error_in_stage_gives_no_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``stage`` raises, ``on_done`` is not called, nothing waits, and the next save works."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer)
    rig.save(state)
    train(model, optimizer)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stager_module.SharedCopy, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rig.stage(state)
    train(model, optimizer)
    assert rig.answers == []
    rig.save(state)
    assert rig.staged(state) == live(state)
    assert rig.answers == [None]


def test_tensors_that_are_not_the_plans(rig: Rig) -> None:
    """A tensor of another size than planned is refused before a byte is copied."""
    state = {"m": {"w": torch.randn(50)}}
    rig.save(state)
    collected = collect(state)
    collected.tensors[0] = torch.randn(60)
    with pytest.raises(ValueError, match="not those of the plan"):
        rig.stage_collected(collected)
    rig.save(state)


def test_an_arena_that_is_too_small(rig: Rig) -> None:
    """The plan must fit."""
    state = {"m": {"w": torch.randn(5000)}}
    collected = collect(state)
    plan = rig.plans.plan(collected.entries, collected.tree, collected.plain_files)
    rig.plan, rig.arena = plan, make_arena(4096)
    with pytest.raises(ValueError, match="arena has 4096"):
        rig.stage_collected(collected)


def test_save_during_a_capture(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured no save begins: nothing was copied, nothing is armed."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigError, match="captured"):
        rig.stage({"m": {"w": torch.randn(50)}})
    monkeypatch.undo()
    rig.save({"m": {"w": torch.randn(50)}})


def test_an_optimizer_that_a_graph_holds_is_never_guarded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step runs again without a hook; steps that are eager before or after change nothing about it."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer)
    rig.save(state)
    train(model, optimizer)
    assert rig.save(state).lazy_nbytes > 0
    train(model, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_initialized", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    for _ in range(2):
        assert rig.save(state).lazy_nbytes == 0
        train(model, optimizer)


def test_a_capture_waits_for_pending_copies(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is captured while copies are pending may be replayed at once, so the thread waits."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    for _ in range(2):
        train(model, optimizer)
        rig.save(state)
    train(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        threading.Timer(0.05, gate.set).start()
        optimizer.step()
        assert gate.is_set()
    assert staging.wait(PATIENCE_SECONDS), staging.error


def test_after_close(rig: Rig) -> None:
    """A closed Stager says so; closing twice is harmless."""
    rig.save({"m": {"w": torch.randn(50)}})
    rig.stager.close()
    rig.stager.close()
    with pytest.raises(UsageError, match="close"):
        rig.stage({"m": {"w": torch.randn(50)}})


def test_two_snapshots_at_once(make_rig: Callable[..., Rig]) -> None:
    """One Stager copies one snapshot at a time; a second one waits for its end and then says so."""
    rig = make_rig(stall_timeout=0.1)
    state = {"m": {"w": torch.randn(50)}}
    with rig.held():
        staging = rig.stage(state)
        with pytest.raises(UsageError, match="still being copied"):
            rig.stage(state)
    assert staging.wait(PATIENCE_SECONDS)


def test_a_stager_that_is_dropped_ends_its_thread() -> None:
    """The copy thread holds nothing of the Stager and ends with it."""
    rig = Rig()
    rig.save({"m": {"w": torch.randn(50)}})
    thread = rig.stager._thread._thread
    assert thread is not None
    assert rig.arena is not None
    rig.arena.close()
    del rig
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


class FakeDevice:
    """A device whose copies arrive after some looks, or never."""

    class Side:
        device = torch.device("cuda", 0)

    side = Side()

    def __init__(self, looks: float) -> None:
        self.looks = looks
        self.seen = 0

    def arrived(self) -> list[Any]:
        self.seen += 1
        return []

    @property
    def complete(self) -> bool:
        return self.seen >= self.looks


def with_device(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    monkeypatch.setattr(
        stager_module.Stager, "_copy_devices", lambda self, layout, chosen, staging: staging.devices.append(device)
    )


def test_the_answer_waits_for_the_device(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enqueued copies are waited for, also by a cancelled save: its arena is written into until then."""
    state = {"m": {"w": torch.randn(50)}}
    device = FakeDevice(looks=5)
    with_device(monkeypatch, device)
    with rig.held():
        staging = rig.stage(state)
        staging.cancel()
    assert not staging.wait(PATIENCE_SECONDS)
    assert device.seen == 5
    rig.save(state)


def test_a_device_that_never_answers(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The save fails by ``stall_timeout``; the arena stays mapped under the device, and no other save goes into it."""
    rig = make_rig(stall_timeout=0.1)
    state = {"m": {"w": torch.randn(50)}}
    with_device(monkeypatch, FakeDevice(looks=float("inf")))
    staging = rig.stage(state)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, SaveTimeoutError)
    assert "cuda:0" in str(staging.error)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="still being copied"):
        rig.stage(state)
    assert rig.arena is not None
    view = rig.arena.bytes_at(0, 4096)
    rig.arena.close()
    view.fill_(1)
