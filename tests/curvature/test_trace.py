"""The trace: exact where it must be, and an interval that covers as often as it says."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

import dyntune
from dyntune.errors import InvalidArgumentError, NonFiniteError
from tests.objective.zoo import ZOO, truth

SPECTRA = {
    "decaying": 1 / torch.arange(1.0, 301.0) ** 2,
    "symmetric about 0.1": torch.linspace(-1, 1, 300) + 0.1,
    "identity": torch.ones(300),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_interval_covers_at_its_level(name: str) -> None:
    """400 seeds, fixed in advance. 95% nominal: fewer than the 0.1% quantile of Binomial(400, 0.95) would be a lie."""
    spectrum = SPECTRA[name]
    matrix, exact = torch.diag(spectrum), float(spectrum.double().sum())
    covered = sum(exact in dyntune.trace(matrix, num_products=36, seed=seed) for seed in range(400))
    assert binom.ppf(1e-3, 400, 0.95) <= covered
    # An interval that covers always is too wide to be of use; quadratic forms are a little heavier than normal.
    assert covered < 400


def test_low_rank_is_exact() -> None:
    spectrum = torch.zeros(100)
    spectrum[:4] = torch.tensor([5.0, -3.0, 2.0, 1.0])
    found = dyntune.trace(torch.diag(spectrum), num_products=24)
    assert float(found) == pytest.approx(5.0, abs=1e-4)  # float32 products of size 5
    assert found.high - found.low < 1e-4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_dimensions_below_the_budget(n: int) -> None:
    found = dyntune.trace(torch.diag(torch.arange(1.0, n + 1)), num_products=30)
    assert float(found) == pytest.approx(n * (n + 1) / 2, rel=1e-5)


def test_zero_operator() -> None:
    found = dyntune.trace(torch.zeros(20, 20))
    assert (float(found), found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["mlp", "conv", "tied"])
def test_hessians_on_unequal_batches(name: str) -> None:
    case = ZOO[name]()
    x, y = case.batch
    operator = dyntune.hessian(case.model, [(x[:1], y[:1]), (x[1:], y[1:])], criterion=case.criterion)
    found = dyntune.trace(operator, num_products=60, level=0.999)
    assert float(truth(name).trace()) in found


def test_scale_of_the_operator_scales_the_trace() -> None:
    matrix = torch.diag(SPECTRA["decaying"])
    one, scaled = dyntune.trace(matrix, num_products=30), dyntune.trace(2.0**-30 * matrix, num_products=30)
    assert float(scaled) == pytest.approx(float(one) * 2.0**-30, rel=1e-6)


def test_bad_input() -> None:
    with pytest.raises(InvalidArgumentError, match="num_products=5"):
        dyntune.trace(torch.eye(3), num_products=5)
    with pytest.raises(InvalidArgumentError, match=r"level=1\.0"):
        dyntune.trace(torch.eye(3), level=1.0)
    with pytest.raises(NonFiniteError):
        dyntune.trace((lambda v: v * float("nan"), 50))
