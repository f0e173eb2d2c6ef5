"""Water-filling: SLSQP, the conditions of optimality, floors that are kept to the last bit, and input that is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.water_filling import error_per_cost, water_filling


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Two to eight sources, amounts over three decades; floors in two of three, costs in half, G in a quarter."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 9))
    amounts = 10 ** rng.uniform(-1.5, 1.5, k)
    floors = rng.dirichlet(np.ones(k)) * rng.uniform(0, 0.95) if seed % 3 else np.zeros(k)
    costs = 10 ** rng.uniform(-1, 1, k) if seed % 2 else None
    # No squared mean can be larger than (sum a)^2: the mean gradients' lengths are at most the root mean squares.
    offset = float(rng.uniform(0, 0.9) * amounts.sum() ** 2) if seed % 4 == 3 else 0.0
    return amounts, floors, costs, offset


def by_slsqp(amounts: np.ndarray, floors: np.ndarray, costs: np.ndarray | None, offset: float) -> float:
    """The best of three starts, moved onto the constraints that it misses by its own tolerance."""
    scale = error_per_cost(amounts, amounts / amounts.sum(), costs=costs)
    rng = np.random.default_rng(0)
    best = math.inf
    for start in (np.ones_like(amounts), amounts, rng.dirichlet(np.ones(len(amounts)))):
        first = floors + (1 - floors.sum()) * start / start.sum()
        with np.errstate(all="ignore"):
            found = minimize(
                lambda p: error_per_cost(amounts, np.maximum(p, 1e-12), costs=costs, offset=offset) / scale,
                first,
                method="SLSQP",
                bounds=[(max(f, 1e-9), 1.0) for f in floors],
                constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
                options={"ftol": 1e-15, "maxiter": 1000},
            ).x
        found = np.maximum(found, floors)
        free = found - floors
        if free.sum() > 0:
            kept = floors + free * (1 - floors.sum()) / free.sum()
            best = min(best, error_per_cost(amounts, kept, costs=costs, offset=offset))
    return best


# The first fifty in the quick tests, all of them in the full ones.
@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
@pytest.mark.filterwarnings("ignore:Values in x were outside bounds")
def test_at_most_what_slsqp_finds(block: int) -> None:
    """500 problems; 1e-10 of the value, which SLSQP itself rarely reaches."""
    for seed in range(50 * block, 50 * block + 50):
        amounts, floors, costs, offset = random_problem(seed)
        shares = water_filling(amounts, floors, costs, offset=offset)
        ours = error_per_cost(amounts, shares, costs=costs, offset=offset)
        theirs = by_slsqp(amounts, floors, costs, offset)
        assert ours <= theirs * (1 + 1e-10), (seed, ours, theirs)
        assert (shares >= floors).all()


@pytest.mark.parametrize("seed", range(1, 60, 2))
def test_no_neighbour_is_better_with_costs(seed: int) -> None:
    """Moving a share of 1e-4 between any two sources, floors kept, never helps: 1e-12 is what rounding leaves."""
    amounts, floors, costs, _ = random_problem(seed)
    shares = water_filling(amounts, floors, costs)
    best = error_per_cost(amounts, shares, costs=costs)
    for i in range(len(amounts)):
        for j in range(len(amounts)):
            moved = shares.copy()
            step = min(1e-4, moved[j] - floors[j])
            moved[i] += step
            moved[j] -= step
            assert error_per_cost(amounts, moved, costs=costs) >= best * (1 - 1e-12)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), k=st.integers(1, 12))
def test_floors_are_kept_and_shares_add_up(data: st.DataObject, k: int) -> None:
    amounts = data.draw(st.lists(st.floats(0, 1e150), min_size=k, max_size=k).filter(any))
    raw = np.array(data.draw(st.lists(st.floats(0, 1), min_size=k, max_size=k)))
    total = data.draw(st.floats(0, 1))
    floors = raw * (total / raw.sum()) if raw.sum() > 1e-300 else np.zeros(k)
    if math.fsum(floors) > 1:
        floors /= math.fsum(floors) * (1 + 1e-15)
    costs = data.draw(st.none() | st.lists(st.floats(1e-6, 1e6), min_size=k, max_size=k))
    shares = water_filling(amounts, floors, costs)
    assert (shares >= floors).all()
    assert math.fsum(shares) == pytest.approx(1, abs=4 * k * np.finfo(float).eps)


def test_closed_forms() -> None:
    """Neyman without floors, with costs, and all at their floors."""
    assert water_filling([1, 2, 5]) == pytest.approx([0.125, 0.25, 0.625], rel=1e-15)
    with_costs = np.array([1, 2, 6 / 3])
    assert water_filling([1, 2, 6], costs=[1, 1, 9]) == pytest.approx(with_costs / with_costs.sum(), rel=1e-12)
    assert water_filling([1, 2, 5], [0.5, 0.25, 0.25]).tolist() == [0.5, 0.25, 0.25]
    assert water_filling([0, 1, 1], [0.2, 0, 0]).tolist() == [0.2, 0.4, 0.4]
    assert water_filling([0, 1, 1]).tolist() == [0, 0.5, 0.5]
    assert water_filling([3.0]).tolist() == [1.0]
    assert water_filling([1] * 10, [0.1] * 10).tolist() == [0.1] * 10


def test_scales_do_not_matter() -> None:
    """Powers of two: the same to the last bit."""
    amounts, floors, costs = np.array([1.0, 2.0, 7.0]), [0.4, 0.1, 0.0], np.array([1.0, 3.0, 0.5])
    once = water_filling(amounts, floors, costs)
    assert water_filling(amounts * 2.0**-300, floors, costs * 2.0**40).tolist() == once.tolist()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "amounts"),
        (([0.0, 0.0],), "above 0"),
        (([1.0, -1.0],), "amounts"),
        (([1.0, math.nan],), "amounts"),
        (([1.0, math.inf],), "amounts"),
        (([1.0, 1.0], [0.6, 0.5]), "add up to 1.1"),
        (([1.0, 1.0], [0.6]), "one for each of the 2"),
        (([1.0, 1.0], [-0.1, 0.5]), "floor is a share"),
        (([1.0, 1.0], [math.nan, 0.5]), "floor is a share"),
        (([1.0, 1.0], None, [1.0, 0.0]), "costs"),
        (([1.0, 1.0], None, [1.0]), "costs"),
    ],
)
def test_input_that_is_none(arguments: tuple, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        water_filling(*arguments)


def test_an_offset_that_is_none() -> None:
    with pytest.raises(InvalidArgumentError, match="squared length"):
        water_filling([1.0, 2.0], offset=math.nan)
