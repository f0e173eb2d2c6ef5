"""Spectral alignment against a dense singular value decomposition, and shares of a step in eigenvectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import dyntune
from dyntune.dynamics.alignment import _leading
from dyntune.errors import InvalidArgumentError, RefusedError, UnreadableModelError
from dyntune.records import Status
from tests.objective.zoo import made, rows

X = rows(30, 6)


def weighted(spectrum: list[float], outputs: int = 5, inputs: int = 6, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values. Shape (outputs, inputs)."""
    u, _, vt = torch.linalg.svd(rows(outputs, inputs, seed=seed).double(), full_matrices=False)
    return (u * torch.tensor(spectrum, dtype=torch.float64)) @ vt


def layer(weight: torch.Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        found.weight.copy_(weight)
    return found


@pytest.mark.parametrize("spectrum", [[4.0, 3.0, 2.0, 1.0, 0.5], [4.0, 3.9, 3.8, 3.7, 1.0], [1e-6, 1e-7, 0, 0, 0]])
def test_against_the_dense_decomposition(spectrum):
    weight = weighted(spectrum)
    found = dyntune.spectral_alignment(layer(weight), X)["weight"]
    u = torch.linalg.svd(weight.float().double()).Vh[0]
    along = X.double() @ u
    positive = float((along > 0).double().mean())
    assert float(found.same_sign) == pytest.approx(max(positive, 1 - positive), abs=1e-12)
    assert found.mean_cosine == pytest.approx(float((along.abs() / X.double().norm(dim=1)).mean()), rel=1e-3)
    assert found.spectral_norm == pytest.approx(spectrum[0], rel=1e-5)
    assert found.direction_error < 1e-3
    assert found.inputs == 30


def test_the_bound_on_the_direction_holds():
    """Singular values closer and closer: the true error stays below what is said, until it is refused."""
    said = []
    for gap in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7):
        weight = weighted([1.0, 1 - gap, 0.9, 0.8, 0.7])
        u, _, error = _leading(weight.float().T, seed=0)
        exact = torch.linalg.svd(weight.float().double()).Vh[0]
        sine = math.sqrt(max(0.0, 1 - float(u.double() @ exact) ** 2 / float(u.double() @ u.double())))
        assert sine <= error + 1e-3  # rounding of the sine itself, sqrt(eps)
        said.append(error)
    assert said[0] < 1e-2
    refused = dyntune.spectral_alignment(layer(weighted([1.0, 1.0, 0.5, 0.4, 0.3])), X)["weight"].same_sign
    assert refused.status is Status.REFUSED
    assert "too close" in refused.reason
    with pytest.raises(RefusedError):
        float(refused)


def test_a_collapse_of_the_signs_is_one_and_scale_plays_no_part():
    weight = weighted([4.0, 3.0, 2.0, 1.0, 0.5])
    u = torch.linalg.svd(weight).Vh[0].float()
    shifted = X + 20 * u
    found = [dyntune.spectral_alignment(layer(c * weight), s * shifted)["weight"] for c in (1, 100) for s in (1, -1)]
    assert all(float(f.same_sign) == 1.0 for f in found)
    assert [f.mean_cosine for f in found] == pytest.approx([found[0].mean_cosine] * 4, rel=1e-5)


def test_random_inputs_meet_the_baseline():
    found = dyntune.spectral_alignment(layer(weighted([4.0, 3.0, 2.0, 1.0, 0.5])), rows(4000, 6))["weight"]
    assert 0.5 in found.same_sign or float(found.same_sign) < 0.52
    # E|cos| in n dimensions is Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2)); sqrt(2 / (pi n)) is its limit for large n
    exact = math.gamma(3) / (math.sqrt(math.pi) * math.gamma(3.5))
    assert found.mean_cosine == pytest.approx(exact, abs=4 * 0.25 / math.sqrt(4000))
    assert found.random_cosine == pytest.approx(exact, rel=0.1)


def test_every_matrix_is_found_by_name():
    model = made(lambda: nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)))
    names = ["0.weight", *(f"1.{n}.weight" for n in ("self_attn.out_proj", "linear1", "linear2"))]
    names.insert(1, "1.self_attn.in_proj_weight")
    for mode in (True, False):
        plain = dyntune.spectral_alignment(model.train(mode), rows(3, 5, 6))
        assert list(plain) == names
        assert {f.inputs for f in plain.values()} == {15}
        assert all("3 rows" in f.same_sign.method for f in plain.values())
        low = dyntune.spectral_alignment(model, rows(3, 5, 6), autocast=torch.bfloat16)
        assert list(low) == names
    compiled = torch.compile(model, backend="eager")
    assert list(dyntune.spectral_alignment(compiled, rows(3, 5, 6))) == names


def test_the_same_seed_gives_the_same_bits():
    net = layer(weighted([4.0, 3.9, 3.8, 3.7, 1.0]))
    assert dyntune.spectral_alignment(net, X) == dyntune.spectral_alignment(net, X)


def test_edges():
    with pytest.raises(UnreadableModelError, match="no product of activations"):
        dyntune.spectral_alignment(nn.Embedding(5, 3), torch.arange(4))
    zero = dyntune.spectral_alignment(layer(weighted([4.0, 3.0, 2.0, 1.0, 0.5])), torch.zeros(4, 6))["weight"]
    assert zero.same_sign.status is Status.REFUSED
    assert dyntune.spectral_alignment(layer(torch.zeros(5, 6)), X)["weight"].same_sign.status is Status.REFUSED
    thin = dyntune.spectral_alignment(nn.Linear(6, 1), X)["weight"]
    assert thin.same_sign.status is Status.OK


def test_shares_of_a_gradient_in_eigenvectors():
    """On a quadratic they are known, and those of a whole basis add up to one."""
    model = made(lambda: nn.Linear(4, 1, bias=False))
    data = (rows(50, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5]), torch.zeros(50, 1))
    pairs = dyntune.eigenvalues(dyntune.hessian(model, data, criterion=nn.MSELoss()), 4)
    gradient = torch.autograd.grad(nn.functional.mse_loss(model(data[0]), data[1]), list(model.parameters()))
    shares = dyntune.eigenvector_shares(gradient, pairs.vectors)
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    w = model.weight.detach().double().flatten().numpy()
    x = data[0].double().numpy()
    values, vectors = np.linalg.eigh(2 * x.T @ x / 50)
    expected = (values * (vectors.T @ w)) ** 2
    assert shares == pytest.approx(tuple((expected / expected.sum())[::-1]), abs=1e-4)
    assert dyntune.eigenvector_shares(pairs.vectors[1], pairs.vectors) == pytest.approx((0, 1, 0, 0), abs=1e-6)
    with pytest.raises(InvalidArgumentError, match="no direction"):
        dyntune.eigenvector_shares([torch.zeros(1, 4)], pairs.vectors)


@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 63, 64, 65, 66, 130])
@pytest.mark.parametrize("outputs", [1, 2, 7, 80])
def test_the_leading_direction_of_any_size_is_the_singular_vector(inputs, outputs):
    """Small ones, too, whose space the blocks of the Krylov method do not fill."""
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(inputs * 100 + outputs)).double()
    found, norm, error = _leading(weight.float(), seed=0)
    left, values, _ = torch.linalg.svd(weight)
    assert norm == pytest.approx(float(values[0]), rel=1e-4)  # squares in float32, to a residual of 1e-5
    along = float(found.double() @ left[:, 0])
    sine = float(torch.linalg.vector_norm(found.double() - along * left[:, 0]))
    assert sine <= error + 1e-6  # the sine of two float32 unit vectors has that much rounding
