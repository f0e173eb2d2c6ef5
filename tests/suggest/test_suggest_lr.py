"""suggest_lr end to end: budgets, neutrality, metamorphic relations, optimizers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dyntune
from dyntune.errors import InvalidArgumentError, NotConvergedError, OptimizerMismatchError, RefusedError
from dyntune.suggest.lr_sweep import sweep_lr
from tests.suggest.problems import classification, mlp, same, snapshot

CE = nn.CrossEntropyLoss()


def suggest(model: nn.Module, batches: Any = None, **options: Any) -> dyntune.Recommendation:
    options.setdefault("criterion", CE)
    options.setdefault("max_gradients", 100)
    return dyntune.suggest_lr(model, classification() if batches is None else batches, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_training_at_the_suggestion_learns_and_ten_times_max_stable_does_not(optimizer: str) -> None:
    """Behaviour at the edge: the suggestion trains; a rate far above the bound on stability does worse."""
    batches = classification(64)
    rec = suggest(mlp(), batches, optimizer=optimizer, max_gradients=200)
    assert rec.value is not None
    assert rec.max_stable is not None
    assert rec.value <= float(rec.max_stable)

    def final(lr: float) -> float:
        model = mlp()
        groups = {"momentum": 0.9} if optimizer in ("momentum", "nesterov") else {}
        if optimizer == "nesterov":
            groups["nesterov"] = True
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        opt = kinds.get(optimizer, torch.optim.SGD)(model.parameters(), lr=lr, **groups)  # type: ignore[arg-type]
        losses = []
        for step in range(200):
            x, y = batches[step % 64]
            loss = CE(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
        return sum(losses[-50:]) / 50

    start = float(CE(mlp()(batches[0][0]), batches[0][1]).detach())
    good, wild = final(rec.value), final(10 * rec.max_stable.high)
    assert good < 0.7 * start
    assert not wild < good


@pytest.mark.parametrize("budget", [60, 75, 100, 200])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_budget_is_kept_and_every_pass_is_charged(budget: int, optimizer: str) -> None:
    """A pass with gradients counts 1, one without a third; and most of the budget is used."""
    calls = {True: 0, False: 0}

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[torch.is_grad_enabled()] += 1
            return self.inner(x)

    rec = suggest(Counting(), optimizer=optimizer, max_gradients=budget)
    assert 0.8 * budget < rec.cost <= budget + 1e-9  # runs that blow up early leave some; a sum of thirds
    # The check of the first batch builds a graph and takes no gradient: a third.
    assert rec.cost == pytest.approx(calls[True] - 1 + (calls[False] + 1) / 3, abs=1e-6)  # a sum of a few hundred


def test_no_second_derivative_is_taken() -> None:
    """method="forward" is a promise: a backward pass that cannot be differentiated is no obstacle."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[2](Once.apply(self.inner[0](x)))

    found = suggest(Model(), method="forward")
    # 8-16-4 with tanh by hand: the same function and gradient as the plain model's, up to rounding of tanh' that 40
    # steps amplify.
    assert found.value == pytest.approx(suggest(mlp()).value, rel=1e-2)


def test_the_users_own_rate_does_not_matter() -> None:
    """It says how the groups' rates relate, no more: eight times as high, and the answer is the same bits."""
    model = mlp()
    one, eight = (suggest(model, optimizer=torch.optim.SGD(model.parameters(), lr=lr)) for lr in (0.01, 0.08))
    assert one.to_dict() == eight.to_dict()


def test_a_sweep_is_the_thorough_method() -> None:
    model, batches = mlp(), classification(8)
    found = suggest(model, batches, optimizer="sgd", method="sweep", num_steps=20, progress=False)
    plain = sweep_lr(model, batches, criterion=CE, optimizer="sgd", num_steps=20)
    assert found.to_dict() == plain.to_dict()
    with pytest.raises(InvalidArgumentError, match="num_steps"):
        suggest(model, method="sweep")
    with pytest.raises(InvalidArgumentError, match="'exact'"):
        suggest(model, method="exact")


