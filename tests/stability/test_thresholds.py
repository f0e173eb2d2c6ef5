"""Every row of the table on ``torch.optim`` itself: 0.98 of the threshold converges, 1.02 diverges.

One float64 parameter on a parabola. Second moments are put back to a fixed value before every step, and the parameter
stays so small (1e-9) that its own gradients do not count beside that value: the preconditioner is constant, as the
table assumes. Steps are counted from 100,000, where bias corrections and momentum schedules have settled.
"""

import math
from functools import partial

import pytest
import torch
from torch import optim

from dyntune.errors import InvalidArgumentError, RefusedError
from dyntune.stability import batch_threshold, threshold
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import Recurrence, recurrence

LR = 0.01
SETTLED = 100_000.0
MOMENTS = {
    "exp_avg_sq": 4.0,
    "max_exp_avg_sq": 9.0,
    "exp_inf": 3.0,
    "square_avg": 4.0,
    "acc_delta": 0.25,
    "sum": 4.0,
    "variance": 4.0,
}

DECAYING = ("exp_avg_sq", "exp_inf", "square_avg")  # before the step divides by them; acc_delta only afterwards

CASES = {
    "SGD": partial(optim.SGD),
    "SGD, dampening without momentum": partial(optim.SGD, dampening=0.5),
    "SGD, weight decay": partial(optim.SGD, weight_decay=30.0),
    "momentum": partial(optim.SGD, momentum=0.9),
    "little momentum": partial(optim.SGD, momentum=0.3),
    "momentum, dampening": partial(optim.SGD, momentum=0.9, dampening=0.4),
    "momentum, weight decay": partial(optim.SGD, momentum=0.9, weight_decay=50.0),
    "Nesterov": partial(optim.SGD, momentum=0.9, nesterov=True),
    "Nesterov, weight decay": partial(optim.SGD, momentum=0.5, nesterov=True, weight_decay=20.0),
    "RMSprop": partial(optim.RMSprop),
    "RMSprop, momentum": partial(optim.RMSprop, momentum=0.9),
    "RMSprop, centered": partial(optim.RMSprop, centered=True),
    "RMSprop, weight decay": partial(optim.RMSprop, weight_decay=50.0),
    "Adagrad": partial(optim.Adagrad),
    "Adadelta": partial(optim.Adadelta),
    "Adafactor": partial(optim.Adafactor),
    "Adafactor, decoupled decay": partial(optim.Adafactor, weight_decay=20.0),
    "Adam": partial(optim.Adam),
    "Adam, beta1 0.5": partial(optim.Adam, betas=(0.5, 0.99)),
    "Adam, no momentum": partial(optim.Adam, betas=(0.0, 0.99)),
    "Adam, amsgrad": partial(optim.Adam, amsgrad=True),
    "Adam, large eps": partial(optim.Adam, eps=1.0),
    "Adam, weight decay": partial(optim.Adam, weight_decay=500.0),
    "AdamW": partial(optim.AdamW, weight_decay=0.01),
    "AdamW, strong decay": partial(optim.AdamW, weight_decay=30.0),
    "Adamax": partial(optim.Adamax),
    "RAdam": partial(optim.RAdam),
    "RAdam, decoupled decay": partial(optim.RAdam, weight_decay=20.0, decoupled_weight_decay=True),
    "NAdam": partial(optim.NAdam),
    "NAdam, decoupled decay": partial(optim.NAdam, weight_decay=20.0, decoupled_weight_decay=True),
}


def hold(optimizer: optim.Optimizer, p: torch.nn.Parameter) -> None:
    """Put second moments where the step's own decay brings them to their values; momentum is left alone."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    decay = group.get("alpha") or group.get("rho") or group.get("betas", (0, 1))[1]
    for name in MOMENTS.keys() & state.keys():
        state[name].fill_(MOMENTS[name] / (decay if name in DECAYING else 1))
    if "step" in state:
        state["step"].fill_(SETTLED)
    if "mu_product" in state:
        state["mu_product"].fill_(0.0)


def start(make: partial) -> tuple[torch.nn.Parameter, optim.Optimizer, float]:
    """A parameter, its optimizer with all state in place, and the preconditioner that the next steps divide by."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([p], lr=LR)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    hold(optimizer, p)
    for name in MOMENTS.keys() & optimizer.state[p].keys():
        optimizer.state[p][name].fill_(MOMENTS[name])
    scale = diagonal_scale(optimizer, [p])
    return p, optimizer, 1.0 if scale is None else float(scale[0])


