"""What autograd does not say by itself: operations in a loss's graph whose second derivative cannot be trusted.

``autograd.grad`` follows only the paths that lead to the parameters. A ``once_differentiable`` backward, or one that
detaches what it saved, has no such path: the gradient is right and the Hessian silently lacks terms. torch itself has
an operation of this kind, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from dyntune.errors import HVPUnsupportedError

__all__ = ["check_twice_differentiable", "graph_nodes", "reaches", "suspects"]

# The node that `once_differentiable` leaves in the graph of a gradient.
_ERROR_NODE = "torch::autograd::Error"
# Operations of torch whose second derivative is wrong without an error: fused weight_norm, measured 40% (linear) and
# 89% (convolution) off by central differences in float64 (torch 2.13, CPU); the matrix is not even symmetric.
_KNOWN_WRONG = {"WeightNormInterfaceBackward0": "weight_norm"}


def graph_nodes(tensors: Sequence[torch.Tensor]) -> Iterator[Node]:
    """Every node of the graph behind `tensors`, each once."""
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions if following is not None)


def suspects(loss: torch.Tensor) -> tuple[str, ...]:
    """Names of operations whose second derivative has to be verified: Python's, and those known to be wrong."""
    found = set()
    for node in graph_nodes([loss]):
        name = node.name()
        if issubclass(type(node), BackwardCFunction):
            found.add(name.removesuffix("Backward"))
        elif name in _KNOWN_WRONG:
            found.add(_KNOWN_WRONG[name])
    return tuple(sorted(found))


def reaches(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the graph of the loss leads to any of the parameters."""
    wanted = {id(p) for p in parameters}
    # A loss that is a parameter has no graph of its own.
    return id(loss) in wanted or any(id(getattr(node, "variable", None)) in wanted for node in graph_nodes([loss]))


def check_twice_differentiable(gradient: Sequence[torch.Tensor]) -> None:
    """Raise when the graph of a gradient holds a ``once_differentiable`` backward.

    Raises:
        HVPUnsupportedError: It does.
    """
    for node in graph_nodes(gradient):
        if node.name() == _ERROR_NODE:
            raise HVPUnsupportedError("an autograd.Function in the model is marked with @once_differentiable.")
