"""A thousand measurements in the middle of training: parameters, states and draws stay the same bits."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dyntune.errors import DyntuneError
from tests.neutrality.measurements import MEASUREMENTS
from tests.neutrality.state import everything, values
from tests.neutrality.workloads import WORKLOADS, Training
from tests.objective.snapshot import changes


@contextmanager
def seeded() -> Iterator[None]:
    """All global generators at a known place; put back afterwards, as the order of tests is random."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def trained(build: Callable[[], Training], count: int, measure: Iterator[str] | None) -> tuple[Training, dict, int]:
    """Train `count` steps with a measurement at every stop, after the first step; how many there were."""
    with seeded():
        training, done = build(), 0
        for stop in training.steps(count):
            if measure is None or not training.losses:
                continue
            name = next(measure)
            before = everything(training.model, *training.company)
            try:
                MEASUREMENTS[name](training.subject)
                assert name not in training.subject.unsupported
            except DyntuneError:
                if name not in training.subject.unsupported:
                    raise
            assert changes(before, everything(training.model, *training.company)) == [], (name, stop)
            done += 1
        return training, values(training.model, *training.company), done


def check(build: Callable[[], Training], steps: int, measure: Iterator[str]) -> int:
    """The same run with and without measurements; how many there were."""
    undisturbed, expected, _ = trained(build, steps, None)
    measured, found, done = trained(build, steps, measure)
    assert changes(expected, found) == []
    assert torch.equal(torch.stack(undisturbed.losses), torch.stack(measured.losses))
    return done


@pytest.mark.parametrize("name", WORKLOADS)
def test_training_with_measurements_is_the_same_training(name):
    place = list(WORKLOADS).index(name)
    turns = itertools.cycle([*MEASUREMENTS][place:] + [*MEASUREMENTS][:place])  # over all models all measurements
    assert check(WORKLOADS[name], 2, turns) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_with_a_thousand_measurements(name):
    """1,000 and more over all models: 22 steps of three or more stops, the first step without."""
    assert check(WORKLOADS[name], 22, itertools.cycle(MEASUREMENTS)) >= 84


def test_which_hooks_of_the_users_run():
    """Those around forward and backward, as they may be part of the function; none that belongs to training."""
    training = WORKLOADS["mlp"]()
    model, optimizer = training.model, training.optimizer
    for _ in training.steps(1):
        pass
    calls: Counter[str] = Counter()
    model.register_forward_hook(lambda *_: calls.update(["forward"]))
    model.first.weight.register_hook(lambda _: calls.update(["gradient"]))
    model.first.weight.register_post_accumulate_grad_hook(lambda _: calls.update(["accumulated"]))
    optimizer.register_step_pre_hook(lambda *_: calls.update(["step"]))
    optimizer.register_step_post_hook(lambda *_: calls.update(["step"]))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.update(["state dict"]))
    for measure in MEASUREMENTS.values():
        measure(training.subject)
    assert calls.keys() == {"forward", "gradient"}
