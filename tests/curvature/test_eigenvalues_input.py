"""Arguments out of range, operators that are none, and the record that comes back."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dyntune import eigenvalues
from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError, UnsupportedDtypeError
from tests.operators import diagonal

A = torch.diag(torch.tensor([3.0, 1.0, 0.5, -7.0]))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"k": 5}, "k=5 eigenvalues were asked of an operator of dimension 4; choose k <= 4"),
        ({"k": 0}, "k=0: ask for at least one"),
        ({"k": -1}, "k=-1: ask for at least one"),
        ({"which": "LM"}, "which='LM'; choose one of largest"),
        ({"rtol": 0.0}, "rtol=0.0: choose 0 < rtol < 1"),
        ({"rtol": -1e-2}, "rtol=-0.01: choose"),
        ({"rtol": 1.0}, "rtol=1.0: choose"),
        ({"rtol": math.nan}, "rtol=nan: choose"),
        ({"failure_probability": 0.0}, "failure_probability=0.0: choose a probability"),
        ({"failure_probability": 1.0}, "failure_probability=1.0: choose a probability"),
        ({"max_products": 0}, "max_products=0: at least one product"),
        ({"basis": 5}, r"basis=5 vectors .* give at least 2 k \+ 4 = 6"),
        ({"k": 2, "basis": 7}, r"give at least 2 k \+ 4 = 8"),
    ],
)
def test_arguments_out_of_range(options, fragment):
    with pytest.raises(InvalidArgumentError, match=fragment):
        eigenvalues(A, **options)


@pytest.mark.parametrize(
    ("operator", "error", "fragment"),
    [
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), InvalidArgumentError, r"not symmetric.*Pass \(A \+ A.T\) / 2"),
        (torch.ones(2, 3), ShapeMismatchError, r"shape \(2, 3\)"),
        (torch.full((3, 3), float("nan")), NonFiniteError, "NaN or infinity"),
        (torch.eye(3, dtype=torch.bfloat16), UnsupportedDtypeError, r"bfloat16.*matrix.to\(torch.float32\)"),
        ((lambda v: v[:2], 3), ShapeMismatchError, r"returned shape \(2,\) for a vector of shape \(3,\)"),
        ((lambda v: v * float("nan"), 3), NonFiniteError, "Check the parameters and the loss"),
        ((lambda v: v.add_(1), 3), InvalidArgumentError, "wrote to its argument"),
        (len, InvalidArgumentError, r"pass a dyntune operator.*\(matvec, n\)"),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_operators_that_are_none(operator, error, fragment, k):
    with pytest.raises(error, match=fragment):
        eigenvalues(operator, k)


def test_all_eigenvalues_of_an_operator_that_is_not_finite():
    """The dense path, which never meets the recurrence."""
    with pytest.raises(NonFiniteError, match="Check the parameters and the loss"):
        eigenvalues((lambda v: v * float("nan"), 3), 3)


def test_a_product_that_turns_nan_later():
    calls = []

    def matvec(v):
        calls.append(0)
        return torch.linspace(0, 1, 50) * v if len(calls) < 5 else v * float("nan")

    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        eigenvalues((matvec, 50))


class TestRecord:
    def test_behaves_like_its_values(self):
        found = eigenvalues(A, 2)
        assert len(found) == 2
        assert float(found) == pytest.approx(3, rel=1e-6)
        assert found[1] == pytest.approx(1, rel=1e-6)
        assert [round(float(v), 4) for v in found.values] == [3, 1]

    def test_shapes_and_dtypes(self):
        found = eigenvalues(A, which="both")
        for name in ("values", "low", "high", "residuals"):
            assert getattr(found, name).dtype == torch.float64
            assert getattr(found, name).shape == (2,)
        assert found.converged_each.dtype == torch.bool
        assert [v.shape for v in found.vectors] == [(4,), (4,)]
        assert (found.which, found.rtol, found.method) == ("both", 1e-2, "exact products")

    def test_json_round_trip(self):
        found = eigenvalues(A.double(), 2, which="magnitude")
        data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert data["values"] == found.values.tolist()
        assert data["converged_each"] == [True, True]

    def test_an_unknown_end_of_a_bracket_is_null_in_json(self):
        unbounded = torch.tensor([math.inf, 2.0], dtype=torch.float64)
        data = dataclasses.replace(eigenvalues(A, 2), high=unbounded, low=-unbounded).to_dict()
        assert data["high"] == [None, 2.0]
        assert data["low"] == [None, -2.0]
        json.dumps(data, allow_nan=False)

    def test_text_says_what_is_not_settled(self):
        text = str(eigenvalues(diagonal(np.linspace(0, 1, 500)), max_products=4))
        assert "NOT converged" in text
        assert "4 products" in text
        assert "NOT" not in str(eigenvalues(A))

    def test_flat_operators_return_flat_vectors_in_their_dtype(self):
        assert eigenvalues(A.double()).vectors[0].dtype == torch.float64


def test_progress_is_reported_in_the_operators_own_units():
    for scale in (1.0, 2.0**-90):
        seen = []
        found = eigenvalues(
            diagonal(scale * np.linspace(0, 1, 300)), progress=lambda n, v, seen=seen: seen.append((n, v))
        )
        counts, values = zip(*seen, strict=True)
        assert list(counts[:30]) == list(range(1, 31))
        assert counts[-1] == found.num_products
        assert values[-1] == pytest.approx(float(found), rel=1e-12)
        assert all(a <= b * (1 + 1e-6) for a, b in pairwise(values))  # Ritz values only grow
