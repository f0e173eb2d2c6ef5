"""Where in the network curvature lives: eigenvalues of diagonal blocks, and the share of a direction in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from dyntune.curvature.eigenvalues import Eigenvalues, eigenvalues
from dyntune.curvature.hessian import HessianOperator, Method, hessian
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.target import Which
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.parameters import ParameterSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BlockEigenvalues", "BlockMass", "Grouping", "block_eigenvalues", "block_mass", "block_of"]

# "parameter": every tensor by itself; a number: the first so many parts of its name, 1 for the top-level modules.
Grouping: TypeAlias = Literal["parameter", "layer"] | int


class BlockEigenvalues(dict[str, Eigenvalues]):
    """Eigenvalues by block, in the model's order."""

    def plot(self, ax: Axes | None = None, *, whole: Eigenvalues | None = None) -> Axes:
        """Draw them, with the whole Hessian's where given (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_blocks

        return plot_blocks(self, whole=whole, ax=ax)


class BlockMass(dict[str, float]):
    """Shares of a direction's squared length by block, in the model's order.

    Args:
        shares: Shares; they sum to 1.
        sizes: How many parameters each block has: a random direction's shares are proportional to them.
    """

    def __init__(self, shares: Mapping[str, float], sizes: Mapping[str, int]) -> None:
        super().__init__(shares)
        self.sizes = dict(sizes)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw them beside those of a random direction (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_block_mass

        return plot_block_mass(self, ax=ax)


def block_of(name: str, by: Grouping = "layer") -> str:
    """The block that a parameter belongs to.

    Args:
        name: A parameter's name, such as ``"blocks.0.attn.weight"``.
        by: ``"parameter"`` for the name itself, ``"layer"`` for the module that holds it, or how many of its parts.

    Example:
        >>> block_of("blocks.0.attn.weight"), block_of("blocks.0.attn.weight", by=2)
        ('blocks.0.attn', 'blocks.0')
    """
    parts = name.split(".")
    if by == "parameter" or len(parts) == 1:
        return name
    if by == "layer":
        return ".".join(parts[:-1])
    if not isinstance(by, int) or by < 1:
        raise InvalidArgumentError(f'by={by!r}: group by "parameter", "layer" or a number of name parts, 1 or more.')
    return ".".join(parts[: min(by, len(parts) - 1)])


def block_mass(operator: HessianOperator, vector: Sequence[torch.Tensor], *, by: Grouping = "layer") -> BlockMass:
    """Share of a direction's squared length in each block: where an eigenvector lives.

    Args:
        operator: The operator whose vector it is; it knows the names.
        vector: One tensor per parameter, such as ``eigenvalues(operator).vectors[0]``.
        by: See :func:`block_of`.

    Returns:
        Shares by block, in the model's order; they sum to 1.

    Raises:
        ShapeMismatchError: The vector has other shapes, or is zero.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> H = hessian(model, (torch.eye(2), torch.zeros(2, 1)), criterion=torch.nn.MSELoss())
        >>> shares = block_mass(H, [torch.ones(p.shape) for p in model.parameters()])
        >>> {name: round(share, 3) for name, share in shares.items()}
        {'0': 0.667, '1': 0.333}
    """
    parts = operator.space.check(vector)
    masses: dict[str, float] = {}
    sizes: dict[str, int] = {}
    squares = operator.space.squared_norms(parts)
    for name, square, shape in zip(operator.names, squares, operator.space.whole_shapes, strict=True):
        block = block_of(name, by)
        masses[block] = masses.get(block, 0.0) + square
        sizes[block] = sizes.get(block, 0) + shape.numel()
    total = sum(masses.values())
    if total == 0.0:
        raise ShapeMismatchError("the vector is zero: it has no share in any block.")
    return BlockMass({block: mass / total for block, mass in masses.items()}, sizes)


def block_eigenvalues(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    k: int = 1,
    by: Grouping = "layer",
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    which: Which = "largest",
    rtol: float = 1e-2,
    max_products: int | None = None,
    seed: int = 0,
) -> BlockEigenvalues:
    """Extreme eigenvalues of every diagonal block of the Hessian: the curvature when only that block moves.

    A loader is drawn from once, so that all blocks are measured on the same batches.

    Args:
        model: As for :func:`dyntune.hessian`, like everything not named here.
        batches: See there.
        loss_fn: See there.
        k: How many eigenvalues per block, at most the block's size.
        by: What a block is; see :func:`block_of`.
        criterion: See :func:`dyntune.hessian`.
        params: See there: only blocks of these parameters.
        num_batches: See there.
        method: See there.
        which: See :func:`dyntune.eigenvalues`.
        rtol: See there.
        max_products: Budget per block.
        seed: Seed.

    Returns:
        Eigenvalues by block, in the model's order. None exceeds the whole Hessian's largest (interlacing).

    Cost:
        One solve per block. The products pass through the whole network, but hold only the block's vectors.
    """
    whole = hessian(
        model, batches, loss_fn, criterion=criterion, params=params, num_batches=num_batches, method=method, seed=seed
    )
    names: dict[str, list[str]] = {}
    for name in whole.names:
        names.setdefault(block_of(name, by), []).append(name)
    found = BlockEigenvalues()
    for block, members in names.items():
        operator = HessianOperator(whole.objective.restricted(members), method=method)
        size = min(k, operator.numel)
        found[block] = eigenvalues(operator, size, which=which, rtol=rtol, max_products=max_products, seed=seed)
    return found
