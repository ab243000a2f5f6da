"""The snapshot is the state at the call, whatever steps at once behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.staging.rig import PATIENCE_SECONDS, Rig, live

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd momentum foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "sgd momentum fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=3),
}


def make_model(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 24 * 8).view(8, 24)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, with a closure as LBFGS needs it."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)  # type: ignore[arg-type]


def in_thread(target: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def check_guarded(rig: Rig, state: dict[str, Any], step: Callable[[], Any], *, later_too: bool = True) -> None:
    """Save twice; the second snapshot must be guarded against a step at once, which must wait and then go on."""
    step()
    first = rig.save(state)
    assert first.lazy_nbytes == 0
    step()
    expected = live(state)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        stepping = in_thread(step)
        stepping.join(0.1)
        assert stepping.is_alive(), "the step did not wait"
        gate.set()
        stepping.join(PATIENCE_SECONDS)
        assert not stepping.is_alive()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected
    assert live(state) != expected, "the step changed nothing"
    if later_too:
        expected = live(state)
        staging = rig.stage(state)
        step()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(state) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_for_its_copies(rig: Rig, name: str) -> None:
    """Every optimizer of torch.optim waits in its next step; the staged bytes are those of the call."""
    model = make_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    check_guarded(rig, {"model": model, "optimizer": optimizer}, lambda: train(model, optimizer))


def test_sparse_adam_waits_too(rig: Rig) -> None:
    """Its gradients are sparse, its parameters and state are not."""
    embedding = nn.Embedding(200, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        embedding(torch.arange(50)).square().sum().backward()
        optimizer.step()

    check_guarded(rig, {"model": embedding, "optimizer": optimizer}, step)


def test_every_optimizer_of_torch_is_tried() -> None:
    """One that torch adds has to be put into the table; the hook is torch's, but a class may step around it."""
    parameters = list(make_model().parameters())
    tried = {type(make(parameters)) for make in OPTIMIZERS.values()} | {torch.optim.SparseAdam}
    named = {getattr(torch.optim, name) for name in torch.optim.__all__}
    assert {kind for kind in named if isinstance(kind, type)} - {torch.optim.Optimizer} == tried


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", [True, False], ids=["compiled before the first save", "compiled after it"])
def test_a_compiled_step(rig: Rig, before: bool) -> None:
    """``torch.compile(optimizer.step)`` calls the hook in every run, whenever it was compiled."""
    torch._dynamo.reset()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    loss_of(model).backward()
    if not before:
        optimizer.step()
        rig.save(state)
    compiled = torch.compile(optimizer.step, backend="eager")
    compiled()
    check_guarded_after(rig, state, compiled)
    torch._dynamo.reset()


def check_guarded_after(rig: Rig, state: dict[str, Any], step: Callable[[], Any]) -> None:
    rig.save(state)
    step()
    expected = live(state)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        threading.Timer(0.05, gate.set).start()  # dynamo compiles per thread, so the step stays in this one
        step()
        assert gate.is_set(), "the step did not wait"
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected
    assert live(state) != expected


class WholeStep(torch.optim.Optimizer):
    """An optimizer whose step dynamo can trace without a graph break."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_step_compiled_with_fullgraph_is_not_broken(make_rig: Callable[..., Rig], fresh_guard: None) -> None:
    """``fullgraph=True`` allows no graph break: the hook stays out of such a step, nothing is guarded afterwards."""
    torch._dynamo.reset()
    rig = make_rig()
    model = make_model()
    optimizer = WholeStep(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    loss_of(model).backward()
    optimizer.step()
    rig.save(state)
    optimizer.step()
    assert rig.save(state).lazy_nbytes > 0
    optimizer.step()
    expected = live(state)
    compiled = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        threading.Timer(0.05, gate.set).start()
        compiled()
        assert gate.is_set(), "the compilation did not wait for what was pending"
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected
    compiled()
    optimizer.step()
    expected = live(state)
    staging = rig.stage(state)
    assert staging.lazy_nbytes == 0
    compiled()
    assert staging.wait(PATIENCE_SECONDS)
    assert rig.staged(state) == expected
    torch._dynamo.reset()


def test_under_a_grad_scaler(rig: Rig) -> None:
    """GradScaler.step calls the optimizer's step, so the hook fires."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()

    check_guarded(rig, {"model": model, "optimizer": optimizer}, step)


def test_an_optimizer_per_parameter_in_backward(rig: Rig) -> None:
    """With the step inside backward each parameter's optimizer waits for its own tensors."""
    model = make_model()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def step_one(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_one)
    state = {"model": model, "optimizers": {str(i): o for i, o in enumerate(optimizers.values())}}
    check_guarded(rig, state, lambda: loss_of(model).backward())


def test_two_optimizers_wait_each_for_its_own(rig: Rig) -> None:
    """Two optimizers over two halves are both guarded; one that owns nothing lazy does not wait for the other's."""
    model, scale = make_model(), nn.Parameter(torch.ones(3))
    left = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    right = torch.optim.SGD(model[2].parameters(), lr=1e-2, momentum=0.9)
    tiny = torch.optim.SGD([scale], lr=1e-2)
    state = {"model": model, "left": left, "right": right}

    def step() -> None:
        for optimizer in (left, right, tiny):
            optimizer.zero_grad()
        (loss_of(model) * scale.sum()).backward()
        left.step()
        right.step()

    step()
    tiny.step()
    check_guarded(rig, state, step)
    tiny.step()
    rig.save(state)
    step()
    tiny.step()
    with rig.held():
        staging = rig.stage(state)
        stepping = in_thread(tiny.step)
        stepping.join(PATIENCE_SECONDS)
        assert not stepping.is_alive(), "it waited for copies that are not its own"
        assert not staging.done
    assert staging.wait(PATIENCE_SECONDS)


