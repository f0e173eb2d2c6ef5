"""Records made by hand, so that what a figure has to show is known."""

from __future__ import annotations

import math
from typing import Any

import torch

import dyntune
from dyntune import Eigenvalues, Estimate, Recommendation, SpectralDensity, Status

HOSTILE = "<script>alert(1)</script>\"'& $\\frac{$ \x1b[31m\x00 \ud800 {{ 7*7 }} </svg>"


def estimate(value: float | None, low: float, high: float, *, unit: str = "learning rate") -> Estimate:
    return Estimate(value=value, low=low, high=high, level=0.95, unit=unit, method="by hand", covers="both")


def recommendation(**changed: Any) -> Recommendation:
    fields: dict[str, Any] = {
        "knob": "learning rate",
        "value": 3e-3,
        "low": 1e-3,
        "high": 9e-3,
        "level": None,
        "status": Status.OK,
        "rule": "by hand",
        "sources": ("nobody",),
        "evidence": {
            "stochastic threshold": estimate(6e-3, 5e-3, 7e-3),
            "early_limit": estimate(2e-3, 1e-3, math.inf),
            "lambda_max": estimate(12.0, 11.0, 13.0, unit="loss / parameter^2"),
            "loss before": 2.3,
            "batches": "16",
            "absent": None,
        },
        "checks": ("looked at twice",),
        "cost": 150.0,
        "max_stable": estimate(2e-2, 1e-2, 4e-2),
        "warmup_steps": 20,
        "series": {
            "ramp_lr": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
            "ramp_loss": (2.3, 2.2, 1.5, 1.2, math.inf),
            "run_lr": (1e-4, 1e-3, 1e-2),
            "run_loss": (2.0, 1.4, 1.1),
            "failed_lr": (5e-2,),
        },
    }
    return Recommendation(**(fields | changed))


SWEEP = {"sweep_lr": (1e-3, 1e-4, 1e-2), "sweep_loss": (0.8, 1.9, math.nan)}


def matrix() -> torch.Tensor:
    """A bulk within 0.1 of zero, one negative outlier and three positive ones."""
    return torch.diag(torch.cat([torch.linspace(-0.1, 0.1, 396), torch.tensor([-1.0, 3.0, 5.0, 8.0])])).double()


def found(**options: Any) -> Eigenvalues:
    return dyntune.eigenvalues(matrix(), **options)


def density() -> SpectralDensity:
    return dyntune.spectral_density(matrix(), num_probes=4, num_steps=20)