def test_nothing_of_the_user_moves() -> None:
    model = mlp(extras=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("step"))
    batches = classification()
    CE(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    fired.clear()
    before = snapshot(model, optimizer)
    suggest(model, batches, optimizer=optimizer)
    assert same(before, snapshot(model, optimizer))
    assert fired == []


@pytest.mark.parametrize("failing_call", [0, 1, 5, 20, 60])
def test_nothing_moves_when_interrupted(failing_call: int) -> None:
    model = mlp(extras=True)
    before = snapshot(model)
    calls = 0

    def loss_fn(m: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > failing_call:
            raise KeyboardInterrupt
        return CE(m(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        suggest(model, criterion=None, loss_fn=loss_fn)
    assert same(before, snapshot(model))


def test_loss_times_c_divides_the_sgd_rate_by_c() -> None:
    c = 4.0  # a power of two: every product rounds alike, so the pilot takes the same decisions
    one = suggest(mlp(), optimizer="sgd", max_gradients=200)
    scaled = suggest(
        mlp(), optimizer="sgd", max_gradients=200, criterion=None, loss_fn=lambda m, b: c * CE(m(b[0]), b[1])
    )
    assert one.value is not None
    # Curvature and thresholds are sums in float32: rounding differs in the last digits only.
    assert scaled.value == pytest.approx(one.value / c, rel=1e-4)


def test_sample_duplication_changes_nothing() -> None:
    batches = classification(rows=16)
    doubled = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in batches]
    one, two = suggest(mlp(), batches, optimizer="sgd"), suggest(mlp(), doubled, optimizer="sgd")
    # Sums over twice the rows round differently in float32, and 40 training steps amplify that.
    assert two.value == pytest.approx(one.value, rel=1e-2)


def test_deterministic_under_seed() -> None:
    model = mlp(extras=True)
    first, second = suggest(model, seed=3), suggest(model, seed=3)
    assert first.to_dict() == second.to_dict()


def test_loader_is_drawn_once_and_its_randomness_restored() -> None:
    x, y = (torch.cat(parts) for parts in zip(*classification(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    state = torch.get_rng_state()
    rec = suggest(mlp(), loader)
    assert rec.value is not None
    assert torch.equal(state, torch.get_rng_state())


def test_one_batch_says_what_it_cannot_tell() -> None:
    rec = suggest(mlp(), classification()[0])
    assert rec.status is dyntune.Status.ONE_BATCH
    assert rec.value is not None
    with pytest.raises(NotConvergedError) as caught:
        suggest(mlp(), classification()[0], strict=True)
    assert isinstance(caught.value.partial, dyntune.Recommendation)


def test_param_group_ratios_are_kept() -> None:
    """A head trained at a hundredth of the body's rate: the value is the body's (first group's)."""
    model = mlp()
    body, head = list(model[0].parameters()), list(model[2].parameters())
    grouped = torch.optim.SGD([{"params": body, "lr": 1.0}, {"params": head, "lr": 0.01}])
    flipped = torch.optim.SGD([{"params": head, "lr": 0.01}, {"params": body, "lr": 1.0}])
    first, second = suggest(model, optimizer=grouped), suggest(model, optimizer=flipped)
    assert first.value is not None
    assert second.value is not None
    # The same problem stated in another order. Steps are the same up to rounding of lr * ratio.
    assert second.value == pytest.approx(first.value / 100, rel=1e-2)


def test_state_of_the_users_optimizer_is_used() -> None:
    """With a second moment 1e4 times as large, Adam's steps are 100 times as small."""
    model = mlp()
    batches = classification()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.9999))
    for x, y in batches:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    usual = suggest(model, optimizer=optimizer)
    for state in optimizer.state.values():
        state["exp_avg_sq"].mul_(1e4)
        state["step"].fill_(1e6)  # bias correction over: the moment is what it says
    inflated = suggest(model, optimizer=optimizer)
    assert usual.value is not None
    assert inflated.value is not None
    assert inflated.value > 3 * usual.value


@pytest.mark.parametrize(
    "factory",
    [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad, torch.optim.Adamax],
)
def test_other_optimizers_of_torch(factory: Any) -> None:
    rec = suggest(mlp(), optimizer=lambda params: factory(params, lr=0.1))
    assert rec.value is not None
    assert 0 < rec.value < math.inf


def test_factory_clipping_accumulation_and_autocast_run() -> None:
    rec = suggest(
        mlp(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5),
        clip_norm=0.5,
        accumulate=2,
        autocast=torch.bfloat16,
        num_steps=500,
        schedule="cosine",
        max_gradients=200,
    )
    assert rec.value is not None
    assert rec.cost <= 200
    assert any("cosine" in check for check in rec.checks)


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"max_gradients": 10}, InvalidArgumentError, "at least 60"),
        ({"max_gradients": 100, "accumulate": 4}, InvalidArgumentError, "at least 240"),
        ({"accumulate": 0}, InvalidArgumentError, "accumulate=0"),
        ({"clip_norm": -1.0}, InvalidArgumentError, "clip_norm=-1.0"),
        ({"num_steps": 0}, InvalidArgumentError, "num_steps=0"),
        ({"optimizer": "adamx"}, InvalidArgumentError, "'adamx'"),
        ({"optimizer": lambda params: None}, InvalidArgumentError, "NoneType"),
        ({"optimizer": lambda p: torch.optim.Rprop(p, lr=0.1)}, InvalidArgumentError, "Rprop"),
        ({"optimizer": lambda p: torch.optim.ASGD(p, lr=0.1)}, InvalidArgumentError, "ASGD"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], fragment: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=fragment):
        suggest(model, **options)
    assert same(before, snapshot(model))


def test_an_optimizer_on_other_parameters_is_refused() -> None:
    model, other = mlp(), mlp(1)
    with pytest.raises(OptimizerMismatchError, match=r"0\.weight"):
        suggest(model, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(OptimizerMismatchError, match="lacks 2"):
        suggest(model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_frozen_parameters_may_stay_in_the_optimizer() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    rec = suggest(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert rec.value is not None


def test_a_loss_that_no_rate_lowers_is_refused() -> None:
    """At the exact minimum of a convex loss every step makes it worse."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    batches = [(torch.eye(3),)] * 4
    rec = suggest(model, batches, criterion=None, loss_fn=lambda m, b: (m(b[0]) ** 2).mean() + 1.0)
    assert rec.status is dyntune.Status.REFUSED
    assert rec.value is None
    with pytest.raises(RefusedError):
        float(rec)
    assert "refused" in str(rec)


@pytest.mark.parametrize("start", [(0.6, 0.5, 0.4, 0.5), (0.005, 0.3, 0.2, 0.3), (0.0, 0.03, 0.1, 0.1)])
def test_a_quadratic_is_stable_at_the_suggestion(start: tuple[float, ...]) -> None:
    """Full-batch gradient descent: 2 / lambda is the edge, also where the steepest direction is hardly met at first."""
    eigenvalues = torch.tensor([10.0, 3.0, 1.0, 0.3])
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([start]))
    batch = torch.diag(eigenvalues.sqrt())

    def loss_fn(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        return 0.5 * (m(b) ** 2).sum()

    rec = suggest(model, batch, criterion=None, loss_fn=loss_fn, optimizer="sgd", max_gradients=200)
    assert rec.value is not None
    edge = 2 / 3.0 if start[0] == 0 else 2 / 10.0  # a direction without a gradient is none
    assert 0 < rec.value < edge


def test_progress_reports_stages() -> None:
    stages: list[tuple[str, float]] = []
    suggest(mlp(), progress=lambda stage, spent, _: stages.append((stage, spent)))
    spent = [s for _, s in stages]
    assert spent == sorted(spent)
    assert any("ramp" in s or "range test" in s for s, _ in stages)
    assert any("short run" in s for s, _ in stages)
