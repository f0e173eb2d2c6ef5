"""The spectral density on a logarithmic axis, with its band."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from dyntune.curvature.density import Array, SpectralDensity
from dyntune.plots.style import BLUE, INK, MUTED, label, new_axes, number, tidy

__all__ = ["DensityData", "density_data", "draw_density", "plot_density"]

BULK = 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class DensityData:
    """What the figure shows.

    Args:
        grid: Eigenvalues, shape (g,).
        density: Share of the eigenvalues per unit of eigenvalue, shape (g,), not below `floor`.
        low: Lower edge of the band, shape (g,), not below `floor`.
        high: Upper edge, shape (g,), not below `floor`.
        floor: A tenth of `one`: what lies below is less than a tenth of an eigenvalue.
        one: Height of the peak that a single eigenvalue makes.
        smallest: Smallest quadrature node: lambda_min is not above it.
        largest: Largest quadrature node: lambda_max is not below it.
        bulk: This share, `BULK`, of the eigenvalues is at most this large in magnitude.
        numel: How many eigenvalues there are.
        title: One line above the figure.
    """

    grid: Array
    density: Array
    low: Array
    high: Array
    floor: float
    one: float
    smallest: float
    largest: float
    bulk: float
    numel: int
    title: str


def density_data(result: SpectralDensity) -> DensityData:
    """What :func:`plot_density` shows, as plain data."""
    one = 1 / (result.numel * result.bandwidth * math.sqrt(2 * math.pi))
    floor = one / 10
    bulk = _bulk(result.nodes, result.weights)
    return DensityData(
        grid=result.grid,
        density=np.maximum(result.density, floor),
        low=np.maximum(result.low, floor),
        high=np.maximum(result.high, floor),
        floor=floor,
        one=one,
        smallest=float(result.nodes.min()),
        largest=float(result.nodes.max()),
        bulk=bulk,
        numel=result.numel,
        title=f"{BULK:.0%} of {result.numel:,} eigenvalues lie within ±{number(bulk, 2)}",
    )


def _bulk(nodes: Array, weights: Array) -> float:
    """Smallest c such that the nodes with magnitude at most c carry the share `BULK` of the weight."""
    order = np.argsort(np.abs(nodes), axis=None)
    share = np.cumsum(weights.ravel()[order]) / weights.sum()
    index = min(int(np.searchsorted(share, BULK)), share.size - 1)
    return float(np.abs(nodes).ravel()[order][index])


def draw_density(ax: Axes, data: DensityData) -> None:
    """Draw on given axes."""
    top = float(data.high.max())
    ax.set_yscale("log")
    ax.set_ylim(data.floor, top * (top / data.floor) ** 0.18)
    ax.set_xlim(float(data.grid[0]), float(data.grid[-1]))
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.fill_between(data.grid, data.low, data.high, color=BLUE, alpha=0.3, linewidth=0)
    ax.plot(data.grid, data.density, color=BLUE, linewidth=1.4)
    ax.axhline(data.one, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    across = ax.get_yaxis_transform()
    label(ax, 1.0, data.one, "one eigenvalue", color=MUTED, xycoords=across, va="center", offset=(4.0, 0.0), columns=10)
    upward = ax.get_xaxis_transform()
    for x, name, side in ((data.smallest, "smallest", "left"), (data.largest, "largest", "right")):
        ax.axvline(x, ymax=0.86, color=MUTED, linewidth=0.8)
        label(ax, x, 0.87, f"{name} {number(x)}", color=INK, xycoords=upward, ha=side, va="bottom")
    tidy(
        ax,
        title=data.title,
        xlabel="eigenvalue λ (loss / parameter²)",
        ylabel="share of eigenvalues per unit of λ",
    )


def plot_density(result: SpectralDensity, *, ax: Axes | None = None) -> Axes:
    """Draw a spectral density with its pointwise band on a logarithmic axis.

    The dashed line is the height of the peak that one single eigenvalue makes: the curve below it says nothing.

    Args:
        result: What :func:`dyntune.spectral_density` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> import torch, dyntune
        >>> found = dyntune.spectral_density(torch.diag(torch.linspace(0, 1, 200)), num_probes=2, num_steps=8)
        >>> plot_density(found).get_yscale()
        'log'
    """
    axes = new_axes(height=3.2) if ax is None else ax
    draw_density(axes, density_data(result))
    return axes
