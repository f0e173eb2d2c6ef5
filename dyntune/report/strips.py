"""A signal of every tensor or layer as rows of coloured cells over the steps, the most remarkable first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.rows import Array
from dyntune.monitor.run import Run
from dyntune.plots.style import number
from dyntune.report.axis import Axis

__all__ = ["LEVELS", "PREFIXES", "Strip", "Strips", "tensor_strips"]

COLUMNS = 120  # cells of a row
SHOWN = 20  # rows; the others are counted, and in the log
MOST_NAME = 90  # characters
LEVELS = 6  # shades: neighbours can be told apart on light and dark pages
# Of all values: what lies outside shares the outermost shades, so that one outlier does not leave the rest pale.
SPREAD = (0.02, 0.98)
FAR_APART = 2  # times the median distance: farther, nothing was measured, and nothing is drawn


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One tensor, or one layer.

    Args:
        tensor: Its name.
        shades: A path for each shade, palest first, in a box of 1000 by 10.
        broken: The path of cells that hold a value which is not finite.
        worst: The most remarkable value, and where.
        last: The latest one.
    """

    tensor: str
    shades: tuple[str, ...]
    broken: str
    worst: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Strips:
    """One signal of all tensors, or layers.

    Args:
        title: The signal.
        of: What the rows are: ``"tensor"``, ``"layer"``, ``"layer or head"``.
        note: How to read it, and what comes first.
        strips: Worst first.
        more: How many are not shown.
        scale: Value at which each shade begins.
    """

    title: str
    of: str
    note: str
    strips: tuple[Strip, ...]
    more: int
    scale: tuple[str, ...]


@dataclass(frozen=True)
class _Signal:
    prefix: str
    title: str
    note: str
    score: Callable[[Array], float]  # of finite values: larger is more remarkable
    worst: Callable[[Array], int]  # which of them
    of: str = "tensor"


def _from_usual(values: Array) -> Array:
    """How many powers of ten the lengths of steps are away from 1e-3 of the weights."""
    away: Array = np.abs(np.log10(np.maximum(np.abs(values), 1e-30)) + 3)
    return away


def _drift(values: Array) -> Array:
    change: Array = np.abs(values - values[0])
    return change


def _largest_drift(values: Array) -> float:
    return float(_drift(values).max())


def _at_drift(values: Array) -> int:
    return int(_drift(values).argmax())


def _largest(values: Array) -> float:
    return float(values.max())


def _at_largest(values: Array) -> int:
    return int(values.argmax())


_SIGNALS = (
    _Signal(
        "adam/staleness/",
        "Staleness of the second moment",
        "Near 1 while Adam's second moment describes the gradient; far above, the gradient has outgrown it and steps "
        "are too long. Largest first.",
        _largest,
        _at_largest,
    ),
    _Signal(
        "update/ratio/",
        "Length of the step over that of the weights",
        "Around 1e-3 is usual (a rule of thumb); far below, the tensor hardly learns; far above, it is rewritten. "
        "Farthest from 1e-3 first.",
        lambda v: float(_from_usual(np.array([np.median(v)]))[0]),
        lambda v: int(_from_usual(v).argmax()),
    ),
    _Signal(
        "adam/below_eps/",
        "Share of entries below Adam's eps",
        "Where it is large, eps and not the second moment sets the step, and the optimizer is not adaptive there. "
        "Largest first.",
        _largest,
        _at_largest,
    ),
    _Signal(
        "grad/log_rms/",
        "Gradient: logarithm of the root mean square",
        "A fall of 2.3 is a gradient ten times smaller. Largest change since the first value first.",
        _largest_drift,
        _at_drift,
    ),
    _Signal(
        "curvature/block/",
        "Largest eigenvalue of each tensor's block",
        "Sharpest first.",
        _largest,
        _at_largest,
    ),
    _Signal(
        "activation/log_rms/",
        "Activations: logarithm of the root mean square",
        "A rise of 2.3 is activations ten times larger. Largest change since the first value first.",
        _largest_drift,
        _at_drift,
        "layer",
    ),
    _Signal(
        "units/dead/",
        "Share of dead units",
        "Units into which nothing above zero goes, and out of which next to nothing comes. Largest first.",
        _largest,
        _at_largest,
        "layer",
    ),
    _Signal(
        "units/saturated/",
        "Share of saturated activations",
        "Of a tanh or sigmoid where it is flat, so that hardly any gradient passes. Largest first.",
        _largest,
        _at_largest,
        "layer",
    ),
    _Signal(
        "attention/max_logit/",
        "Largest attention logit",
        "QK-Clip acts at 100; growth together with a fall of the entropy precedes divergence. Largest first.",
        _largest,
        _at_largest,
        "layer",
    ),
    _Signal(
        "attention/entropy/",
        "Relative entropy of attention",
        "1: every key counts alike; near 0: each query looks at one. Low values can be healthy, a fall together with "
        "growing logits is not. Lowest first.",
        lambda v: -float(v.min()),
        lambda v: int(v.argmin()),
        "layer or head",
    ),
    _Signal(
        "alignment/",
        "Spectral alignment",
        "Share of inputs on one side of the direction that the weights amplify most: 0.5 on both alike, 1 all on one, "
        "and every step grows the matrix. Largest first.",
        _largest,
        _at_largest,
    ),
)


