"""Keep rates: exact tails, Monte Carlo, what an audit adds, and inputs that say nothing of the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from dyntune.errors import DyntuneError, InvalidArgumentError, MissingDependencyError, NonFiniteError, RefusedError
from dyntune.records import Status
from dyntune.suggest.keep_rate import suggest_keep_rate
from dyntune.suggest.keep_rate_rule import binomial_keep, hoeffding_keep, noise_limit

CASES = [(n, eps, d) for n in (32, 64, 128, 256, 512) for eps in (0.2, 0.45) for d in (0.05, 0.01)]


def test_the_published_table() -> None:
    """Reference figures: n, eps -> rows kept, at delta = 0.05."""
    for n, eps, hoeffding, exact in ((64, 0.2, 41, 46), (128, 0.2, 88, 95), (128, 0.5, 50, 55), (256, 0.5, 108, 115)):
        assert (hoeffding_keep(n, eps, 0.05), binomial_keep(n, eps, 0.05)) == (hoeffding, exact)
    assert binom.cdf(math.floor(128 * 0.8) - 1, 128, 0.8) == pytest.approx(0.41, abs=0.01)  # of the usual rate


@pytest.mark.parametrize(("n", "eps", "delta"), CASES)
def test_failures_by_monte_carlo(n: int, eps: float, delta: float) -> None:
    """At most delta and three standard errors; the exact bound more than half of it, where one more is too many."""
    draws = 200_000
    clean = np.random.default_rng(n).binomial(n, 1 - eps, draws)
    error = math.sqrt(delta * (1 - delta) / draws)
    exact, loose = binomial_keep(n, eps, delta), hoeffding_keep(n, eps, delta)
    failures = float((clean < exact).mean())
    assert failures <= delta + 3 * error
    assert float((clean < loose).mean()) <= delta + 3 * error
    assert loose <= exact
    # One step of the integers multiplies this tail by less than two in all of these cases but the smallest.
    if binom.cdf(exact, n, 1 - eps) <= 2 * delta:
        assert failures >= delta / 2 - 3 * error
    assert binom.cdf(exact, n, 1 - eps) > delta  # one more is too many


def test_the_integers_mostly_allow_half_of_delta() -> None:
    allowed = [binom.cdf(binomial_keep(n, e, d), n, 1 - e) <= 2 * d for n, e, d in CASES]
    assert sum(allowed) >= 18


@given(st.integers(1, 400), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_the_exact_bound_is_the_largest(n: int, eps: float, delta: float) -> None:
    k = binomial_keep(n, eps, delta)
    assert 0 <= k <= n
    assert k == 0 or binom.cdf(k - 1, n, 1 - eps) <= delta
    assert k == n or binom.cdf(k, n, 1 - eps) > delta
    assert hoeffding_keep(n, eps, delta) <= k


def test_an_audit_costs_half_of_delta_and_holds() -> None:
    """Draw an audit and a batch: together they fail in at most delta."""
    rng = np.random.default_rng(0)
    failures, eps, n = 0, 0.3, 64
    for _ in range(2000):
        audit = rng.random(200) < eps
        k = round(n * float(suggest_keep_rate(n, audited=audit, delta=0.1)))
        failures += rng.binomial(n, 1 - eps) < k
    assert failures / 2000 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 2000)
    few, many = (float(suggest_keep_rate(128, audited=np.arange(m) % 5 == 0)) for m in (50, 5000))
    assert few < many < float(suggest_keep_rate(128, noise_rate=0.2))


def test_limits_of_a_noise_rate() -> None:
    assert noise_limit(0, 100, 0.05, bound="binomial") == pytest.approx(1 - 0.05 ** (1 / 100))
    assert noise_limit(7, 7, 0.05, bound="binomial") == 1.0
    assert noise_limit(10, 100, 0.05, bound="binomial") < noise_limit(10, 100, 0.05, bound="hoeffding")


def test_more_batches_and_less_risk_keep_less() -> None:
    rates = [float(suggest_keep_rate(128, noise_rate=0.2, num_batches=b)) for b in (1, 10, 1000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    assert float(suggest_keep_rate(128, noise_rate=0.0)) == 1.0


def test_half_is_uncertain_and_nothing_is_refused() -> None:
    half = suggest_keep_rate(128, noise_rate=0.5)
    assert half.status is Status.UNCERTAIN
    assert "complement" in half.reason
    none = suggest_keep_rate(4, noise_rate=0.9)
    assert none.status is Status.REFUSED
    with pytest.raises(RefusedError):
        suggest_keep_rate(4, noise_rate=0.9, strict=True)
    assert "usual" in suggest_keep_rate(64, noise_rate=0.2).explain()


def test_noise_from_labels_and_probabilities() -> None:
    pytest.importorskip("cleanlab")
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 2000)
    p = np.full((2000, 4), 0.05)
    p[np.arange(2000), true] = 0.85
    labels = np.where(rng.random(2000) < 0.2, (true + 1) % 4, true)
    found = suggest_keep_rate(128, labels=labels, probabilities=p)
    assert found.status is Status.UNCERTAIN
    assert found.evidence["noise rate"] == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({}, InvalidArgumentError),
        ({"noise_rate": 0.2, "audited": [0, 1]}, InvalidArgumentError),
        ({"noise_rate": 1.2}, InvalidArgumentError),
        ({"noise_rate": math.nan}, InvalidArgumentError),
        ({"noise_rate": 0.2, "delta": 0.0}, InvalidArgumentError),
        ({"noise_rate": 0.2, "bound": "chernoff"}, InvalidArgumentError),
        ({"noise_rate": 0.2, "num_batches": 0}, InvalidArgumentError),
        ({"audited": []}, InvalidArgumentError),
        ({"audited": [0.5]}, InvalidArgumentError),
        ({"labels": [0, 1]}, InvalidArgumentError),
        ({"labels": [0, 0], "probabilities": [[0.5, 0.5], [0.5, 0.5]]}, InvalidArgumentError),
        ({"labels": [0, 1], "probabilities": [[0.5, math.nan], [0.5, 0.5]]}, NonFiniteError),
    ],
)
def test_bad_input(wrong: dict[str, Any], error: type[DyntuneError]) -> None:
    with pytest.raises(error):
        suggest_keep_rate(64, **wrong)
    with pytest.raises(InvalidArgumentError):
        suggest_keep_rate(0, noise_rate=0.1)


def test_cleanlab_is_only_asked_for_when_needed() -> None:
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="audited"):
            suggest_keep_rate(64, labels=[0, 1], probabilities=[[0.6, 0.4], [0.3, 0.7]])