def final_size(make: partial, factor: float, steps: int = 1500) -> float:
    """How much |p| has changed under curvature `factor` times the critical one."""
    p, optimizer, scale = start(make)
    rule = recurrence(optimizer)
    curvature = factor * float(threshold(optimizer)) * scale / LR - rule.coupled_decay
    assert curvature > 0
    p.data.fill_(1e-9)
    for _ in range(steps):
        hold(optimizer, p)
        p.grad = (curvature * p).detach()
        optimizer.step()
        if abs(p.item()) > 1e-6:
            break
    return abs(p.item()) / 1e-9


@pytest.mark.parametrize("name", CASES)
def test_two_percent_below_converges_and_two_percent_above_diverges(name):
    assert final_size(CASES[name], 0.98) < 1e-3
    assert final_size(CASES[name], 1.02) > 1e3


def simulated(rule: Recurrence, factor: float, steps: int = 3000) -> float:
    """The rows that torch does not implement, written out: y is where the gradient is taken."""
    curvature = factor * float(threshold(rule)) / rule.lr
    x, z, buffer = 1.0, 1.0, 0.0
    for step in range(1, steps + 1):
        if rule.family == "schedule-free":
            y = (1 - rule.momentum) * z + rule.momentum * x
            z -= rule.lr * curvature * y
            x += (z - x) / (step + 1e4)  # the average of a long run hardly moves
        else:
            buffer = rule.momentum * buffer + curvature * z
            z -= rule.lr * rule.decoupled_decay * z + rule.lr * buffer
        if abs(z) > 1e6:
            break
    return abs(z)


@pytest.mark.parametrize(
    "rule",
    [
        Recurrence("sgd", 0.9, 0.1, decoupled_decay=1.0),
        Recurrence("sgd", 0.0, 0.1, decoupled_decay=5.0),
        Recurrence("schedule-free", 0.9, 0.1),
        Recurrence("schedule-free", 0.0, 0.1),
    ],
    ids=["momentum, decoupled decay", "decoupled decay", "schedule-free", "schedule-free without momentum"],
)
def test_recurrences_that_torch_does_not_have(rule):
    assert simulated(rule, 0.98) < 10  # Schedule-Free: z goes towards -beta / (1 - beta) times the standing average
    assert simulated(rule, 1.02) > 1e3


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2, 2))]


def test_known_values():
    assert float(threshold(optim.SGD(parameters(), lr=0.3))) == 2
    assert float(threshold(optim.SGD(parameters(), lr=0.3, momentum=0.9))) == pytest.approx(3.8, rel=1e-12)
    assert float(threshold(optim.Adam(parameters(), lr=0.3))) == pytest.approx(38, rel=1e-12)
    estimate = threshold(optim.Adam(parameters()))
    assert (estimate.low, estimate.high, estimate.unit) == (estimate.value, estimate.value, "1")
    assert "2103.00065" in estimate.method


@pytest.mark.parametrize(
    ("make", "preconditioned"),
    [
        (optim.SGD, False),
        (optim.RMSprop, True),
        (optim.Adam, True),
        (optim.AdamW, True),
        (optim.NAdam, True),
        (optim.Adagrad, True),
    ],
)
def test_of_which_matrix_the_threshold_speaks(make, preconditioned):
    assert recurrence(make(parameters(), lr=0.1)).preconditioned is preconditioned


def test_where_small_batches_settle():
    def value(optimizer: optim.Optimizer) -> float:
        return float(batch_threshold(optimizer))

    assert value(optim.SGD(parameters(), lr=0.1)) == 2
    assert value(optim.SGD(parameters(), lr=0.1, dampening=0.5)) == 2  # torch dampens momentum only
    assert value(optim.SGD(parameters(), lr=0.1, momentum=0.9)) == pytest.approx(0.2)
    assert value(optim.SGD(parameters(), lr=0.1, momentum=0.9, dampening=0.9)) == pytest.approx(2)
    assert value(optim.AdamW(parameters())) == 2


@pytest.mark.parametrize("function", [threshold, batch_threshold])
def test_methods_whose_step_does_not_follow_the_gradient_are_refused(function):
    found = function(optim.Rprop(parameters()))
    assert found.value is None
    with pytest.raises(RefusedError):
        float(found)
    assert (found.low, found.high) == (0.0, math.inf)


def test_a_learning_rate_in_a_tensor():
    assert recurrence(optim.Adam(parameters(), lr=torch.tensor(0.25))).lr == 0.25


def test_optimizers_without_an_entry():
    with pytest.raises(InvalidArgumentError, match="maximize=True"):
        threshold(optim.SGD(parameters(), lr=0.1, maximize=True))
    with pytest.raises(InvalidArgumentError, match="no stability threshold is known for LBFGS"):
        threshold(optim.LBFGS(parameters()))
