"""The judge trains as a plain loop with torch.optim does, and stops where it says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.lr import judge
from benchmarks.lr.scenario import Scenario

SCENARIO = Scenario(
    *("judged", "digits/mlp-relu", "tune", "adamw"),
    **{"batch": 64, "steps": 40, "width": 16, "warmup": 5, "clip": 1.0, "weight_decay": 0.1},
    model=(("dropout", 0.1),),
)


def plain_loop(scenario: Scenario, lr: float, seed: int) -> list[tuple[float, float]]:
    """Losses on the fixed rows after every step, written down without the judge."""
    model = scenario.new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=scenario.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scenario.factor)
    loader, data, losses = scenario.loader(seed), scenario.data(), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(losses) < scenario.steps:
            for x, y in loader:
                if len(losses) == scenario.steps:
                    break
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
                optimizer.step()
                schedule.step()
                model.eval()
                with torch.no_grad():
                    on_train = torch.nn.functional.cross_entropy(model(data.x[:512]), data.y[:512])
                    on_val = torch.nn.functional.cross_entropy(model(data.x_val[:512]), data.y_val[:512])
                model.train()
                losses.append((float(on_train), float(on_val)))
    return losses


def test_judge_is_a_plain_loop():
    run = judge.train(SCENARIO, 0.01, 3)
    losses = plain_loop(SCENARIO, 0.01, 3)
    expected = [sum(losses[step - 1][i] for step in (38, 39, 40)) / 3 for i in (0, 1)]  # 95%, 97.5% and all of 40
    # The judge uses torch's fused kernel: 40 steps of another rounding, in single precision.
    assert (run.train, run.val) == pytest.approx(expected, rel=1e-4)
    assert run.failed == judge.OK
    assert run.peak < 2 * run.initial


def test_initial_losses_are_those_of_the_untrained_model():
    run = judge.train(SCENARIO, 0.01, 3)
    assert (run.initial, run.initial_val) == judge.evaluate(SCENARIO, SCENARIO.new_model(3))
    assert run.initial == pytest.approx(math.log(10), rel=0.1)


def test_the_seed_decides_everything_and_nothing_else_moves():
    before = torch.random.get_rng_state()
    assert judge.train(SCENARIO, 0.01, 3) == judge.train(SCENARIO, 0.01, 3)
    assert judge.train(SCENARIO, 0.01, 4) != judge.train(SCENARIO, 0.01, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_peak_ends_the_run():
    run = judge.train(dataclasses.replace(SCENARIO, clip=None, warmup=0), 0.3, 0)
    assert run.failed == judge.PEAK
    assert run.train == run.val == math.inf
    assert 2 * run.initial < run.peak < 100 * run.initial  # the first window above it, not the height of the blow-up


def test_a_loss_that_is_not_finite_ends_the_run():
    exploding = dataclasses.replace(SCENARIO, family="diabetes/mlp-gelu", loss="regression", optimizer="sgd", clip=None)
    run = judge.train(dataclasses.replace(exploding, batch=4), 1e30, 0)
    assert run.failed == judge.NON_FINITE
    assert run.peak == math.inf  # known at once, before a window is full


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_keeps_the_mode(training):
    model = SCENARIO.new_model(0).train(training)
    assert judge.evaluate(SCENARIO, model) == judge.evaluate(SCENARIO, model)
    assert model.training is training
