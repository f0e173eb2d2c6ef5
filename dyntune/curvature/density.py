"""The distribution of all eigenvalues: :func:`spectral_density`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.krylov import FLOOR_EPS
from dyntune.numerics.operator import OperatorLike, as_operator
from dyntune.numerics.quadrature import gauss_quadrature, smoothed_density
from dyntune.numerics.vectors import Basis
from dyntune.records import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SpectralDensity", "spectral_density"]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralDensity:
    """A smoothed spectral density with its band.

    Args:
        grid: Eigenvalue axis, shape (g,).
        density: Density at the grid points, shape (g,); integrates to 1. Unit: 1 / eigenvalue.
        low: Lower edge of the pointwise band over random probes, shape (g,).
        high: Upper edge, shape (g,).
        level: Pointwise level of the band.
        bandwidth: Standard deviation of the Gaussian that every eigenvalue is smeared with.
        nodes: Quadrature nodes, shape (probes, steps).
        weights: Their weights, shape (probes, steps); each row sums to 1.
        trace: Estimate of the trace (Hutchinson, from the same products).
        numel: Dimension n of the operator.
        num_products: Operator products spent.
    """

    grid: Array
    density: Array
    low: Array
    high: Array
    level: float
    bandwidth: float
    nodes: Array
    weights: Array
    trace: Estimate
    numel: int
    num_products: int

    def mass(self, low: float, high: float) -> float:
        """Estimated share of eigenvalues in [low, high], without smoothing; resolution is that of the quadrature."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return float((self.weights * inside).sum(axis=1).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "grid": self.grid.tolist(),
            "density": self.density.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "level": self.level,
            "bandwidth": self.bandwidth,
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "trace": self.trace.to_dict(),
            "numel": self.numel,
            "num_products": self.num_products,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density with its band on a logarithmic axis (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_density

        return plot_density(self, ax=ax)


def spectral_density(
    operator: OperatorLike,
    *,
    num_probes: int = 8,
    num_steps: int = 32,
    bandwidth: float | None = None,
    num_points: int = 512,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues by stochastic Lanczos quadrature, with a band over probes, and the trace.

    Args:
        operator: As for :func:`dyntune.eigenvalues`.
        num_probes: Independent random probes, >= 2 (the band needs two).
        num_steps: Lanczos steps per probe, >= 2.
        bandwidth: Standard deviation of the smoothing Gaussian; default the spread of the nodes over `num_steps`, the
            scale that a quadrature of that many nodes resolves in the bulk.
        num_points: Points of the grid.
        level: Level of the pointwise band and of the trace's interval (Student t over probes).
        seed: Seed of the probes.
        progress: Called with (probes done, largest node so far).

    Returns:
        Density, band, quadrature and trace.

    Raises:
        InvalidArgumentError: An argument out of range.
        NonFiniteError: A product is NaN or infinite.

    Accuracy:
        Isolated eigenvalues carry a weight of 1/n, which a band over 8 probes sees only roughly: use
        :func:`dyntune.eigenvalues` for the extremes. The trace's interval covers as often as it says when many
        eigenvalues make up the trace, in 87% instead of 95% of cases (400 runs) when a single one does.
    Cost:
        At most ``num_probes * num_steps`` products; ``num_steps + 1`` vectors of memory.
    Source:
        Lin, Saad and Yang (2016), SIAM Review 58(1); Ghorbani, Krishnan and Xiao (2019), arXiv:1901.10159. The trace
        is Hutchinson's (1990) with Gaussian probes of unit length.

    Example:
        >>> import torch
        >>> d = spectral_density(torch.diag(torch.linspace(0, 1, 200)), num_probes=4, num_steps=20)
        >>> abs(float(np.trapezoid(d.density, d.grid)) - 1) < 1e-3, 100.0 in d.trace
        (True, True)
    """
    _validate(num_probes=num_probes, num_steps=num_steps, num_points=num_points, level=level, bandwidth=bandwidth)
    op = as_operator(operator)
    steps = min(num_steps, op.numel)
    pairs, spent = [], 0
    with plain_arithmetic(op.device), op.session() as product:
        basis = Basis(op.space, steps + 1)

        def counted(vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            nonlocal spent
            spent += 1
            return product(vector)

        for probe in range(num_probes):
            pairs.append(gauss_quadrature(counted, basis, num_steps=steps, key=(seed, 0, probe)))
            if progress is not None:
                progress(probe + 1, max(float(nodes.max()) for nodes, _ in pairs))
    nodes, weights = (np.stack(parts) for parts in zip(*pairs, strict=True))
    shape = _Shape(op.numel, spent, torch.finfo(op.dtype).eps)
    return _summarise(nodes, weights, shape, bandwidth=bandwidth, num_points=num_points, level=level)


def _validate(*, num_probes: int, num_steps: int, num_points: int, level: float, bandwidth: float | None) -> None:
    if num_probes < 2:
        raise InvalidArgumentError(f"num_probes={num_probes}: a band needs at least two random probes.")
    if num_steps < 2 or num_points < 2:
        raise InvalidArgumentError(f"num_steps={num_steps}, num_points={num_points}: both must be at least 2.")
    if not 0 < level < 1:
        raise InvalidArgumentError(f"level={level}: choose a level in (0, 1), for instance 0.95.")
    if bandwidth is not None and not bandwidth > 0:
        raise InvalidArgumentError(f"bandwidth={bandwidth}: the width of a Gaussian is positive.")


@dataclass(frozen=True)
class _Shape:
    """What the quadrature does not say of itself: dimension, products spent, precision of a product."""

    numel: int
    num_products: int
    eps: float


def _summarise(
    nodes: Array, weights: Array, shape: _Shape, *, bandwidth: float | None, num_points: int, level: float
) -> SpectralDensity:
    from scipy.special import stdtrit

    probes, steps = nodes.shape
    low, high = float(nodes.min()), float(nodes.max())
    size = max(abs(low), abs(high))
    # A multiple of the identity has no spread but rounding; a width of 1% of its value draws it as the peak that it is.
    spread = high - low if high - low > FLOOR_EPS * shape.eps * size else 0.01 * size * steps or 1.0
    width = bandwidth if bandwidth is not None else spread / steps
    grid = np.linspace(low - 4 * width, high + 4 * width, num_points)
    each = smoothed_density(nodes, weights, grid, width)
    quantile = float(stdtrit(probes - 1, (1 + level) / 2))
    mean, half = each.mean(axis=0), quantile * each.std(axis=0, ddof=1) / np.sqrt(probes)
    traces = shape.numel * (nodes * weights).sum(axis=1)
    # Rounding of v.Av against |Av|; it matters only where the probes agree, as for a multiple of the identity.
    rounding = FLOOR_EPS * shape.eps * shape.numel * float(np.sqrt((nodes**2 * weights).sum(axis=1).mean()))
    trace = float(traces.mean())
    trace_half = quantile * float(traces.std(ddof=1)) / float(np.sqrt(probes)) + rounding
    return SpectralDensity(
        grid=grid,
        density=mean,
        low=np.maximum(mean - half, 0.0),
        high=mean + half,
        level=level,
        bandwidth=width,
        nodes=nodes,
        weights=weights,
        trace=Estimate(
            value=trace,
            low=trace - trace_half,
            high=trace + trace_half,
            level=level,
            unit="loss / parameter^2",
            method=f"Hutchinson, {probes} probes",
            covers="numerical",
            num_products=shape.num_products,
        ),
        numel=shape.numel,
        num_products=shape.num_products,
    )
