"""Policy objectives: Hessians against exact ones, the policy's block alone, estimators, drift, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

from dyntune.errors import InvalidArgumentError, NonFiniteError, StaleOperatorError
from dyntune.numerics.affine import affine_spectrum
from dyntune.numerics.vectors import VectorSpace
from dyntune.rl import PolicyObjective, SoftmaxBandit, TabularMDP


class Table(nn.Module):
    """Logits for every state."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())


class ActorCritic(nn.Module):
    """A policy and a value of their own, on four numbers."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.actor = nn.Linear(8, 3)
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()


def evaluate(policy: Any, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Categorical(logits=policy.actor(policy.body(x)))
    return found.log_prob(actions), found.entropy()


def batch(count: int = 64, seed: int = 0) -> tuple[ActorCritic, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    policy = ActorCritic()
    x = torch.randn(count, 4).double()
    actions = torch.randint(3, (count,))
    return policy, x, actions, torch.randn(count).double()


def dense(family: Any) -> tuple[torch.Tensor, torch.Tensor]:
    n = family.space.numel
    columns: list[list[torch.Tensor]] = [[], []]
    with family.session() as product:
        for e in torch.eye(n, dtype=family.space.dtype):
            for kept, found in zip(columns, product(family.space.unflatten(e)), strict=True):
                kept.append(torch.cat([t.reshape(-1) for t in found]))
    return torch.stack(columns[0], 1), torch.stack(columns[1], 1)


def test_a_bandit_gives_its_closed_forms() -> None:
    """All actions, weighted by their probabilities, stand for the expectation; the loss is minus what is ascended."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bandit = SoftmaxBandit(torch.rand(5, dtype=torch.float64))
    pi = torch.softmax(logits, 0).detach()
    advantages = 5 * pi * (bandit.rewards - pi @ bandit.rewards)  # a mean of five terms is the expectation

    def of(policy: Any, _: Any, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = Categorical(logits=policy.logits)
        return found.log_prob(actions), found.entropy()

    policy = Table(logits)
    objective = PolicyObjective.of_batch(policy, of, None, torch.arange(5), advantages, normalize=False)
    a, b = dense(objective.family())
    assert torch.allclose(a, -bandit.hessian(logits, 0.0), atol=1e-10)
    assert torch.allclose(b, -bandit.entropy_hessian(logits), atol=1e-10)
    loss, entropy = objective.gradients()
    assert torch.allclose(loss[0], -bandit.gradient(logits, 0.0), atol=1e-10)
    g = SoftmaxBandit(torch.zeros(5).double()).gradient(logits, 1.0)
    assert torch.allclose(entropy[0], g, atol=1e-10)
    # The entropy's change in a small step, against the step itself.
    lr, alpha = 1e-5, 0.1
    moved = logits + lr * bandit.gradient(logits, alpha)
    change = float(bandit.entropy(moved) - bandit.entropy(logits))
    assert objective.drift(lr=lr, alpha=alpha) == pytest.approx(change, rel=1e-3)
    assert objective.drift(lr=lr, alpha=objective.balance()) == pytest.approx(0.0, abs=1e-15)
    assert objective.estimator == "ratio"


def horizon_problem() -> tuple[TabularMDP, torch.Tensor, int]:
    return (
        TabularMDP.random(states=2, actions=2, gamma=0.0, seed=4),
        torch.tensor([[0.3, -0.2], [0.1, 0.4]]).double(),
        3,
    )


def test_loaded_dice_is_the_return_s_hessian_where_the_ratio_is_not() -> None:
    """Every trajectory of three steps, weighted by its probability, against the exact expected return."""
    mdp, logits, horizon = horizon_problem()
    p = mdp.transitions

    def expected(x: torch.Tensor) -> torch.Tensor:
        pi, d, total = torch.softmax(x, -1), mdp.start, torch.zeros(()).double()
        for _ in range(horizon):
            total = total + (d[:, None] * pi * mdp.rewards).sum()
            d = torch.einsum("s,sa,sat->t", d, pi, p)
        return total

    pi = torch.softmax(logits, -1)
    found = {"ratio": torch.zeros(4, 4).double(), "loaded-dice": torch.zeros(4, 4).double()}
    gradient = torch.zeros(2, 2).double()

    def of(policy: Any, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = Categorical(logits=policy.logits[states])
        return rows.log_prob(actions), rows.entropy()

    # Returns to go as advantages: no baseline is needed in an exact sum.
    for path in itertools.product(*[range(2)] * (2 * horizon)):
        states, actions = torch.tensor(path[:horizon]), torch.tensor(path[horizon:])
        weight = float(mdp.start[states[0]])
        for t in range(horizon):
            weight *= float(pi[states[t], actions[t]])
            weight *= float(p[states[t], actions[t], states[t + 1]]) if t + 1 < horizon else 1.0
        rewards = mdp.rewards[states, actions]
        to_go = rewards.flip(0).cumsum(0).flip(0)
        starts = torch.tensor([True] + [False] * (horizon - 1))
        for kind in found:
            objective = PolicyObjective.of_batch(
                Table(logits),
                of,
                states,
                actions,
                to_go,
                estimator=kind,
                starts=starts,
                normalize=False,  # type: ignore[arg-type]
            )
            a, _ = dense(objective.family())
            found[kind] += -weight * horizon * a
            if kind == "ratio":
                gradient += -weight * horizon * objective.gradients()[0][0]
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(expected(leaf), leaf)
    assert torch.allclose(gradient, slope, atol=1e-10)
    exact = torch.autograd.functional.hessian(expected, logits).reshape(4, 4)
    assert torch.allclose(found["loaded-dice"], exact, atol=1e-10)
    assert float((found["ratio"] - exact).norm() / exact.norm()) > 0.02


def test_dice_and_loaded_dice_are_the_discounted_return_s_hessian() -> None:
    """Every trajectory of three steps, with a discount: rewards for DiCE, exact advantages for Loaded DiCE."""
    mdp, logits, horizon = horizon_problem()
    p, gamma, pi = mdp.transitions, 0.7, torch.softmax(logits, -1)

    def expected(x: torch.Tensor) -> torch.Tensor:
        policy, d, total = torch.softmax(x, -1), mdp.start, torch.zeros(()).double()
        for t in range(horizon):
            total = total + gamma**t * (d[:, None] * policy * mdp.rewards).sum()
            d = torch.einsum("s,sa,sat->t", d, policy, p)
        return total

    values, advantages = torch.zeros(2).double(), []
    for _ in range(horizon):  # backwards: Q - V with so many steps to go
        q = mdp.rewards + gamma * torch.einsum("sat,t->sa", p, values)
        values = (pi * q).sum(-1)
        advantages.insert(0, q - values[:, None])

    def of(policy: Any, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = Categorical(logits=policy.logits[states])
        return rows.log_prob(actions), rows.entropy()

    found = {"dice": torch.zeros(4, 4).double(), "loaded-dice": torch.zeros(4, 4).double()}
    slopes = {name: torch.zeros(2, 2).double() for name in found}
    starts = torch.tensor([True, False, False])
    for path in itertools.product(*[range(2)] * (2 * horizon)):
        states, actions = torch.tensor(path[:horizon]), torch.tensor(path[horizon:])
        weight = float(mdp.start[states[0]] * pi[states, actions].prod())
        weight *= float(p[states[:-1], actions[:-1], states[1:]].prod())
        exact = torch.stack([advantages[t][states[t], actions[t]] for t in range(horizon)])
        for name in found:
            objective = PolicyObjective.of_batch(
                Table(logits),
                of,
                states,
                actions,
                exact,
                estimator=name,  # type: ignore[arg-type]
                starts=starts,
                rewards=mdp.rewards[states, actions] if name == "dice" else None,
                gamma=gamma,
                normalize=False,
            )
            assert objective.estimator == name
            found[name] -= weight * horizon * dense(objective.family())[0]
            slopes[name] -= weight * horizon * objective.gradients()[0][0]
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(expected(leaf), leaf)
    hessian = torch.autograd.functional.hessian(expected, logits).reshape(4, 4)
    for name, matrix in found.items():
        assert torch.allclose(slopes[name], slope, atol=1e-10)
        assert torch.allclose(matrix, hessian, atol=1e-10)


def test_loaded_dice_without_dependencies_is_the_ratio_form() -> None:
    policy, x, actions, advantages = batch()
    ratio = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages)
    starts = torch.arange(64) % 16 == 0
    options: dict[str, Any] = {"estimator": "loaded-dice", "starts": starts}
    loose = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages, discount=1e-12, **options)
    tied = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages, **options)
    assert torch.allclose(dense(loose.family())[0], dense(ratio.family())[0], atol=1e-10)
    assert not torch.allclose(dense(tied.family())[0], dense(ratio.family())[0], atol=1e-2)


