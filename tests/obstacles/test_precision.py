"""Parameters stored in bfloat16 or float16: every measurement is that of the float32 copy, and the storage stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.errors import HVPUnsupportedError, UnsupportedDtypeError
from tests.objective.measurements import MEASUREMENTS
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows
from tests.obstacles.models import CastByName

BATCHES = [(rows(8, 4, seed=s), torch.arange(8) % 3) for s in range(2)]
CRITERION = {"criterion": nn.CrossEntropyLoss()}
EPS = torch.finfo(torch.float32).eps


def stored(dtype: torch.dtype, **more: bool) -> nn.Module:
    net = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3)))
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_every_measurement_equals_that_of_a_float32_copy(measure, dtype):
    model = stored(dtype)
    truth = measure(copy.deepcopy(model).float(), BATCHES, CRITERION)
    before = snapshot(model)
    found = measure(model, BATCHES, CRITERION)
    assert changes(before, snapshot(model)) == []
    # The same operations on the same numbers; kernels may sum in another order where memory lies otherwise.
    torch.testing.assert_close(found, truth, rtol=100 * EPS, atol=100 * EPS * float(truth.abs().max()))


def test_batches_of_that_dtype_are_widened_without_touching_the_users():
    batch = (BATCHES[0][0].bfloat16(), BATCHES[0][1])
    wide = (batch[0].float(), batch[1])
    found, truth = (dyntune.hessian(stored(torch.bfloat16), b, **CRITERION).to_dense() for b in (batch, wide))
    assert torch.equal(found, truth)
    assert batch[0].dtype == torch.bfloat16


def test_vectors_are_float32_and_the_record_says_so():
    operator = dyntune.hessian(stored(torch.bfloat16), BATCHES, **CRITERION)
    assert operator.dtype == torch.float32
    assert operator.method == "exact, retained-graph, float32 copy of bfloat16 parameters"
    record = dyntune.sharpness(stored(torch.float16), BATCHES, **CRITERION).record
    assert record["precision"] == "float32 copy of float16 parameters"
    assert "precision" not in dyntune.sharpness(stored(torch.float32), BATCHES, **CRITERION).record


def test_gauss_newton_and_the_preconditioned_hessian_too():
    model = stored(torch.bfloat16).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    F.cross_entropy(model(BATCHES[0][0].bfloat16()).float(), BATCHES[0][1]).backward()
    optimizer.step()
    wide = copy.deepcopy(model).float()
    ours, truth = (dyntune.hessian(m, BATCHES, **CRITERION) for m in (model, wide))
    scale = [p.float() for p in dyntune.stability.scales.diagonal_scale(optimizer, list(model.parameters()))]
    found = dyntune.preconditioned(ours, optimizer).to_dense()
    assert found.dtype == torch.float32
    wanted = dyntune.preconditioned(truth, scale).to_dense()
    assert torch.linalg.norm(found - wanted) < 100 * EPS * torch.linalg.norm(wanted)
    one, two = (dyntune.gauss_newton(m, BATCHES, **CRITERION).to_dense() for m in (model, wide))
    assert torch.linalg.norm(one - two) < 100 * EPS * torch.linalg.norm(two)


def test_the_present_parameters_are_measured():
    model = stored(torch.bfloat16).eval()
    operator = dyntune.hessian(model, BATCHES, **CRITERION)
    before = operator.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    truth = dyntune.hessian(copy.deepcopy(model).float(), BATCHES, **CRITERION).to_dense()
    assert torch.linalg.norm(operator.to_dense() - truth) < 100 * EPS * torch.linalg.norm(truth)
    assert torch.linalg.norm(before - truth) > 0.1 * torch.linalg.norm(truth)


def test_frozen_low_precision_parameters_are_computed_with_in_float32():
    model = stored(torch.bfloat16).eval()
    model[0].requires_grad_(False)
    found = dyntune.hessian(model, BATCHES, **CRITERION).to_dense()
    truth = dyntune.hessian(copy.deepcopy(model).float(), BATCHES, **CRITERION).to_dense()
    assert torch.linalg.norm(found - truth) < 100 * EPS * torch.linalg.norm(truth)


def test_a_parameter_that_reaches_the_loss_past_the_model_is_not_missed():
    model = stored(torch.bfloat16)
    held = list(model.parameters())

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + sum(p.float().square().sum() for p in held)

    with pytest.raises(HVPUnsupportedError, match=r"take parameters from the model: for p in model\.parameters"):
        dyntune.hessian(model, BATCHES, loss_fn)


def test_a_cast_by_name_is_explained():
    with pytest.raises(UnsupportedDtypeError, match=r"float32 copy of bfloat16.*write x\.to\(self\.weight\.dtype\)"):
        dyntune.hessian(made(CastByName).bfloat16(), BATCHES, **CRITERION)


def test_other_errors_of_the_model_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dyntune.hessian(stored(torch.bfloat16), (rows(8, 5), torch.arange(8) % 3), **CRITERION)


def test_suggest_lr_does_not_pretend_to_train_in_low_precision():
    with pytest.raises(UnsupportedDtypeError, match=r"'0\.weight' is stored in torch\.bfloat16"):
        dyntune.suggest_lr(stored(torch.bfloat16), BATCHES, **CRITERION)
