"""Dropout and other randomness of the forward pass: one fixed function per seed, a fresh one per batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.objective.objective import Objective
from tests.objective.measurements import PRODUCTS
from tests.objective.zoo import made, rows

BATCH = (rows(16, 4), torch.arange(16) % 3)
CRITERION = {"criterion": nn.CrossEntropyLoss()}


def dropout() -> nn.Module:
    return made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))).train()


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_two_products_with_one_operator_are_identical(options):
    operator = dyntune.hessian(dropout(), [BATCH, BATCH], **CRITERION, **options)
    vector = operator.space.normal(0)
    with operator.session() as product:
        within = [torch.cat([t.reshape(-1) for t in product(vector)]) for _ in range(2)]
    across = operator.flatten(operator @ vector)
    assert torch.equal(within[0], within[1])
    assert torch.equal(within[0], across)


def test_all_engines_see_the_same_masks():
    first, *others = (
        measure(dropout(), BATCH, CRITERION) for name, measure in PRODUCTS.items() if name != "re-forward"
    )
    for found in others:
        # Finite differences in float32; another mask changes the product by more than its own size.
        assert torch.linalg.norm(found - first) < 1e-3 * torch.linalg.norm(first)


def test_the_global_state_has_no_influence():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        found.append(dyntune.hessian(dropout(), BATCH, **CRITERION).to_dense())
    assert torch.equal(found[0], found[1])


def test_another_seed_is_another_function():
    one, two = (Objective(dropout(), BATCH, **CRITERION, seed=s).loss() for s in (0, 1))
    assert one != two
    assert one == Objective(dropout(), BATCH, **CRITERION, seed=0).loss()


def test_batches_have_masks_of_their_own():
    objective = Objective(dropout(), [BATCH, BATCH], **CRITERION)
    with objective.measuring() as buffers:
        losses = [objective.batch_loss(i, buffers).value.item() for i in (0, 1, 0)]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_python_and_numpy_randomness_is_fixed_too():
    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * (random.random() + np.random.rand())

    objective = Objective(dropout(), BATCH, loss_fn)
    assert objective.loss() == objective.loss()
