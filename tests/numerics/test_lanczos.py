"""Decisions inside the solver that its answers show too rarely to be tested through them."""

import numpy as np
import pytest
import torch

from dyntune.numerics import lanczos as module
from dyntune.numerics.certificate import RitzState, log_needed
from dyntune.numerics.lanczos import _Locked, _Solver, lanczos
from dyntune.numerics.operator import CallableOperator
from dyntune.numerics.target import Target
from tests.operators import diagonal

N = 100


def solver(which: str, k: int, *, locked: list[float]) -> _Solver:
    """In its second run, after `locked` pairs with negligible residuals."""
    made = _Solver(CallableOperator(*diagonal(np.linspace(0, 10, N))), Target(which, k), 1e-2, 1e-4, 40, 0)
    made._begin(None)
    made.locked = _Locked(np.array(locked), np.full(len(locked), 1e-9), np.zeros(len(locked)))
    made.scale = 10.0
    made._begin(None)
    made.run.beta = 1.0
    return made


def ritz(*pairs: tuple[float, float]) -> RitzState:
    values, residuals = (np.array(x) for x in zip(*pairs, strict=True))
    return RitzState(values, residuals, np.eye(len(pairs)))


def test_a_late_pair_settles_to_the_finest_tolerance_of_all():
    """A second 10: its residual loosens the bound below 0.02 as much as that below 10."""
    at_work = solver("largest", 3, locked=[10.0, 0.02, 0.01])
    permitted = 0.25 / np.sqrt(2) * 0.01 * 0.02  # 10, 10 and 0.02 stay; this is the second run
    assert at_work._to_lock(ritz((0.0, 1.0), (10.0, 1.01 * permitted))).tolist() == []
    assert at_work._to_lock(ritz((0.0, 1.0), (10.0, 0.99 * permitted))).tolist() == [1]


def test_only_what_changes_the_answer_is_locked_later():
    at_work = solver("largest", 2, locked=[10.0, 5.0])
    assert at_work._to_lock(ritz((4.0, 0.0), (5.04, 0.0))).tolist() == []  # within 1% of 5
    assert at_work._to_lock(ritz((4.0, 0.0), (5.06, 0.0))).tolist() == [1]


def test_a_pair_that_is_given_up_counts_as_a_residual_again():
    at_work = solver("largest", 2, locked=[10.0, 5.0])
    at_work.locked = _Locked(np.array([10.0, 5.0]), np.array([1e-5, 2e-5]), np.array([3e-5, 0.0]))
    at_work.run.size = 2
    at_work.basis.buffers[0].zero_()
    at_work._lock(ritz((0.0, 1.0), (8.0, 4e-5)), np.array([1]))
    assert at_work.locked.values.tolist() == [10.0, 8.0]
    # 10 leaks 3e-5 into what was locked before it, which may be the 5 that is gone.
    np.testing.assert_allclose(at_work.locked.residuals, [np.hypot(1e-5, 3e-5), 4e-5])
    assert not at_work.locked.leaks.any()


@pytest.mark.parametrize(("which", "expected"), [("largest", [5, 6, 7, 8, 9]), ("smallest", [0, 1, 2, 3, 4])])
def test_restarts_keep_half_from_the_end_that_matters(which, expected):
    at_work = solver(which, 1, locked=[])
    at_work.run.size = 10
    assert at_work._keep(ritz(*((v, 1.0) for v in np.linspace(-1, 1, 10)))).tolist() == expected


def test_restarts_keep_what_is_wanted_where_more_than_half_is():
    at_work = solver("both", 3, locked=[])
    at_work.run.size = 10
    kept = at_work._keep(ritz(*((v, 1.0) for v in np.linspace(-1, 1, 10))))
    assert set(kept.tolist()) >= {0, 1, 2, 7, 8, 9}
    assert len(kept) <= 7  # three rows at least for new vectors


def test_restarts_keep_the_largest_magnitudes_wherever_they_are():
    at_work = solver("magnitude", 4, locked=[])
    at_work.run.size = 8
    kept = at_work._keep(
        ritz((-0.1, 1.0), (0.0, 1.0), (0.2, 1.0), (3.0, 1.0), (4.0, 1.0), (5.0, 1.0), (6.0, 1.0), (7.0, 1.0))
    )
    assert kept.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_the_certificate_knows_how_random_the_start_was(which, monkeypatch):
    """A mixed start asks for log 4 more; both ends share the failure probability."""
    asked = []
    monkeypatch.setattr(module, "log_needed", lambda *a, **k: asked.append(log_needed(*a, **k)) or asked[-1])
    operator = CallableOperator(*diagonal(np.linspace(0, 1, N)))
    options = {"rtol": 1e-2, "failure_probability": 1e-4, "max_products": 3, "basis_size": 20, "seed": 0}
    for start in (None, [torch.ones(N)], [torch.zeros(N)]):
        lanczos(operator, target=Target(which, 1), start=start, **options)
    plain, mixed, nothing = asked[0], asked[2], asked[4]  # once per end, in the only run of each solve
    assert mixed - plain == pytest.approx(np.log(4), rel=1e-9)
    assert nothing == plain
    # All but the hundredth that later runs would share.
    assert plain == pytest.approx(log_needed(N, 0.99e-4 / (1 if which == "largest" else 2)), rel=1e-6)


def test_several_values_share_the_failure_probability_among_runs(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "log_needed", lambda n, p, **k: asked.append((n, p)) or log_needed(n, p, **k))
    values = np.concatenate([[3.0, 3.0, 3.0], np.linspace(0, 1, N)])
    operator = CallableOperator(*diagonal(values))
    options = {"rtol": 1e-2, "failure_probability": 1e-4, "max_products": 400, "basis_size": 30, "seed": 0}
    lanczos(operator, target=Target("largest", 3), start=None, **options)
    levels = sorted({p for _, p in asked}, reverse=True)
    assert len(levels) > 1
    np.testing.assert_allclose(levels, [1e-4 / 2**run for run in range(1, len(levels) + 1)], rtol=1e-9)
    assert sum(levels) < 1e-4
