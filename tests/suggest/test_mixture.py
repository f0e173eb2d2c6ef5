"""suggest_mixture: closed forms, variances of drawn batches, both kinds of sampling, metrics, and what is no input."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from dyntune.dynamics.sources import SourceMoments, blended_moments, source_moments
from dyntune.errors import (
    DyntuneError,
    EmptyBatchError,
    InvalidArgumentError,
    NonFiniteError,
    NotConvergedError,
    OptimizerMismatchError,
    RefusedError,
)
from dyntune.plots.style import BLUE
from dyntune.records import Status
from dyntune.suggest.mixture import suggest_mixture
from dyntune.suggest.mixture_rule import Mixture, MixtureEvidence, mixture_rule
from dyntune.training.mixture_sampler import MixtureSampler

NOISE, SHIFTS, ROWS = (0.1, 1.0, 4.0), (0.0, 0.7, -0.5), 400
WEIGHTS = (0.5, 0.375, 0.125)


def regression(seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Three linear problems with one solution each, near each other, and very different noise."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, 1, generator=rng, dtype=torch.float64)
    data = []
    for noise, shift in zip(NOISE, SHIFTS, strict=True):
        x = torch.randn(ROWS, 5, generator=rng, dtype=torch.float64)
        data.append((x, x @ (truth + shift) + noise * torch.randn(ROWS, 1, generator=rng, dtype=torch.float64)))
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(truth.T)
    return model, data


def row_gradients(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[np.ndarray]:
    """Of the squared error, in closed form. Shape (rows, 5) each."""
    weight = model.weight.detach()
    return [(2 * (x @ weight.T - y) * x).numpy() for x, y in data]


def population(gradients: list[np.ndarray]) -> SourceMoments:
    """Moments of the data as the whole population: no error is left in them."""
    variance = np.array([float(((g - g.mean(0)) ** 2).sum(1).mean()) for g in gradients])
    second = np.array([float((g**2).sum(1).mean()) for g in gradients])
    means = np.array([g.mean(0) for g in gradients])
    gram = means @ means.T
    return SourceMoments(
        variance=variance,
        second=second,
        means=gram,
        variance_draws=variance[None],
        second_draws=second[None],
        means_draws=gram[None],
        counts=tuple(len(g) for g in gradients),
    )


def evidence(moments: SourceMoments, **changes: Any) -> MixtureEvidence:
    k = moments.variance.size
    given: dict[str, Any] = {
        "names": tuple(f"s{i}" for i in range(k)),
        "weights": (1 / k,) * k,
        "floors": (0.0,) * k,
        "costs": None,
        "sampling": "stratified",
        "metric": "Euclidean",
        "shrink": False,
    } | changes
    return MixtureEvidence(moments=moments, **given)


def suggest(**options: Any) -> Mixture:
    model, data = regression()
    given: dict[str, Any] = {"model": model, "criterion": nn.MSELoss(), "num_gradients": 400} | options
    return suggest_mixture(given.pop("sources", data), **given)


def test_ratio_to_uniform_in_closed_form() -> None:
    moments = population(row_gradients(*regression()))
    found = mixture_rule(evidence(moments, weights=WEIGHTS))
    amounts = np.array(WEIGHTS) * np.sqrt(moments.variance)
    assert found.to_uniform.value == pytest.approx(amounts.sum() ** 2 / (3 * (amounts**2).sum()), rel=1e-12)
    against = amounts.sum() ** 2 / (np.array(WEIGHTS) * moments.variance).sum()
    assert found.to_proportional.value == pytest.approx(against, rel=1e-12)
    assert found.proportions == pytest.approx(amounts / amounts.sum(), rel=1e-12)


@pytest.mark.parametrize("sampling", ["stratified", "multinomial"])
def test_variance_of_drawn_batches_is_the_formulas(sampling: Any) -> None:
    """1500 batches of 32 at three designs in whole rows; within four standard errors of each variance, and of ratios.

    A source's rows come without replacement, which takes 32 / 400 of the variance within at most, a tenth of what four
    standard errors are of a single batch's; the bound below has it.
    """
    model, data = regression()
    gradients = row_gradients(model, data)
    moments, flat = population(gradients), np.concatenate(gradients)
    best = mixture_rule(evidence(moments, weights=WEIGHTS, sampling=sampling)).proportions
    assert best is not None
    target = sum(w * g.mean(0) for w, g in zip(WEIGHTS, gradients, strict=True))
    batch = 32
    rounded = np.maximum(np.round(np.array(best) * batch), 1)
    rounded[rounded.argmax()] += batch - rounded.sum()
    for shares in (WEIGHTS, (0.25, 0.25, 0.5), tuple(rounded / batch)):
        sampler = MixtureSampler([ROWS] * 3, shares, batch_size=batch, weights=WEIGHTS, sampling=sampling, seed=1)
        errors = []
        for _ in range(1500):
            indices = sampler.next_batch()
            weighted = sampler.importance(indices).double().numpy()[:, None] * flat[indices]
            errors.append(float(((weighted.mean(0) - target) ** 2).sum()))
        w, p = np.array(WEIGHTS), np.array(shares)
        if sampling == "stratified":
            # Without replacement within one batch: (1 - n / N) of it, as all batches of an epoch are disjoint.
            formula = float((w**2 * moments.variance / p * (1 - (p * batch - 1) / (ROWS - 1))).sum()) / batch
        else:
            formula = (float((w**2 * moments.second / p).sum()) - float(target @ target)) / batch
        spread = float(np.std(errors)) / math.sqrt(len(errors))
        correction = 0.0 if sampling == "stratified" else formula * batch / ROWS
        assert abs(np.mean(errors) - formula) < 4 * spread + correction, (sampling, shares)


def test_multinomial_counts_means_and_stratified_does_not() -> None:
    """Sources without any spread of their own: nothing to gain by strata, Neyman by lengths of means otherwise."""
    gradients = [np.tile([3.0, 0.0], (20, 1)), np.tile([0.0, 1.0], (20, 1))]
    quiet = mixture_rule(evidence(population(gradients)))
    assert quiet.status is Status.REFUSED
    assert "no source has any noise" in quiet.reason
    found = mixture_rule(evidence(population(gradients), sampling="multinomial"))
    assert found.proportions == pytest.approx((0.75, 0.25), rel=1e-12)
    same = [np.tile([2.0, 0.0], (20, 1))] * 2  # one gradient everywhere: any share is as good
    assert mixture_rule(evidence(population(same), sampling="multinomial")).status is Status.REFUSED


@pytest.mark.parametrize("sampling", ["stratified", "multinomial"])
def test_costs_are_paid_for(sampling: Any) -> None:
    """No share on a fine grid has a smaller variance for the budget."""
    moments = population(row_gradients(*regression()))
    costs, floors = (1.0, 5.0, 20.0), (0.05, 0.1, 0.2)
    found = mixture_rule(evidence(moments, weights=WEIGHTS, costs=costs, floors=floors, sampling=sampling))
    w, t = np.array(WEIGHTS), np.array(costs)
    squares, offset = (
        (moments.variance, 0.0) if sampling == "stratified" else (moments.second, float(w @ moments.means @ w))
    )

    def price(p: np.ndarray) -> float:
        return float(t @ p) * (float((w**2 * squares / p).sum()) - offset)

    grid = [
        np.array([a, b, 1 - a - b])
        for a in np.linspace(0.05, 0.7, 131)
        for b in np.linspace(0.1, 0.75, 131)
        if a + b <= 0.8
    ]
    assert price(np.array(found.proportions)) <= min(map(price, grid)) * (1 + 1e-12)


@pytest.mark.slow
def test_intervals_hold_the_truth() -> None:
    """32 gradients of each of three sources, 100 times. Of nominally 95%, fewer than 85 have a chance of 1e-4."""
    rng = np.random.default_rng(0)
    sigma = np.array([1.0, 2.0, 0.5])
    truth_v = 20 * sigma**2
    held = held_shares = 0
    for trial in range(100):
        draws = np.concatenate([s * rng.standard_normal((32, 20)) + 0.3 for s in sigma])
        found = mixture_rule(evidence(source_moments(draws @ draws.T, [32] * 3, seed=trial)))
        p = np.array(found.proportions)
        truth = (truth_v / p).sum() / (3 * truth_v.sum())
        held += truth in found.to_uniform
        best = sigma / sigma.sum()
        held_shares += found.low[1] <= best[1] <= found.high[1]
    assert held >= 85
    assert held_shares >= 85


def test_moments_are_unbiased() -> None:
    """Mean over 400 samples of parts of four rows, within four standard errors; the bootstrap's centre likewise."""
    rng = np.random.default_rng(1)
    mean = np.array([0.5, -0.2, 0.1])
    found = []
    for trial in range(400):
        parts = [(mean * s + rng.standard_normal((6, 4, 3))).mean(1) for s in (1.0, -2.0)]
        every = np.concatenate(parts)
        m = source_moments(every @ every.T, [6, 6], rows=4, draws=40, seed=trial)
        found.append(
            [
                *(m.variance[0], m.second[1], m.means[0, 1], m.means[1, 1]),
                *(m.variance_draws.mean(0)[0], m.second_draws.mean(0)[1]),
                *(m.means_draws.mean(0)[0, 1], m.means_draws.mean(0)[1, 1]),
            ]
        )
    square = float(mean @ mean)
    truth = [3.0, 3.0 + 4 * square, -2 * square, 4 * square] * 2
    values = np.array(found)
    assert (np.abs(values.mean(0) - truth) < 4 * values.std(0) / math.sqrt(len(values))).all()


