r"""A bank of running averages of squared gradients, each asked to predict the next one.

Adam divides by :math:`\sqrt{\hat v}`, where v is a running average of :math:`g^2` with factor beta2. How well a beta2
follows the scale of the gradients is how well the average of the steps before predicts the next square. Per coordinate
and step the score is (lower is better)

.. math:: Q(\beta) = \log \tilde v + g_t^2 / \tilde v, \qquad
          \tilde v = v_{t-1} / (1 - \beta^{t-1}) + 10^{-3} \, \overline{g^2}_{t-1}

whose expectation is lowest where :math:`\tilde v` is the variance of :math:`g_t`, whatever its distribution (QLIKE:
Patton 2011, J. Econometrics 160). The second term is a floor relative to the coordinate's own mean so far: without one,
runs of exact zeros, which ReLU makes, let v vanish and the next gradient's score explode. Coordinates that are zero in
half of the first steps or more are counted apart: between hits their v measures how long ago the last one was.

What predicts best is not what trains best: on a small network 0.98 to 0.99 predicted best while 0.9999 trained best.

The same prediction says how *stale* each average would be, tensor by tensor:

.. math:: \mathrm{RMS}_t(\beta) = \sqrt{\mathrm{mean}_i \; g_{t,i}^2 / \tilde v_i}

over the scored coordinates of one tensor (Wortsman et al. 2023, arXiv:2304.13013, with the average of the steps
*before*: theirs, and what a :class:`~dyntune.Monitor` records, has g_t in it and cannot exceed
:math:`1 / \sqrt{1 - \beta}`). Counted is how often it exceeds :data:`STALE`. That is evidence, not a bound: neither the
threshold nor a share that would be too much has been calibrated, and on a small network 0.1% of steps, a share that was
proposed, excluded the values with the lowest loss (0.99 with 0.15% and 0.9999 with 0.33%).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError

__all__ = ["BETAS", "STALE", "EMABank", "Table"]

Floats: TypeAlias = npt.NDArray[np.float64]

# Evenly spaced in log(beta / (1 - beta)), 13 from 0.8 to 0.9999: neighbours differ by a factor 1.7 to 1.9 in memory.
# The loss of tracking grows with (r + 1 / r) / 2 at r times the best memory: by 5% half-way between two of them.
BETAS: tuple[float, ...] = tuple(
    round(float(1 / (1 + np.exp(-x))), 12) for x in np.linspace(np.log(4), np.log(9999), 13)
)
# Staleness above which Wortsman et al. (2023), arXiv:2304.13013, saw spikes of the loss follow in CLIP training;
# whether it is the right one elsewhere was not measured.
STALE = 2.3
# Share of a coordinate's own mean square that is added to its running average.
FLOOR = 1e-3
# Steps that only fill the averages, and tell dense coordinates from others: a coordinate that is hit in 30% of
# steps shows more than 16 hits in 32 in 0.5% of draws (binomial).
BURN_IN = 32
DENSE = 0.5
# Bins of time in which sums are kept; when they are full, neighbours are joined. 128 at least after the first joining:
# two and a half per tau in a series of 50 tau.
MAX_BINS = 256
LEVELS = 20  # means over 2^0 ... 2^19 steps, half a million
PROBE = 0.9  # the average that gives the kurtosis its scale: short, since it only has to be of the right size


class Table:
    """Sums over bins of consecutive steps; neighbours are joined when there are :data:`MAX_BINS`.

    Args:
        shape: Of what is summed.
    """

    def __init__(self, *shape: int) -> None:
        self._sums = np.zeros((MAX_BINS, *shape))
        self._width = 2  # an odd and an even step
        self._steps = 0

    def add(self, values: Floats) -> None:
        """Take one step's values."""
        place = self._steps // self._width
        if place == MAX_BINS:
            self._sums[: MAX_BINS // 2] = self._sums[::2] + self._sums[1::2]
            self._sums[MAX_BINS // 2 :] = 0.0
            self._width *= 2
            place //= 2
        self._sums[place] += values
        self._steps += 1

    @property
    def width(self) -> int:
        """Steps in a bin."""
        return self._width

    @property
    def bins(self) -> Floats:
        """Sums of the bins that are complete. Shape (bins, ...)."""
        return self._sums[: self._steps // self._width]


class EMABank:
    """Scores of many beta2 on a stream of gradients of the same coordinates.

    Args:
        size: Coordinates.
        betas: Factors to compare, ascending, in (0, 1); three at least.
        tensors: How many coordinates each tensor has, in their order; None for all of one. Staleness is of a tensor.

    Raises:
        InvalidArgumentError: No coordinate, betas that are not ascending in (0, 1), or a tensor of negative size.
        ShapeMismatchError: Tensors that do not add up to the coordinates.

    Cost: per step and coordinate one logarithm and some ten operations per beta; memory for coordinates x (betas + 512
    bins) numbers, whatever the number of steps.

    Example:
        >>> bank = EMABank(4)
        >>> rng = np.random.default_rng(0)
        >>> for _ in range(100):
        ...     bank.update(rng.standard_normal(4))
        >>> bank.steps, bank.dense.tolist()
        (100, [True, True, True, True])
    """

    def __init__(self, size: int, *, betas: tuple[float, ...] = BETAS, tensors: Sequence[int] | None = None) -> None:
        grid = np.asarray(betas, dtype=np.float64)
        if size < 1:
            raise InvalidArgumentError(f"size={size}: a bank follows one coordinate at least.")
        if len(grid) < 3 or not (np.diff(grid) > 0).all() or grid[0] <= 0 or grid[-1] >= 1:
            raise InvalidArgumentError(f"betas={betas}: three or more ascending factors between 0 and 1 are compared.")
        sizes = np.asarray([size] if tensors is None else tensors, dtype=np.int64)
        if (sizes < 0).any():
            raise InvalidArgumentError(f"tensors={sizes.tolist()}: a tensor has no negative number of coordinates.")
        if sizes.sum() != size:
            raise ShapeMismatchError(
                f"tensors={sizes.tolist()} add up to {sizes.sum()} coordinates, the bank follows {size}."
            )
        self.betas = tuple(float(b) for b in grid)
        self.steps = 0
        self.hits = np.zeros(size, dtype=np.int64)
        self.dense = np.ones(size, dtype=bool)  # after the burn-in: those that are scored
        self.scores = Table(len(grid))
        self.stale = Table(len(grid))  # tensors whose staleness is above STALE
        self.tensors = 0  # after the burn-in: those with a scored coordinate
        # Per step: numerator and denominator of the kurtosis; then for each length of mean the sum of squared
        # differences of neighbours, and how many there were.
        self.moments = Table(2 + 2 * LEVELS)
        self.logs: Table | None = None  # (bins, 2, dense): odd and even steps of log g^2
        self._owner = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.zeros(0, dtype=np.int64)  # first scored coordinate of each tensor
        self._limits: Floats = np.zeros(0)  # sum of g^2 / v beyond which it is stale
        self._grid = grid[:, None]
        self._powers = np.ones_like(self._grid)  # beta^t
        self._averages = np.zeros((len(grid), size))
        self._sum = np.zeros(size)
        self._probe = int(np.argmin(np.abs(grid - PROBE)))
        self._last: tuple[Floats, Floats] | None = None  # the step before: squares, and what had been predicted
        self._means: list[Floats | None] = [None] * LEVELS
        self._counts = [0] * LEVELS

    def update(self, gradient: npt.ArrayLike) -> None:
        """Score one step's gradient, then learn from it.

        Args:
            gradient: Shape (size,), of the same coordinates at every step.

        Raises:
            ShapeMismatchError: Another number of coordinates.
            NonFiniteError: NaN or infinite.
        """
        g = np.asarray(gradient, dtype=np.float64)
        if g.shape != self.hits.shape:
            raise ShapeMismatchError(f"a gradient of shape {g.shape} for a bank of {self.hits.shape[0]} coordinates.")
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            squares = g * g
        if not np.isfinite(squares).all():
            raise NonFiniteError(
                f"step {self.steps}: {int((~np.isfinite(squares)).sum())} sampled entries of the gradient are NaN, "
                "infinite or overflow when squared: no average of them is a scale."
            )
        self.hits += squares > 0
        if self.steps == BURN_IN:
            self._keep_dense()
        scored = squares[self.dense] if self.steps >= BURN_IN else squares
        if self.steps >= BURN_IN and len(scored):
            self._score(scored)
        self._averages += (1 - self._grid) * (scored - self._averages)
        self._powers *= self._grid
        self._sum += scored
        self.steps += 1

    def _keep_dense(self) -> None:
        self.dense = self.hits > DENSE * BURN_IN
        self._averages = self._averages[:, self.dense]
        self._sum = self._sum[self.dense]
        self.logs = Table(2, int(self.dense.sum()))
        _, self._starts, counts = np.unique(self._owner[self.dense], return_index=True, return_counts=True)
        self._limits = STALE**2 * counts.astype(np.float64)
        self.tensors = len(counts)

    def _score(self, squares: Floats) -> None:
        floor = FLOOR * self._sum / self.steps
        predicted = self._averages / (1 - self._powers) + floor
        ratios = squares / predicted
        self.scores.add((np.log(predicted) + ratios).mean(axis=1))
        self.stale.add((np.add.reduceat(ratios, self._starts, axis=1) > self._limits).sum(axis=1, dtype=np.float64))
        moments = np.zeros(2 + 2 * LEVELS)
        if self._last is not None:
            # The scale is from before both steps, so that it is independent of the noise in either.
            before, scale = self._last
            one, two = before / scale, squares / scale
            moments[:2] = ((one * one + two * two) / 2).mean(), (one * two).mean()
        self._last = squares, predicted[self._probe]
        logs = np.log(squares + floor)
        self._differences(logs, moments[2:])
        self.moments.add(moments)
        assert self.logs is not None
        parts = np.zeros((2, len(logs)))
        parts[self.steps % 2] = logs
        self.logs.add(parts)

    def _differences(self, mean: Floats, found: Floats) -> None:
        """Half the mean squared difference of neighbouring means over 1, 2, 4, ... steps, where one is complete."""
        for level in range(LEVELS):
            last = self._means[level]
            self._means[level] = mean
            self._counts[level] += 1
            if last is not None:
                found[level] = ((mean - last) ** 2).mean() / 2
                found[LEVELS + level] = 1.0
            if last is None or self._counts[level] % 2:
                break
            mean = (last + mean) / 2
