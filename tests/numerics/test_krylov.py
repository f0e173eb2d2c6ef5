"""The identities that define a Krylov run, before and after thick restarts."""

import numpy as np
import pytest
import torch

from dyntune.errors import NonFiniteError
from dyntune.numerics.krylov import KrylovRun, UnitScale
from dyntune.numerics.vectors import Basis, VectorSpace

N = 60
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
# Each entry of a residual below collects the rounding of a product (N terms), two Gram-Schmidt passes and a rotation,
# all of unit vectors: about sqrt(N) eps ||A|| each. 20 eps ||A|| leaves a factor of 2.
ROUNDINGS = 20


def symmetric(seed: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))
    values = torch.cat([torch.tensor([4.0, -3.0]), torch.linspace(-1, 1, N - 2)]).double()
    return ((q * values) @ q.T).to(dtype)


def begin(matrix: torch.Tensor, rows: int, *, locked: int = 0) -> KrylovRun:
    basis = Basis(VectorSpace.of([matrix[0]]), rows)
    for row in range(locked + 1):
        basis.load(row, basis.space.normal(row))
        basis.orthogonalise(row, row)
        basis.scale(row, basis.norm(row).reciprocal())
    return KrylovRun(basis, locked, scale=0.0)


def advance(run: KrylovRun, matrix: torch.Tensor, until: int) -> None:
    while run.size < until:
        run.step(lambda v: [matrix @ v[0]], EPS[matrix.dtype])


def check_identities(run: KrylovRun, matrix: torch.Tensor) -> None:
    """Orthonormality, and A Q = Q T + r e^T + (locked rows) L; T need not be tridiagonal."""
    first, m = run.first, run.size
    rows = run.basis.buffers[0][: first + m + 1].double().numpy()
    locked, q, after = rows[:first], rows[first : first + m].T, rows[first + m]
    tolerance = ROUNDINGS * EPS[matrix.dtype]
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=tolerance)
    residual = matrix.double().numpy() @ q - q @ run.projected[:m, :m] - locked.T @ run.leak[:, :m]
    residual[:, -1] -= run.beta * after
    assert np.abs(residual).max() < tolerance * 4  # ||A|| = 4


@pytest.mark.parametrize("locked", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
class TestIdentities:
    def test_before_a_restart(self, dtype, locked):
        matrix = symmetric(0, dtype)
        run = begin(matrix, 20, locked=locked)
        advance(run, matrix, 12)
        t = run.projected[:12, :12]
        assert np.array_equal(t, np.triu(np.tril(t, 1), -1))  # tridiagonal, exactly
        assert np.array_equal(t, t.T)
        check_identities(run, matrix)

    @pytest.mark.parametrize("keep", [[8, 9, 10, 11], [0, 1, 11], [11]])
    def test_after_restarts(self, dtype, locked, keep):
        matrix = symmetric(1, dtype)
        run = begin(matrix, 20, locked=locked)
        for _ in range(3):
            advance(run, matrix, 12)
            run.restart(run.ritz(), np.array(keep))
            assert run.size == len(keep)
            advance(run, matrix, len(keep) + 1)  # the arrow is complete with the next product
            check_identities(run, matrix)
        advance(run, matrix, 12)
        check_identities(run, matrix)

    def test_the_arrow_is_what_the_restart_promised(self, dtype, locked):
        matrix = symmetric(2, dtype)
        run = begin(matrix, 20, locked=locked)
        advance(run, matrix, 12)
        ritz = run.ritz()
        keep = np.array([9, 10, 11])
        run.restart(ritz, keep)
        promised = run.projected[:4, :4].copy()
        advance(run, matrix, 4)
        q = run.basis.buffers[0][locked : locked + 4].double().numpy()
        direct = q @ matrix.double().numpy() @ q.T
        np.testing.assert_allclose(direct[:3], promised[:3], atol=4 * ROUNDINGS * EPS[dtype])
        np.testing.assert_allclose(np.diag(promised)[:3], ritz.values[keep])


def test_residuals_are_those_of_the_ritz_vectors():
    matrix = symmetric(3, torch.float64)
    run = begin(matrix, 20, locked=2)
    advance(run, matrix, 10)
    run.restart(run.ritz(), np.array([7, 8, 9]))
    advance(run, matrix, 10)
    ritz = run.ritz()
    y = run.basis.buffers[0][2:12].double().numpy().T @ ritz.vectors
    true = np.linalg.norm(matrix.numpy() @ y - y * ritz.values, axis=0)
    leaks = run.leaks(ritz, np.arange(10))
    np.testing.assert_allclose(np.hypot(ritz.residuals, leaks), true, rtol=1e-9, atol=1e-13)
    assert leaks.max() > 0.1  # the locked rows here are random, so what leaks into them is not rounding


def test_full_order_has_the_exact_eigenvalues():
    matrix = symmetric(4, torch.float64)
    run = begin(matrix, N + 1)
    advance(run, matrix, N)
    assert run.beta == 0.0
    np.testing.assert_allclose(run.ritz().values, np.linalg.eigvalsh(matrix.numpy()), atol=1e-13)


def test_an_invariant_space_ends_the_run():
    matrix = torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0, 0.5]))
    run = begin(matrix, 7)
    advance(run, matrix, 3)
    assert run.beta == 0.0
    np.testing.assert_allclose(run.ritz().values, [-1, 0.5, 2], atol=1e-6)


def test_a_full_basis_is_reported():
    matrix = symmetric(5, torch.float32)
    run = begin(matrix, 6, locked=2)
    advance(run, matrix, 2)
    assert not run.full
    advance(run, matrix, 3)
    assert run.full  # 2 locked, 3 of the run, 1 for the next vector


def test_asymmetry_is_seen_and_absent_in_symmetric_operators():
    matrix = symmetric(6, torch.float64)
    run = begin(matrix, 20)
    advance(run, matrix, 12)
    assert run.asymmetry < ROUNDINGS * EPS[torch.float64]
    run.restart(run.ritz(), np.array([0, 1, 10, 11]))
    advance(run, matrix, 10)
    assert run.asymmetry < ROUNDINGS * EPS[torch.float64]
    skewed = matrix + 0.1 * torch.triu(torch.ones_like(matrix))
    run = begin(skewed, 20)
    advance(run, skewed, 12)
    assert run.asymmetry > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_an_error(bad):
    run = begin(symmetric(7, torch.float32), 5)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        run.step(lambda v: [v[0] * bad], EPS[torch.float32])


class TestUnitScale:
    @pytest.mark.parametrize("exponent", [-120, -80, -32, 31, 80, 120])
    def test_extreme_products_come_back_near_one(self, exponent):
        unit = UnitScale(lambda v: [2.0**exponent * v[0]])
        (result,) = unit([torch.tensor([0.5, 1.5])])
        assert torch.equal(result, torch.tensor([0.5, 1.5]) * 2.0**exponent * unit.factor)
        assert 0.5 <= float(result.max()) < 2
        (again,) = unit([torch.tensor([3.0, 0.0])])  # the factor was chosen once
        assert float(again[0]) == 3.0 * 2.0**exponent * unit.factor

    @pytest.mark.parametrize("value", [0.0, 1.0, 1e-8, 1e8, float("nan"), float("inf")])
    def test_ordinary_and_undefined_products_are_left_alone(self, value):
        given = torch.tensor([value])
        unit = UnitScale(lambda v: [given, torch.empty(0)])
        result = unit([torch.ones(1)])
        assert unit.factor == 1.0
        assert result[0].data_ptr() == given.data_ptr()