def test_shrinkage_moves_together_what_noise_alone_sets_apart() -> None:
    rng = np.random.default_rng(2)
    raw, shrunk = [], []
    for trial in range(20):
        draws = rng.standard_normal((24, 3))
        moments = source_moments(draws @ draws.T, [8] * 3, seed=trial)
        for shrink, into in ((False, raw), (True, shrunk)):
            into.append(np.std(mixture_rule(evidence(moments, shrink=shrink)).proportions))
    assert np.mean(shrunk) < 0.7 * np.mean(raw)
    far = mixture_rule(evidence(population(row_gradients(*regression())), shrink=True))
    plain = mixture_rule(evidence(population(row_gradients(*regression()))))
    assert far.proportions == pytest.approx(plain.proportions, rel=1e-9)  # no noise, nothing to shrink


def test_measured_gradients_are_the_closed_forms() -> None:
    model, data = regression()
    truth = population(row_gradients(model, data))
    found = suggest(weights=WEIGHTS)
    assert found.status is Status.OK
    unbiased = ROWS / (ROWS - 1)
    assert found.evidence.moments.variance == pytest.approx(truth.variance * unbiased, rel=1e-9)
    assert found.evidence.moments.second == pytest.approx(truth.second, rel=1e-9)
    assert found.importance == pytest.approx([w / p for w, p in zip(WEIGHTS, found.proportions, strict=True)])
    assert found.floors == pytest.approx([0.1 * w for w in WEIGHTS])


