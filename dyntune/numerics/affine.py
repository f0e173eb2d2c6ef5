r"""Extreme eigenvalues of :math:`H(\alpha) = A + \alpha B` for every alpha at once, with brackets.

The largest eigenvalue is convex in alpha, the smallest concave. One orthonormal basis V holds all directions that were
ever multiplied, and A V and B V are kept apart, so that at any alpha

* the Ritz values of :math:`V^T A V + \alpha V^T B V` bound the largest eigenvalue from below, and the smallest from
  above, without another product;
* a chord between two alphas at which an upper bound is known bounds it from above.

Upper bounds come from Lanczos runs from random starts at some alphas, the *nodes* (what no residual can give: see
:mod:`dyntune.numerics.certificate`); every vector of a run enters the joint basis. New nodes go where the bracket is
widest. Weyl's inequality adds :math:`\lambda_{max}(A) + \alpha \lambda_{max}(B)`, of which the first is the node at
zero.

Source of the reuse: the successive constraint method of Huynh et al. (2007), C. R. Acad. Sci. Paris 345, in one
dimension; Hellmann and Feynman for the slope :math:`d\lambda / d\alpha = v^T B v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.certificate import PolynomialTrack, RitzState, log_needed, probable_bound
from dyntune.numerics.krylov import NON_FINITE_PRODUCT
from dyntune.numerics.operator import LinearOperator
from dyntune.numerics.random import normal_like
from dyntune.numerics.vectors import VectorSpace

__all__ = ["AffineFamily", "AffineSpectrum", "AffineValue", "End", "OperatorPair", "affine_spectrum"]

Array: TypeAlias = NDArray[np.float64]
End: TypeAlias = Literal["largest", "smallest"]
PairProduct: TypeAlias = Callable[[Sequence[torch.Tensor]], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]

# A direction whose part outside the joint basis is below this share of it is taken to lie inside: its product is then
# wrong by as much, relative to the norm of the operator.
INSIDE = 1e-5
GAP = 0.1  # of an end: the distance to the next eigenvalue at which residuals give the wanted accuracy
LEAST_END = 0.02  # of the larger end: an end nearer to zero is measured as finely as if it were there
# A Ritz pair may settle on the second eigenvalue, residual and all, while the first, close by, is still hidden. Where
# the pair behind it is that close it has to settle, too, which brings the first up: of 80 random pairs without a gap
# (n = 200) 5 had a wrong end without this and none with it, for 30% more products on those.
NEIGHBOURS = 1
KEPT = 64  # projected problems whose solutions are kept
LEAST_STEPS, MOST_STEPS = 8, 60  # of a node's Lanczos run
FAILURE_PROBABILITY = 1e-3  # of each upper bound: it is the start vector's, as in dyntune.eigenvalues


class AffineFamily:
    """``A + alpha B``: products of both with one vector.

    Args:
        space: Where vectors live; of one process.
        session: Opens the family for products ``v -> (A v, B v)``.
    """

    def __init__(self, space: VectorSpace, session: Callable[[], AbstractContextManager[PairProduct]]) -> None:
        if space.spread is not None:
            raise InvalidArgumentError(
                "the operators' vectors are spread over processes: a family is measured in one. Use an unsharded copy."
            )
        self.space, self.session = space, session


class OperatorPair(AffineFamily):
    """The family of any two operators on the same vectors.

    Args:
        first: A.
        second: B.

    Raises:
        ShapeMismatchError: They act on different vectors.
    """

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        if first.space.shapes != second.space.shapes:
            raise ShapeMismatchError(
                f"A acts on {first.space.numel} entries in {len(first.space.shapes)} tensors, B on "
                f"{second.space.numel} in {len(second.space.shapes)}: only operators on the same vectors add up."
            )
        self._first, self._second = first, second
        super().__init__(first.space, self._open)

    @contextmanager
    def _open(self) -> Iterator[PairProduct]:
        with ExitStack() as stack:
            a, b = (stack.enter_context(op.session()) for op in (self._first, self._second))

            def product(vector: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
                return [t.clone() for t in a(vector)], list(b(vector))

            yield product


@dataclass(frozen=True)
class AffineValue:
    """An extreme eigenvalue at one alpha.

    Args:
        alpha: Where.
        value: The Ritz value: a bound from inside, and the estimate.
        low: Lower end of the bracket.
        high: Upper end of the bracket.
        slope: How it changes with alpha, ``v^T B v``.
        residual: ``||H v - value v||``: some eigenvalue is so near.
    """

    alpha: float
    value: float
    low: float
    high: float
    slope: float
    residual: float


@dataclass
class _Joint:
    """Directions that were multiplied, and their products; one row each."""

    rows: int
    numel: int
    dtype: torch.dtype
    device: torch.device
    size: int = 0
    basis: torch.Tensor = field(init=False)
    a: torch.Tensor = field(init=False)
    b: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        empty = torch.empty(3, self.rows, self.numel, dtype=self.dtype, device=self.device)
        self.basis, self.a, self.b = empty
        self.inner = np.zeros((2, self.rows, self.rows))  # V^T A V, V^T B V
        self.squares = np.zeros((3, self.rows, self.rows))  # (AV)^T AV, (AV)^T BV, (BV)^T BV
        self._solved: dict[float, tuple[Array, Array]] = {}  # alpha -> Ritz values and coefficients

    def outside(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients in the basis, and what lies outside of it."""
        rows = self.basis[: self.size]
        coefficients = rows @ vector
        rest = vector - rows.T @ coefficients
        again = rows @ rest  # once more: the first pass leaves rounding of the size of what it took away
        return coefficients + again, rest - rows.T @ again

    def add(self, unit: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take in a direction orthogonal to all others, of length one, with its products."""
        i = self.size
        self.basis[i], self.a[i], self.b[i] = unit, a, b
        self.size = n = i + 1
        self._solved.clear()
        wide = torch.float64
        for k, product in enumerate((a, b)):
            entries = (self.basis[:n].to(wide) @ product.to(wide)).cpu().numpy()
            self.inner[k, i, :n] = self.inner[k, :n, i] = entries
        self.squares[0, i, :n] = self.squares[0, :n, i] = (self.a[:n].to(wide) @ a.to(wide)).cpu().numpy()
        self.squares[2, i, :n] = self.squares[2, :n, i] = (self.b[:n].to(wide) @ b.to(wide)).cpu().numpy()
        self.squares[1, i, :n] = (self.b[:n].to(wide) @ a.to(wide)).cpu().numpy()
        self.squares[1, :n, i] = (self.a[:n].to(wide) @ b.to(wide)).cpu().numpy()

    def ritz(self, alpha: float, end: End, place: int = 0) -> tuple[float, Array, float]:
        """The extreme Ritz value at an alpha, or one `place` further in; its coefficients, and its residual."""
        n = self.size
        if alpha not in self._solved:
            if len(self._solved) >= KEPT:  # of a spectrum that is asked for many alphas
                self._solved.clear()
            self._solved[alpha] = np.linalg.eigh(self.inner[0, :n, :n] + alpha * self.inner[1, :n, :n])
        values, vectors = self._solved[alpha]
        i = -1 - place if end == "largest" else place
        y, value = vectors[:, i], float(values[i])
        aa, ab, bb = (float(y @ self.squares[k, :n, :n] @ y) for k in range(3))
        return value, y, math.sqrt(max(0.0, aa + 2 * alpha * ab + alpha**2 * bb - value**2))

    def combine(self, y: Array, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A direction of the basis, and H(alpha) times it."""
        c = torch.from_numpy(np.ascontiguousarray(y)).to(self.device, self.dtype)
        n = self.size
        return self.basis[:n].T @ c, self.a[:n].T @ c + alpha * (self.b[:n].T @ c)


class AffineSpectrum:
    """Both ends of the spectrum of ``A + alpha B`` over a range of alpha.

    Made by :func:`affine_spectrum`.

    Args:
        joint: What was multiplied.
        space: Where vectors live.
        nodes: alpha -> (largest, smallest): bounds from outside.
        weyl: (largest, smallest) eigenvalue of B, bounded from outside; None where B was not measured by itself.
        range_: Alphas that it speaks of.
        num_products: Vectors that were multiplied, each with A and with B.
        failure_probability: Of all bounds together.
    """

    def __init__(
        self,
        joint: _Joint,
        space: VectorSpace,
        nodes: dict[float, tuple[float, float]],
        weyl: tuple[float, float] | None,
        range_: tuple[float, float],
        num_products: int,
        failure_probability: float,
    ) -> None:
        self._joint, self._space, self._weyl = joint, space, weyl
        self.nodes, self.range, self.num_products = dict(sorted(nodes.items())), range_, num_products
        self.failure_probability = failure_probability

    def at(self, alpha: float, end: End = "largest") -> AffineValue:
        """The extreme eigenvalue at an alpha of the range, without another product.

        Raises:
            InvalidArgumentError: alpha lies outside the range: there is no upper bound there.
        """
        low, high = self.range
        if not low <= alpha <= high:
            raise InvalidArgumentError(f"alpha={alpha}: the spectrum was measured between {low} and {high}.")
        value, y, residual = self._joint.ritz(alpha, end)
        n = self._joint.size
        slope = float(y @ self._joint.inner[1, :n, :n] @ y)
        outer = self._outer(alpha, end)
        # A bound from outside and one from inside may cross by rounding where both are sharp.
        inside, outside = (value, max(outer, value)) if end == "largest" else (value, min(outer, value))
        return AffineValue(alpha, value, min(inside, outside), max(inside, outside), slope, residual)

    def direction(self, alpha: float, end: End = "largest") -> list[torch.Tensor]:
        """The unit vector that belongs to it, in the shapes of the parameters."""
        _, y, _ = self._joint.ritz(alpha, end)
        return self._space.unflatten(self._joint.combine(y, alpha)[0])

    def _outer(self, alpha: float, end: End) -> float:
        side = 0 if end == "largest" else 1
        found = [_chord(self.nodes, alpha, side)]
        if self._weyl is not None and 0.0 in self.nodes:
            found.append(self.nodes[0.0][side] + alpha * self._weyl[side if alpha >= 0 else 1 - side])
        return min(found) if end == "largest" else max(found)


def _chord(nodes: dict[float, tuple[float, float]], alpha: float, side: int) -> float:
    ordered = sorted(nodes)
    right = next(a for a in ordered if a >= alpha)
    if right == alpha:
        return nodes[alpha][side]
    left = max(a for a in ordered if a < alpha)
    share = (alpha - left) / (right - left)
    return (1 - share) * nodes[left][side] + share * nodes[right][side]


def affine_spectrum(
    family: AffineFamily,
    *,
    alphas: tuple[float, float] = (0.0, 1.0),
    rtol: float = 5e-3,
    smallest_rtol: float = 2e-2,
    bracket_rtol: float = 0.2,
    weyl: bool = False,
    max_products: int = 120,
    grid: int = 33,
    failure_probability: float = FAILURE_PROBABILITY,
    seed: int = 0,
) -> AffineSpectrum:
    """Measure both ends of the spectrum of ``A + alpha B`` for all alpha of a range.

    Args:
        family: Such as ``PolicyObjective.family()`` or ``OperatorPair(A, B)``.
        alphas: First and last alpha, finite.
        rtol: Wanted accuracy of the largest eigenvalue relative to itself: residuals are made as small as gives it
            where the gap to the next eigenvalue is a tenth of it. An end below a fiftieth of the other is measured as
            finely as one of that size.
        smallest_rtol: The same of the smallest; it counts for less, and lies close to others more often.
        bracket_rtol: Wanted width of the brackets, relative to the larger end.
        weyl: Whether to measure B by itself, too, for Weyl's bounds; for a range that begins at zero.
        max_products: Most directions to multiply, each with A and with B; at least 16.
        grid: How many alphas are looked at to see where the bracket is widest: halfway between linear and logarithmic.
        failure_probability: Of each bound from outside, over its random start.
        seed: Of the random starts.

    Returns:
        What can be asked for any alpha of the range.

    Raises:
        InvalidArgumentError: A range that is none, or a number outside its range.
        NonFiniteError: A product is NaN or infinite.

    Accuracy:
        Against dense eigenvalues and against independent solves: ``tests/numerics/test_affine.py``. Ritz values are
        bounds from inside in exact arithmetic; bounds from outside hold with ``1 - failure_probability`` each.
    Cost:
        Two Hessian-vector products for each direction, some three dozen directions on small policies; memory of three
        vectors for each.
    Assumes:
        Both operators are symmetric and stay as they are.

    Example:
        >>> from dyntune.numerics.operator import DenseOperator
        >>> A, B = torch.diag(torch.tensor([1.0, 0.0, -1.0])), torch.diag(torch.tensor([0.0, 2.0, 0.0]))
        >>> found = affine_spectrum(OperatorPair(DenseOperator(A), DenseOperator(B)))
        >>> [round(found.at(alpha).value, 4) for alpha in (0.0, 0.25, 1.0)]
        [1.0, 1.0, 2.0]
    """
    first, last = alphas
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise InvalidArgumentError(f"alphas={alphas}: give the first and the last alpha of a range, finite.")
    shares = (rtol, smallest_rtol, bracket_rtol, failure_probability)
    if not all(0 < share < 1 for share in shares) or grid < 2 or max_products < 16:
        raise InvalidArgumentError(
            f"rtol={rtol}, smallest_rtol={smallest_rtol}, bracket_rtol={bracket_rtol} and "
            f"failure_probability={failure_probability} lie in (0, 1), grid={grid} is at least 2 and "
            f"max_products={max_products} at least 16."
        )
    if weyl and first != 0.0:
        raise InvalidArgumentError(f"weyl=True with alphas={alphas}: Weyl's bounds are those of A, at alpha = 0.")
    tolerances: dict[End, float] = {"largest": rtol, "smallest": smallest_rtol}
    solver = _Solver(family.space, tolerances, bracket_rtol, max_products, failure_probability, seed)
    looked = _looked_at(first, last, grid)
    with plain_arithmetic(family.space.device), family.session() as product:
        solver.product = product
        solver.node(first)
        solver.node(last)
        b_alone = solver.of_b() if weyl else None
        while True:
            found = AffineSpectrum(solver.joint, family.space, solver.nodes, b_alone, (first, last), solver.spent, 1.0)
            if not solver.refine(found, looked):
                break
    runs = len(solver.nodes) + (b_alone is not None)
    return AffineSpectrum(
        solver.joint,
        family.space,
        solver.nodes,
        b_alone,
        (first, last),
        solver.spent,
        min(1.0, 2 * runs * failure_probability),
    )


def _looked_at(first: float, last: float, grid: int) -> list[float]:
    """Alphas of a range, dense towards the small ones: coefficients are thought of in powers of ten."""
    shares = np.linspace(0.0, 1.0, grid)
    return [first + (last - first) * float(s) for s in (shares + shares**3) / 2]


class _Solver:
    """Grows the joint basis."""

    def __init__(
        self, space: VectorSpace, rtol: dict[End, float], bracket: float, most: int, failure: float, seed: int
    ) -> None:
        self.space, self.rtol, self.bracket, self.failure, self.seed = space, rtol, bracket, failure, seed
        rows = min(most, space.numel)
        self.joint = _Joint(rows, space.numel, space.dtype, space.device)
        self.nodes: dict[float, tuple[float, float]] = {}
        self.product: PairProduct | None = None
        self.spent = 0
        self._runs = 0

    @property
    def left(self) -> int:
        """Directions that may still be multiplied."""
        return self.joint.rows - self.joint.size

    def multiply(self, unit: torch.Tensor) -> None:
        """Take a direction of length one, orthogonal to the basis, into it."""
        assert self.product is not None
        a, b = (self._flat(x) for x in self.product(self.space.unflatten(unit)))
        self.spent += 1
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise NonFiniteError(NON_FINITE_PRODUCT)
        self.joint.add(unit, a, b)

    def _flat(self, vector: Sequence[torch.Tensor]) -> torch.Tensor:
        joined = [t.detach().reshape(-1).to(self.space.device, self.space.dtype) for t in vector]
        return torch.cat(joined)

    def random(self) -> torch.Tensor:
        """A random direction, another one at each call."""
        self._runs += 1
        shape = torch.Size([self.space.numel])
        vector = normal_like(shape, self.space.dtype, self.space.device, key=(self.seed, 7, self._runs))
        return vector / float(torch.linalg.vector_norm(vector))

    def times(self, vector: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor | None:
        """``(w_A A + w_B B)`` times a unit vector; None where that takes a product that is not left."""
        coefficients, rest = self.joint.outside(vector)
        length = float(torch.linalg.vector_norm(rest))
        if length > INSIDE:
            if not self.left:
                return None
            self.multiply(rest / length)
            coefficients = torch.cat([coefficients, torch.tensor([length]).to(coefficients)])
        n = self.joint.size
        sums: torch.Tensor = weights[0] * (self.joint.a[:n].T @ coefficients)
        sums += weights[1] * (self.joint.b[:n].T @ coefficients)
        return sums

    def node(self, alpha: float) -> None:
        """A Lanczos run at an alpha from a random start, for bounds from outside."""
        self.nodes[alpha] = self.run((1.0, alpha))

    def of_b(self) -> tuple[float, float]:
        """The same for B alone."""
        return self.run((0.0, 1.0))

    def run(self, weights: tuple[float, float]) -> tuple[float, float]:
        """Bounds from outside on the largest and the smallest eigenvalue; infinite where none was reached."""
        n = self.space.numel
        needed = log_needed(n, self.failure)
        vectors = [self.random()]
        diagonal: list[float] = []
        off: list[float] = []
        outer = math.inf, -math.inf
        for step in range(1, min(MOST_STEPS, n) + 1):
            w = self.times(vectors[-1], weights)
            if w is None:
                break
            diagonal.append(float(torch.dot(w, vectors[-1])))
            rows = torch.stack(vectors)
            for _ in range(2):
                w = w - rows.T @ (rows @ w)
            beta = float(torch.linalg.vector_norm(w))
            matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
            values, states = np.linalg.eigh(matrix)
            scale = max(float(np.abs(values).max()), math.ulp(0.0) * 1e20)
            invariant = beta <= 8 * torch.finfo(self.space.dtype).eps * scale or step == n
            ritz = RitzState(values, beta * np.abs(states[-1]), states)
            track = PolynomialTrack(log_betas=-math.inf if invariant else sum(map(math.log, [*off, beta])))
            outer = (
                probable_bound(track, ritz, needed=needed, upper=True),
                probable_bound(track, ritz, needed=needed, upper=False),
            )
            width = max(outer[0] - float(values[-1]), float(values[0]) - outer[1])
            if invariant or (step >= LEAST_STEPS and width <= self.bracket / 2 * scale):
                break
            off.append(beta)
            vectors.append(w / beta)
        return outer

    def refine(self, found: AffineSpectrum, looked: Sequence[float]) -> bool:
        """Do what helps most: a residual where a Ritz pair is poor, then a node where a bracket is wide."""
        if not self.left:
            return False
        worst = 1.0
        where: tuple[float, End, int] | None = None
        widest, gap = 0.0, None
        for alpha in looked:
            ends: dict[End, AffineValue] = {end: found.at(alpha, end) for end in self.rtol}
            scale = max(abs(e.value) for e in ends.values()) or 1.0
            for end, e in ends.items():
                # The error of a Ritz value is at most the square of its residual over the gap to the next eigenvalue.
                size = max(abs(e.value), LEAST_END * scale)
                for place, residual in enumerate(self._residuals(e, end, size)):
                    share = residual / (size * math.sqrt(self.rtol[end] * GAP))
                    if share > worst:
                        worst, where = share, (alpha, end, place)
                if (e.high - e.low) / scale > widest and alpha not in self.nodes:
                    widest, gap = (e.high - e.low) / scale, alpha
        if where is not None:
            alpha, end, place = where
            value, y, _ = self.joint.ritz(alpha, end, place)
            v, hv = self.joint.combine(y, alpha)
            _, rest = self.joint.outside(hv - value * v)
            length = float(torch.linalg.vector_norm(rest))
            if length > 0:
                self.multiply(rest / length)
                return True
        if gap is not None and widest > self.bracket and self.left >= LEAST_STEPS:
            self.node(gap)
            return True
        return False

    def _residuals(self, extreme: AffineValue, end: End, size: float) -> list[float]:
        """Of the extreme Ritz pair, and of those behind it that may turn out to be the extreme one."""
        found = [extreme.residual]
        for place in range(1, min(NEIGHBOURS + 1, self.joint.size)):
            value, _, residual = self.joint.ritz(extreme.alpha, end, place)
            if abs(value - extreme.value) > GAP * size:
                break
            found.append(residual)
        return found