def test_episodes_do_not_depend_on_each_other() -> None:
    """Two episodes in one batch are the mean of both alone, discounts beginning anew."""
    policy, x, actions, rewards = batch(10)
    starts = torch.arange(10) == 0
    options: dict[str, Any] = {"estimator": "dice", "gamma": 0.8, "normalize": False}

    def of(chosen: slice, first: torch.Tensor) -> torch.Tensor:
        given = (x[chosen], actions[chosen], torch.zeros(len(x[chosen])).double())
        objective = PolicyObjective.of_batch(policy, evaluate, *given, starts=first, rewards=rewards[chosen], **options)
        return dense(objective.family())[0]

    both = starts.clone()
    both[5] = True
    halves = (of(slice(0, 5), starts[:5]) + of(slice(5, 10), starts[:5])) / 2
    assert torch.allclose(of(slice(0, 10), both), halves, atol=1e-12)
    assert not torch.allclose(of(slice(0, 10), starts), halves, atol=1e-3)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5)], ids=["batch norm", "dropout"])
def test_a_policy_in_training_mode_repeats_and_keeps_its_state(layer: nn.Module) -> None:
    """Buffers, gradients and random states are what they were; A and B see the same masks at every product."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = nn.Sequential(nn.Linear(4, 8), layer, nn.Tanh(), nn.Linear(8, 3)).double()
    g = torch.Generator().manual_seed(1)
    x, advantages = (torch.randn(32, *shape, generator=g, dtype=torch.float64) for shape in ((4,), ()))
    actions = torch.randint(3, (32,), generator=g)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in policy.parameters()]
    before = {name: t.clone() for name, t in policy.state_dict().items()}
    state = torch.get_rng_state()

    def of(net: Any, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = Categorical(logits=net(x))
        return found.log_prob(a), found.entropy()

    objective = PolicyObjective.of_batch(policy, of, x, actions, advantages)
    once, again = dense(objective.family()), dense(objective.family())
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert all(torch.allclose(m, m.T, atol=1e-12) for m in once)
    told = objective()
    with torch.random.fork_rng():
        torch.rand(7)  # as a training in between would draw
        assert objective() == told
    assert objective.covariance() == objective.covariance()
    objective.gradients()
    assert all(torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    assert all(p.grad is grad for p, grad in zip(policy.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_is_differentiated_twice() -> None:
    """The fused kernels have no second derivative: products against finite differences of the gradient."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
            return found

    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Attending().double()
    g = torch.Generator().manual_seed(0)
    x, actions = torch.randn(16, 5, 4, generator=g, dtype=torch.float64), torch.randint(3, (16,), generator=g)
    advantages = torch.randn(16, generator=g, dtype=torch.float64)
    with torch.no_grad():
        old = Categorical(logits=policy(x)).log_prob(actions)

    def losses(net: Any) -> tuple[torch.Tensor, torch.Tensor]:  # the ratio form, to a policy that stays while it moves
        found = Categorical(logits=net(x))
        return -(advantages * torch.exp(found.log_prob(actions) - old)).mean(), found.entropy().mean()

    objective = PolicyObjective(policy, losses, estimator="ratio")
    v = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in objective.parameters.values()]
    with objective.family().session() as product:
        exact = product(v)
    sides, step = [], 1e-5
    for sign in (1, -2, 1):
        with torch.no_grad():
            for p, d in zip(objective.parameters.values(), v, strict=True):
                p.add_(d, alpha=sign * step)
        sides.append(objective.gradients())
    for part, sign in ((0, 1.0), (1, -1.0)):  # B is minus the entropy's
        for found, plus, minus in zip(exact[part], sides[0][part], sides[1][part], strict=True):
            assert torch.allclose(found, sign * (plus - minus) / (2 * step), atol=1e-7)


