"""The orthonormal basis against plain linear algebra in NumPy."""

import numpy as np
import pytest
import torch

from dyntune.numerics import vectors
from dyntune.numerics.vectors import Basis, VectorSpace

SHAPES = [(30,), (), (4, 5), (7,), (11,)]
# Rounding of sums of about 70 products of order 1, in the least precise dtype: 10 eps leaves a factor of about 5.
ATOL = {torch.float32: 1e-6, torch.float64: 2e-15}
CASES = {
    "fp32": [torch.float32] * 5,
    "fp64": [torch.float64] * 5,
    "mixed": [torch.float32, torch.float32, torch.float64, torch.float64, torch.float32],
}


@pytest.fixture(params=CASES)
def filled(request, monkeypatch):
    """A basis of 6 random unit rows in several segments and blocks, the same rows in NumPy, and the tolerance."""
    monkeypatch.setattr(vectors, "SEGMENT_NUMEL", 35)
    monkeypatch.setattr(vectors, "BLOCK_NUMEL_CPU", 8)
    space = VectorSpace([torch.Size(s) for s in SHAPES], CASES[request.param], [torch.device("cpu")] * 5)
    assert len(space.segments) > 1
    basis = Basis(space, 6)
    for row in range(6):
        basis.load(row, space.normal(row))
        basis.scale(row, basis.norm(row).reciprocal())
    return basis, as_numpy(basis), ATOL[space.dtype]


def as_numpy(basis: Basis) -> np.ndarray:
    return torch.stack([torch.cat([t.reshape(-1).double() for t in basis.views(r)]) for r in range(basis.rows)]).numpy()


def test_norm_project_and_subtract(filled):
    basis, rows, atol = filled
    assert float(basis.norm(2)) == pytest.approx(np.linalg.norm(rows[2]), rel=atol)
    coefficients = basis.project(4, 5)
    assert coefficients.dtype == torch.float64
    np.testing.assert_allclose(coefficients.numpy(), rows[:4] @ rows[5], atol=atol)
    basis.subtract(4, 5, coefficients)
    np.testing.assert_allclose(as_numpy(basis)[5], rows[5] - (rows[:4] @ rows[5]) @ rows[:4], atol=atol)


def test_orthogonalise_builds_an_orthonormal_basis(filled):
    basis, rows, atol = filled
    for row in range(6):
        coefficients = basis.orthogonalise(row, row)
        assert coefficients.shape == (row,)
        basis.scale(row, basis.norm(row).reciprocal())
    found = as_numpy(basis)
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=atol)
    np.testing.assert_allclose(np.abs(np.linalg.qr(rows.T)[0].T), np.abs(found), atol=10 * atol)  # condition < 10


def test_orthogonalise_twice_is_enough_for_a_vector_close_to_the_span(filled):
    basis, _, atol = filled
    for row in range(5):
        basis.orthogonalise(row, row)
        basis.scale(row, basis.norm(row).reciprocal())
    tiny = [1e3 * atol * t for t in basis.space.normal(99)]
    basis.load(5, [a + b for a, b in zip(basis.views(0), tiny, strict=True)])
    coefficients = basis.orthogonalise(5, 5)
    assert float(coefficients[0]) == pytest.approx(1, abs=0.01)
    basis.scale(5, basis.norm(5).reciprocal())
    # One pass would leave eps / (1e3 atol), about 1e-3.
    assert np.abs(as_numpy(basis)[:5] @ as_numpy(basis)[5]).max() < 2 * atol


def test_orthogonalise_against_nothing(filled):
    basis, rows, _ = filled
    assert basis.orthogonalise(0, 0).shape == (0,)
    np.testing.assert_array_equal(as_numpy(basis), rows)


def test_rotate(filled):
    basis, rows, atol = filled
    rotation = np.random.default_rng(0).standard_normal((4, 3))
    basis.rotate(1, 4, torch.from_numpy(rotation))
    found = as_numpy(basis)
    np.testing.assert_allclose(found[1:4], rotation.T @ rows[1:5], atol=10 * atol)  # coefficients up to 2.5, 4 terms
    np.testing.assert_array_equal(found[[0, 4, 5]], rows[[0, 4, 5]])


def test_move_and_release(filled):
    basis, rows, _ = filled
    basis.move(4, 1)
    np.testing.assert_array_equal(as_numpy(basis)[1], rows[4])
    picked = basis.release([3, 1, 3])
    flat = [torch.cat([t.reshape(-1).double() for t in v]).numpy() for v in picked]
    np.testing.assert_array_equal(flat, rows[[3, 4, 3]])
