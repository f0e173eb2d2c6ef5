"""Extreme eigenvalues of a symmetric operator: Lanczos with full reorthogonalisation, thick restart and a certificate.

One *run* is a Krylov space grown from one random vector in the complement of the pairs locked so far. A target of one
eigenvalue per end needs one run, which stops when the certificate of :mod:`dyntune.numerics.certificate` excludes any
eigenvalue beyond the tolerance. More eigenvalues per end need more: a run sees one direction of every eigenspace, so
the pairs that have settled are locked, and a fresh run in their complement either certifies that nothing was missed or
brings up what was (a second copy of a multiple eigenvalue, say). The same happens when a Krylov space comes to its end
before the certificate has said enough, as it does for a multiple of the identity.

Thick restart: Wu and Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J.
Matrix Anal. Appl. 22(2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.certificate import RitzState, level_reached, level_still_needed, log_needed, probable_bound
from dyntune.numerics.krylov import FLOOR_EPS, KrylovRun, UnitScale
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.target import Target
from dyntune.numerics.vectors import Basis, Vector

__all__ = ["LanczosResult", "lanczos"]

Array = NDArray[np.float64]
Indices = NDArray[np.int_]

# Share of the tolerance that the residuals of locked pairs may use; the rest is for what the certificate excludes.
LOCK_SHARE = 0.25
# Share of the failure probability that is set aside for runs after the first when one run is the rule.
RERUN_SHARE = 0.01
# From this size on the projected eigenproblem is solved every size/16 steps only: it costs O(size^3) on the host.
CHECK_EVERY_STEP_UP_TO = 32


@dataclass(frozen=True)
class LanczosResult:
    """Outcome of :func:`lanczos`; arrays are ordered as the target orders them.

    Args:
        values: Eigenvalue estimates, shape (k,).
        low: Lower ends of the brackets, shape (k,).
        high: Upper ends of the brackets, shape (k,).
        residuals: ``||A v - value v||`` as the recurrence gives it, shape (k,).
        converged_each: Which values are certified to the tolerance, shape (k,).
        vectors: One unit vector per value.
        num_products: Products spent.
        asymmetry: Largest relative violation of symmetry seen in the recurrence (rounding level when healthy).
    """

    values: Array
    low: Array
    high: Array
    residuals: Array
    converged_each: NDArray[np.bool_]
    vectors: list[Vector]
    num_products: int
    asymmetry: float


@dataclass
class _Locked:
    """Pairs that have settled; their vectors are the first rows of the basis."""

    values: Array = field(default_factory=lambda: np.zeros(0))
    residuals: Array = field(default_factory=lambda: np.zeros(0))  # towards everything that was not locked before
    leaks: Array = field(default_factory=lambda: np.zeros(0))  # the part of the residual towards what was

    def __len__(self) -> int:
        return len(self.values)

    @property
    def coupling(self) -> float:
        """Bound on the spectral norm of what links the locked space to its complement."""
        return float(np.linalg.norm(self.residuals))

    @property
    def full_residuals(self) -> Array:
        """The whole residuals."""
        return np.hypot(self.residuals, self.leaks)


def lanczos(
    operator: LinearOperator,
    *,
    target: Target,
    rtol: float,
    failure_probability: float,
    max_products: int,
    basis_size: int,
    start: Sequence[torch.Tensor] | None,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> LanczosResult:
    """Extreme eigenvalues of `operator`, certified.

    Args:
        operator: A symmetric operator.
        target: Which eigenvalues.
        rtol: Wanted accuracy of every value relative to itself; never finer than ``8 eps ||A||``.
        failure_probability: Bound on the probability, over the random start, that a value reported as converged is off
            by more than the tolerance.
        max_products: Budget.
        basis_size: Rows of the basis; memory is ``basis_size + 1`` vectors.
        start: Direction to begin with; an equal share of a random direction is mixed in.
        seed: Stream of the random directions.
        progress: Called with (products so far, leading value) whenever the projected problem is solved.

    Returns:
        The pairs, their brackets, and what is certified.
    """
    with plain_arithmetic(operator.device):
        solver = _Solver(operator, target, rtol, failure_probability, basis_size, seed)
        with operator.session() as product:
            unit = UnitScale(product, operator.space)
            shown = None if progress is None else lambda spent, value: progress(spent, value / unit.factor)
            return _in_units_of(solver.solve(unit, max_products, start, shown), unit.factor)


def _in_units_of(result: LanczosResult, factor: float) -> LanczosResult:
    """The result for the operator itself, from that for the operator times `factor`."""
    scaled = {name: getattr(result, name) / factor for name in ("values", "low", "high", "residuals")}
    return replace(result, **scaled)


class _Solver:
    """The loop over runs; see the module's docstring."""

    def __init__(
        self, operator: LinearOperator, target: Target, rtol: float, failure: float, basis_size: int, seed: int
    ) -> None:
        self.space = operator.space
        self.target = target
        self.rtol = rtol
        self.failure = failure
        self.seed = seed
        self.eps = torch.finfo(operator.dtype).eps
        self.basis = Basis(operator.space, basis_size + 1)
        self.locked = _Locked()
        self.run = KrylovRun(self.basis, 0, scale=0.0)
        self.runs = 0
        self.share = 1.0
        self.needed = {True: 0.0, False: 0.0}
        self.reached: dict[bool, list[float]] = {True: [], False: []}
        self.scale = 0.0
        self.asymmetry = 0.0
        self.products = 0

    # -- starting a run ------------------------------------------------------------------------------------------

    def _begin(self, start: Sequence[torch.Tensor] | None) -> None:
        """Load a fresh direction orthogonal to the locked vectors as the first row of a new run."""
        self.runs += 1
        row = len(self.locked)
        share = 1.0
        vector = self.space.normal(self.seed, self.runs)
        if start is not None and (length := self.space.norm(start)) > 0:
            share = 0.5
            torch._foreach_div_(vector, self.space.norm(vector))
            torch._foreach_add_(vector, list(start), alpha=1 / length)
        self.basis.load(row, vector)
        self.basis.orthogonalise(row, row)
        self.basis.scale(row, self.basis.norm(row).reciprocal())
        self.run = KrylovRun(self.basis, row, scale=self.scale)
        # A union bound over runs. With several eigenvalues per end each run takes half of what is left; with one, later
        # runs are rare (see the module's docstring) and share a hundredth, so that the first loses nothing.
        repeats = self.runs - 1
        if self.target.simple:
            failure = self.failure * (1 - RERUN_SHARE if repeats == 0 else RERUN_SHARE * 0.5**repeats)
        else:
            failure = self.failure * 0.5**self.runs
        self.share = share
        self.needed = {
            upper: log_needed(
                self.space.numel - row, level_still_needed(failure / self.target.ends, levels), random_share=share
            )
            for upper, levels in self.reached.items()
        }

    # -- judging the present state -------------------------------------------------------------------------------

    def tolerance(self, values: Array) -> Array:
        return np.maximum(self.rtol * np.abs(values), FLOOR_EPS * self.eps * self.scale)

    def _excluded(self, ritz: RitzState, bounds: tuple[float | None, float | None]) -> bool:
        """Whether the certificate rules out eigenvalues of the complement beyond the bounds (lower, upper)."""
        lower, upper = bounds
        track, needed = self.run.track, self.needed
        if upper is not None and not (ritz.values[-1] <= upper and track.log_christoffel(ritz, upper) >= needed[True]):
            return False
        return lower is None or (ritz.values[0] >= lower and track.log_christoffel(ritz, lower) >= needed[False])

    def _bounds(self, values: Array) -> tuple[float | None, float | None]:
        """Where the complement must have no eigenvalue for `values` to be right."""
        return self.target.bounds(values, self.tolerance(values) - self.locked.coupling)

    def _certified(self, ritz: RitzState) -> bool:
        if self.target.simple and not len(self.locked):
            chosen = ritz.values[self.target.choose(ritz.values)]
            return self._excluded(ritz, self._bounds(chosen))
        if len(self.locked) < self.target.count:
            return False
        return self._excluded(ritz, self._bounds(self.locked.values))

    def _to_lock(self, ritz: RitzState) -> Indices:
        """Indices of settled Ritz pairs that belong to the answer and are not in it yet; empty to go on."""
        none = np.zeros(0, dtype=int)
        known = len(self.locked)
        if self.target.simple and not known and self.run.beta > 0:
            return none  # one run is enough: no pair has to settle
        together = np.concatenate([self.locked.values, ritz.values])
        chosen = self.target.choose(together)
        new = np.unique(chosen[chosen >= known]) - known
        if known >= self.target.count:
            lower, upper = self._bounds(self.locked.values)
            values = ritz.values[new]
            beyond = np.zeros(len(new), dtype=bool)
            if upper is not None:
                beyond |= values > upper
            if lower is not None:
                beyond |= values < lower
            new = new[beyond]
        enough = known + len(ritz.values) >= self.target.count or self.run.beta == 0.0
        if not len(new) or not enough:
            return none
        # Residuals loosen every bound, so the finest tolerance counts; shares like 1 / sqrt(run) add up slowly.
        permitted = LOCK_SHARE / math.sqrt(self.runs) * self.tolerance(together[chosen]).min()
        return new if np.linalg.norm(ritz.residuals[new]) <= permitted else none

    # -- the loop ------------------------------------------------------------------------------------------------

    def solve(
        self,
        product: Product,
        max_products: int,
        start: Sequence[torch.Tensor] | None,
        progress: Callable[[int, float], None] | None,
    ) -> LanczosResult:
        self._begin(start)
        while True:
            run = self.run
            run.step(product, self.eps)
            self.products += 1
            self.scale = max(self.scale, run.scale)
            self.asymmetry = max(self.asymmetry, run.asymmetry)
            out_of_budget = self.products >= max_products
            invariant = run.beta == 0.0
            due = run.size <= CHECK_EVERY_STEP_UP_TO or run.size % (run.size // 16) == 0
            if not (due or run.full or out_of_budget or invariant):
                continue
            ritz = run.ritz()
            self.scale = max(self.scale, float(np.abs(ritz.values).max()))
            if progress is not None:
                progress(self.products, self._leading(ritz))
            if self._certified(ritz):
                return self._result(ritz, certified=True)
            new = self._to_lock(ritz)
            if len(self.locked) + len(new) == self.space.numel:
                self._lock(ritz, new)
                return self._result(None, certified=True)
            if out_of_budget:
                return self._result(ritz, certified=False)
            if len(new):
                self._lock(ritz, new)
            if invariant:
                self._remember(ritz)
            if len(new) or invariant:
                self._begin(None)
            elif run.full:
                run.restart(ritz, self._keep(ritz))

    def _remember(self, ritz: RitzState) -> None:
        """Note how surely this run, which cannot go on, has excluded an eigenvalue that would change the answer."""
        if len(self.locked) < self.target.count:
            return
        lower, upper = self._bounds(self.locked.values)
        dimension = self.space.numel - self.run.first
        for end, bound in ((True, upper), (False, lower)):
            if bound is not None and (ritz.values[-1] <= bound if end else ritz.values[0] >= bound):
                found = self.run.track.log_christoffel(ritz, bound)
                self.reached[end].append(level_reached(dimension, found, random_share=self.share))

    def _leading(self, ritz: RitzState) -> float:
        values = np.concatenate([self.locked.values, ritz.values])
        return float(values[self.target.choose(values)[0]])

    def _keep(self, ritz: RitzState) -> Indices:
        """Indices to keep at a restart: half the rows or all wanted pairs, from the ends that the target looks at."""
        size = self.run.size
        wanted = self.target.count - len(self.locked)
        room = max(1, size // 2, min(wanted + 2, size - 3))
        if self.target.magnitude:  # the wanted ones may all lie at one end
            return np.sort(np.argsort(-np.abs(ritz.values), kind="stable")[:room])
        order = np.arange(size)
        upper, lower = self.target.looks_at
        if upper and lower:
            return np.concatenate([order[: room // 2], order[len(order) - (room - room // 2) :]])
        return order[len(order) - room :] if upper else order[:room]

    def _lock(self, ritz: RitzState, new: Indices) -> None:
        """Move settled Ritz vectors to the front of the basis; drop locked pairs that the answer no longer needs."""
        known = len(self.locked)
        self.basis.rotate(known, self.run.size, torch.from_numpy(np.ascontiguousarray(ritz.vectors[:, new])))
        values = np.concatenate([self.locked.values, ritz.values[new]])
        residuals = np.concatenate([self.locked.residuals, ritz.residuals[new]])
        leaks = np.concatenate([self.locked.leaks, self.run.leaks(ritz, new)])
        keep = np.unique(self.target.choose(values))
        for target, source in enumerate(keep):
            if source != target:
                self.basis.move(int(source), target)
        if len(keep) < len(values):  # what is given up lies in the complement from now on, where residuals count
            residuals, leaks = np.hypot(residuals, leaks), np.zeros_like(leaks)
        self.locked = _Locked(values[keep], residuals[keep], leaks[keep])
        self.reached = {True: [], False: []}

    # -- the answer ----------------------------------------------------------------------------------------------

    def _result(self, ritz: RitzState | None, *, certified: bool) -> LanczosResult:
        known = len(self.locked)
        values, residuals = self.locked.values, self.locked.full_residuals
        if ritz is not None:
            values = np.concatenate([values, ritz.values])
            leaks = self.run.leaks(ritz, np.arange(len(ritz.values)))
            residuals = np.concatenate([residuals, np.hypot(ritz.residuals, leaks)])
        if certified and known >= self.target.count:
            chosen = self.target.choose(self.locked.values)
        else:
            chosen = self.target.choose(values)
        fresh = [int(c) - known for c in chosen if c >= known]
        if fresh and ritz is not None:
            self.basis.rotate(known, self.run.size, torch.from_numpy(np.ascontiguousarray(ritz.vectors[:, fresh])))
        rows = [int(c) if c < known else known + fresh.index(int(c) - known) for c in chosen]
        low, high = self._brackets(ritz, values[chosen])
        tolerance = self.tolerance(values[chosen])
        within = (high - values[chosen] <= tolerance) & (values[chosen] - low <= tolerance)
        return LanczosResult(
            values=values[chosen],
            low=low,
            high=high,
            residuals=residuals[chosen],
            converged_each=(within | certified) & (self.asymmetry * self.scale <= tolerance),
            vectors=self.basis.release(rows),
            num_products=self.products,
            asymmetry=self.asymmetry,
        )

    def _brackets(self, ritz: RitzState | None, values: Array) -> tuple[Array, Array]:
        """What is known of each value: Ritz values bound from inside, the certificate from outside."""
        inner = self.locked.coupling + FLOOR_EPS * self.eps * self.scale
        top, bottom = self._outside(ritz, upper=True), self._outside(ritz, upper=False)
        is_upper = self.target.is_upper(values)
        if self.target.magnitude:
            top = max(top, -bottom)
            bottom = -top
        high = np.where(is_upper, np.maximum(values, top), values) + inner
        low = np.where(is_upper, values, np.minimum(values, bottom)) - inner
        return low, high

    def _outside(self, ritz: RitzState | None, *, upper: bool) -> float:
        """The point beyond which the complement of the locked pairs has no eigenvalue."""
        looks_up, looks_down = self.target.looks_at
        if ritz is None or not (looks_up if upper else looks_down):
            return -math.inf if upper else math.inf  # nothing is left, or nobody asks
        found = probable_bound(self.run.track, ritz, needed=self.needed[upper], upper=upper)
        if not self.reached[upper]:
            return found
        # Earlier runs have vouched for what lies beyond these bounds only.
        lower_bound, upper_bound = self._bounds(self.locked.values)
        bound = upper_bound if upper else lower_bound
        assert bound is not None
        return max(found, bound) if upper else min(found, bound)
