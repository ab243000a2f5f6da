"""Writes that nobody waits for: what is found, what is no tear, what happens then."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aiockpt.errors import SaveCancelledError, SaveTimeoutError, TornSnapshotError
from tests.staging.rig import PATIENCE_SECONDS, SMALL, Rig, live
from tests.staging.test_optimizers import in_thread, loss_of, make_model, train


class Scene:
    """A model whose next save is guarded."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.train()
        rig.save(self.state)
        self.train()

    @property
    def weight(self) -> nn.Parameter:
        return self.model[0].weight  # type: ignore[no-any-return, union-attr, return-value]

    def train(self) -> None:
        train(self.model, self.optimizer)


@pytest.fixture
def scene(rig: Rig) -> Scene:
    return Scene(rig)


def write_fused(weight: nn.Parameter) -> None:
    weight.data.numpy()[:] += 1.0


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda w: w.detach().add_(1.0),
    "an EMA swap through .data": lambda w: w.data.copy_(torch.zeros_like(w)),
    "numpy": write_fused,
    "dlpack": lambda w: torch.from_dlpack(w.detach()).fill_(7.0),
    "the storage": lambda w: w.untyped_storage().fill_(3),
    "a view of .data": lambda w: w.data.view(-1).mul_(2.0),
    "NaN": lambda w: w.data.fill_(float("nan")),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_behind_the_guard_is_found(scene: Scene, name: str) -> None:
    """Any write before the copy fails the save with the key, by counters or by canaries; from then on it is inline."""
    rig = scene.rig
    with rig.held():
        staging = rig.stage(scene.state)
        WRITES[name](scene.weight)
    assert not staging.wait(PATIENCE_SECONDS)
    (error,) = rig.answers
    assert isinstance(error, TornSnapshotError)
    assert error is staging.error
    assert error.keys == ("model.0.weight",)
    assert error.step == staging.step
    assert "model.0.weight" in str(error)
    scene.train()
    expected = live(scene.state)
    lazy_nbytes = staging.lazy_nbytes
    with rig.held():
        staging = rig.stage(scene.state)
        assert staging.lazy_nbytes == lazy_nbytes - scene.weight.nbytes
        WRITES[name](scene.weight)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected


@pytest.mark.parametrize("name", WRITES)
def test_a_write_after_the_wait_is_no_tear(scene: Scene, name: str) -> None:
    """Once ``wait`` returned, everything may be written to."""
    expected = live(scene.state)
    staging = scene.rig.stage(scene.state)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    WRITES[name](scene.weight)
    assert scene.rig.staged(scene.state) == expected
    assert scene.rig.answers == [None]


def test_a_counted_write_that_the_canaries_do_not_see(scene: Scene) -> None:
    """Writing the same values back is a write all the same, and the counters say so."""
    with scene.rig.held():
        staging = scene.rig.stage(scene.state)
        scene.weight.detach().mul_(1.0)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)


def test_a_write_before_the_step_is_found_at_the_hook(scene: Scene) -> None:
    """The counters are read when the hook is entered, before the step bumps them itself."""
    rig = scene.rig
    with rig.held() as gate:
        staging = rig.stage(scene.state)
        scene.weight.detach().mul_(1.0)
        stepping = in_thread(scene.optimizer.step)
        stepping.join(0.1)
        gate.set()
        stepping.join(PATIENCE_SECONDS)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    assert staging.error.keys == ("model.0.weight",)


def test_all_torn_keys_are_named(scene: Scene) -> None:
    """One error names every tensor that was written to."""
    with scene.rig.held():
        staging = scene.rig.stage(scene.state)
        for parameter in scene.model.parameters():
            parameter.data.zero_()
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    # The biases are below the threshold: copied before stage returned.
    assert staging.error.keys == ("model.0.weight", "model.2.weight")


def test_replacing_a_tensor_is_no_tear(scene: Scene) -> None:
    """``p.data = …`` leaves the old storage alone, which is the snapshot's."""
    expected = live(scene.state)
    with scene.rig.held():
        staging = scene.rig.stage(scene.state)
        scene.weight.data = torch.zeros_like(scene.weight)
        scene.optimizer.state[scene.weight]["exp_avg"] = torch.zeros_like(scene.weight)
        gc.collect()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert scene.rig.staged(scene.state) == expected