def test_parts_of_several_rows_speak_of_one_row() -> None:
    """80 parts of five rows: the variance of a row within a third, five standard errors of heavy-tailed squares."""
    one, five = suggest(), suggest(rows=5, num_gradients=80)
    assert five.evidence.moments.variance == pytest.approx(one.evidence.moments.variance, rel=0.33)
    assert five.evidence.moments.second == pytest.approx(one.evidence.moments.second, rel=0.33)
    total = suggest(rows=5, num_gradients=80, criterion=nn.MSELoss(reduction="sum"))
    assert total.evidence.moments.variance == pytest.approx(five.evidence.moments.variance, rel=1e-9)


def test_the_metric_is_the_optimizers() -> None:
    model, data = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    scale = ((state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8).numpy()
    moments = population([g / np.sqrt(scale) for g in row_gradients(model, data)])
    optimizer.zero_grad(set_to_none=True)
    found = suggest(sources=data, model=model, optimizer=optimizer)
    assert found.evidence.moments.second == pytest.approx(moments.second, rel=1e-6)
    assert "Adam" in found.checks[0]
    with pytest.raises(OptimizerMismatchError):
        suggest(optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(InvalidArgumentError, match="not stepped"):
        suggest(sources=data, model=model, optimizer=torch.optim.Adam(model.parameters()))


def test_nothing_of_the_users_changes() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    data = [(torch.randn(40, 5), torch.randn(40, 1)) for _ in range(2)]
    model[0].weight.grad = torch.ones(8, 5)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = suggest_mixture(data, model=model, criterion=nn.MSELoss(), rows=8, num_gradients=5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(model[0].weight.grad, torch.ones(8, 5))
    assert model[3].weight.grad is None
    assert model.training
    again = suggest_mixture(data, model=model, criterion=nn.MSELoss(), rows=8, num_gradients=5)
    assert again.to_dict() == found.to_dict()


def test_sketches_stand_in_for_large_gradients() -> None:
    """Off-diagonal inner products have a relative error of about 1 / sqrt(8192); averages of 64 have far less."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2000), nn.Tanh(), nn.Linear(2000, 1)).double()
    _, data = regression()
    exact = suggest(sources=data, model=model, num_gradients=16)
    sketched = suggest(sources=data, model=model, num_gradients=16, gram_bytes=1)
    assert "sketch" in sketched.checks[0]
    assert sketched.evidence.moments.second == pytest.approx(exact.evidence.moments.second, rel=1e-9)
    assert sketched.evidence.moments.variance == pytest.approx(exact.evidence.moments.variance, rel=0.02)


def test_looks_are_averaged() -> None:
    first, second = suggest(num_gradients=16), suggest(num_gradients=16, seed=1)
    both = suggest(num_gradients=16, seed=1, previous=first)
    mean = (first.evidence.moments.variance + second.evidence.moments.variance) / 2
    assert both.evidence.moments.variance == pytest.approx(mean, rel=1e-12)
    assert both.evidence.moments.counts == (32, 32, 32)
    assert "2 looks" in both.checks[1]
    third = blended_moments(both.evidence.moments, first.evidence.moments, memory=2)
    assert third.variance == pytest.approx((both.evidence.moments.variance + first.evidence.moments.variance) / 2)
    with pytest.raises(InvalidArgumentError, match="previous"):
        suggest(sources=dict(zip("abc", regression()[1], strict=True)), previous=first)
    with pytest.raises(InvalidArgumentError, match="memory"):
        blended_moments(first.evidence.moments, first.evidence.moments, memory=0.5)


def test_zero_gradients_everywhere_are_refused() -> None:
    x = torch.randn(10, 5, dtype=torch.float64)
    model, _ = regression()
    nn.init.zeros_(model.weight)  # or rounding would be all the noise there is
    flat = [(x, 0 * x[:, :1]), (x, 0 * x[:, :1])]
    found = suggest(sources=flat, model=model, num_gradients=4)
    assert found.status is Status.REFUSED
    assert found.proportions is None
    assert "every gradient is zero" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["proportions"] is None
    assert "none" in found.explain()
    assert found.plot() is not None
    with pytest.raises(RefusedError):
        suggest(sources=flat, model=model, num_gradients=4, strict=True)
    one = suggest(sources=[flat[0], regression()[1][2]], model=model, num_gradients=8)
    assert one.proportions == pytest.approx((0.05, 0.95))  # the source without noise keeps its floor
    assert math.isfinite(one.noise[0])


def test_one_source_and_equal_sources_gain_nothing() -> None:
    alone = suggest(sources={"only": regression()[1][0]}, num_gradients=8)
    assert alone.proportions == (1.0,)
    assert alone.to_uniform.value == pytest.approx(1.0)
    data = regression()[1][1]
    same = suggest(sources=[data, data], num_gradients=20)
    assert same.status is Status.UNCERTAIN
    with pytest.raises(NotConvergedError):
        suggest(sources=[data, data], num_gradients=20, strict=True)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"weights": (0.5, 0.5)}, InvalidArgumentError, "one for each of the 3"),
        ({"weights": (0.5, 0.5, 0.5)}, InvalidArgumentError, "add up to 1.5"),
        ({"weights": (1.5, -0.5, 0.0)}, InvalidArgumentError, "0 or more"),
        ({"weights": (math.nan, 0.5, 0.5)}, InvalidArgumentError, "0 or more"),
        ({"floors": (0.5, 0.5, 0.5)}, InvalidArgumentError, "add up to 1.5"),
        ({"costs": (1.0, 0.0, 1.0)}, InvalidArgumentError, "costs"),
        ({"sampling": "random"}, InvalidArgumentError, "sampling"),
        ({"rows": 0}, InvalidArgumentError, "rows=0"),
        ({"num_gradients": 1}, InvalidArgumentError, "num_gradients=1"),
        ({"rows": 400}, InvalidArgumentError, "noise is told from two"),
        ({"rows": 401}, EmptyBatchError, "no batch of 401"),
        ({"sources": []}, InvalidArgumentError, "nothing to mix"),
        ({"sources": {}}, InvalidArgumentError, "nothing to mix"),
        ({"sources": [regression()[1][0], []]}, EmptyBatchError, "source 1"),
        ({"sources": (torch.zeros(2, 5), torch.zeros(2, 1))}, InvalidArgumentError, "mapping"),
        ({"sources": [(torch.zeros(0, 5).double(), torch.zeros(0, 1).double())]}, EmptyBatchError, "no rows"),
    ],
)
def test_input_that_is_none(options: dict[str, Any], error: type[DyntuneError], said: str) -> None:
    with pytest.raises(error, match=said):
        suggest(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    data = regression()[1]
    x = data[1][0].clone()
    x[7, 2] = bad
    with pytest.raises(NonFiniteError):
        suggest(sources=[data[0], (x, data[1][1])])


def test_told_and_drawn() -> None:
    found = suggest(weights=WEIGHTS, costs=(1.0, 2.0, 3.0), sampling="multinomial")
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["objective"] == "same"
    assert sum(plain["proportions"]) == pytest.approx(1)
    text = found.explain()
    for part in ("objective: the same", "Neyman", "variance times cost", "source 2"):
        assert part in text
    assert "<pre>" in found._repr_html_()
    ax = found.plot()
    bars = [patch.get_width() for patch in ax.patches if to_hex(patch.get_facecolor()) == BLUE]
    assert bars == pytest.approx(found.proportions)
    assert ax.get_xlabel() == "share of the rows"
