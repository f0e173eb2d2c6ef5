"""A learning rate for PPO by short trainings: the useless and the broken are not taken, and nothing moves outside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from dyntune.errors import InvalidArgumentError
from dyntune.integrations.stable_baselines3_lr import suggest_lr_for
from dyntune.records import Status

pytestmark = pytest.mark.filterwarnings("ignore")  # gymnasium's and stable-baselines3's own


def make(lr: float, seed: int) -> OnPolicyAlgorithm:
    return PPO("MlpPolicy", "CartPole-v1", learning_rate=lr, n_steps=512, seed=seed, device="cpu")


def test_a_rate_that_learns_is_taken_over_one_that_stands_still_and_one_that_breaks() -> None:
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state().clone())
    found = suggest_lr_for(make, rates=(1e-7, 1e-3, 1e3), rollouts=3, rounds=2, num_seeds=2)
    assert float(found.lr) == 1e-3
    assert found.lr.status is Status.OK
    assert found.entropy is not None
    assert found.entropy.lr == pytest.approx(1e-3, rel=1)  # after the clip's factor
    assert found.steps == 512 * 2 * (3 * 3 + 2 * 3)  # the broken one may have stopped: then this fails
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_best_rate_at_the_end_is_uncertain() -> None:
    found = suggest_lr_for(make, rates=(1e-7, 1e-3), rollouts=3, rounds=1, num_seeds=2)
    assert found.lr.status is Status.UNCERTAIN
    assert "at an end" in found.lr.reason
    assert "1e-07" in found.lr.explain()


def test_a2c_works_and_sac_is_refused() -> None:
    def quick(lr: float, seed: int) -> OnPolicyAlgorithm:
        return A2C("MlpPolicy", "CartPole-v1", learning_rate=lr, n_steps=64, seed=seed, device="cpu")

    assert float(suggest_lr_for(quick, rates=(1e-4, 1e-3), rollouts=2, rounds=1, num_seeds=1).lr) in (1e-4, 1e-3)
    with pytest.raises(InvalidArgumentError, match="SAC"):
        suggest_lr_for(lambda lr, seed: SAC("MlpPolicy", "Pendulum-v1", device="cpu"))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "wrong", [{"rates": (1e-3,)}, {"rates": (0.0, 1e-3)}, {"rollouts": 0}, {"num_seeds": 0}, {"rounds": 0}]
)
def test_numbers_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        suggest_lr_for(make, **wrong)  # type: ignore[arg-type]
