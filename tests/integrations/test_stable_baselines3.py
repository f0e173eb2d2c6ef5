"""The callback for stable-baselines3: training is the same with it, its numbers are the library's, flags come early."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

sb3 = pytest.importorskip("stable_baselines3")

from dyntune.errors import InvalidArgumentError  # noqa: E402
from dyntune.integrations.stable_baselines3 import (  # noqa: E402
    EntropyCallback,
    clip_factor,
    policy_objective,
    suggest_entropy_coef_for,
)

# A library of its own warnings: about GPUs, and gymnasium's about its registry.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def made(kind: str, **options: Any) -> Any:
    algorithm, environment, own = {
        "ppo": (sb3.PPO, "CartPole-v1", {"n_steps": 128, "batch_size": 32, "n_epochs": 2}),
        "a2c": (sb3.A2C, "CartPole-v1", {"n_steps": 16}),
        "gaussian": (sb3.PPO, "Pendulum-v1", {"n_steps": 64, "batch_size": 32, "n_epochs": 1}),
        "sac": (sb3.SAC, "Pendulum-v1", {"learning_starts": 40, "batch_size": 16, "train_freq": 8}),
    }[kind]
    common = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [16, 16]}}
    return algorithm("MlpPolicy", environment, **(common | own | options))


STEPS = {"ppo": 384, "a2c": 64, "gaussian": 192, "sac": 72}


@pytest.mark.parametrize("kind", list(STEPS))
def test_training_is_the_same_with_the_callback(kind: str) -> None:
    weights = []
    for callback in (None, EntropyCallback(overhead=1.0)):
        model = made(kind).learn(STEPS[kind], callback=callback)
        weights.append({k: v.clone() for k, v in model.policy.state_dict().items()})
    assert callback is not None
    assert callback.failure is None
    assert len(callback.readings) >= 2
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    last = callback.readings[-1]
    assert math.isfinite(last.entropy)
    assert 0 < last.clip_factor <= 1
    assert last.edge > 0 or kind == "sac"
    assert last.alpha == 0.0 or (kind == "sac" and 0.99 < last.alpha < 1.0)  # it begins at 1 and is learnt


class Seen(sb3.common.callbacks.BaseCallback):  # type: ignore[name-defined,misc]
    """Calls a function at the end of rollouts."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.found = function, []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.found.append(self.function(self.model))


def test_numbers_are_the_library_s_own() -> None:
    """The entropy that PPO logs, and the gradient norm that it clips, on the whole rollout in one batch."""
    norms: list[float] = []
    kept = torch.nn.utils.clip_grad_norm_

    def noting(parameters: Any, limit: float, **options: Any) -> Any:
        found = kept(parameters, limit, **options)
        norms.append(float(found))
        return found

    look = Seen(lambda m: (policy_objective(m)()[1], clip_factor(m)))
    model = made("ppo", n_epochs=1, batch_size=128, ent_coef=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
        model.learn(128, callback=look)
    ((entropy, factor),) = look.found
    assert entropy == pytest.approx(-model.logger.name_to_value["train/entropy_loss"], rel=1e-5)
    assert factor == pytest.approx(min(1.0, model.max_grad_norm / norms[0]), rel=1e-4)


def test_a_suggestion_inside_a_training() -> None:
    look = Seen(lambda m: suggest_entropy_coef_for(m, max_products=30) if m._n_updates else None)
    made("ppo", ent_coef=0.01).learn(256, callback=look)
    found = look.found[-1]
    assert found.lr == pytest.approx(3e-4)
    assert found.clip_factor is not None
    assert found.low <= found.value <= found.high
    assert found.value == 0.01
    assert not found.linear
    gaussian = Seen(lambda m: suggest_entropy_coef_for(m, max_products=30) if m._n_updates else None)
    made("gaussian").learn(128, callback=gaussian)
    assert gaussian.found[-1].linear  # log_std is a parameter of its own


def test_after_a_training_the_buffer_is_flat_and_says_the_same() -> None:
    look = Seen(lambda m: policy_objective(m).batch["advantages"])
    model = made("ppo").learn(128, callback=look)
    assert torch.allclose(policy_objective(model).batch["advantages"], look.found[-1])
    with pytest.raises(InvalidArgumentError, match="not full"):
        policy_objective(made("ppo"))
    with pytest.raises(InvalidArgumentError, match="empty"):
        policy_objective(made("sac"))
    with pytest.raises(InvalidArgumentError, match="known are PPO"):
        policy_objective(sb3.DQN("MlpPolicy", "CartPole-v1", device="cpu"))
    for wrong in ({"every": 0}, {"overhead": 0.0}):
        with pytest.raises(InvalidArgumentError):
            EntropyCallback(**wrong)


def test_flags_come_in_the_first_tenth_and_not_for_what_is_well() -> None:
    """A training of 10,240 steps: 1,024 of them, eight rollouts."""

    def flags(**options: Any) -> list[str]:
        callback = EntropyCallback(overhead=1.0)
        made("ppo", n_epochs=10, **options).learn(1024, callback=callback)
        return [line for reading in callback.readings for line in reading.warnings]

    assert flags() == []
    assert flags(ent_coef=0.01, learning_rate=1e-3) == []
    assert any("outweighs" in line for line in flags(ent_coef=10.0))
    assert any("collapsed" in line or "fell" in line for line in flags(learning_rate=0.1))


def test_a_callback_that_fails_does_not_end_a_training() -> None:
    callback = EntropyCallback(overhead=1.0)
    model = made("ppo")
    with torch.no_grad():
        model.policy.action_net.weight.fill_(0.0)
    original = model.policy.evaluate_actions

    def broken(*given: Any) -> Any:
        values, log_prob, entropy = original(*given)
        return values, log_prob * math.nan if callback.spent == 0 else log_prob, entropy

    model.policy.evaluate_actions = broken
    model.learn(128, callback=callback)
    assert callback.failure is not None
    assert callback.readings == []
    assert np.isfinite(callback.spent)


def test_the_figure() -> None:
    callback = EntropyCallback(overhead=1.0)
    made("ppo").learn(256, callback=callback)
    figure = callback.plot().get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    assert len(figure.axes) == 3
