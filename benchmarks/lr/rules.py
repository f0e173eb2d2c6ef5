"""Learning rates that need no tool: constants, chance, and a naive sweep."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from benchmarks.lr.metrics import loss_at
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.scenarios import select
from benchmarks.lr.search import lr_of
from benchmarks.lr.verdict import sweep_of

TORCH_DEFAULTS = {"sgd": 1e-3, "momentum": 1e-3, "nesterov": 1e-3}
TORCH_DEFAULTS |= {"rmsprop": 1e-2, "adam": 1e-3, "adamw": 1e-3, "nadam": 2e-3}
USUAL = {"sgd": 0.1, "momentum": 0.1, "nesterov": 0.1, "rmsprop": 1e-3, "adam": 1e-3, "adamw": 1e-3, "nadam": 1e-3}
LRS, STEPS, LAST = 9, 15, 5  # the naive sweep: nine runs of fifteen steps, judged by the last five
CAUTION = 0.3  # of its pick: the multiple of the issue that this benchmark answers

Rule = Callable[[Scenario, int], float | None]


def fit_constants(sweeps: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Per optimizer the one LR with the smallest mean interpolated training regret over the tune half."""
    constants = {}
    for optimizer in TORCH_DEFAULTS:
        curves = []
        for scenario in select(half="tune"):
            if scenario.optimizer == optimizer:
                sweep = sweep_of(scenario, sweeps)
                initial = float(np.mean([run.initial for run in sweep.at(sweep.best)]))
                curves.append((sweep.curve(), loss_at(sweep.curve(), sweep.best), initial))

        def mean_regret(k: int, curves: list[Any] = curves) -> float:
            return float(np.mean([(loss_at(c, lr_of(k)) - best) / (start - best) for c, best, start in curves]))

        constants[optimizer] = lr_of(min(range(-80, 40), key=mean_regret))
    return constants


def fit_ranges(sweeps: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Per optimizer an octave beyond the best LRs of the tune half: the range that sweeps and chance know."""
    ranges = {}
    for optimizer in TORCH_DEFAULTS:
        bests = [sweep_of(s, sweeps).best for s in select(half="tune") if s.optimizer == optimizer]
        ranges[optimizer] = (min(bests) / 2, max(bests) * 2)
    return ranges


def _drawn(bounds: tuple[float, float], rng: random.Random) -> float:
    return math.exp(rng.uniform(*map(math.log, bounds)))


def short_run(scenario: Scenario, lr: float, seed: int) -> float:
    """Mean batch loss over the last steps of a short run at a constant LR; infinite where it blows up."""
    model = scenario.new_model(seed)
    optimizer = scenario.new_optimizer(model, lr)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses: list[float] = []
    while len(losses) < STEPS:
        for batch in scenario.loader(seed):
            loss = scenario.loss_fn(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf
            optimizer.zero_grad()
            loss.backward()
            if scenario.clip is not None:
                nn.utils.clip_grad_norm_(parameters, scenario.clip)
            optimizer.step()
            if len(losses) == STEPS:
                break
    return float(np.mean(losses[-LAST:]))


def _pick(scenario: Scenario, lrs: Sequence[float], seed: int) -> float:
    return min(lrs, key=lambda lr: (short_run(scenario, lr, seed), lr))


def rules(sweeps: dict[str, dict[str, Any]]) -> dict[str, Rule]:
    """Every rule by name; those that were fitted saw the tune half alone."""
    constants, ranges = fit_constants(sweeps), fit_ranges(sweeps)

    def naive(scenario: Scenario, seed: int) -> float:
        return _pick(scenario, [float(lr) for lr in np.geomspace(*ranges[scenario.optimizer], LRS)], seed)

    def random_search(scenario: Scenario, seed: int) -> float:
        rng = random.Random(f"search {scenario.name} {seed}")
        return _pick(scenario, [_drawn(ranges[scenario.optimizer], rng) for _ in range(LRS)], seed)

    return {
        "best-constant": lambda scenario, _: constants[scenario.optimizer],
        "usual-default": lambda scenario, _: USUAL[scenario.optimizer],
        "torch-default": lambda scenario, _: TORCH_DEFAULTS[scenario.optimizer],
        "naive-sweep": naive,
        "naive-sweep-0.3x": lambda scenario, seed: CAUTION * naive(scenario, seed),
        "random": lambda scenario, seed: _drawn(ranges[scenario.optimizer], random.Random(f"{scenario.name} {seed}")),
        "random-search": random_search,
    }


COSTS = {"naive-sweep": LRS * STEPS, "naive-sweep-0.3x": LRS * STEPS, "random-search": LRS * STEPS}  # gradients
