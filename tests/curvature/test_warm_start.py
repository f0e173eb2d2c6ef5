"""Starting from an earlier direction, right or wrong, and the bookkeeping of randomness."""

import numpy as np
import pytest
import torch

from dyntune import eigenvalues
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.operator import LinearOperator
from dyntune.numerics.vectors import VectorSpace
from tests.operators import diagonal

N = 2000
VALUES = np.concatenate([[3.0, 2.9], np.random.default_rng(0).uniform(-1, 1, N - 2)])


def unit(index: int) -> torch.Tensor:
    e = torch.zeros(N)
    e[index] = 1.0
    return e


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_wrong_start_hides_nothing(seed, scale):
    """The exact second eigenvector: its residual is zero from the first product on."""
    found = eigenvalues(diagonal(VALUES), start=scale * unit(1), seed=seed)
    assert found.converged
    assert float(found) == pytest.approx(3.0, rel=1e-2)
    assert float(found) > 2.95


@pytest.mark.parametrize("seed", range(10))
def test_the_right_start_saves_products(seed):
    cold = eigenvalues(diagonal(VALUES), seed=seed)
    warm = eigenvalues(diagonal(VALUES), start=unit(0), seed=seed)
    assert warm.converged
    assert float(warm) == pytest.approx(3.0, rel=1e-2)
    assert warm.num_products <= cold.num_products


@pytest.mark.slow
def test_wrong_starts_do_not_break_the_stated_probability():
    """The mixed start is worth half a random one, and the certificate knows: 400 runs at 10%, 99.9% of its binomial."""
    values = np.concatenate([[1.05, 1.02], np.random.default_rng(1).uniform(-1, 1, 300)])
    start = torch.zeros(302)
    start[1] = 1.0
    wrong = 0
    for seed in range(400):
        found = eigenvalues(diagonal(values), start=start, failure_probability=0.1, seed=seed)
        wrong += found.converged and float(found) < 1.05 * 0.99
    assert wrong <= 59


class InParts(LinearOperator):
    """The diagonal matrix on vectors of two tensors."""

    def __init__(self) -> None:
        parts = torch.as_tensor(VALUES).float().split([500, N - 500])
        self.parts = [parts[0].view(20, 25), parts[1]]
        super().__init__(VectorSpace.of(self.parts))

    def session(self):
        from contextlib import nullcontext

        return nullcontext(lambda v: [a * x for a, x in zip(self.parts, v, strict=True)])


def test_a_start_may_be_flat_a_list_or_an_earlier_result():
    operator = InParts()
    flat = unit(0)
    parts = operator.space.unflatten(flat)
    results = [eigenvalues(operator, start=s) for s in (flat, parts, tuple(parts), flat.double())]
    # The same direction gives the same run, bit by bit.
    assert len({(float(r), r.num_products) for r in results}) == 1
    again = eigenvalues(operator, start=results[0])
    assert again.converged
    assert again.num_products <= results[0].num_products
    assert [tuple(t.shape) for t in again.vectors[0]] == [(20, 25), (N - 500,)]


def test_an_earlier_result_with_several_vectors_is_a_start():
    first = eigenvalues(diagonal(VALUES), k=2)
    again = eigenvalues(diagonal(VALUES), k=2, start=first)
    assert again.converged
    np.testing.assert_allclose(again.values, [3.0, 2.9], rtol=1e-2)


def test_a_start_of_zeros_is_as_good_as_none():
    plain = eigenvalues(diagonal(VALUES))
    assert torch.equal(eigenvalues(diagonal(VALUES), start=torch.zeros(N)).vectors[0], plain.vectors[0])


def test_the_start_is_not_written_to():
    start = unit(0)
    before = start.clone()
    eigenvalues(diagonal(VALUES), start=start)
    assert torch.equal(start, before)


@pytest.mark.parametrize("k", [1, 3])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(k):
    first, second, other = (eigenvalues(diagonal(VALUES), k, seed=seed) for seed in (5, 5, 6))
    for name in ("values", "low", "high", "residuals"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert all(torch.equal(a, b) for a, b in zip(first.vectors, second.vectors, strict=True))
    assert not torch.equal(first.vectors[0], other.vectors[0])


def test_global_generators_are_neither_read_nor_advanced():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        results.append(eigenvalues(diagonal(VALUES), k=2))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(results[0].vectors[0], results[1].vectors[0])


@pytest.mark.parametrize(
    ("start", "error", "fragment"),
    [
        (torch.ones(N - 1), ShapeMismatchError, "1999 elements, the operator needs 2000"),
        ([torch.ones(N), torch.ones(1)], ShapeMismatchError, "start has tensors of shape"),
        (torch.full((N,), float("nan")), InvalidArgumentError, "start holds NaN or infinity"),
        (torch.full((N,), float("inf")), InvalidArgumentError, "start holds NaN or infinity"),
    ],
)
def test_unusable_starts(start, error, fragment):
    with pytest.raises(error, match=fragment):
        eigenvalues(diagonal(VALUES), start=start)