def test_a_resized_storage_is_found(scene: Scene) -> None:
    """A storage that was freed behind us (as FSDP1 does) is never read, and the save fails."""
    moment = scene.optimizer.state[scene.weight]["exp_avg"]
    with scene.rig.held():
        staging = scene.rig.stage(scene.state)
        moment.untyped_storage().resize_(0)
    assert not staging.wait(PATIENCE_SECONDS)
    assert isinstance(staging.error, TornSnapshotError)
    assert staging.error.keys == ("optimizer.state.model.0.weight.exp_avg",)


def test_fsdp1_flat_parameters_are_inline(scene: Scene) -> None:
    """A flat parameter's memory comes and goes: never guarded."""
    weight = scene.weight
    weight._is_flat_param = True  # type: ignore[attr-defined]
    before = scene.rig.stage(scene.state)
    assert before.wait(PATIENCE_SECONDS)
    sizes = sum(p.nbytes for p in scene.model.parameters() if p.nbytes >= SMALL.lazy_nbytes)
    assert before.lazy_nbytes == 3 * sizes - weight.nbytes


def test_inference_tensors_are_inline(rig: Rig) -> None:
    """An inference tensor has no counter: never guarded."""
    with torch.inference_mode():
        parameter = torch.randn(600)
    optimizer = torch.optim.SGD([torch.zeros(600)], lr=0.1)
    optimizer.param_groups[0]["params"] = [parameter]
    for _ in range(3):
        optimizer.step()
        assert rig.save({"p": parameter}).lazy_nbytes == 0


def test_strided_tensors_are_inline(rig: Rig) -> None:
    """A tensor that is not contiguous is copied at once, in logical order."""
    parameter = nn.Parameter(torch.randn(60, 70).t())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    state = {"p": parameter}
    for _ in range(3):
        optimizer.step()
        expected = live(state)
        with rig.held():
            staging = rig.stage(state)
            assert staging.lazy_nbytes == 0
            optimizer.step()
        assert staging.wait(PATIENCE_SECONDS)
        assert rig.staged(state) == expected


