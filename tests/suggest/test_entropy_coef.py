"""suggest_entropy_coef: exact edges, stable ranges, what is vacuous, clips, and choices by the drift."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

from dyntune import suggest_entropy_coef
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Status
from dyntune.rl import GaussianBandit, PolicyObjective, SoftmaxBandit
from dyntune.suggest.entropy_rule import EntropyCoefficient

REWARDS = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)


def bandit_at(logits: torch.Tensor, rewards: torch.Tensor = REWARDS) -> tuple[SoftmaxBandit, PolicyObjective]:
    bandit = SoftmaxBandit(rewards)
    policy = nn.ParameterList([nn.Parameter(logits.clone())])
    return bandit, PolicyObjective(policy, lambda p: (-bandit.value(p[0], 0.0), bandit.entropy(p[0])))


def suggest(objective: PolicyObjective, **options: Any) -> EntropyCoefficient:
    given: dict[str, Any] = {"lr": 1.0, "optimizer": "sgd", "alphas": (0.0, 6.0)} | options
    return suggest_entropy_coef(objective, **given)


@pytest.mark.parametrize("alpha", [0.05, 0.08, 0.13, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0])
def test_critical_rates_of_a_bandit_at_its_optimum(alpha: float) -> None:
    """Within 1% of the truth, and in its bracket; ascent is tried at 0.98 and 1.02 of it in tests/rl/test_bandit.py."""
    bandit, objective = bandit_at(SoftmaxBandit(REWARDS).optimum(alpha))
    found = suggest(objective)
    rate = found.critical_lr(alpha)
    assert float(rate) == pytest.approx(bandit.critical_lr(alpha), rel=0.01)
    low, high = found.bracket(alpha)
    assert low <= bandit.critical_lr(alpha) * (1 + 1e-9)
    assert bandit.critical_lr(alpha) <= high * (1 + 1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.9, 1.0, 1.1, 3.0])
def test_a_gaussian_arm_has_no_edge_in_alpha(alpha: float) -> None:
    """Its entropy is linear: all of alpha's effect comes through where the optimum lies."""
    bandit = GaussianBandit(2.0)
    policy = nn.ParameterList([nn.Parameter(bandit.optimum(alpha))])
    found = suggest(
        PolicyObjective(policy, lambda p: (-bandit.value(p[0], 0.0), p[0][1] + math.log(2 * math.pi * math.e) / 2)),
        lr=0.3,
    )
    assert found.linear
    assert "no coefficient moves the critical rate" in found.reason
    assert found.slope == 0.0
    assert float(found.critical_lr(alpha)) == pytest.approx(bandit.critical_lr(alpha), rel=0.01)
    assert float(found.critical_lr(0.0)) == float(found.critical_lr(6.0))
    assert found.balance == pytest.approx(alpha, rel=1e-6)  # at the optimum the entropy stands still


def test_the_stable_range_ends_where_the_rate_is_critical() -> None:
    bandit, objective = bandit_at(SoftmaxBandit(REWARDS).optimum(1.0))
    lr = 2.0
    found = suggest(objective, lr=lr, present=1.0)
    assert found.low == 0.0
    assert not found.open_ended
    truth = 2 / lr
    matrix = lambda a: -bandit.hessian(bandit.optimum(1.0), a)  # noqa: E731
    for alpha, stable in ((found.high, True), (found.high * 1.25, False)):
        assert (float(torch.linalg.eigvalsh(matrix(alpha))[-1]) <= truth) is stable
    assert found.value == 1.0
    assert "the one in use" in found.reason
    beyond = suggest(objective, lr=lr, present=5.0)
    assert beyond.value == pytest.approx(found.high)
    assert "moved into the stable range" in beyond.reason
    assert any("unstable at coefficient 5" in line for line in beyond.warnings)


def test_no_coefficient_is_stable() -> None:
    """Curvature that comes from the rewards alone, and a rate far above it."""
    _, objective = bandit_at(torch.tensor([0.3, 0.0, -0.2, 0.1]).double(), 100 * REWARDS)
    found = suggest(objective, lr=100.0)
    assert found.value is None
    assert found.status is Status.REFUSED
    assert math.isnan(found.low)
    with pytest.raises(RefusedError):
        float(found)
    with pytest.raises(RefusedError):
        suggest(objective, lr=100.0, strict=True)
    assert "refused" in str(found)
    assert json.dumps(found.to_dict())