PREFIXES = tuple(signal.prefix for signal in _SIGNALS)  # of columns that are drawn so


def tensor_strips(run: Run, steps: Axis) -> tuple[Strips, ...]:
    """The signals that the run holds by tensor or layer.

    Args:
        run: Any run.
        steps: Range of steps of the page.
    """
    found = []
    for signal in _SIGNALS:
        names = [name for name in run.names if name.startswith(signal.prefix)]
        if names:
            found.append(_strips(run, signal, names, steps))
    return tuple(found)


def _strips(run: Run, signal: _Signal, names: list[str], steps: Axis) -> Strips:
    scored = []
    for name in names:
        values = run.series(name)[1]
        finite = values[np.isfinite(values)]
        broken = bool(np.isinf(values).any())
        scored.append((broken, signal.score(finite) if finite.size else -math.inf, name))
    scored.sort(key=lambda item: (not item[0], -item[1], item[2]))
    shown = [name for _, _, name in scored[:SHOWN]]
    bounds = _bounds(run, shown)
    return Strips(
        title=signal.title,
        of=signal.of,
        note=signal.note,
        strips=tuple(_strip(run, signal, name, steps, bounds) for name in shown),
        more=len(names) - len(shown),
        scale=tuple(number(v, 2) for v in bounds[:-1].tolist()),
    )


def _bounds(run: Run, names: list[str]) -> Array:
    """Ends of the shades, shape (LEVELS + 1,): equal steps of the logarithm where all values are positive."""
    values = np.concatenate([run.series(name)[1] for name in names])
    values = values[np.isfinite(values)]
    if not values.size:
        return np.linspace(0.0, 1.0, LEVELS + 1)
    low, high = (float(v) for v in np.quantile(values, SPREAD))
    if low > 0:
        return np.geomspace(low, max(high, low * 1.01), LEVELS + 1)
    return np.linspace(low, high if high > low else low + 1.0, LEVELS + 1)


def _strip(run: Run, signal: _Signal, name: str, steps: Axis, bounds: Array) -> Strip:
    at, values = run.series(name)
    order = np.argsort(at, kind="stable")
    at, values = at[order], values[order]
    cells = np.minimum((COLUMNS * steps.place(at.astype(np.float64))).astype(int), COLUMNS - 1)
    shades: list[list[tuple[int, int]]] = [[] for _ in range(LEVELS)]
    broken: list[tuple[int, int]] = []
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    widths = _cell_widths(cells[starts])
    for a, b, width in zip(starts.tolist(), [*starts[1:].tolist(), at.size], widths.tolist(), strict=True):
        within = values[a:b][np.isfinite(values[a:b])]
        where = broken
        if within.size:
            value = within[signal.worst(within)]
            where = shades[int(np.clip(np.searchsorted(bounds, value, side="right") - 1, 0, LEVELS - 1))]
        where.append((int(cells[a]), width))
    known = np.flatnonzero(np.isfinite(values))
    worst = last = "none"
    if known.size:
        most = int(known[signal.worst(values[known])])
        worst, last = f"{number(values[most])} (step {at[most]:,})", number(float(values[known[-1]]))
    return Strip(
        tensor=_short(name.removeprefix(signal.prefix)),
        shades=tuple(_cells(cells) for cells in shades),
        broken=_cells(broken),
        worst=worst,
        last=last,
    )


def _short(name: str) -> str:
    """Both ends of a name: what tells tensors apart is mostly at one of them."""
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME // 2]}…{name[-MOST_NAME // 2 :]}"


def _cell_widths(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Measurements lie apart: a cell reaches to the next one, where that is not far beyond the usual distance."""
    apart = np.diff(cells, append=COLUMNS)
    usual = FAR_APART * int(np.median(apart[:-1])) if cells.size > 1 else max(1, COLUMNS // 40)
    widths: NDArray[np.int64] = np.minimum(apart, usual)
    return widths


def _cells(cells: list[tuple[int, int]]) -> str:
    scale = 1000 / COLUMNS
    boxes = ((a * scale, min(w, COLUMNS - a) * scale) for a, w in cells)
    return "".join(f"M{x:.4g} 0h{w:.4g}v10h-{w:.4g}z" for x, w in boxes)
