"""The certificate's formulas, derived a second time."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from dyntune.numerics.certificate import (
    PolynomialTrack,
    RitzState,
    level_reached,
    level_still_needed,
    log_needed,
    probable_bound,
)
from dyntune.numerics.krylov import KrylovRun
from dyntune.numerics.operator import CallableOperator
from dyntune.numerics.vectors import Basis
from tests.operators import diagonal

N = 200
EPS = 2.0**-52


def new_run(values: np.ndarray, rows: int, seed: int = 0) -> tuple[KrylovRun, CallableOperator]:
    operator = CallableOperator(*diagonal(values, torch.float64), dtype=torch.float64)
    basis = Basis(operator.space, rows)
    basis.load(0, basis.space.normal(seed))
    basis.scale(0, basis.norm(0).reciprocal())
    return KrylovRun(basis, 0, scale=0.0), operator


def advance(run: KrylovRun, operator: CallableOperator, until: int) -> None:
    with operator.session() as product:
        while run.size < until:
            run.step(product, EPS)


def spectrum(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([[1.04, 1.02, -1.03], rng.uniform(-1, 1, N - 3)])


class Polynomials:
    """Values at one point of the polynomials behind the rows of a run, in 60 digits, from its coefficients alone."""

    def __init__(self, at: float) -> None:
        self.at = mpmath.mpf(at)
        self.rows = [mpmath.mpf(1)]  # p_0 = 1

    def extend(self, run: KrylovRun) -> None:
        """``beta p_new = (x - alpha) p_last - sum of couplings times the polynomials of the rows before``."""
        while len(self.rows) <= run.size:
            j = len(self.rows) - 1
            beta = mpmath.mpf(run.projected[j + 1, j] if j + 1 < run.size else run.beta)
            before = sum(mpmath.mpf(run.projected[i, j]) * self.rows[i] for i in range(j))
            self.rows.append(((self.at - mpmath.mpf(run.projected[j, j])) * self.rows[j] - before) / beta)

    def restart(self, run: KrylovRun, keep: np.ndarray) -> None:
        """Kept Ritz vectors are sums of rows; the last row stays."""
        m = run.size
        _, vectors = mpmath.mp.eigsy(mpmath.matrix(run.projected[:m, :m].tolist()))
        signs = np.sign(run.ritz().vectors[-1])  # an eigenvector's sign is arbitrary, the couplings follow NumPy's
        kept = [
            signs[c] * mpmath.sign(vectors[m - 1, int(c)]) * sum(vectors[i, int(c)] * self.rows[i] for i in range(m))
            for c in keep
        ]
        self.rows = [*kept, self.rows[m]]

    def log_sum_of_squares(self) -> float:
        return float(mpmath.log(sum(p * p for p in self.rows)))


@pytest.mark.parametrize("at", [1.0001, 1.75, 3.0, 40.0, -1.61, -9.0])
def test_christoffel_function_is_the_sum_of_squared_polynomials(at):
    """The closed form against the recurrences, over two restarts."""
    with mpmath.workdps(60):
        # The Ritz values stay clear of `at` from both sides: the bulk only.
        run, operator = new_run(np.random.default_rng(0).uniform(-1, 1, N), 16)
        polynomials = Polynomials(at)
        for keep in ([5, 6, 7, 8, 9], [0, 1, 8, 9], None):
            for size in (run.size + 1, 10):
                advance(run, operator, size)
                polynomials.extend(run)
                found = run.track.log_christoffel(run.ritz(), at)
                # The roots (Ritz values) are known to a few eps; one at distance 1e-4 moves log C by 1e-11.
                assert found == pytest.approx(polynomials.log_sum_of_squares(), rel=1e-9, abs=1e-9)
            if keep is not None:
                polynomials.restart(run, np.array(keep))
                run.restart(run.ritz(), np.array(keep))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_christoffel_function_at_an_eigenvalue_is_what_the_basis_holds_of_its_eigenvector(index):
    """C(lambda) <u, v0>^2 = sum of <u, v_j>^2 over the rows: the equality behind Bessel's inequality."""
    values = spectrum(1)
    run, operator = new_run(values, 16, seed=3)
    log_weight = 2 * math.log(abs(float(run.basis.views(0)[0][index])))
    keep = {0: [7, 8, 9], 1: [7, 8, 9], 2: [0, 1, 2]}[index]
    for _ in range(3):
        for size in range(run.size + 1, 11):
            advance(run, operator, size)
            held = float((run.basis.buffers[0][: run.size + 1, index] ** 2).sum())
            found = run.track.log_christoffel(run.ritz(), values[index])
            # The gap to the nearest Ritz value, at least 1e-6 here, is resolved to eps.
            assert np.abs(run.ritz().values - values[index]).min() > 1e-6
            assert found + log_weight == pytest.approx(math.log(held), abs=1e-8)
            assert found + log_weight < 1e-8  # Bessel
        run.restart(run.ritz(), np.array(keep))


