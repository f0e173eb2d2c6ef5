"""One Hessian-vector product from each library, as its documentation says, for the obstacle matrix.

A problem is handed over in the form that suits the library: a model, a criterion and (inputs, targets) where the loss
has that form; else the loss as the output of a wrapping module, with the number of the batch as its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.obstacles.problem import Problem

Named = Mapping[str, Tensor]
Product = Callable[[Named], dict[str, Tensor]]


class _Wrapped(nn.Module):
    """The loss of a batch, chosen by its number; rows of the input are rows of the batch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.wrapped = problem.model
        self.problem = problem

    def forward(self, numbers: Tensor) -> Tensor:
        return self.problem.term(self.wrapped, self.problem.parts[int(numbers[0])])


class _Given(nn.Module):
    """A criterion for a model that returns its loss."""

    reduction = "mean"

    def forward(self, outputs: Tensor, _targets: Tensor) -> Tensor:
        return outputs


def _pairs(problem: Problem) -> tuple[nn.Module, Any, Iterable[Any]]:
    """Model, criterion and (inputs, targets)."""
    if problem.criterion is not None:
        data = [problem.batches] if problem.batches is problem.parts[0] else problem.batches
        return problem.model, problem.criterion, data
    numbers = [torch.full((int(problem.weight(b)) or 1,), i) for i, b in enumerate(problem.parts)]
    return _Wrapped(problem), _Given(), [(n, torch.zeros(len(n))) for n in numbers]


def _names(model: nn.Module) -> list[str]:
    found = [n for n, p in model.named_parameters() if p.requires_grad]
    return [n.replace("_orig_mod.", "").removeprefix("wrapped.") for n in found]


def pyhessian(problem: Problem) -> Product:
    """``hessian(model, criterion, data=... or dataloader=...)``."""
    from pyhessian import hessian, hessian_vector_product

    model, criterion, data = _pairs(problem)
    names = _names(model)
    single = isinstance(data, list) and len(data) == 1
    source = {"data": data[0]} if single else {"dataloader": data}
    found = hessian(model, criterion, cuda=False, **source)

    def product(vector: Named) -> dict[str, Tensor]:
        v = [vector[n].to(p.dtype) for n, p in zip(names, found.params, strict=True)]
        parts = hessian_vector_product(found.gradsH, found.params, v) if single else found.dataloader_hv_product(v)[1]
        return dict(zip(names, parts, strict=True))

    return product


def eigenthings(problem: Problem, **options: Any) -> Product:
    """``HessianOperator(model, dataloader, loss_fn)``; its loss functions take (model, batch)."""
    from hessian_eigenthings import HessianOperator

    several = problem.batches is not problem.parts[0]
    operator = HessianOperator(problem.model, problem.batches if several else problem.parts, problem.term, **options)
    names = _names(problem.model)

    def product(vector: Named) -> dict[str, Tensor]:
        flat = torch.cat([vector[n].reshape(-1) for n in names]).to(operator.dtype)
        parts = operator.matvec(flat).split([vector[n].numel() for n in names])
        return {n: part.view(vector[n].shape) for n, part in zip(names, parts, strict=True)}

    return product


def eigenthings_differences(problem: Problem) -> Product:
    """The same with ``method="finite_difference"``, its documented way around missing second derivatives."""
    return eigenthings(problem, method="finite_difference")


def curvlinops(problem: Problem) -> Product:
    """``HessianLinearOperator(model, criterion, params, data)``, its check for determinism on, as by default."""
    from curvlinops import HessianLinearOperator

    model, criterion, data = _pairs(problem)
    names = _names(model)
    params = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(model, criterion, params, data)

    def product(vector: Named) -> dict[str, Tensor]:
        parts = operator @ [vector[n].to(p.dtype) for n, p in zip(names, params, strict=True)]
        return dict(zip(names, parts, strict=True))

    return product


def dyntune(problem: Problem) -> Product:
    """Defaults."""
    import dyntune as library

    operator = library.hessian(problem.model, problem.batches, **problem.loss)

    def product(vector: Named) -> dict[str, Tensor]:
        parts = operator @ [vector[n].to(operator.dtype) for n in operator.names]
        return dict(zip(operator.names, parts, strict=True))

    return product


TOOLS: dict[str, Callable[[Problem], Product]] = {
    "dyntune": dyntune,
    "PyHessian": pyhessian,
    "eigenthings": eigenthings,
    "eigenthings, finite_difference": eigenthings_differences,
    "curvlinops": curvlinops,
}
