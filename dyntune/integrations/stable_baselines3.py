"""Stability and entropy of a policy while stable-baselines3 trains it: :class:`EntropyCallback`.

Measured at the end of a rollout, before ``train()``, where the ratio is one. Nothing moves: ``rollout_buffer.get()``
would draw from NumPy's global generator and change the training (measured: parameters differ by 0.015 after 1,024
steps), so that arrays are read directly; SAC's actions are drawn with a generator state of their own, which is put
back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dyntune.curvature.eigenvalues import eigenvalues
from dyntune.errors import DyntuneError, InvalidArgumentError, MissingDependencyError
from dyntune.numerics.affine import AffineFamily
from dyntune.objective.state import preserved_rng
from dyntune.rl.policy import PolicyObjective
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import threshold
from dyntune.suggest.entropy_coef import suggest_entropy_coef
from dyntune.suggest.entropy_rule import EntropyCoefficient

if TYPE_CHECKING:
    from matplotlib.axes import Axes

try:
    from gymnasium import spaces
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
except ImportError as error:
    raise MissingDependencyError(
        "the stable-baselines3 callback needs stable-baselines3, which is not installed: pip install 'dyntune[rl]'."
    ) from error

__all__ = ["EntropyCallback", "EntropyReading", "policy_objective", "suggest_entropy_coef_for"]

# A reading costs the training more than its own clock says (caches and memory to fill again): 1.4 times (0.9 to 1.8) as
# measured by benchmarks/rl/overhead.py with 3% by that clock.
COUNTED = 1.8
ROWS = 512  # of a rollout, evenly spread: an eigenvalue to some percent takes no more
# Budget and accuracy of the eigenvalue at the coefficient in use: a reading says which side of the edge it is on.
PRODUCTS, RTOL = 30, 0.1
COLLAPSED = 0.05  # of the largest entropy of a discrete policy: one action has 99% of the mass, of two
FALL = 0.5  # of the entropy, from one reading to the next
# Entropy held at its largest by a bonus whose range, alpha log A, is above a standard deviation of the advantages,
# which PPO makes 1. At that balance the entropy stands still, so that drift and balance do not show it.
PINNED, PATIENCE = 0.998, 3


@dataclass(frozen=True, kw_only=True)
class EntropyReading:
    """What was read at the end of one rollout.

    Args:
        step: Environment steps so far.
        alpha: Entropy coefficient in use.
        entropy: Mean entropy on the rollout, nats.
        drift: Change of it in one step, to first order.
        balance: Coefficient at which it stands still; NaN where it has no gradient.
        edge: Largest eigenvalue times learning rate over the threshold: 1 is the edge; NaN before the optimizer has
            stepped.
        clip_factor: By which the global clip shortens the gradient.
        warnings: What speaks for a collapse or an instability.
    """

    step: int
    alpha: float
    entropy: float
    drift: float
    balance: float
    edge: float
    clip_factor: float
    warnings: tuple[str, ...]


class EntropyCallback(BaseCallback):
    """Reads entropy, its drift and the distance from the edge of stability at the end of rollouts.

    For PPO, A2C and SAC. Readings are in ``callback.readings`` and in the algorithm's logger under ``dyntune/``;
    warnings are also printed where ``verbose`` is 1. Training is the same, bit by bit, with and without it.

    Args:
        every: Rollouts between two readings, at least.
        overhead: Share of the training's time that readings may take; they are left out where they would take more.
            The first ones come at once; 1 leaves none out.
        verbose: 1 prints warnings as they come.

    Raises:
        InvalidArgumentError: A number outside its range.

    Cost:
        Some thirty Hessian-vector products on 512 rows for each reading.

    Example:
        >>> callback = EntropyCallback(every=1)
        >>> callback.readings
        []
    """

    def __init__(self, *, every: int = 1, overhead: float = 0.03, verbose: int = 0) -> None:
        super().__init__(verbose)
        if every < 1 or not 0 < overhead <= 1:
            raise InvalidArgumentError(f"every={every} is at least 1, and overhead={overhead} a share in (0, 1].")
        self.readings: list[EntropyReading] = []
        self.failure: DyntuneError | None = None
        self.spent = 0.0
        self._every, self._overhead = every, overhead
        self._rollouts, self._began, self._last = 0, 0.0, 0.0

    def _on_training_start(self) -> None:
        self._began = time.perf_counter() - (0.0 if not self.spent else COUNTED * self.spent / self._overhead)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        elapsed = time.perf_counter() - self._began
        due = (self._rollouts - 1) % self._every == 0
        if (
            not due
            or self.failure is not None
            or (self.readings and self._overhead < 1 and COUNTED * (self.spent + self._last) > self._overhead * elapsed)
        ):
            return
        began = time.perf_counter()
        try:
            with preserved_rng():
                reading = self._read()
        except DyntuneError as error:  # a measurement never ends a training; it is told once, and not tried again
            self.failure = error
            self.logger.record("dyntune/failure", str(error), exclude="tensorboard")
            return
        finally:
            self._last = time.perf_counter() - began
            self.spent += self._last
        if reading is None:
            return
        self.readings.append(reading)
        for name, value in asdict(reading).items():
            if isinstance(value, float) and math.isfinite(value):
                self.logger.record(f"dyntune/{name}", value)
        if self.verbose:
            for line in reading.warnings:
                print(f"dyntune, step {reading.step}: {line}")  # noqa: T201 - as the library's own verbose does

    def _read(self) -> EntropyReading | None:
        model: Any = self.model
        if isinstance(model, OffPolicyAlgorithm):
            buffer = model.replay_buffer
            if buffer is None or buffer.size() < model.batch_size:
                return None
        objective, optimizer = policy_objective(model), _optimizer(model)
        alpha, stepped = coefficient(model), bool(optimizer.state)
        scale = diagonal_scale(optimizer, list(objective.parameters.values())) if stepped else None
        factor = clip_factor(model)
        lr = float(optimizer.param_groups[0]["lr"]) * factor
        entropy = objective()[1]
        edge = math.nan
        limit = threshold(optimizer).value
        if stepped and limit is not None:
            edge = lr * _largest(objective.family(scale), alpha) / limit
        balance = objective.balance(scale)
        return EntropyReading(
            step=self.num_timesteps,
            alpha=alpha,
            entropy=entropy,
            drift=objective.drift(lr=lr, alpha=alpha, scale=scale),
            balance=balance,
            edge=edge,
            clip_factor=factor,
            warnings=self._warnings(model, entropy=entropy, alpha=alpha, edge=edge),
        )

    def _warnings(self, model: Any, *, entropy: float, alpha: float, edge: float) -> tuple[str, ...]:
        lines = []
        if edge > 1:
            lines.append(f"unstable: {edge:.3g} times the edge. Lower the learning rate")
        largest = math.log(model.action_space.n) if isinstance(model.action_space, spaces.Discrete) else None
        before = self.readings[-1].entropy if self.readings else None
        if largest is not None and entropy < COLLAPSED * largest:
            lines.append(
                f"entropy collapsed: {entropy:.3g} of {largest:.3g} nats. Lower the learning rate, or raise the bonus"
            )
        elif largest is not None and before is not None and entropy < FALL * before:
            lines.append(f"entropy fell from {before:.3g} to {entropy:.3g} nats since the last reading")
        if largest is not None and alpha * largest > 1:
            recent = [
                *(r.entropy for r in self.readings[1:][1 - PATIENCE :]),
                entropy,
            ]  # the first is the untrained one
            if len(recent) >= PATIENCE and min(recent) >= PINNED * largest:
                lines.append(
                    f"the bonus outweighs the reward: entropy stays at {entropy / largest:.1%} of its largest. "
                    "Lower the coefficient"
                )
        return tuple(lines)

    def plot(self) -> Axes:
        """Draw entropy, drift and the share of the edge over training (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_entropy

        rows = self.readings
        return plot_entropy(
            [r.step for r in rows],
            [r.entropy for r in rows],
            [r.drift for r in rows],
            ratio=[r.edge for r in rows],
        )


def policy_objective(model: BaseAlgorithm, *, rows: int = ROWS, seed: int = 0) -> PolicyObjective:
    """The policy objective of PPO, A2C or SAC on what it has just collected; nothing of it moves.

    Args:
        model: With a full rollout buffer (PPO, A2C: from a callback's ``_on_rollout_end``), or a replay buffer (SAC).
        rows: Most transitions, evenly spread (SAC: drawn).
        seed: Of SAC's rows and of the noise of its actions, which stays the same in every product.

    Raises:
        InvalidArgumentError: Another algorithm, or nothing collected yet.
    """
    if isinstance(model, OnPolicyAlgorithm):
        return _of_rollout(model, rows)
    if isinstance(model, OffPolicyAlgorithm) and hasattr(model.policy, "actor") and hasattr(model, "ent_coef"):
        return _of_replay(model, rows, seed)
    raise InvalidArgumentError(f"{type(model).__name__}: known are PPO, A2C (on-policy) and SAC.")


def suggest_entropy_coef_for(model: BaseAlgorithm, **options: Any) -> EntropyCoefficient:
    """:func:`dyntune.suggest_entropy_coef` for a stable-baselines3 algorithm, in the middle of a callback or after it.

    Args:
        model: As for :func:`policy_objective`; its optimizer has stepped.
        **options: Of :func:`dyntune.suggest_entropy_coef`; the learning rate, the optimizer, the coefficient in use and
            the clip are read off the model.
    """
    optimizer = _optimizer(model)
    given: dict[str, Any] = {
        "lr": float(optimizer.param_groups[0]["lr"]),
        "optimizer": optimizer,
        "present": coefficient(model),
    }
    factor = clip_factor(model)
    if factor < 1:
        given |= {"clip_norm": factor, "gradient_norm": 1.0}
    with preserved_rng():
        return suggest_entropy_coef(policy_objective(model), **(given | options))


def coefficient(model: Any) -> float:
    """The entropy coefficient in use; SAC's own where it is learnt."""
    learnt = getattr(model, "log_ent_coef", None)
    if learnt is not None:
        return float(learnt.detach().exp())
    return float(model.ent_coef)


def clip_factor(model: Any, *, rows: int = ROWS) -> float:
    """By which the clip of the whole gradient's norm shortens it on the present rollout; 1 where there is none."""
    if not isinstance(model, OnPolicyAlgorithm):
        return 1.0
    observations, actions, advantages, keep = _rollout(model, rows)
    returns = torch.as_tensor(_flat(model.rollout_buffer.returns)[keep], device=model.device)
    if getattr(model, "normalize_advantage", False) and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    with torch.enable_grad():
        values, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
        bonus = -log_prob.mean() if entropy is None else entropy.mean()
        error = torch.nn.functional.mse_loss(returns, values.flatten())
        loss = -(advantages * log_prob).mean() - coefficient(model) * bonus + model.vf_coef * error
        found = torch.autograd.grad(loss, [p for p in model.policy.parameters() if p.requires_grad], allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))
    return min(1.0, float(model.max_grad_norm) / norm) if norm > 0 else 1.0


