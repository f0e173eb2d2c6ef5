"""The same numbers whatever mode the caller is in, and the mode is the caller's again afterwards."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.objective.objective import Objective
from tests.objective.measurements import MEASUREMENTS
from tests.objective.oracle import relative_error
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, mlp, rows


@contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CALLERS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 default": double_by_default,
    "deterministic": deterministic,
}
BATCH = (rows(12, 4), torch.arange(12) % 3)
CRITERION = {"criterion": nn.CrossEntropyLoss()}


def model() -> nn.Module:
    return made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))).train()


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_numbers_and_state_are_those_of_a_plain_call(measure, caller):
    subject = model()
    plain = measure(subject, BATCH, CRITERION)
    with caller():
        before = snapshot(subject)
        found = measure(subject, BATCH, CRITERION)
        assert changes(before, snapshot(subject)) == []
    # The test's own vector is a linspace in the default dtype: rounded once more on its way to float32.
    assert torch.allclose(found.to(plain.dtype), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_batches_made_in_inference_mode(measure):
    with torch.inference_mode():
        batch = tuple(t.clone() for t in BATCH)
    assert batch[0].is_inference()
    subject = model()
    plain = measure(subject, BATCH, CRITERION)
    assert torch.equal(measure(subject, batch, CRITERION), plain)
    with torch.inference_mode():
        assert torch.equal(measure(subject, batch, CRITERION), plain)


def test_a_loader_drawn_in_inference_mode():
    class Loader:
        def __iter__(self):
            yield tuple(t.clone() for t in BATCH)

    subject = model()
    plain = dyntune.hessian_eigenvalues(subject, BATCH, **CRITERION)
    with torch.inference_mode():
        assert float(dyntune.hessian_eigenvalues(subject, Loader(), **CRITERION)) == float(plain)


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_a_vector_made_in_inference_mode(options):
    operator = dyntune.hessian(model(), BATCH, **CRITERION, **options)
    with torch.inference_mode():
        vector = torch.ones(operator.numel)
    assert torch.equal(operator @ vector, operator @ torch.ones(operator.numel))


def test_a_start_and_a_matrix_in_inference_mode():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -4.0, 0.5]))
    plain = dyntune.eigenvalues(matrix, start=torch.ones(5), seed=1)
    with torch.inference_mode():
        found = dyntune.eigenvalues(matrix.clone(), start=torch.ones(5), seed=1)
    assert float(found) == float(plain)


def test_gradients_of_the_measurement_are_in_full_precision_under_autocast():
    """The forward pass alone would not be enough: matrix products of the backward pass are autocast, too."""
    subject = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Objective(subject, BATCH, **CRITERION).gradient()
    truth = torch.autograd.grad(F.cross_entropy(subject(BATCH[0]), BATCH[1]), list(subject.parameters()))
    for a, b in zip(found, truth, strict=True):
        assert relative_error(a, b.double()) < 10 * torch.finfo(torch.float32).eps


def test_a_loss_with_an_autocast_of_its_own_sees_parameters_move():
    """Weights that autocast casts once and keeps would not follow a twin's steps."""

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    objective = Objective(mlp(), BATCH, loss_fn)
    with objective.measuring() as buffers:
        moved = {name: p.detach().clone().requires_grad_() for name, p in objective.parameters.items()}
        first = objective.batch_loss(0, buffers, moved).value.item()
        with torch.no_grad():
            for p in moved.values():
                p.zero_()
        second = objective.batch_loss(0, buffers, moved).value.item()
    assert second == pytest.approx(torch.log(torch.tensor(3.0)).item())  # zero weights: uniform over three classes
    assert abs(first - second) > 1e-2


def test_a_loss_with_an_autocast_of_its_own_has_a_curvature():
    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    subject = mlp()
    exact = dyntune.hessian(subject, BATCH, **CRITERION).to_dense().double()
    # bfloat16 has 8 bits: 4e-3 per operation, about a percent through two layers and back.
    assert relative_error(dyntune.hessian(subject, [BATCH, BATCH], loss_fn).to_dense(), exact) < 0.05
