"""The mixing law: recovered exactly, intervals that hold, minima with a certificate, and what is no input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from dyntune.errors import InvalidArgumentError, NonFiniteError, NotConvergedError
from dyntune.records import Status
from dyntune.suggest.mixing_law import MixingLaw, fit_mixing_law

FLOORS, FACTORS = np.array([1.0, 2.0]), np.array([0.8, 1.5])
SLOPES = np.array([[-1.5, 0.5, 1.0], [1.0, -2.0, 1.0]])


def truth(shares: np.ndarray) -> np.ndarray:
    """Shape (n, 2)."""
    return FLOORS + FACTORS * np.exp(shares @ SLOPES.T)


def runs(count: int, seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), count)
    return shares, truth(shares) + noise * rng.standard_normal((count, 2))


def test_exact_losses_give_the_law_back() -> None:
    law = fit_mixing_law(*runs(12))
    assert law.floors == pytest.approx(FLOORS, rel=1e-5)
    assert law.factors == pytest.approx(FACTORS, rel=1e-5)
    assert law.slopes == pytest.approx(SLOPES, abs=1e-5)
    assert law.status is Status.OK
    found = law.predict([0.2, 0.3, 0.5], 1)
    assert float(found) == pytest.approx(float(truth(np.array([[0.2, 0.3, 0.5]]))[0, 1]), rel=1e-8)
    assert law.predict([1.0, 0.0, 0.0]).status is Status.UNCERTAIN  # no run was there


@pytest.mark.slow
def test_intervals_hold_the_truth() -> None:
    """100 sets of 20 runs. Of nominally 95%, fewer than 88 have a chance of 0.003."""
    at = np.array([0.5, 0.3, 0.2])
    held = held_new = 0
    for seed in range(100):
        law = fit_mixing_law(*runs(20, seed, noise=0.02))
        held += float(truth(at[None])[0, 0]) in law.predict(at.tolist())
        one_more = float(truth(at[None])[0, 0]) + 0.02 * float(np.random.default_rng(seed + 10**6).standard_normal())
        held_new += one_more in law.predict(at.tolist(), new_run=True)
    assert held >= 88
    assert held_new >= 88


@pytest.mark.parametrize("floors", [None, (0.1, 0.0, 0.2), (0.6, 0.2, 0.2)])
@pytest.mark.parametrize("weights", [None, (1.0, 0.0), (0.2, 0.8)])
def test_no_shares_on_a_grid_are_better(floors: Any, weights: Any) -> None:
    law = fit_mixing_law(*runs(15))
    found = law.minimum(floors, weights=weights)
    f = np.zeros(3) if floors is None else np.array(floors)
    v = np.full(2, 0.5) if weights is None else np.array(weights)
    r = np.array(found.proportions)
    assert (r >= f).all()
    assert r.sum() == pytest.approx(1)

    def predicted(at: np.ndarray) -> float:
        return float(v @ (law.floors + law.factors * np.exp(law.slopes @ at)))

    grid = [np.array([a, b, 1 - a - b]) for a in np.linspace(0, 1, 81) for b in np.linspace(0, 1, 81) if a + b <= 1]
    best = min(predicted(at) for at in [*grid, r] if (at >= f - 1e-12).all())
    assert predicted(r) <= best + 1e-9
    assert found.gap <= 1e-9
    assert float(found.change) == pytest.approx(predicted(r))


def test_told_and_drawn() -> None:
    found = fit_mixing_law(*runs(15, noise=0.01), names=["a", "b", "c"]).minimum((0.05, 0.05, 0.05))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["objective"] == "mixing-law"
    assert "objective: changed on purpose" in found.explain()
    assert "<pre>" in found._repr_html_()
    assert len([p for p in found.plot().patches if p.get_width() > 0]) == 3
    if found.status is not Status.OK:
        with pytest.raises(NotConvergedError):
            found.require()


def test_a_straight_line_tells_no_floor() -> None:
    shares, _ = runs(12)
    noise = np.random.default_rng(0).standard_normal(12)
    law = fit_mixing_law(shares, 5 + 1e-4 * shares[:, 0] + 3e-6 * noise)
    assert law.status is Status.UNCERTAIN
    assert float(law.predict([1.0, 0.0, 0.0])) == pytest.approx(5.0001, abs=1e-5)


def test_losses_that_are_all_the_same() -> None:
    shares, _ = runs(12)
    assert float(fit_mixing_law(shares, np.full(12, 3.0)).predict([0.3, 0.3, 0.4])) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize(
    ("shares", "losses", "error", "said"),
    [
        (runs(4)[0], runs(4)[1], InvalidArgumentError, "5 runs are needed"),
        (np.tile([0.5, 0.25, 0.25], (9, 1)), np.ones(9), InvalidArgumentError, "span 1 of 3"),
        (runs(9)[0] * 2, np.ones(9), InvalidArgumentError, "add up to one"),
        (runs(9)[0], np.ones(8), InvalidArgumentError, "for each run"),
        (runs(9)[0], np.full(9, math.nan), NonFiniteError, "NaN"),
        (runs(9)[0], -runs(9)[1], InvalidArgumentError, "below least"),
        (np.zeros(3), np.zeros(3), InvalidArgumentError, "for each run"),
    ],
)
def test_runs_that_are_none(shares: Any, losses: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        fit_mixing_law(shares, losses)


def test_questions_that_are_none() -> None:
    law: MixingLaw = fit_mixing_law(*runs(12))
    with pytest.raises(InvalidArgumentError, match="add up"):
        law.predict([0.5, 0.5, 0.5])
    with pytest.raises(InvalidArgumentError, match="loss=2"):
        law.predict([0.5, 0.5, 0.0], 2)
    with pytest.raises(InvalidArgumentError, match="weights"):
        law.minimum(weights=[0.0, 0.0])
    with pytest.raises(InvalidArgumentError, match="floors"):
        law.minimum((0.9, 0.9, 0.9))