def test_reused_addresses_are_not_guarded(rig: Rig) -> None:
    """Memory that an optimizer had before, and something else has now, belongs to nobody."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "extra": torch.zeros(1)}
    train(model, optimizer)
    rig.save(state)
    train(model, optimizer)
    assert rig.save(state).lazy_nbytes > 0
    size = model[0].weight.shape
    addresses = {p.data_ptr() for p in model.parameters()}
    del model, optimizer
    state.clear()
    gc.collect()
    extra = [torch.zeros(size) for _ in range(200)]
    reused = [t for t in extra if t.data_ptr() in addresses]
    state = {f"t{i}": t for i, t in enumerate(reused or extra[:3])}
    expected = live(state)
    with rig.held():
        staging = rig.stage(state)
        assert staging.lazy_nbytes == 0
        for tensor in extra:
            tensor.fill_(1.0)
    assert staging.wait(PATIENCE_SECONDS)
    assert rig.staged(state) == expected


def test_a_stalled_copy_fails_the_save_and_training_steps_on(make_rig: Callable[..., Rig]) -> None:
    """After ``stall_timeout`` without a copied byte the step goes on, and the save fails saying so."""
    rig = make_rig(stall_timeout=0.2)
    scene = Scene(rig)
    before = live(scene.state)
    with rig.held():
        staging = rig.stage(scene.state)
        scene.train()
        assert live(scene.state) != before
        assert not staging.done, "the copy thread still has the arena"
    assert not staging.wait(PATIENCE_SECONDS)
    (error,) = rig.answers
    assert isinstance(error, SaveTimeoutError)
    assert (error.step, error.timeout, error.phase) == (staging.step, 0.2, "STAGING")
    scene.train()
    expected = live(scene.state)
    staging = rig.stage(scene.state)
    scene.train()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected


def test_a_copy_that_progresses_is_not_stalled(make_rig: Callable[..., Rig]) -> None:
    """The time counts from the last copied byte: a slow copy is waited for."""
    rig = make_rig(stall_timeout=0.5)
    scene = Scene(rig)
    expected = live(scene.state)
    slow = threading.Event()
    staging = rig.stage(scene.state, on_progress=lambda file, upto: slow.wait(0.1) and None)
    staging.pending.moved()
    scene.train()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected


def test_a_cancelled_save_frees_the_step(scene: Scene) -> None:
    """Cancel ends the waiting of a step at once; the answer comes when the copy thread has let go."""
    rig = scene.rig
    with rig.held():
        staging = rig.stage(scene.state)
        stepping = in_thread(scene.optimizer.step)
        stepping.join(0.1)
        assert stepping.is_alive()
        staging.cancel()
        stepping.join(PATIENCE_SECONDS)
        assert not stepping.is_alive()
        assert not staging.done
    assert not staging.wait(PATIENCE_SECONDS)
    assert [type(answer) for answer in rig.answers] == [SaveCancelledError]
    staging.cancel()
    assert len(rig.answers) == 1


def test_cancel_after_the_end_changes_nothing(scene: Scene) -> None:
    """What is staged stays staged."""
    staging = scene.rig.save(scene.state)
    staging.cancel()
    assert staging.error is None
    assert staging.wait(0)


def test_close_with_copies_pending(make_rig: Callable[..., Rig]) -> None:
    """Close cancels: the step goes on, the answer is a cancellation, the thread is gone."""
    rig = make_rig()
    scene = Scene(rig)
    with rig.held() as gate:
        staging = rig.stage(scene.state)
        closing = in_thread(rig.stager.close)
        scene.train()
        gate.set()
        closing.join(PATIENCE_SECONDS)
    assert staging.done
    assert [type(answer) for answer in rig.answers] == [SaveCancelledError]
    assert not any(
        thread.name == "aiockpt-copy" and thread is rig.stager._thread._thread for thread in threading.enumerate()
    )
    rig.stager.close()


def test_a_restore_waits_for_pending_copies(scene: Scene) -> None:
    """``sync_pending`` returns when the live tensors may be overwritten."""
    rig = scene.rig
    expected = live(scene.state)
    with rig.held() as gate:
        staging = rig.stage(scene.state)
        syncing = in_thread(rig.stager.sync_pending)
        syncing.join(0.1)
        assert syncing.is_alive()
        gate.set()
        syncing.join(PATIENCE_SECONDS)
        assert not syncing.is_alive()
        for parameter in scene.model.parameters():
            parameter.data.zero_()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(scene.state) == expected


def test_several_stagers_work_side_by_side(make_rig: Callable[..., Rig]) -> None:
    """A step waits for the copies of every Checkpointer of the process."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    rigs = [make_rig(), make_rig()]
    train(model, optimizer)
    for rig in rigs:
        rig.save(state)
    train(model, optimizer)
    first = live(state)
    with rigs[0].held() as one, rigs[1].held() as two:
        stagings = [rigs[0].stage(state)]
        stagings.append(rigs[1].stage(state))
        assert all(staging.lazy_nbytes > 0 for staging in stagings)
        stepping = in_thread(optimizer.step)
        one.set()
        assert stagings[0].wait(PATIENCE_SECONDS)
        stepping.join(0.1)
        assert stepping.is_alive()
        two.set()
        stepping.join(PATIENCE_SECONDS)
    assert stagings[1].wait(PATIENCE_SECONDS)
    for rig in rigs:
        assert rig.staged(state) == first


def test_memory_is_released_when_it_is_copied(scene: Scene) -> None:
    """A pending copy holds the storage, and lets it go as soon as it is copied; nothing is kept between saves."""
    rig = scene.rig
    weight = scene.weight.detach()
    storage = weakref.ref(weight.untyped_storage())
    first, rest = threading.Event(), threading.Event()

    def on_progress(file: int, upto: int) -> None:
        first.set()
        rest.wait(PATIENCE_SECONDS)

    with rig.held():
        staging = rig.stage(scene.state, on_progress=on_progress)
        staging.pending  # noqa: B018  # held below by its lazies only
        scene.weight.data = torch.zeros_like(weight)
        del weight
        gc.collect()
        assert storage() is not None, "the pending copy must hold it"
        rest.set()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert all(lazy.storage is None and lazy.tensor is None for lazy in staging.pending.lazies)
    assert first.is_set()
    gc.collect()
    assert storage() is None


def test_losses_do_not_depend_on_who_waits(scene: Scene) -> None:
    """After a torn save everything still works."""
    with scene.rig.held():
        staging = scene.rig.stage(scene.state)
        scene.weight.data.zero_()
    staging.wait(PATIENCE_SECONDS)
    scene.train()
    assert torch.isfinite(loss_of(scene.model))
    scene.rig.save(scene.state)
