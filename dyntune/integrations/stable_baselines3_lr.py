"""A learning rate for PPO and A2C by short trainings: :func:`suggest_lr_for`.

The edge of stability does not choose it: healthy runs of PPO sit at a thousandth of theirs, since the clip and the
bounded ratio end an update long before curvature does. What remains is to try, with the seeds paired, halving the
candidates as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from dyntune.errors import DyntuneError, InvalidArgumentError
from dyntune.integrations.stable_baselines3 import suggest_entropy_coef_for
from dyntune.objective.state import preserved_rng
from dyntune.records import Recommendation, Status
from dyntune.suggest.entropy_rule import EntropyCoefficient
from dyntune.suggest.one_error_rule import CarefulChoice, careful_choice

__all__ = ["PolicyTraining", "suggest_lr_for"]

# Half decades around stable-baselines3's default of 3e-4, one below it and three above.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RULE = (
    "short trainings at every rate with the same seeds, the better half goes on; of the last ones the lowest rate that "
    "is not worse than the best by more than a standard error"
)
SOURCES = (
    "Karnin, Koren, Somekh (2013) and Jamieson, Talwalkar (2016), arXiv:1502.07943 (successive halving)",
    "Breiman et al. (1984), section 3.4.3 (one standard error)",
)


@dataclass(frozen=True, kw_only=True)
class PolicyTraining:
    """A learning rate and an entropy coefficient for a policy.

    Args:
        lr: The rate, with the scores of all rates as its evidence.
        entropy: The coefficient at that rate, measured at the end of its short training; None where it could not be.
        scores: Rate -> score of each seed in its last round.
        steps: Environment steps spent.
    """

    lr: Recommendation
    entropy: EntropyCoefficient | None
    scores: dict[float, tuple[float, ...]]
    steps: int

    def __str__(self) -> str:
        return f"{self.lr}\n{'no entropy coefficient' if self.entropy is None else self.entropy}"


class _Episodes(BaseCallback):
    """Ends and returns of episodes, over all environments."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[int] = []
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.ends.append(self.num_timesteps)
                self.returns.append(float(info["episode"]["r"]))
        return True

    def score(self, first: int, last: int) -> float:
        """Mean over steps from `first` to `last` of the return of the episode that had ended last; NaN without one."""
        if not self.ends:
            return math.nan
        # Before the first end there is nothing to say: that episode's return counts from the beginning.
        times = np.clip(np.concatenate([[0], self.ends[1:], [last]]), first, last)
        weights = np.diff(times)
        return float(np.average(self.returns, weights=weights)) if weights.sum() else math.nan


@dataclass
class _Pilot:
    model: OnPolicyAlgorithm
    episodes: _Episodes
    failed: bool = False

    def go_on(self, rollouts: int) -> float:
        """Train for so many rollouts more; the score over them, NaN for a training that broke."""
        size = self.model.n_steps * self.model.n_envs
        first = self.model.num_timesteps
        if not self.failed:
            try:
                self.model.learn(rollouts * size, callback=self.episodes, reset_num_timesteps=False)
            except ValueError:  # the distribution's check of its own parameters: they are NaN
                self.failed = True
        return math.nan if self.failed else self.episodes.score(first, self.model.num_timesteps)


