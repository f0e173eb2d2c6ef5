r"""Which mixture gives the lowest loss after training: a law fitted to small runs with other mixtures.

Of each loss i that is watched, over the shares r of the sources,

.. math:: L_i(r) = c_i + k_i \exp\Bigl(\sum_j t_{ij} r_j\Bigr), \qquad c_i \ge \text{least},\ k_i > 0 .

Shares add up to one, so that only :math:`k_i e^{s}` with all :math:`t_{ij}` lower by s is determined: here the
:math:`t_{ij}` of a loss add up to zero. A weighted sum of such laws is convex, and Newton's steps with an exact
quadratic solver end in its minimum over shares with floors.

This changes the objective: rows are drawn in the shares found and count alike.

Source: Ye et al. (2024), "Data mixing laws", arXiv:2403.16952 (the form). The intervals are the usual linearised ones
of nonlinear least squares (Bates and Watts 1988, chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.simplex import simplex_gap, simplex_quadratic
from dyntune.numerics.water_filling import checked_floors
from dyntune.records import Estimate, Status, short_number
from dyntune.suggest.mixture_changed import ChangedMixture

__all__ = ["MixingLaw", "fit_mixing_law"]

Array = NDArray[np.float64]
LEVEL = 0.95
# Starts: c so many ranges of the losses below the lowest; from a curve that is nearly flat there to a straight one.
STARTS = (0.01, 0.1, 0.3, 1.0, 3.0)
DRAWS = 200
NEWTON = 100
SOURCES = ("Ye et al. (2024), arXiv:2403.16952 (data mixing laws)", "Bates and Watts (1988), chapter 2 (intervals)")


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingLaw:
    """Laws of one or several losses over the shares of the same sources.

    Args:
        names: Of the sources.
        floors: c_i. Shape (m,).
        factors: k_i. Shape (m,).
        slopes: t_ij, each row adding up to zero. Shape (m, k).
        spreads: Standard deviation of each loss's residuals. Shape (m,).
        num_runs: Runs behind the fit.
        status: UNCERTAIN where the losses show no curvature that would tell a floor.
        reason: Why.
    """

    names: tuple[str, ...]
    floors: Array
    factors: Array
    slopes: Array
    spreads: Array
    num_runs: int
    status: Status
    reason: str
    # Of (c, log k + t): covariance of each loss's parameters. Shape (m, k + 1, k + 1).
    covariances: Array = field(repr=False)
    runs: Array = field(repr=False)

    def predict(self, proportions: Sequence[float], loss: int = 0, *, new_run: bool = False) -> Estimate:
        """A loss at other shares, with its 95% interval.

        Args:
            proportions: Shares, adding up to one. Shape (k,).
            loss: Which of the losses.
            new_run: Whether the interval is for one more run (with its own noise) rather than for the mean of many.

        Raises:
            InvalidArgumentError: Shares that are none, or no such loss.
        """
        r = self._shares(proportions)
        if not 0 <= loss < len(self.floors):
            raise InvalidArgumentError(f"loss={loss}: there are {len(self.floors)}, the first is 0.")
        rise = float(self.factors[loss] * math.exp(self.slopes[loss] @ r))
        direction = np.concatenate([[1.0], rise * r])
        variance = float(direction @ self.covariances[loss] @ direction) + new_run * float(self.spreads[loss]) ** 2
        half = _quantile(self.num_runs - len(direction)) * math.sqrt(max(0.0, variance))
        value = float(self.floors[loss]) + rise
        inside = bool((r >= self.runs.min(0) - 1e-12).all() and (r <= self.runs.max(0) + 1e-12).all())
        return Estimate(
            value=value,
            low=value - half,
            high=value + half,
            level=LEVEL,
            unit="loss",
            method=f"mixing law, {self.num_runs} runs",
            covers="sampling",
            status=Status.OK if inside else Status.UNCERTAIN,
            reason="" if inside else "outside of the shares that were run",
        )

    def minimum(
        self,
        floors: Sequence[float] | None = None,
        *,
        weights: Sequence[float] | None = None,
        present: Sequence[float] | None = None,
        seed: int = 0,
    ) -> ChangedMixture:
        """The shares with the lowest weighted sum of the losses that the law predicts.

        Args:
            floors: Least share of each source; default zero.
            weights: Of the losses, >= 0; default equal, adding up to one.
            present: Shares to show beside; default equal.
            seed: Of the draws behind the shares' intervals.

        Raises:
            InvalidArgumentError: Floors that add up to more than one, or weights that are none.

        Accuracy: `gap` bounds how much lower the law is anywhere else.
        """
        count, k = self.slopes.shape
        f = checked_floors(floors, k)
        v = np.full(count, 1 / count) if weights is None else np.array(weights, dtype=np.float64)
        if v.shape != (count,) or not bool(np.isfinite(v).all()) or bool((v < 0).any()) or not v.any():
            raise InvalidArgumentError(
                f"weights={v.tolist()}: one of 0 or more for each of the {count} losses, not all 0."
            )
        beside = np.full(k, 1 / k) if present is None else self._shares(present)
        logs = np.log(self.factors)[:, None] + self.slopes
        shares, gap = _minimum(v, logs, f)
        rng = np.random.default_rng(seed)
        drawn = [
            rng.multivariate_normal(logs[i], self.covariances[i][1:, 1:], DRAWS, method="eigh") for i in range(count)
        ]
        found = np.array([_minimum(v, np.array([d[n] for d in drawn]), f)[0] for n in range(DRAWS)])
        low, high = np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
        each = [self.predict(shares.tolist(), i) for i in range(count)]
        value = sum(w * float(e) for w, e in zip(v, each, strict=True))
        # Errors of different losses may go together: their halves are added up.
        half = sum(float(w) * (e.high - e.low) / 2 for w, e in zip(v, each, strict=True))
        outside = any(e.status is not Status.OK for e in each)
        reason = self.reason or (
            "the minimum lies outside of the shares that were run: run some near it" if outside else ""
        )
        return ChangedMixture(
            names=self.names,
            proportions=tuple(shares.tolist()),
            low=tuple(np.minimum(low, shares).tolist()),
            high=tuple(np.maximum(high, shares).tolist()),
            floors=tuple(f.tolist()),
            present=tuple(beside.tolist()),
            objective="mixing-law",
            change=Estimate(
                value=value,
                low=value - half,
                high=value + half,
                level=None,
                unit="loss",
                method=f"mixing law, {self.num_runs} runs",
                covers="sampling",
            ),
            gap=gap,
            status=Status.UNCERTAIN if reason else Status.OK,
            reason=reason,
            checks=(f"residuals of {', '.join(short_number(float(s)) for s in self.spreads)}",),
            cost=0.0,
            sources=SOURCES,
        )

    def _shares(self, proportions: Sequence[float]) -> Array:
        r = checked_floors(proportions, self.slopes.shape[1])
        if abs(r.sum() - 1) > 1e-6:
            raise InvalidArgumentError(f"proportions={r.tolist()} add up to {r.sum():.6g}: shares add up to one.")
        return r


def fit_mixing_law(
    proportions: Sequence[Sequence[float]] | Array,
    losses: Sequence[float] | Sequence[Sequence[float]] | Array,
    *,
    names: Sequence[str] | None = None,
    least: float = 0.0,
) -> MixingLaw:
    """Fit the law to runs with different mixtures.

    Args:
        proportions: Shares of each run, adding up to one. Shape (n, k).
        losses: What each run ended with. Shape (n,), or (n, m) for several losses.
        names: Of the sources.
        least: No loss can be below it; 0 for a cross-entropy.

    Returns:
        The law, with ``predict`` and ``minimum``.

    Raises:
        InvalidArgumentError: Fewer than k + 2 runs, shares that do not add up to one or do not span the sources, or a
            loss below `least`.
        NonFiniteError: A loss that is NaN or infinite: leave failed runs out.

    Accuracy:
        An interval of a prediction held the truth in 90 or more of 100 simulated sets of 20 runs
        (``tests/suggest/test_mixing_law.py``).
    Cost:
        Five fits of k + 1 numbers for each loss.
    Source:
        Ye et al. (2024), arXiv:2403.16952.

    Example:
        >>> shares = [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
        >>> law = fit_mixing_law(shares, [1 + math.exp(-2 * a) for a, _ in shares])
        >>> round(float(law.predict([0.6, 0.4])), 4), round(1 + math.exp(-1.2), 4)
        (1.3012, 1.3012)
    """
    runs, found = np.array(proportions, dtype=np.float64), np.array(losses, dtype=np.float64)
    found = found[:, None] if found.ndim == 1 else found
    if runs.ndim != 2 or found.ndim != 2 or len(found) != len(runs) or not found.shape[1]:
        raise InvalidArgumentError(
            f"proportions of shape {runs.shape} and losses of shape {np.shape(losses)}: one row of shares and one loss "
            "(or one row of them) for each run."
        )
    n, k = runs.shape
    if not bool(np.isfinite(found).all()):
        raise NonFiniteError("a loss is NaN or infinite: leave runs that failed out of the fit.")
    if not bool(np.isfinite(runs).all()) or bool((runs < 0).any()) or bool((abs(runs.sum(1) - 1) > 1e-6).any()):
        raise InvalidArgumentError("every run's shares are 0 or more and add up to one.")
    if n < k + 2 or np.linalg.matrix_rank(runs) < k:
        raise InvalidArgumentError(
            f"{n} runs whose shares span {np.linalg.matrix_rank(runs)} of {k} sources: a law has {k + 1} numbers for "
            f"each loss, so that {k + 2} runs are needed at least, in which every source's share varies by itself."
        )
    if float(found.min()) < least:
        raise InvalidArgumentError(f"a loss of {found.min():.6g} lies below least={least:g}: give a lower one.")
    parts = [_fitted(runs, loss, least) for loss in found.T]
    logs = np.array([p["logs"] for p in parts])
    centers = logs.mean(1)
    untold = [i for i, p in enumerate(parts) if p["untold"]]
    return MixingLaw(
        names=tuple(names) if names is not None else tuple(f"source {j}" for j in range(k)),
        floors=np.array([p["floor"] for p in parts]),
        factors=np.exp(centers),
        slopes=logs - centers[:, None],
        spreads=np.array([p["spread"] for p in parts]),
        num_runs=n,
        status=Status.UNCERTAIN if untold else Status.OK,
        reason=f"the floor of loss {untold[0]} is not told by these runs" if untold else "",
        covariances=np.array([p["covariance"] for p in parts]),
        runs=runs,
    )


def _fitted(runs: Array, losses: Array, least: float) -> dict[str, Any]:
    """One loss: parameters (c, t) with k absorbed in t, in units of the losses' range."""
    from scipy.optimize import least_squares

    n, k = runs.shape
    scale = float(np.ptp(losses)) or max(abs(float(losses[0])), 1.0)
    y, lowest = losses / scale, least / scale

    def residual(x: Array) -> Array:
        return np.asarray(x[0] + np.exp(np.minimum(runs @ x[1:], 300.0)) - y)

    def jacobian(x: Array) -> Array:
        rise = np.exp(np.minimum(runs @ x[1:], 300.0))
        return np.column_stack([np.ones(n), rise[:, None] * runs])

    best: Any = None
    top = float(y.max()) + 1.0
    for below in STARTS:
        c = max(float(y.min()) - below, lowest + 1e-6)
        logs = np.log(np.maximum(y - c, 1e-6))
        start = np.concatenate([[min(c, top - 1e-6)], np.linalg.lstsq(runs, logs, rcond=None)[0]])
        bounds = ([lowest, *[-np.inf] * k], [top, *[np.inf] * k])
        one = least_squares(residual, start, jacobian, bounds=bounds, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12)
        best = one if best is None or one.cost < best.cost else best
    slopes = jacobian(best.x)
    spread = math.sqrt(2 * best.cost / (n - k - 1))
    # A thousandth of the losses' range from the bound: the trust region's steps end a little inside.
    bound = bool(best.x[0] - lowest < 1e-3)
    covariance = np.zeros((k + 1, k + 1))
    free = slice(1 if bound else 0, None)
    covariance[free, free] = spread**2 * np.linalg.pinv(slopes[:, free].T @ slopes[:, free], hermitian=True)
    # No wider than what stands on it, or a straight line and a floor far below are as likely.
    wide = _quantile(n - k - 1) * math.sqrt(float(covariance[0, 0])) > float(np.exp(runs @ best.x[1:]).mean())
    units = np.array([scale, *[1.0] * k])
    return {
        "floor": float(best.x[0]) * scale,
        "logs": best.x[1:] + math.log(scale),
        "spread": spread * scale,
        "covariance": covariance * np.outer(units, units),
        "untold": bound or wide,
    }


def _minimum(weights: Array, logs: Array, floors: Array) -> tuple[Array, float]:
    """Newton's steps over shares for ``sum_i v_i exp(logs_i . r)``, which is convex; and Frank and Wolfe's gap."""
    k = logs.shape[1]
    r = floors + (1 - floors.sum()) / k

    def value(at: Array) -> float:
        return float(weights @ np.exp(logs @ at))

    gap = math.inf
    for _ in range(NEWTON):
        each = weights * np.exp(logs @ r)
        gradient, bend = logs.T @ each, (logs.T * each) @ logs
        gap = max(0.0, simplex_gap(gradient, r, floors))
        if gap <= 1e-12 * each.sum():
            break
        # A ridge of rounding's size: fewer losses than sources leave directions without curvature.
        bend = bend + 1e-12 * np.trace(bend) / k * np.eye(k)
        goal = simplex_quadratic(bend, bend @ r - gradient, floors)
        step, now, fall = 1.0, value(r), float(gradient @ (goal - r))
        while value(r + step * (goal - r)) > now + 0.25 * step * fall and step > 1e-10:
            step /= 2
        r = r + step * (goal - r)
    return np.maximum(r, floors), gap


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
