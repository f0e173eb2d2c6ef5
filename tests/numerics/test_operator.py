"""Operators from matrices, callables and subclasses."""

from contextlib import contextmanager

import pytest
import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError, UnsupportedDtypeError
from dyntune.numerics.operator import CallableOperator, DenseOperator, LinearOperator, as_operator
from dyntune.numerics.vectors import VectorSpace


def symmetric(n: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return a + a.T


class Doubling(LinearOperator):
    """2 I on vectors of two tensors of different dtype."""

    def __init__(self) -> None:
        shapes, dtypes = [torch.Size([2, 2]), torch.Size([])], [torch.float32, torch.float64]
        super().__init__(VectorSpace(shapes, dtypes, [torch.device("cpu")] * 2))

    @contextmanager
    def session(self):
        yield lambda v: [2 * t for t in v]


def test_matrices_callables_and_operators_are_taken():
    a = symmetric()
    v = torch.arange(5.0, dtype=torch.float64)
    assert torch.equal(as_operator(a) @ v, a @ v)
    found = as_operator((lambda x: a @ x, 5), start=v)
    assert found.dtype == torch.float64
    assert torch.equal(found @ v, a @ v)
    assert as_operator((lambda x: x, 5)).dtype == torch.float32
    assert as_operator(found) is found


def test_to_dense_is_the_matrix():
    assert torch.equal(as_operator(symmetric()).to_dense(), symmetric())
    assert torch.equal(Doubling().to_dense(), 2 * torch.eye(5))


def test_flat_in_flat_out_and_lists_in_lists_out():
    operator = Doubling()
    flat = operator @ torch.arange(5.0)
    assert torch.equal(flat, 2 * torch.arange(5.0))
    first, second = operator @ [torch.ones(2, 2), torch.tensor(3.0)]
    assert torch.equal(first, torch.full((2, 2), 2.0))
    assert (float(second), second.dtype) == (6.0, torch.float64)
    assert (operator.shape, operator.dtype) == ((5, 5), torch.float32)
    assert repr(operator) == "Doubling(n=5, dtype=torch.float32, device=cpu)"


def test_products_carry_no_graph():
    weights = torch.ones(3, requires_grad=True)
    assert not (CallableOperator(lambda v: weights * v, 3) @ torch.ones(3)).requires_grad


def test_a_matrix_that_requires_grad_is_detached():
    assert not (DenseOperator(symmetric().requires_grad_()) @ torch.ones(5, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize(
    ("operator", "error", "fragment"),
    [
        (torch.ones(2, 3), ShapeMismatchError, r"shape \(2, 3\)"),
        (torch.ones(3), ShapeMismatchError, r"shape \(3,\)"),
        (torch.empty(0, 0), ShapeMismatchError, r"shape \(0, 0\)"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), InvalidArgumentError, r"max\|A - A.T\| = 0.5.*Pass \(A \+ A.T\) / 2"),
        (torch.tensor([[float("nan")]]), NonFiniteError, "NaN or infinity"),
        (torch.tensor([[float("inf")]]), NonFiniteError, "NaN or infinity"),
        (torch.eye(2, dtype=torch.bfloat16), UnsupportedDtypeError, r"bfloat16.*matrix.to\(torch.float32\)"),
        (torch.eye(2, dtype=torch.int64), UnsupportedDtypeError, "int64"),
        (torch.eye(2, dtype=torch.complex64), UnsupportedDtypeError, "complex64"),
        ((lambda v: v, 0), InvalidArgumentError, "n=0"),
        (lambda v: v, InvalidArgumentError, r"function; pass .*\(matvec, n\)"),
        ("hessian", InvalidArgumentError, "operator is a str"),
        ([[1.0]], InvalidArgumentError, "operator is a list"),
        (None, InvalidArgumentError, "NoneType"),
    ],
)
def test_what_is_no_operator_is_refused(operator, error, fragment):
    with pytest.raises(error, match=fragment):
        as_operator(operator)


def test_rounding_level_asymmetry_is_accepted():
    a = symmetric(50, torch.float32)
    gram = a @ a.T
    gram[0, 1] *= 1 + 1e-5
    assert as_operator(gram).numel == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_the_dtype_of_a_callable_comes_from_the_start_and_has_to_carry_enough_digits(dtype):
    with pytest.raises(UnsupportedDtypeError, match=r"start vector decides it.*torch.float32"):
        as_operator((lambda v: v, 3), start=torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("shape", [(2,), (3, 1), ()])
def test_a_matvec_that_returns_another_shape(shape):
    with pytest.raises(ShapeMismatchError, match=r"returned shape .* for a vector of shape \(3,\)"):
        CallableOperator(lambda v: torch.zeros(shape), 3) @ torch.ones(3)


def test_a_matvec_that_returns_no_tensor():
    with pytest.raises(InvalidArgumentError, match="returned a ndarray"):
        CallableOperator(lambda v: v.numpy(), 3) @ torch.ones(3)


def test_a_matvec_that_overwrites_its_argument():
    """The argument is a row of the solver's basis: the recurrence would go on from a wrong vector."""
    with pytest.raises(InvalidArgumentError, match="wrote to its argument"):
        CallableOperator(lambda v: v.mul_(2), 3) @ torch.ones(3)


def test_vectors_of_wrong_shape():
    with pytest.raises(ShapeMismatchError, match="needs 5"):
        Doubling() @ torch.ones(4)
    with pytest.raises(ShapeMismatchError, match=r"needs \[\(2, 2\), \(\)\]"):
        Doubling() @ [torch.ones(4), torch.tensor(1.0)]