def suggest_lr_for(
    make: Callable[[float, int], OnPolicyAlgorithm],
    *,
    rates: Sequence[float] = RATES,
    rollouts: int = 2,
    rounds: int = 3,
    num_seeds: int = 3,
    seed: int = 0,
    entropy_options: dict[str, Any] | None = None,
) -> PolicyTraining:
    """A learning rate for PPO or A2C from short trainings with paired seeds, and the entropy coefficient at it.

    Args:
        make: ``(lr, seed) -> model``: an untrained algorithm, its environment seeded by the same number. Environments
            report episodes through ``Monitor``, which stable-baselines3 adds by itself.
        rates: Candidates, at least two, positive.
        rollouts: In every round, for each candidate that is left.
        rounds: After each the better half goes on.
        num_seeds: Trainings of each candidate.
        seed: The first one.
        entropy_options: For :func:`suggest_entropy_coef_for` on the chosen rate's trained model.

    Returns:
        The rate with the scores behind it, and the coefficient. The status is UNCERTAIN where the best candidate is at
        an end of `rates`, and always where one seed was asked for.

    Raises:
        InvalidArgumentError: A number outside its range, or no candidate that finished an episode without breaking.

    Accuracy:
        ``benchmarks/rl/suggested.py``: against a brute force on CartPole and Acrobot, see docs/results/entropy.
    Cost:
        With five rates, the defaults and halves rounded up: (5 + 3 + 2) times `rollouts` for each seed.
    Assumes:
        That what learns fastest in the first rollouts does so later: a rate that breaks only late is not seen.
    Source:
        Karnin, Koren, Somekh (2013): successive halving; Breiman et al. (1984): one standard error.

    Example:
        >>> from stable_baselines3 import PPO
        >>> def make(lr, seed):
        ...     return PPO("MlpPolicy", "CartPole-v1", learning_rate=lr, n_steps=128, seed=seed, device="cpu")
        >>> found = suggest_lr_for(make, rates=(1e-5, 1e-3), rollouts=1, rounds=1, num_seeds=2)
        >>> found.steps
        512
    """
    rates = tuple(sorted({float(r) for r in rates}))
    if len(rates) < 2 or not all(0 < r < math.inf for r in rates):
        raise InvalidArgumentError(f"rates={rates}: a comparison takes two different positive rates at least.")
    for name, value in (("rollouts", rollouts), ("rounds", rounds), ("num_seeds", num_seeds)):
        if value < 1:
            raise InvalidArgumentError(f"{name}={value}: at least 1.")
    with preserved_rng():  # an algorithm seeds Python's, NumPy's and torch's global generators
        return _suggest(make, rates, rollouts, rounds, num_seeds, seed, entropy_options or {})


def _suggest(
    make: Callable[[float, int], OnPolicyAlgorithm],
    rates: tuple[float, ...],
    rollouts: int,
    rounds: int,
    num_seeds: int,
    seed: int,
    entropy_options: dict[str, Any],
) -> PolicyTraining:
    seeds = range(seed, seed + num_seeds)
    pilots: dict[tuple[float, int], _Pilot] = {}
    scores: dict[float, tuple[float, ...]] = {}
    left, choice = rates, None
    for _ in range(rounds):
        for rate in left:
            for s in seeds:
                if (rate, s) not in pilots:
                    pilots[rate, s] = _Pilot(_checked(make(rate, s)), _Episodes())
            scores[rate] = tuple(pilots[rate, s].go_on(rollouts) for s in seeds)
        choice = careful_choice({rate: scores[rate] for rate in left})
        ranked = sorted(choice.mean, key=lambda r: -choice.mean[r])
        left = tuple(sorted(ranked[: max(2, math.ceil(len(left) / 2))]))
    assert choice is not None
    steps = sum(p.model.num_timesteps for p in pilots.values())
    cost = float(sum(p.model._n_updates for p in pilots.values()))
    return PolicyTraining(
        lr=_recommendation(rates, choice, scores, cost=cost, seeds=num_seeds),
        entropy=_entropy(pilots[choice.chosen, seed].model, entropy_options),
        scores=scores,
        steps=steps,
    )


def _checked(model: OnPolicyAlgorithm) -> OnPolicyAlgorithm:
    if not isinstance(model, OnPolicyAlgorithm):
        raise InvalidArgumentError(
            f"make() returned {type(model).__name__}: PPO and A2C have rollouts to compare rates over."
        )
    if isinstance(model.action_space, spaces.Dict):
        raise InvalidArgumentError("an action space of type Dict: stable-baselines3 has no policy for it.")
    return model


def _entropy(model: OnPolicyAlgorithm, options: dict[str, Any]) -> EntropyCoefficient | None:
    try:
        return suggest_entropy_coef_for(model, **options)
    except DyntuneError:
        return None  # told by the field being None; the rate stands without it


def _recommendation(
    rates: tuple[float, ...],
    choice: CarefulChoice,
    scores: dict[float, tuple[float, ...]],
    *,
    cost: float,
    seeds: int,
) -> Recommendation:
    reasons = []
    if choice.best in (rates[0], rates[-1]):
        reasons.append(f"the best rate, {choice.best:g}, is at an end of those tried")
    if seeds == 1:
        reasons.append("with one seed differences have no error")
    evidence: dict[str, Any] = {
        f"score at {r:g}": float(np.mean(s)) if np.isfinite(s).all() else "broke, or ended no episode"
        for r, s in sorted(scores.items())
    }
    return Recommendation(
        knob="learning rate",
        value=choice.chosen,
        low=choice.tied[0],
        high=choice.tied[-1],
        level=None,
        status=Status.UNCERTAIN if reasons else Status.OK,
        reason="; ".join(reasons),
        rule=RULE,
        sources=SOURCES,
        evidence=evidence | {"best": choice.best},
        checks=(f"{seeds} seeds, the same for every rate",),
        cost=cost,
    )
