"""The answer in float64, by plain double backward on a copy of the model: dyntune lends it nothing but its seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dyntune.numerics.random import stream_seed
from dyntune.objective.state import own_generators
from tests.obstacles.problem import Problem

__all__ = ["Truth", "doubled", "probe_vector", "relative_error"]

Named = dict[str, torch.Tensor]


def doubled(value: Any) -> Any:
    """Floating point tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(item) for item in value)
    return value


def clean(name: str) -> str:
    return name.replace("_orig_mod.", "")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, each once, without the compiler's prefix."""
    return {clean(n): p for n, p in model.named_parameters() if p.requires_grad}


def probe_vector(model: nn.Module) -> Named:
    """A fixed direction, the same for every tool: normal entries, by name."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in trainable(model).items()}


def relative_error(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Frobenius norm of the difference over that of the truth; infinity where names differ or entries are NaN."""
    if found.keys() != wanted.keys():
        return float("inf")
    gap = sum(float((found[n].double().cpu() - wanted[n]).square().sum()) for n in wanted)
    error = (gap / sum(float(t.square().sum()) for t in wanted.values())) ** 0.5
    return error if error == error else float("inf")  # NaN is not equal to itself


def _seeded(problem: Problem, twin: nn.Module, index: int, batch: Any) -> torch.Tensor:
    """A batch's loss with the masks that dyntune draws for ``seed=0``: the generators give the same in float64."""
    seed = stream_seed(0, index)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for generator in own_generators(twin):
            generator.manual_seed(seed)  # type: ignore[union-attr]
        return problem.term(twin, batch)


class Truth:
    """The problem's loss in float64, with its gradient's graph kept.

    Args:
        problem: Left alone; its model is copied.
    """

    def __init__(self, problem: Problem) -> None:
        model = getattr(problem.model, "_orig_mod", problem.model)
        twin = problem.exact(copy.deepcopy(model)).double()
        self.parameters = trainable(twin)
        batches = doubled(problem.parts)
        with sdpa_kernel(SDPBackend.MATH):
            terms = [_seeded(problem, twin, index, batch) for index, batch in enumerate(batches)]
            weights = [1.0 if problem.summed else problem.weight(b) for b in problem.parts]
            total = sum(t * w for t, w in zip(terms, weights, strict=True))
            loss = total if problem.summed else total / sum(weights)
            self.gradient = torch.autograd.grad(
                loss, list(self.parameters.values()), create_graph=True, materialize_grads=True
            )

    def product(self, vector: Named) -> Named:
        """By a second backward pass."""
        live = [(g, vector[n]) for n, g in zip(self.parameters, self.gradient, strict=True) if g.requires_grad]
        outputs, weights = zip(*live, strict=True)
        with sdpa_kernel(SDPBackend.MATH):
            parts = torch.autograd.grad(
                outputs, list(self.parameters.values()), weights, retain_graph=True, materialize_grads=True
            )
        return {n: p.to_dense() if p.is_sparse else p for n, p in zip(self.parameters, parts, strict=True)}

    def lambda_max(self) -> float:
        """ARPACK, residual to 1e-5: the eigenvalue is compared to 1e-2."""
        sizes = [p.numel() for p in self.parameters.values()]
        shapes = {n: p.shape for n, p in self.parameters.items()}

        def matvec(flat: np.ndarray) -> np.ndarray:
            pieces = torch.from_numpy(np.ascontiguousarray(flat).reshape(-1)).split(sizes)
            found = self.product({n: t.view(s) for t, (n, s) in zip(pieces, shapes.items(), strict=True)})
            return torch.cat([t.reshape(-1) for t in found.values()]).numpy()

        n = sum(sizes)
        start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
        operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
        return float(eigsh(operator, k=1, which="LA", tol=1e-5, v0=start, return_eigenvectors=False)[0])
