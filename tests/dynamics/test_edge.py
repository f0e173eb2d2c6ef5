"""The classifier on training whose regime is known: parabolas with and without noise, below, at and above the limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dyntune.dynamics.autocorrelation import GradientAutocorrelation
from dyntune.dynamics.edge import EDGE_SHARE, Regime, classify, directional_curvature, step_curvature
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.records import Estimate, Status
from dyntune.stability import threshold


def known(value, error=0.0):
    return Estimate(
        value=value, low=value - error, high=value + error, level=0.95, unit="1", method="known", covers="both"
    )


REFUSED = Estimate(
    value=None,
    low=-math.inf,
    high=math.inf,
    level=None,
    unit="1",
    method="none",
    covers="both",
    status=Status.REFUSED,
    reason="too noisy",
)


def trained(x, *, noise, spectrum=(1.0, 0.3, 0.1), steps=2000, kept=400, seed=0):
    """SGD on a parabola with lr * largest curvature = x; (what was recorded, curvature along the last steps)."""
    rng = np.random.default_rng(seed)
    curvature = torch.tensor(spectrum, dtype=torch.float64) / max(spectrum)
    w = torch.ones(len(spectrum), dtype=torch.float64)
    recorder = GradientAutocorrelation(lags=2, sketched=False, batch_size=2)
    along = []
    for step in range(steps):
        halves = [curvature * w + noise * torch.from_numpy(rng.standard_normal(len(spectrum))) for _ in range(2)]
        g = (halves[0] + halves[1]) / 2
        if step >= steps - kept:
            recorder.update(g, step=step, halves=(halves[0], halves[1]))
        w = w - x * g
        if step >= steps - 16:  # the same batch again, at the new parameters
            along.append(float(directional_curvature([g - x * curvature * g], [g])))
    mean, error = np.mean(along), np.std(along, ddof=1) / 4 * 2.13  # Student's t of 15
    return recorder.read(), known(float(mean), float(error))


@pytest.mark.parametrize("spectrum", [(1.0,), (1.0, 0.3, 0.1), tuple(0.8**i for i in range(30))])
@pytest.mark.parametrize("x", [0.1, 0.5, 1.0, 1.5, 1.9])
def test_stable_noisy_sgd_is_never_called_unstable(x, spectrum):
    for seed in range(3):
        found, along = trained(x, noise=1.0, spectrum=spectrum, seed=seed)
        for directional in (along, None):
            reading = classify(
                *found.corrected,
                found.amplitude,
                raw_lag_one=found.raw[0],
                directional=directional,
                loss_above_start=True,  # the least favourable
            )
            assert reading.regime not in (Regime.EDGE, Regime.DIVERGING)
            if x >= 0.5:  # below, lag 1 of -x / 2 or less is within its error
                assert found.raw[0].high < 0  # what a rule on the sign alone would take for instability
                assert reading.regime is Regime.STATIONARY_NOISE or directional is None


def test_one_dimension_near_the_limit_looks_like_the_edge_but_for_the_curvature():
    found, along = trained(1.9, noise=1.0, spectrum=(1.0,), steps=4000, kept=2000)
    # Lag 1 of the noise-free gradient is -1, lag 2 is x - 1, the amplitude stays. That all stretches count alike
    # favours small amplitudes in one dimension, where both are less (the noise of the step before takes x sigma^2 off).
    assert -1.15 < found.corrected[0].value < -0.9
    assert 0.7 < found.corrected[1].value < 0.95
    assert 0.85 < found.amplitude.value < 1.1
    assert along.value == pytest.approx(1.9, rel=1e-9)
    lags = found.corrected
    assert classify(*lags, found.amplitude).regime is Regime.UNDETERMINED
    assert classify(*lags, found.amplitude, directional=along).regime is Regime.STATIONARY_NOISE


@pytest.mark.parametrize(
    ("x", "amplitude", "regime"),
    [
        (0.5, 0.25, Regime.SMOOTH),
        (1.6, 0.36, Regime.DAMPED),
        (1.95, 0.9025, Regime.DAMPED),
        (2.0, 1.0, Regime.EDGE),
        (2.05, 1.1025, Regime.DIVERGING),
    ],
)
def test_full_batch_descent(x, amplitude, regime):
    w, start = torch.tensor([1.0], dtype=torch.float64), 0.5
    recorder, along = GradientAutocorrelation(lags=2, sketched=False), []
    for step in range(40):
        g = w.clone()  # curvature 1, learning rate x
        recorder.update(g, step=step)
        w = w - x * g
        along.append(float(directional_curvature([w], [g])))
    assert along == pytest.approx([x] * 40, rel=1e-12)
    found = recorder.read()
    assert found.amplitude.value == pytest.approx(amplitude, rel=1e-12)
    loss_above_start = float(w**2) / 2 > start
    reading = classify(*found.best, found.amplitude, directional=known(along[-1]), loss_above_start=loss_above_start)
    assert reading.regime is regime
    assert str(reading).startswith(regime.name.lower())


def test_growth_alone_is_not_divergence():
    lags = known(-1.0, 0.01), known(1.0, 0.01)
    grows = {"directional": known(2.05, 0.01)}
    for above, regime in ((True, Regime.DIVERGING), (False, Regime.EDGE), (None, Regime.UNDETERMINED)):
        assert classify(*lags, known(1.1, 0.01), loss_above_start=above, **grows).regime is regime
    # a loss above its start without growth is no divergence either
    assert classify(*lags, known(1.0, 0.01), loss_above_start=True, directional=known(2.0, 0.01)).regime is Regime.EDGE


def test_intervals_decide_with_their_ends():
    amplitude, edge = known(1.0, 0.01), known(2.0, 0.01)
    assert classify(known(-0.6, 0.2), known(0.9), amplitude, directional=edge).regime is Regime.UNDETERMINED
    assert classify(known(-0.9), known(0.6, 0.2), amplitude, directional=edge).regime is Regime.UNDETERMINED
    assert classify(known(-0.9), known(0.9), amplitude, directional=known(2.0, 0.3)).regime is Regime.UNDETERMINED
    assert classify(known(-0.9), known(0.9), known(1.0, 0.3), directional=edge).regime is Regime.UNDETERMINED
    assert classify(known(-0.1, 0.3), known(0.0, 0.1), amplitude).regime is Regime.UNDETERMINED
    assert classify(known(-0.3, 0.1), known(0.0, 0.1), amplitude).regime is Regime.STATIONARY_NOISE
    assert classify(known(0.3, 0.1), known(0.0, 0.1), amplitude).regime is Regime.SMOOTH


def test_refused_evidence_decides_nothing():
    assert classify(REFUSED, known(1.0), known(1.0)).regime is Regime.UNDETERMINED
    for lags in ((known(-1.0), REFUSED, known(1.0)), (known(-1.0), known(1.0), REFUSED)):
        reading = classify(*lags, directional=known(2.0))
        assert reading.regime is Regime.UNDETERMINED
        assert "too noisy" in reading.reason
    reading = classify(known(-1.0), known(1.0), known(1.0), directional=REFUSED)
    assert reading.regime is Regime.UNDETERMINED
    assert reading.ratio.reason == "too noisy"


def test_the_limit_is_the_optimizers():
    w = torch.nn.Parameter(torch.zeros(1))
    limit = float(threshold(torch.optim.SGD([w], lr=0.1, momentum=0.9)))
    evidence = known(-1.0), known(1.0), known(1.0)
    assert classify(*evidence, directional=known(3.8), limit=limit).regime is Regime.EDGE
    assert classify(*evidence, directional=known(2.0), limit=limit).regime is Regime.STATIONARY_NOISE
    with pytest.raises(InvalidArgumentError, match="limit=0"):
        classify(*evidence, limit=0.0)


def test_edge_share_is_the_parabola_of_its_amplitude():
    share = (2 * EDGE_SHARE - 1) ** 2
    assert share == pytest.approx(0.95)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        x, y = torch.randn(40, 5).double(), torch.randn(40, 1).double()
    return list(model.parameters()), lambda: torch.nn.functional.mse_loss(model(x), y)


def test_curvature_along_a_step_is_the_hessian_along_it():
    """Small steps: d.Hd / d.Pd by a double backward pass, for a preconditioned step and for one with momentum."""
    parameters, loss = network()
    scale = [
        0.5 + torch.rand(p.shape, generator=torch.Generator().manual_seed(i)).double() for i, p in enumerate(parameters)
    ]
    for given in (None, scale):
        g = torch.autograd.grad(loss(), parameters, create_graph=True)
        flat = [x.detach() for x in g]
        ones = [torch.ones_like(x) for x in flat] if given is None else given
        direction = [x / s for x, s in zip(flat, ones, strict=True)]
        product = torch.autograd.grad(sum((x * d).sum() for x, d in zip(g, direction, strict=True)), parameters)
        curved = sum(float((d * h).sum()) for d, h in zip(direction, product, strict=True))
        sloped = sum(float((d * x).sum()) for d, x in zip(direction, flat, strict=True))
        lr = 1e-4
        step = [-lr * d for d in direction]
        with torch.no_grad():
            torch._foreach_add_(parameters, step)
        after = torch.autograd.grad(loss(), parameters)
        # first order in the step: its length times the third derivative
        assert float(step_curvature(after, flat, step, lr=lr, scale=given)) == pytest.approx(
            lr * curved / sloped, rel=2e-3
        )
        assert float(directional_curvature(after, flat, scale=given)) == pytest.approx(lr * curved / sloped, rel=2e-3)
        with torch.no_grad():
            torch._foreach_sub_(parameters, step)


def test_momentum_needs_the_step_itself():
    """Heavy-ball at its limit 2 (1 + beta) = 3.8: along the actual step the curvature is the parabola's."""
    w, buffer, lr = torch.tensor([1.0, 0.2]), torch.zeros(2), 3.8
    for _ in range(5):
        g = w * torch.tensor([1.0, 0.0])
        buffer = 0.9 * buffer + g
        before, w = w, w - lr * buffer
    found = step_curvature([w * torch.tensor([1.0, 0.0])], [g], [w - before], lr=lr)
    assert float(found) == pytest.approx(3.8, rel=1e-5)
    with pytest.raises(ShapeMismatchError, match="one each"):
        step_curvature([w], [g], [], lr=lr)
