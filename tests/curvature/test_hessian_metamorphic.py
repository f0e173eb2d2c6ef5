"""What must not change the curvature, and what must change it by a known factor."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dyntune import hessian, hessian_eigenvalues, sharpness
from tests.objective.zoo import ZOO, classes, made, rows

CRITERION = nn.CrossEntropyLoss()


def batch(count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(count, 4), classes(count)


class Net(nn.Module):
    """4-6-3 with its parameters registered in the order given."""

    def __init__(self, order: str) -> None:
        super().__init__()
        layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)}
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def spectrum(model: nn.Module, data, criterion=CRITERION) -> np.ndarray:
    """Two eigenvalues at each end, to 1e-7."""
    found = hessian_eigenvalues(model.double(), data, criterion=criterion, k=2, which="both", rtol=1e-7)
    assert found.converged
    return found.values.numpy()


@pytest.fixture
def model() -> nn.Module:
    return made(lambda: Net("ab")).double()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = batch()
    return x.double(), y


def test_repeating_every_sample_changes_nothing(model, data):
    x, y = data
    expected = spectrum(model, data)
    np.testing.assert_allclose(spectrum(model, (x.repeat(3, 1), y.repeat(3))), expected, rtol=1e-6)
    np.testing.assert_allclose(spectrum(model, [data, data]), expected, rtol=1e-6)


def test_the_order_and_the_cut_of_the_batches_change_nothing(model, data):
    x, y = data
    expected = spectrum(model, data)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for sizes in ([30], [29, 1], [7, 11, 12]):
        pieces = list(zip(x[order].split(sizes), y[order].split(sizes), strict=True))
        np.testing.assert_allclose(spectrum(model, pieces), expected, rtol=1e-6)
        np.testing.assert_allclose(spectrum(model, pieces[::-1]), expected, rtol=1e-6)


def test_the_order_of_the_parameters_changes_nothing(model, data):
    other = Net("ba").double()
    other.load_state_dict(model.state_dict())
    assert [n for n, _ in other.named_parameters()] != [n for n, _ in model.named_parameters()]
    np.testing.assert_allclose(spectrum(other, data), spectrum(model, data), rtol=1e-6)


def test_permuting_hidden_units_changes_nothing(model, data):
    """An orthogonal change of basis of the parameter space."""
    other = copy.deepcopy(model)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        other.a.weight.copy_(model.a.weight[order])
        other.a.bias.copy_(model.a.bias[order])
        other.b.weight.copy_(model.b.weight[:, order])
    np.testing.assert_allclose(spectrum(other, data), spectrum(model, data), rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_the_curvature_of_a_multiple_of_the_loss(model, data, factor):
    scaled = spectrum(model, data, lambda outputs, targets: factor * CRITERION(outputs, targets))
    np.testing.assert_allclose(scaled, factor * spectrum(model, data), rtol=1e-6)


def test_a_negative_factor_turns_the_spectrum_around(model, data):
    turned = spectrum(model, data, lambda outputs, targets: -CRITERION(outputs, targets))
    a, b, c, d = spectrum(model, data)
    np.testing.assert_allclose(turned, [-c, -d, -a, -b], rtol=1e-6)


def test_l2_regularisation_shifts_the_spectrum(model, data):
    """loss + w |theta|^2 / 2 has the Hessian H + w I."""

    def regularised(m: nn.Module, b) -> torch.Tensor:
        return CRITERION(m(b[0]), b[1]) + 0.05 * sum((p**2).sum() for p in m.parameters())

    found = hessian_eigenvalues(model, data, regularised, k=2, which="both", rtol=1e-7)
    np.testing.assert_allclose(found.values, spectrum(model, data) + 0.1, rtol=1e-6)


def test_float32_and_float64_agree(data):
    x, y = data
    expected = spectrum(made(lambda: Net("ab")), data)
    found = hessian_eigenvalues(
        made(lambda: Net("ab")), (x.float(), y), criterion=CRITERION, k=2, which="both", rtol=1e-4
    )
    # The residuals allow 1e-4 of each value, products in float32 a few eps ||A||.
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-6 * expected[0])


@pytest.mark.parametrize("name", ["mlp", "conv", "sdpa"])
@pytest.mark.parametrize("limit", [None, 0])
def test_engines_give_the_same_eigenvalues(name, limit):
    case = ZOO[name]().double()
    operator = hessian(case.model, case.batch, criterion=case.criterion, memory_limit=limit)
    assert operator.engine == ("retained-graph" if limit is None else "forward-over-reverse")
    found = hessian_eigenvalues(case.model, case.batch, criterion=case.criterion, memory_limit=limit, rtol=1e-8)
    expected = float(torch.linalg.eigvalsh(operator.to_dense())[-1])
    assert float(found) == pytest.approx(expected, rel=1e-8)


class TestSharpness:
    def test_both_ends_and_their_order(self, model, data):
        top, _, bottom, _ = spectrum(model, data)
        found = sharpness(model, data, criterion=CRITERION, quantities=("lambda_min", "lambda_max"))
        assert found.lambda_max.value == pytest.approx(top, rel=1e-2)
        assert found.lambda_min.value == pytest.approx(bottom, rel=1e-2)
        assert top in found.lambda_max
        assert bottom in found.lambda_min

    def test_the_interval_speaks_of_its_level(self, model, data):
        found = sharpness(model, data, criterion=CRITERION)
        assert found.lambda_min is None
        assert found.lambda_max.level == pytest.approx(1 - 1e-4)
        assert found.lambda_max.covers == "numerical"
        assert found.lambda_max.unit == "loss / parameter^2"
        assert found.record["num_rows"] == 30

    def test_an_exhausted_budget_is_a_status_and_with_strict_an_error(self, model, data):
        from dyntune import Status
        from dyntune.errors import NotConvergedError

        found = sharpness(model, data, criterion=CRITERION, max_products=2)
        assert found.lambda_max.status is Status.NOT_CONVERGED
        assert "2 products" in found.lambda_max.reason
        with pytest.raises(NotConvergedError) as caught:
            sharpness(model, data, criterion=CRITERION, max_products=2, strict=True)
        assert caught.value.partial.lambda_max == found.lambda_max

    def test_unknown_quantities(self, model, data):
        from dyntune.errors import InvalidArgumentError

        for quantities in ((), ("trace",), ("lambda_max", "lambda_mid")):
            with pytest.raises(InvalidArgumentError, match="choose from lambda_max, lambda_min"):
                sharpness(model, data, criterion=CRITERION, quantities=quantities)