def _optimizer(model: Any) -> torch.optim.Optimizer:
    """What steps the policy."""
    found: torch.optim.Optimizer = model.actor.optimizer if hasattr(model, "actor") else model.policy.optimizer
    return found


def _flat(array: np.ndarray) -> np.ndarray:
    """(steps, environments, ...) as rows, an environment after the other: as the buffer itself flattens."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])


def _rollout(model: Any, rows: int) -> tuple[Any, torch.Tensor, torch.Tensor, np.ndarray]:
    """Observations, actions and advantages of evenly spread rows, and which they are."""
    buffer = model.rollout_buffer
    if not buffer.full:
        raise InvalidArgumentError("the rollout buffer is not full: ask from a callback's _on_rollout_end.")
    flat = (lambda x: x) if buffer.generator_ready else _flat  # train() flattens the buffer in place
    count = buffer.buffer_size * buffer.n_envs
    keep = np.unique(np.linspace(0, count - 1, min(rows, count)).round().astype(int))
    raw = buffer.observations
    pick: Callable[[np.ndarray], torch.Tensor] = lambda x: torch.as_tensor(flat(x)[keep], device=model.device)  # noqa: E731
    observations = {k: pick(v) for k, v in raw.items()} if isinstance(raw, dict) else pick(raw)
    actions = pick(buffer.actions)
    if isinstance(model.action_space, spaces.Discrete):
        actions = actions.long().flatten()
    return observations, actions, pick(buffer.advantages).flatten(), keep


def _of_rollout(model: Any, rows: int) -> PolicyObjective:
    observations, actions, advantages, _ = _rollout(model, rows)

    def evaluate(policy: Any, x: Any, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, log_prob, entropy = policy.evaluate_actions(x, a)
        return log_prob, -log_prob if entropy is None else entropy

    normalize = bool(getattr(model, "normalize_advantage", False))
    return PolicyObjective.of_batch(model.policy, evaluate, observations, actions, advantages, normalize=normalize)


def _of_replay(model: Any, rows: int, seed: int) -> PolicyObjective:
    """SAC's actor at the present critic, with one draw of noise that stays."""
    buffer = model.replay_buffer
    count = buffer.size()
    if count == 0:
        raise InvalidArgumentError("the replay buffer is empty: nothing was collected yet.")
    with preserved_rng():
        np.random.seed(seed)
        chosen = np.random.default_rng(seed).integers(0, count, size=min(rows, count))
        observations = buffer._get_samples(chosen, env=model._vec_normalize_env).observations

    def losses(actor: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with preserved_rng():
            torch.manual_seed(seed)
            actions, log_prob = actor.action_log_prob(observations)
        values, _ = torch.cat(model.critic(observations, actions), dim=1).min(dim=1)
        return -values.mean(), -log_prob.mean()

    return PolicyObjective(model.actor, losses, estimator="exact")


def _largest(family: AffineFamily, alpha: float) -> float:
    """Largest eigenvalue at one coefficient."""
    space = family.space
    with family.session() as product:

        def times(vector: torch.Tensor) -> torch.Tensor:
            a, b = product(space.unflatten(vector))
            return torch.cat([(x + alpha * y).reshape(-1) for x, y in zip(a, b, strict=True)])

        start = torch.ones(space.numel, dtype=space.dtype, device=space.device)
        found = eigenvalues((times, space.numel), 1, rtol=RTOL, max_products=PRODUCTS, start=start)
    return float(found.values[0])