def test_parameters_that_move_in_an_open_session_are_refused() -> None:
    policy, x, actions, advantages = batch()
    objective = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages)
    v = [torch.ones_like(p) for p in objective.parameters.values()]
    with objective.family().session() as product:
        product(v)
        with torch.no_grad():
            policy.actor.bias.add_(1.0)
        with pytest.raises(StaleOperatorError, match=r"actor\.bias"):
            product(v)


def test_the_value_function_is_left_out() -> None:
    policy, x, actions, advantages = batch()
    objective = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages)
    assert all(name.startswith(("body", "actor")) for name in objective.parameters)
    assert set(objective.left_out) == {name for name, _ in policy.named_parameters() if name.startswith("critic")}
    only = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages, params="actor.*")
    assert set(only.parameters) == {"actor.weight", "actor.bias"}


def test_products_are_symmetric_and_state_stays() -> None:
    policy, x, actions, advantages = batch()
    before = [p.clone() for p in policy.parameters()]
    state = torch.get_rng_state()
    objective = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages)
    a, b = dense(objective.family())
    assert torch.allclose(a, a.T, atol=1e-12)
    assert torch.allclose(b, b.T, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    found = affine_spectrum(objective.family())
    for alpha in (0.0, 0.01, 0.3, 1.0):
        truth = torch.linalg.eigvalsh(a + alpha * b)
        assert found.at(alpha).value == pytest.approx(float(truth[-1]), rel=5e-3)
        assert found.at(alpha).low - 1e-9 <= float(truth[-1]) <= found.at(alpha).high + 1e-9
        assert found.at(alpha, "smallest").value == pytest.approx(float(truth[0]), rel=2e-2)


def test_a_preconditioner_scales_both_sides() -> None:
    policy, x, actions, advantages = batch()
    objective = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages)
    scale = [torch.rand_like(p) + 0.5 for p in objective.parameters.values()]
    plain, scaled = dense(objective.family())[0], dense(objective.family(scale))[0]
    root = torch.cat([s.reshape(-1) for s in scale]).rsqrt()
    assert torch.allclose(scaled, root[:, None] * plain * root[None, :], atol=1e-12)


