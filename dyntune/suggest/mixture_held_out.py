r"""Which mixture of the sources lowers a held-out loss most in one step: a quadratic program over the shares.

A step :math:`-\eta P^{-1} \sum_i r_i g_i` with the sources' mean gradients changes the held-out loss by

.. math:: \Delta(r) = -\eta\, b^\top r + \tfrac{\eta^2}{2} r^\top A r, \qquad
          b_i = \langle g_{val}, P^{-1} g_i \rangle, \quad A_{ij} = (P^{-1} g_i)^\top H_{val} (P^{-1} g_j),

to second order, exactly on quadratics. Shares with floors make it least. Where H has negative curvature along the
gradients, A is replaced by its nearest positive semi-definite matrix.

This changes the objective: what is trained is the mean over sources with the shares as weights.

Source: derived here; first order alone is the alignment of DoGE (Fan et al. 2023, arXiv:2310.15393).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dyntune.dynamics.sources import DRAWS
from dyntune.errors import NonFiniteError
from dyntune.numerics.simplex import simplex_gap, simplex_quadratic
from dyntune.numerics.vectors import dot
from dyntune.objective.objective import Objective
from dyntune.records import Estimate, Status
from dyntune.suggest.mixture_changed import ChangedMixture
from dyntune.suggest.mixture_measure import measure_gradients, metric_of

__all__ = ["HELD_OUT", "held_out_mixture", "held_out_rule"]

Array = NDArray[np.float64]
HELD_OUT = "held-out rows"
LEVEL = 0.95
SOURCES = ("second-order expansion of the held-out loss, derived", "Fan et al. (2023), arXiv:2310.15393 (first order)")


def held_out_rule(
    names: Sequence[str],
    slopes: Array,
    bend: Array,
    *,
    lr: float,
    floors: Sequence[float],
    present: Sequence[float],
    slope_draws: Array,
    checks: Sequence[str] = (),
    cost: float = 0.0,
) -> ChangedMixture:
    """Shares from the held-out loss's slopes and curvature along the sources' steps.

    Args:
        names: Of the sources.
        slopes: b. Shape (k,).
        bend: A. Shape (k, k).
        lr: Learning rate.
        floors: Least shares.
        present: Shares to compare with.
        slope_draws: Bootstrap of b. Shape (d, k).
        checks: What was verified.
        cost: Gradient-equivalents spent.

    Raises:
        NonFiniteError: A slope or a curvature is NaN or infinite.
    """
    if not bool(np.isfinite(slopes).all() and np.isfinite(bend).all()):
        raise NonFiniteError(
            "a slope or curvature of the held-out loss is NaN or infinite: no mixture follows from it."
        )
    f, p, told = np.array(floors), np.array(present), list(checks)
    values, vectors = np.linalg.eigh((bend + bend.T) / 2)
    # Rounding of inner products of float32 vectors, relative to the largest.
    indefinite = bool(values[0] < -1e-6 * max(abs(float(values[-1])), abs(float(values[0]))))
    convex = (vectors * np.maximum(values, 0.0)) @ vectors.T

    def change(b: Array, r: Array) -> float:
        return float(-lr * (b @ r) + 0.5 * lr**2 * (r @ bend @ r))

    shares = simplex_quadratic(lr * convex, slopes, f)
    again = np.array([simplex_quadratic(lr * convex, b, f) for b in slope_draws])
    low, high = np.quantile(again, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    gained = change(slopes, shares) - change(slopes, p)
    drawn = [change(b, shares) - change(b, p) for b in slope_draws]
    ends = [float(x) for x in np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))]
    nothing = not slopes.any() and not bend.any()
    if nothing:
        status, reason = Status.REFUSED, "the held-out loss does not change with any source's gradient"
    elif indefinite:
        status, reason = Status.UNCERTAIN, "the held-out loss has negative curvature along the gradients, left out here"
    elif ends[1] < 0:
        status, reason = Status.OK, ""
    else:
        status, reason = Status.UNCERTAIN, "the rows measured do not tell it from the present shares: measure more"
    return ChangedMixture(
        names=tuple(names),
        proportions=None if nothing else tuple(shares.tolist()),
        low=tuple(np.minimum(low, shares).tolist()),
        high=tuple(np.maximum(high, shares).tolist()),
        floors=tuple(f.tolist()),
        present=tuple(p.tolist()),
        objective="held-out",
        change=Estimate(
            value=gained,
            low=min(ends[0], gained),
            high=max(ends[1], gained),
            level=None,
            unit="held-out loss in a step, beside the present shares",
            method="second-order expansion; bootstrap over gradients, curvature held still",
            covers="sampling",
        ),
        gap=max(0.0, lr * simplex_gap(lr * convex @ shares - slopes, shares, f)),
        status=status,
        reason=reason,
        checks=tuple(told),
        cost=cost,
        sources=SOURCES,
    )


def held_out_mixture(
    model: nn.Module,
    parts: Mapping[str, Sequence[Any]],
    held_out: Sequence[Any],
    *,
    lr: float,
    floors: Sequence[float],
    present: Sequence[float],
    optimizer: torch.optim.Optimizer | None,
    rows: int,
    memory: int,
    seed: int,
    objective_options: Mapping[str, Any],
) -> ChangedMixture:
    """Measure slopes and curvature, and apply :func:`held_out_rule`.

    Args:
        model: At present; left alone.
        parts: Of each source, of `rows` rows each.
        held_out: Parts of the held-out rows.
        lr: Learning rate.
        floors: Least shares.
        present: Shares to compare with.
        optimizer: Whose diagonal P is; None for 1.
        rows: Of a part.
        memory: Bytes for gradients.
        seed: Of the bootstrap.
        objective_options: For :class:`Objective`.

    Cost:
        A gradient for each part, and one Hessian-vector product on the held-out rows for each source.
    """
    scale_of, metric = metric_of(optimizer)
    found = measure_gradients(
        model,
        {HELD_OUT: held_out, **parts},
        rows=rows,
        scale_of=scale_of,
        memory=memory,
        objective_options=objective_options,
    )
    ends = np.cumsum([0, *found.counts])
    rng = np.random.default_rng(seed)
    shares = [rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in found.counts]
    cross = found.gram[: ends[1]]
    blocks = [cross[:, a:b] for a, b in pairwise(ends[1:])]
    slopes = np.array([float(block.mean()) for block in blocks])
    draws = np.array(
        [np.einsum("dv,vj,dj->d", shares[0], block, s) for block, s in zip(blocks, shares[1:], strict=True)]
    ).T
    target = Objective(model, list(held_out), num_checked=1, **objective_options)
    # A criterion that adds rows up has sums for gradients: those of a mean row are what is meant.
    per_row = 1 / (rows * len(held_out)) if target.adds_up else 1.0
    steps = []
    for each in parts.values():
        objective = Objective(model, list(each), num_checked=1, **objective_options)
        gradient = objective.gradient()
        if objective.adds_up:
            gradient = [g / (rows * len(each)) for g in gradient]
        scale = scale_of(objective)
        steps.append(gradient if scale is None else [g / p for g, p in zip(gradient, scale, strict=True)])
    pushed = [target.hvp(step) for step in steps]
    bend = per_row * np.array([[dot(a, h) for h in pushed] for a in steps])
    return held_out_rule(
        tuple(parts),
        slopes,
        (bend + bend.T) / 2,
        lr=lr,
        floors=floors,
        present=present,
        slope_draws=draws,
        checks=(
            f"lengths: {metric}",
            f"{' + '.join(str(n) for n in found.counts[1:])} gradients of {rows} rows each, {found.counts[0]} held out",
            "curvature: of the measured mean gradients, whose own noise is part of it",
        ),
        # A product costs two gradients or so.
        cost=float(sum(found.counts)) + sum(map(len, parts.values())) + 2.0 * len(parts) * len(held_out),
    )
