"""Every public function that measures, in few products."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dyntune
from dyntune.errors import UnreadableModelError

__all__ = ["MEASUREMENTS", "Subject"]


@dataclass
class Subject:
    """What measuring functions take.

    Args:
        model: The model.
        batches: A list of batches or a loader.
        optimizer: The model's; has stepped.
        loss: ``criterion`` or ``loss_fn``.
        unsupported: Measurements that refuse this model; the refusal has to leave no trace, either.
    """

    model: nn.Module
    batches: Any
    optimizer: torch.optim.Optimizer
    loss: dict[str, Any]
    unsupported: frozenset[str] = field(default_factory=frozenset)

    @property
    def common(self) -> tuple[nn.Module, Any]:
        return self.model, self.batches


def _hessian(s: Subject, **options: Any) -> dyntune.HessianOperator:
    return dyntune.hessian(*s.common, **s.loss, **options)


def _sharpness(s: Subject) -> Any:
    quantities = ("lambda_max", "lambda_min", "preconditioned", "batch", "directional", "critical_lr")
    return dyntune.sharpness(*s.common, **s.loss, optimizer=s.optimizer, quantities=quantities, max_products=3)


def _population(s: Subject) -> Any:
    return dyntune.sharpness(*s.common, **s.loss, covers="both", max_products=3)


def _slice(s: Subject) -> Any:
    numel = _hessian(s).numel
    return dyntune.loss_slice(*s.common, **s.loss, direction=torch.ones(numel), radius=0.1, num_points=3)


def _path(s: Subject) -> Any:
    own = {p.data_ptr() for p in s.model.parameters()}
    end = {name: t + 0.1 if t.data_ptr() in own else t.clone() for name, t in s.model.state_dict().items()}
    return dyntune.loss_path(*s.common, **s.loss, end=end, num_points=3)


def _checkpoints(s: Subject) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        torch.save(s.model.state_dict(), path)
        return dyntune.trace_checkpoints(s.model, [path], s.batches, **s.loss, max_products=2)


def _affine(s: Subject) -> Any:
    operator = dyntune.affine(_hessian(s), dyntune.gauss_newton(*s.common, **s.loss), alpha=0.5)
    return dyntune.eigenvalues(operator, max_products=2)


def _mass(s: Subject) -> Any:
    operator = _hessian(s)
    return dyntune.block_mass(operator, operator.space.normal(0))


def _read(measure: Callable[..., Any], s: Subject) -> Any:
    """Forward passes; a model without what is looked for runs through them all the same."""
    try:
        return measure(*s.common)
    except UnreadableModelError as error:
        return str(error)


def _beta2(s: Subject) -> Any:
    adam = isinstance(s.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    options: dict[str, Any] = {"optimizer": s.optimizer} if adam else {"optimizer": "adam", "lr": 1e-3}
    return dyntune.suggest_betas(*s.common, **s.loss, **options, max_gradients=60)  # measures by suggest_beta2


MEASUREMENTS: dict[str, Callable[[Subject], Any]] = {
    "hessian_eigenvalues": lambda s: dyntune.hessian_eigenvalues(*s.common, **s.loss, max_products=3),
    "finite differences": lambda s: dyntune.eigenvalues(_hessian(s, method="finite-difference"), max_products=2),
    "forward over reverse": lambda s: dyntune.eigenvalues(_hessian(s, memory_limit=0), max_products=2),
    "re-forward": lambda s: _hessian(s).objective.hvp(_hessian(s).space.normal(0)),
    "block_eigenvalues": lambda s: dyntune.block_eigenvalues(*s.common, **s.loss, max_products=2),
    "block_mass": _mass,
    "spectral_density": lambda s: dyntune.spectral_density(_hessian(s), num_probes=2, num_steps=2, num_points=5),
    "trace": lambda s: dyntune.trace(_hessian(s), num_products=6),
    "sharpness": _sharpness,
    "sharpness of the population": _population,
    "gauss_newton": lambda s: dyntune.eigenvalues(dyntune.gauss_newton(*s.common, **s.loss), max_products=2),
    "empirical_fisher": lambda s: dyntune.eigenvalues(dyntune.empirical_fisher(*s.common, **s.loss), max_products=2),
    "preconditioned": lambda s: dyntune.eigenvalues(dyntune.preconditioned(_hessian(s), s.optimizer), max_products=2),
    "affine": _affine,
    "loss_slice": _slice,
    "loss_path": _path,
    "trace_checkpoints": _checkpoints,
    "attention_statistics": lambda s: _read(dyntune.attention_statistics, s),
    "dead_units": lambda s: _read(dyntune.dead_units, s),
    "output_logits": lambda s: _read(dyntune.output_logits, s),
    "spectral_alignment": lambda s: _read(dyntune.spectral_alignment, s),
    "suggest_lr": lambda s: dyntune.suggest_lr(*s.common, **s.loss, optimizer=s.optimizer, max_gradients=60),
    "suggest_betas": _beta2,
}