def test_a_free_log_std_makes_the_entropy_linear() -> None:
    class Gaussian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.log_std = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))

    def of(policy: Any, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = Normal(policy.mean(x), policy.log_std.exp())
        return found.log_prob(actions).sum(-1), found.entropy().sum(-1)

    torch.manual_seed(0)
    objective = PolicyObjective.of_batch(Gaussian(), of, torch.randn(32, 4), torch.randn(32, 2), torch.randn(32))
    a, b = dense(objective.family())
    assert float(b.abs().max()) == 0.0
    assert float(a.abs().max()) > 0
    assert objective.drift(lr=0.1, alpha=1.0) - objective.drift(lr=0.1, alpha=0.0) == pytest.approx(0.1 * 2, rel=1e-5)


def test_masked_tokens_change_nothing() -> None:
    policy, x, actions, advantages = batch()
    keep = torch.arange(64) < 40
    masked = PolicyObjective.of_batch(policy, evaluate, x, actions, advantages, mask=keep)
    alone = PolicyObjective.of_batch(policy, evaluate, x[:40], actions[:40], advantages[:40])
    assert masked() == pytest.approx(alone())
    assert masked.covariance() == pytest.approx(alone.covariance())
    for one, other in zip(dense(masked.family()), dense(alone.family()), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_the_covariance_says_where_entropy_goes() -> None:
    """To first order, on a table of logits: dH = -lr cov(log pi, pi A) summed over actions."""
    logits = torch.tensor([1.0, 0.2, -0.5]).double()
    pi = torch.softmax(logits, 0)
    rewards = torch.tensor([1.0, 0.3, 0.0]).double()  # likelier actions are better: entropy falls
    bandit = SoftmaxBandit(rewards)
    lr = 1e-6
    change = float(bandit.entropy(logits + lr * bandit.gradient(logits, 0.0)) - bandit.entropy(logits))
    weighted = pi * (rewards - pi @ rewards)
    covariance = float((pi * pi.log() * weighted).sum() - (pi * pi.log()).sum() * (pi * weighted).sum())
    assert change == pytest.approx(-lr * covariance, rel=1e-4)
    assert change < 0


def test_what_is_refused() -> None:
    policy, x, actions, advantages = batch()
    given = (policy, evaluate, x, actions, advantages)
    with pytest.raises(InvalidArgumentError, match="wrong Hessian"):
        PolicyObjective.of_batch(*given, estimator="log-prob")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="needs starts="):
        PolicyObjective.of_batch(*given, estimator="loaded-dice")
    starts = torch.ones(64).bool()
    for options in ({"estimator": "dice"}, {"rewards": advantages}, {"estimator": "dice", "rewards": advantages[:3]}):
        with pytest.raises(InvalidArgumentError, match="one reward for each action"):
            PolicyObjective.of_batch(*given, starts=starts, **options)
    with pytest.raises(InvalidArgumentError, match="gamma=0"):
        PolicyObjective.of_batch(*given, estimator="dice", starts=starts, rewards=advantages, gamma=0.0)
    with pytest.raises(InvalidArgumentError, match="one advantage for"):
        PolicyObjective.of_batch(policy, evaluate, x, actions, advantages[:3])
    with pytest.raises(InvalidArgumentError, match="mask"):
        PolicyObjective.of_batch(*given, mask=torch.zeros(64, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match="discount"):
        PolicyObjective.of_batch(*given, estimator="loaded-dice", starts=torch.ones(64).bool(), discount=0.0)
    with pytest.raises(InvalidArgumentError, match="sum over"):
        PolicyObjective.of_batch(policy, lambda p, x, a: (x, x), x, actions, advantages)
    with pytest.raises(NonFiniteError):
        PolicyObjective.of_batch(policy, evaluate, x, actions, advantages * math.nan, normalize=False)
    with pytest.raises(InvalidArgumentError, match="no parameter moves"):
        PolicyObjective(policy, lambda _: (torch.zeros(()), torch.zeros(())))
    with pytest.raises(InvalidArgumentError, match="of a batch"):
        PolicyObjective(policy, lambda p: (p.actor.weight.sum(), p.actor.bias.sum())).covariance()
    assert VectorSpace.of(list(policy.parameters())).numel > 0
