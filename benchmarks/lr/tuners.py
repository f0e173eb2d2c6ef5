"""Optimizers that choose their own learning rate, trained in full as their documentation says.

Prodigy and D-Adaptation with lr=1, Schedule-Free with its default LR. They replace the scenario's optimizer, with one
parameter group; its momentum-free, momentum and adaptive kinds map to the variant of the same kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn

from benchmarks.lr.judge import Run, train
from benchmarks.lr.scenario import ADAPTIVE, Scenario

WARMUP = 0.05  # Schedule-Free: "using learning rate warmup is recommended"
NORM_BATCHES = 50  # its example of BatchNorm statistics taken anew before evaluation

Tuner = Callable[[Scenario, int], Run]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def prodigy(scenario: Scenario, seed: int) -> Run:
    """README: lr=1, cosine annealing over all steps, bias correction and safeguard_warmup."""
    from prodigyopt import Prodigy

    model = scenario.new_model(seed)
    optimizer = Prodigy(
        _trained(model), lr=1.0, weight_decay=scenario.weight_decay, use_bias_correction=True, safeguard_warmup=True
    )
    cosine = dataclasses.replace(scenario, warmup=0, schedule="cosine")
    return train(cosine, 1.0, seed, model=model, optimizer=optimizer)


def d_adaptation(scenario: Scenario, seed: int) -> Run:
    """README: lr=1, and the schedule that one would use anyway."""
    from dadaptation import DAdaptAdam, DAdaptSGD

    model = scenario.new_model(seed)
    options = {"lr": 1.0, "weight_decay": scenario.weight_decay}
    if scenario.optimizer in ADAPTIVE:
        optimizer = DAdaptAdam(_trained(model), decouple=scenario.optimizer == "adamw", **options)
    else:
        optimizer = DAdaptSGD(_trained(model), momentum=0.0 if scenario.optimizer == "sgd" else 0.9, **options)
    return train(scenario, 1.0, seed, model=model, optimizer=optimizer)


def schedule_free(scenario: Scenario, seed: int) -> Run:
    """README: default LR, warm-up, no schedule; evaluation at the average, BatchNorm's statistics taken there."""
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    model = scenario.new_model(seed)
    kind = AdamWScheduleFree if scenario.optimizer in ADAPTIVE else SGDScheduleFree
    optimizer = kind(_trained(model), weight_decay=scenario.weight_decay, warmup_steps=round(WARMUP * scenario.steps))
    optimizer.train()
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        optimizer.eval()
        if norms:
            with torch.no_grad():
                for x, _ in islice(scenario.loader(seed), NORM_BATCHES):
                    model(x)
        yield
        optimizer.train()

    plain = dataclasses.replace(scenario, warmup=0, schedule="constant")
    return train(plain, optimizer.param_groups[0]["lr"], seed, model=model, optimizer=optimizer, evaluating=evaluating)


def _quiet(tuner: Tuner) -> Tuner:
    """Without what these packages print, and the warnings that newer versions of torch give about them."""

    def run(scenario: Scenario, seed: int) -> Run:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return tuner(scenario, seed)

    return run


TUNERS: dict[str, Tuner] = {
    "prodigy": _quiet(prodigy),
    "d-adaptation": _quiet(d_adaptation),
    "schedule-free": _quiet(schedule_free),
}
