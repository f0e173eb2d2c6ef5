"""Every way to measure, in few products: for the tests that ask what it does to the user's program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dyntune
from dyntune.objective.objective import Objective

__all__ = ["MEASUREMENTS", "PRODUCTS", "Measurement"]

# (model, batches, keywords of the loss) -> numbers
Measurement = Callable[[nn.Module, Any, dict[str, Any]], Any]


def _product(**options: Any) -> Measurement:
    def measure(model: nn.Module, batches: Any, loss: dict[str, Any]) -> torch.Tensor:
        operator = dyntune.hessian(model, batches, **loss, **options)
        return operator @ torch.linspace(-1, 1, operator.numel)

    return measure


def _reforward(model: nn.Module, batches: Any, loss: dict[str, Any]) -> torch.Tensor:
    objective = Objective(model, batches, **loss)
    return torch.cat([t.reshape(-1) for t in objective.hvp(objective.space.normal(0))])


def _density(model: nn.Module, batches: Any, loss: dict[str, Any]) -> torch.Tensor:
    found = dyntune.spectral_density(dyntune.hessian(model, batches, **loss), num_probes=2, num_steps=3, num_points=5)
    return torch.from_numpy(found.density)


def _sharpness(model: nn.Module, batches: Any, loss: dict[str, Any]) -> torch.Tensor:
    found = dyntune.sharpness(model, batches, **loss, quantities=("lambda_max", "lambda_min"), max_products=4)
    return torch.tensor([float(found.lambda_max), float(found.lambda_min)], dtype=torch.float64)


PRODUCTS: dict[str, Measurement] = {
    "retained graph": _product(method="exact"),
    "re-forward": _reforward,
    "forward over reverse": _product(method="exact", memory_limit=0),
    "finite differences": _product(method="finite-difference"),
}

MEASUREMENTS: dict[str, Measurement] = PRODUCTS | {
    "eigenvalues": lambda m, b, loss: dyntune.hessian_eigenvalues(m, b, **loss, max_products=4).values,
    "sharpness": _sharpness,
    "density": _density,
    "loss": lambda m, b, loss: torch.tensor(Objective(m, b, **loss).loss()),
    "gradient": lambda m, b, loss: torch.cat([g.reshape(-1) for g in Objective(m, b, **loss).gradient()]),
}