def test_half_of_the_entropy_is_kept_at_the_present_drift() -> None:
    bandit, objective = bandit_at(torch.zeros(4).double() + torch.tensor([0.5, 0.1, 0.0, -0.3]))
    steps, lr = 200, 0.5
    found = suggest(objective, lr=lr, num_steps=steps)
    assert found.value is not None
    assert 0 < found.value < found.balance
    entropy, room = objective()[1], 0.5 * objective()[1]
    at = lambda a: objective.drift(lr=lr, alpha=a)  # noqa: E731
    assert at(found.value) * steps == pytest.approx(-room, rel=1e-6)
    assert found.entropy == entropy
    quick = suggest(objective, lr=lr, num_steps=steps, present=0.0)
    assert any("entropy collapse" in line for line in quick.warnings)
    assert suggest(objective, lr=1e-6, num_steps=10).value == 0.0  # it lasts without a bonus
    assert bandit.entropy(torch.zeros(4).double()) == pytest.approx(math.log(4))


def test_a_clip_raises_the_critical_rate() -> None:
    _, objective = bandit_at(SoftmaxBandit(REWARDS).optimum(0.5))
    plain, clipped = suggest(objective), suggest(objective, clip_norm=0.5, gradient_norm=5.0)
    assert clipped.clip_factor == 0.1
    assert float(clipped.critical_lr(0.5)) == pytest.approx(10 * float(plain.critical_lr(0.5)))
    assert suggest(objective, clip_norm=0.5, gradient_norm=0.1).clip_factor == 1.0
    for wrong in (
        {"clip_norm": 0.5},
        {"clip_norm": 0.5, "gradient_norm": 0.0},
        {"clip_norm": -1.0, "gradient_norm": 1.0},
    ):
        with pytest.raises(InvalidArgumentError, match="clip_norm"):
            suggest(objective, **wrong)


class Gaussian(nn.Module):
    """A policy with a log standard deviation of its own, and a value beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.value = nn.Linear(4, 2), nn.Linear(4, 1)
        self.log_std = nn.Parameter(torch.zeros(2))


def gaussian(policy: Any, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Normal(policy.mean(x), policy.log_std.exp())
    return found.log_prob(actions).sum(-1), found.entropy().sum(-1)


def test_adam_needs_its_state_and_the_value_loss_stays_beside() -> None:
    torch.manual_seed(0)
    policy, x = Gaussian(), torch.randn(64, 4)
    objective = PolicyObjective.of_batch(policy, gaussian, x, torch.randn(64, 2), torch.randn(64))
    with pytest.raises(InvalidArgumentError, match="no second moments"):
        suggest(objective, optimizer="adam")
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    with pytest.raises(InvalidArgumentError):
        suggest(objective, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss, entropy = objective.losses()
        (loss - 0.01 * entropy + policy.value(x).square().mean()).backward()
        optimizer.step()
    before = [p.clone() for p in policy.parameters()]
    found = suggest(
        objective, optimizer=optimizer, lr=1e-3, value_loss=lambda p: ((p.value(x) - 100) ** 2).mean(), present=0.01
    )
    assert found.linear
    assert found.value_curvature is not None
    # Of the mean of (w.x + b - 100)^2 the Hessian is 2 E[z z^T] with z = (x, 1).
    z = torch.cat([x, torch.ones(64, 1)], 1)
    assert found.value_curvature == pytest.approx(float(torch.linalg.eigvalsh(2 * z.T @ z / 64)[-1]), rel=0.01)
    assert found.covariance is not None
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert "second moments held still" in found.explain()
    assert "largest eigenvalue of the value loss" in found.explain()


def test_bad_input_and_results_that_are_not_sure() -> None:
    _, objective = bandit_at(torch.zeros(4).double())
    for options in ({"lr": 0.0}, {"lr": math.inf}, {"present": -1.0}, {"num_steps": 0}, {"alphas": (1.0, 0.0)}):
        with pytest.raises(InvalidArgumentError):
            suggest(objective, **options)
    with pytest.raises(NotConvergedError):
        suggest(objective, strict=True)
    with pytest.raises(InvalidArgumentError, match="between 0"):
        suggest(objective).critical_lr(7.0)
    sign = torch.optim.Rprop(objective.policy.parameters())
    unknown = suggest(objective, optimizer=sign, present=0.5)
    assert unknown.value == 0.5
    assert "No stable range is known" in unknown.reason
    assert unknown.critical_lr(0.5).value is None
    assert Categorical(logits=torch.zeros(4)).entropy() == pytest.approx(math.log(4))