def test_an_optimizer_made_after_the_call_waits_for_all(rig: Rig) -> None:
    """A new optimizer may own the same parameters: it waits for everything."""
    model = make_model()
    old = torch.optim.SGD(model.parameters(), lr=1e-2)
    state = {"model": model}
    loss_of(model).backward()
    old.step()
    rig.save(state)
    old.step()
    expected = live(state)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        new = torch.optim.AdamW(model.parameters(), lr=1e-2)
        stepping = in_thread(new.step)
        stepping.join(0.1)
        assert stepping.is_alive()
        gate.set()
        stepping.join(PATIENCE_SECONDS)
    assert staging.wait(PATIENCE_SECONDS)
    assert rig.staged(state) == expected
    # Made after the last save: its state is guarded as soon as it has stepped once.
    state["optimizer"] = new
    expected = live(state)
    staging = rig.stage(state)
    assert staging.lazy_nbytes > 0
    new.step()
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected


def test_a_parameter_added_after_the_call(rig: Rig) -> None:
    """An optimizer without pending copies of its own that got parameters of another one waits for everything."""
    model = make_model()
    tiny = torch.optim.SGD([model[0].bias], lr=1e-2)
    right = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    state = {"model": model}
    loss_of(model).backward()
    for _ in range(2):
        tiny.step()
        right.step()
        rig.save(state)
    tiny.step()
    right.step()
    expected = live(state)
    with rig.held() as gate:
        staging = rig.stage(state)
        assert staging.lazy_nbytes == model[2].weight.nbytes
        tiny.add_param_group({"params": list(model[2].parameters())})
        stepping = in_thread(tiny.step)
        stepping.join(0.1)
        assert stepping.is_alive()
        gate.set()
        stepping.join(PATIENCE_SECONDS)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected


class Plain:
    """No torch.optim.Optimizer: it calls no hook."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.momentum = [torch.zeros_like(p) for p in parameters]

    def step(self) -> None:
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            momentum.mul_(0.9).add_(parameter.grad)
            parameter.data.sub_(momentum, alpha=1e-2)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.momentum = state["momentum"]


def test_an_optimizer_outside_of_torch_is_copied_inline(rig: Rig) -> None:
    """What calls no hook is never guarded: all of it is copied before stage returns."""
    model = make_model()
    optimizer = Plain(list(model.parameters()))
    state = {"model": model, "optimizer": optimizer}
    loss_of(model).backward()
    for _ in range(3):
        optimizer.step()
        expected = live(state)
        with rig.held():
            staging = rig.stage(state)
            assert staging.lazy_nbytes == 0
            optimizer.step()
        assert staging.wait(PATIENCE_SECONDS), staging.error
        assert rig.staged(state) == expected


def test_buffers_and_averages_are_copied_inline(rig: Rig) -> None:
    """BatchNorm's statistics and an EMA model belong to no optimizer: they may change at once."""
    model = nn.Sequential(nn.Linear(24, 600), nn.BatchNorm1d(600), nn.Linear(600, 1))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "average": average, "optimizer": optimizer}

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)

    step()
    rig.save(state)
    step()
    expected = live(state)
    with rig.held():
        staging = rig.stage(state)
        assert staging.lazy_nbytes > 0
        model.eval()
        model.train()
        with torch.no_grad():
            model(torch.randn(8, 24))  # moves the running statistics
        average.update_parameters(model)
    assert staging.wait(PATIENCE_SECONDS), staging.error
    assert rig.staged(state) == expected
    assert live(state) != expected


def test_training_is_bit_equal_with_and_without_saves(rig: Rig) -> None:
    """Saving in every step changes nothing: same parameters, same state, same version counters per step."""
    results = []
    for saves in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = {"model": model, "optimizer": optimizer}
        for _ in range(5):
            train(model, optimizer)
            if saves:
                rig.stage(state)
                rig.stager.sync_pending()
        results.append((live(state), [p._version for p in model.parameters()]))
    assert results[0] == results[1]


def test_version_counters_stay(rig: Rig) -> None:
    """Neither way of copying bumps a counter of the user's."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    tensors = list(model.parameters())
    for _ in range(3):
        train(model, optimizer)
        tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        before = [t._version for t in tensors]
        rig.save(state)
        assert [t._version for t in tensors] == before


def test_first_save_and_inline_snapshots_guard_nothing(make_rig: Callable[..., Rig]) -> None:
    """The first save of each Stager copies all inline, and ``inline`` does so always; a step at once tears nothing."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer)
    first, inline = make_rig(), make_rig(snapshot="inline")
    for rig, saves in ((first, 1), (inline, 3)):
        for _ in range(saves):
            expected = live(state)
            with rig.held():
                staging = rig.stage(state)
                assert staging.lazy_nbytes == 0
                assert staging.inline_nbytes == sum(map(len, expected.values()))
                train(model, optimizer)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
            assert staging.wait(PATIENCE_SECONDS), staging.error
            assert rig.staged(state) == expected


def test_an_optimizer_that_did_not_step_since_is_not_guarded(rig: Rig) -> None:
    """Certain is only an optimizer that was seen since the previous save."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer)
    rig.save(state)
    train(model, optimizer)
    assert rig.save(state).lazy_nbytes > 0
    assert rig.save(state).lazy_nbytes == 0
    train(model, optimizer)
    assert rig.save(state).lazy_nbytes > 0