def test_a_decoupled_space_excludes_everything_and_a_ritz_value_nothing():
    ritz = RitzState(np.array([0.0, 1.0]), np.zeros(2), np.eye(2))
    assert PolynomialTrack(log_betas=-math.inf).log_christoffel(ritz, 2.0) == math.inf
    assert PolynomialTrack().log_christoffel(ritz, 1.0) == -math.inf
    assert PolynomialTrack(discarded=[0.5]).log_christoffel(ritz, 0.5) == -math.inf


class TestLevels:
    @pytest.mark.parametrize("n", [2, 3, 10, 1000, 10**6])
    @pytest.mark.parametrize("failure", [0.5, 1e-2, 1e-4, 1e-8])
    def test_needed_is_the_quantile_of_the_weight(self, n, failure):
        quantile = scipy.stats.beta.ppf(failure, 0.5, (n - 1) / 2)
        assert log_needed(n, failure) == pytest.approx(-math.log(quantile), rel=1e-9)
        assert log_needed(n, failure, random_share=0.5) == pytest.approx(math.log(4) - math.log(quantile), rel=1e-9)

    @pytest.mark.parametrize("n", [2, 7, 10**6])
    def test_needed_far_in_the_tail(self, n):
        """Where the quantile of the weight underflows."""
        needed = log_needed(n, 1e-200)
        with mpmath.workdps(50):
            b = mpmath.mpf(n - 1) / 2
            probability = mpmath.betainc(0.5, b, 0, mpmath.exp(-mpmath.mpf(needed)), regularized=True)
        assert float(probability / mpmath.mpf("1e-200")) == pytest.approx(1, rel=1e-9)
        assert log_needed(n, 1e-99) < log_needed(n, 1e-101) < math.inf

    def test_certainty_and_indifference(self):
        assert log_needed(10, 0.0) == math.inf
        assert log_needed(10, 1.0) == 0.0

    def test_in_one_dimension_the_start_is_the_eigenvector(self):
        assert log_needed(1, 1e-4) == 0.0
        assert level_reached(1, 1e-3) == 0.0

    @pytest.mark.parametrize("n", [2, 50, 10**6])
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_reached_inverts_needed(self, n, share):
        for level in (0.3, 1e-3, 1e-7):
            found = level_reached(n, log_needed(n, level, random_share=share), random_share=share)
            assert found == pytest.approx(level, rel=1e-6)
        assert level_reached(n, -5.0) == 1.0

    def test_one_run_alone_needs_the_level_itself(self):
        assert level_still_needed(1e-4, []) == pytest.approx(1e-4, rel=1e-9)

    @pytest.mark.parametrize("earlier", [[0.1], [0.5, 0.01], [0.2, 0.9, 0.3]])
    def test_runs_combine_by_fishers_method(self, earlier):
        last = level_still_needed(1e-4, earlier)
        product = last * math.prod(earlier)
        assert scipy.stats.chi2.sf(-2 * math.log(product), 2 * len(earlier) + 2) == pytest.approx(1e-4, rel=1e-6)

    def test_enough_evidence_needs_no_more(self):
        assert level_still_needed(1e-2, [1e-9]) == 1.0
        assert level_still_needed(1e-2, [0.0]) == 1.0


class TestProbableBound:
    def test_it_is_where_the_certificate_reaches_the_level(self):
        run, operator = new_run(spectrum(2), 30)
        advance(run, operator, 12)
        ritz = run.ritz()
        for upper, edge in ((True, ritz.values[-1]), (False, ritz.values[0])):
            bound = probable_bound(run.track, ritz, needed=20.0, upper=upper)
            assert abs(bound) > abs(edge)
            distance = bound - edge
            assert run.track.log_christoffel(ritz, bound) >= 20.0
            # Bisection stops at 1e-6 of the distance.
            assert run.track.log_christoffel(ritz, edge + distance * (1 - 2e-6)) < 20.0

    def test_nothing_is_known_after_one_vague_step_and_everything_after_the_last(self):
        ritz = RitzState(np.array([1.0]), np.array([1e40]), np.eye(1))
        assert probable_bound(PolynomialTrack(log_betas=90), ritz, needed=30.0, upper=True) == math.inf
        assert probable_bound(PolynomialTrack(log_betas=90), ritz, needed=30.0, upper=False) == -math.inf
        assert probable_bound(PolynomialTrack(log_betas=-math.inf), ritz, needed=30.0, upper=True) == 1.0
        zero = RitzState(np.array([0.0]), np.array([0.0]), np.eye(1))
        assert probable_bound(PolynomialTrack(log_betas=-math.inf), zero, needed=30.0, upper=True) == 0.0

    def test_coverage(self):
        """Fails in at most the stated share of 400 runs; without the certificate the same test fails clearly."""
        level, repeats = 0.1, 400
        values = np.concatenate([[1.1], np.random.default_rng(5).uniform(-1, 1, N - 1)])
        needed = log_needed(N, level)
        failures = {needed: 0, 0.0: 0}
        for seed in range(repeats):
            run, operator = new_run(values, 12, seed=1000 + seed)
            advance(run, operator, 10)
            for threshold in failures:
                bound = probable_bound(run.track, run.ritz(), needed=threshold, upper=True)
                failures[threshold] += bound < values.max()
        most = scipy.stats.binom.ppf(0.999, repeats, level)
        assert failures[needed] <= most
        assert failures[0.0] > 2 * most
