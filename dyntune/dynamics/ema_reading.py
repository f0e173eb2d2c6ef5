r"""What a bank of running averages says: which beta2 follow the gradients' scale, and whether that can be told.

Two estimates. The **best of the bank** has the lowest mean score, and those whose excess over it is within the
bootstrap's error are not told apart from it. The **local-level gain** needs no bank: where the logarithm of the
variance is a random walk of innovation variance :math:`\sigma_u^2` per step, and :math:`g^2` has a relative variance of
kappa - 1 around it (2 for normal gradients), the gain :math:`K = 1 - \beta_2` of the best average solves

.. math:: K^2 / (1 - K) = \sigma_u^2 / (\kappa - 1), \qquad K \approx \sqrt{\sigma_u^2 / (\kappa - 1)}

the square root of what "remember as long as the scale does" would give. Measured by

* kappa: :math:`E[x_t^2 w] / E[x_t x_{t-1} w]` of squares x, with a scale w of the steps before both;
* sigma_u^2: :math:`L A(L) = \mathrm{Var}(e) + \sigma_u^2 (2 L^2 + 1) / 6`, A(L) being half the mean squared difference
  of neighbouring means of :math:`\log x` over L steps, at the longest L at which drift adds at most as much as noise.

Sources: Harvey (1989), "Forecasting, structural time series models and the Kalman filter" (the gain);
Allan (1966), Proc. IEEE 54(2) (the differences); Hansen, Lunde and Nason (2011), Econometrica 79(2) (a set that holds
the best); the rest is derived here and tested on series whose answer is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dyntune.dynamics.ema_bank import BURN_IN, LEVELS, STALE, EMABank
from dyntune.dynamics.memory import memory_of
from dyntune.errors import InvalidArgumentError
from dyntune.numerics.series import TOLERANCE, WINDOW, block_bootstrap
from dyntune.records import Estimate, Status

__all__ = ["BankReading", "read_bank", "share_interval"]

Floats: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.95
NORMAL = 1.959964  # of the two-sided 95% interval
DRAWS = 400
# Fewest bins for a bootstrap of four blocks of two.
MIN_BINS = 8
# Neighbouring means that a drift is read from: 64 squares are known to within a fifth, and a draw has some of them.
MIN_DIFFERENCES = 64
# Blocks are at most an eighth of the series, so that there are eight to draw from.
MOST_BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class BankReading:
    """What :func:`read_bank` found.

    Args:
        betas: Factors that were compared.
        excess: Mean score of each above that of the best one, in nats per coordinate and step; empty if nothing was
            scored.
        margin: How far each excess may be off, at 95% for all of them at once.
        best: The factor that follows best; refused where the steps do not identify one.
        local_level: The factor 1 - K of the local-level gain; refused where `best` is.
        memory: How long the logarithm of the variance remembers, in steps; refused where it is a trend, too short, or
            constant within the noise.
        steps: Steps that were scored.
        size: Coordinates.
        dense: Share of them that is scored.
        dead: Share that was zero at every step.
        hit_rate: Mean share of steps in which the coordinates that are neither are not zero; None without any.
        stale: For each factor, the share of pairs of a step and a tensor in which the tensor's staleness would have
            been above 2.3; empty if nothing was scored. It bounds nothing: see :mod:`dyntune.dynamics.ema_bank`.
        stale_low: Lower ends of their 95% intervals, each for itself.
        stale_high: Upper ends.
        tensors: How many tensors have a scored coordinate.
    """

    betas: tuple[float, ...]
    excess: tuple[float, ...]
    margin: tuple[float, ...]
    best: Estimate
    local_level: Estimate
    memory: Estimate
    steps: int
    size: int
    dense: float
    dead: float
    hit_rate: float | None
    stale: tuple[float, ...]
    stale_low: tuple[float, ...]
    stale_high: tuple[float, ...]
    tensors: int

    def staleness(self, beta: float) -> Estimate | None:
        """How often a tensor's staleness would have been above 2.3, of the compared factor nearest to `beta`.

        Args:
            beta: In (0, 1).

        Returns:
            A share of steps and tensors, never better than UNCERTAIN since its threshold is not calibrated; None if
            nothing was scored.

        Raises:
            InvalidArgumentError: A factor outside (0, 1).

        Example:
            >>> bank = EMABank(40, tensors=[20, 20])
            >>> for row in np.random.default_rng(0).standard_normal((400, 40)):
            ...     bank.update(row)
            >>> read_bank(bank).staleness(0.999).value
            0.0
        """
        if not 0 < beta < 1:
            raise InvalidArgumentError(f"beta={beta}: the factor of a running average lies between 0 and 1.")
        if not self.stale:
            return None
        logits = np.log(np.array(self.betas)) - np.log1p(-np.array(self.betas))
        i = int(np.abs(logits - math.log(beta) + math.log1p(-beta)).argmin())
        return Estimate(
            value=self.stale[i],
            low=self.stale_low[i],
            high=self.stale_high[i],
            level=LEVEL,
            unit="1",
            method=f"share of {self.steps} steps x {self.tensors} tensors with staleness above {STALE} at "
            f"{self.betas[i]:.4g}, from the average of the steps before",
            covers="sampling",
            status=Status.UNCERTAIN,
            reason=f"neither the threshold {STALE} nor a share that is too much has been calibrated",
        )

    def within(self, tolerance: float, *, sure: bool = False) -> tuple[float, float] | None:
        """Lowest and highest factor within `tolerance` nats of the best one; None if there is none.

        Args:
            tolerance: In nats per coordinate and step.
            sure: False: those not shown to be worse than that. True: those shown not to be.

        Example:
            >>> bank = EMABank(4)
            >>> for row in np.random.default_rng(0).standard_normal((400, 4)):
            ...     bank.update(row)
            >>> read_bank(bank).within(0.1)[1]
            0.9999
        """
        side = 1.0 if sure else -1.0
        rows = zip(self.betas, self.excess, self.margin, strict=False)
        kept = [beta for beta, excess, margin in rows if excess + side * margin <= tolerance]
        return (kept[0], kept[-1]) if kept else None


def read_bank(bank: EMABank, *, seed: int = 0) -> BankReading:
    """Read a bank.

    Args:
        bank: After as many steps as there are; reading does not change it.
        seed: Of the bootstrap.

    Returns:
        Scores and, where they are identified, the best factor and the local-level one. They are refused when the
        variance does not vary beyond the noise, when its memory is (:func:`memory_of`) or may be longer than a fiftieth
        of the steps, and when an end of the bank is not told apart from its best. Shares of stale tensors have
        intervals of as many independent cases as the bootstrap's spread speaks for.

    Accuracy:
        Of 80 series of 15 000 steps of eight coordinates with a log-variance of memory 100, 40 with independent and 40
        with shared variances, 53 were identified; the best factor was within its interval in all, the local-level one
        of a series of 200 000 steps in 48 (``pytest -rP -k intervals tests/dynamics/test_ema_bank.py``). Where memory
        is short the local-level factor is that of the drift over the length it is read from, which is less than a
        random walk's: at a memory of 100 it is 0.89 where the random walk's formula says 0.87, and 0.895 is best.
        Memory comes out too long by up to two bins.
    Cost:
        400 means over at most 256 bins.
    Assumes:
        coordinates may move together (time is what is drawn again); a stretch that speaks for what follows.
    """
    size = len(bank.hits)
    dead = float((bank.hits == 0).mean())
    rare = ~bank.dense & (bank.hits > 0)
    common: dict[str, Any] = {
        "betas": bank.betas,
        "size": size,
        "dense": float(bank.dense.mean()) if bank.steps > BURN_IN else 0.0,
        "dead": dead,
        "hit_rate": float((bank.hits[rare] / bank.steps).mean()) if rare.any() else None,
        "tensors": bank.tensors,
    }
    scores, width = bank.scores.bins, bank.scores.width
    if len(scores) < MIN_BINS or bank.logs is None:
        reason = (
            f"not identified: {bank.steps} steps, of which {BURN_IN} only fill the averages, leave too few to compare"
            if bank.steps < BURN_IN + 2 * MIN_BINS
            else "not identified: every sampled coordinate is zero in most steps"
        )
        refused = _refused(reason)
        return BankReading(
            **common,
            excess=(),
            margin=(),
            best=refused,
            local_level=refused,
            memory=_refused(reason, "steps"),
            steps=0,
            stale=(),
            stale_low=(),
            stale_high=(),
        )
    memory, highest, block = _memory(bank.logs.bins, width)
    count = len(bank.betas)
    columns = np.concatenate(
        [scores / width, bank.moments.bins, bank.stale.bins / (width * max(1, bank.tensors))], axis=1
    )
    draws = block_bootstrap(columns, block=block, draws=DRAWS, seed=seed)
    means = columns.mean(axis=0)
    shares = means[-count:]
    pairs = len(scores) * width * bank.tensors
    # Eight blocks may come out alike by chance; bins that were independent would have the second spread.
    spreads = np.maximum(draws[:, -count:].std(axis=0), columns[:, -count:].std(axis=0) / math.sqrt(len(scores)))
    ends = [
        share_interval(share, pairs, spread=spread, together=bank.tensors)
        for share, spread in zip(shares.tolist(), spreads.tolist(), strict=True)
    ]
    means, draws = means[:-count], draws[:, :-count]
    first = int(means[:count].argmin())
    excess = means[:count] - means[first]
    drawn = draws[:, :count] - draws[:, first : first + 1]
    margin = _margin(drawn - excess)
    reason = _unidentified(bank.betas, excess - margin <= 0, memory, highest, len(scores) * width)
    best = _refused(reason) if reason else _best(bank.betas, excess, margin)
    local = _refused(reason) if reason else _local_level(means[count:], draws[:, count:], len(scores))
    return BankReading(
        **common,
        excess=tuple(excess.tolist()),
        margin=tuple(margin.tolist()),
        best=best,
        local_level=local,
        memory=memory,
        steps=len(scores) * width,
        stale=tuple(shares.tolist()),
        stale_low=tuple(low for low, _ in ends),
        stale_high=tuple(high for _, high in ends),
    )


def share_interval(share: float, count: int, *, spread: float = 0.0, together: float = 1.0) -> tuple[float, float]:
    """Exact 95% interval of a share of `count` cases that are not independent.

    Args:
        share: In [0, 1].
        count: Cases.
        spread: Standard error of `share` that a bootstrap over independent pieces found.
        together: Cases that may all be the same one; they count as one where `spread` is zero, as it is when all cases
            are alike.

    Returns:
        Clopper and Pearson's interval for as many independent cases as would have that spread, never more than there
        are. (Korn and Graubard 1998, Survey Methodology 24(2).)

    Raises:
        InvalidArgumentError: A share outside [0, 1], or no case.

    Example:
        >>> [round(end, 3) for end in share_interval(0.0, 100)]  # 1 - 0.025^(1/100)
        [0.0, 0.036]
        >>> share_interval(0.1, 100, spread=0.06)[1] > share_interval(0.1, 100)[1]
        True
    """
    if not 0 <= share <= 1 or count < 1:
        raise InvalidArgumentError(f"share={share} of count={count}: a share in [0, 1] of one case or more is needed.")
    cases = count / together
    if 0 < share < 1:
        cases = share * (1 - share) / spread**2 if spread > 0 else cases
    cases = min(max(cases, 1.0), float(count))
    from scipy.special import betaincinv

    hits, tail = share * cases, (1 - LEVEL) / 2
    low = float(betaincinv(hits, cases - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, cases - hits, 1 - tail)) if hits < cases else 1.0
    return min(low, share), max(high, share)


def _memory(logs: Floats, width: int) -> tuple[Estimate, float, int]:
    """Memory of log g^2 without the noise of single steps, in steps; the longest it may be; the block in bins."""
    rows = np.moveaxis(logs, 0, -1) / (width / 2)  # (2, dense, bins)
    found = memory_of(rows[0], again=rows[1])
    most = max(1, len(logs) // MOST_BLOCK)
    if found.time.value is None:
        return replace(found.time, reason=f"log g^2, in units of {width} steps: {found.time.reason}"), math.inf, most
    time = found.time
    scaled = Estimate(
        value=found.time.value * width,
        low=time.low * width,
        high=time.high * width,
        level=time.level,
        unit="steps",
        method=f"log g^2 in bins of {width} steps; {time.method}",
        covers="sampling",
    )
    return scaled, found.highest * width, min(most, math.ceil(WINDOW * found.time.value))


def _margin(deviations: Floats) -> Floats:
    """Half widths that hold for all columns at once in 95% of the draws, each a multiple of its own spread."""
    spread = deviations.std(axis=0)
    scaled = np.abs(deviations[:, spread > 0]) / spread[spread > 0]
    if not scaled.size:
        return np.zeros_like(spread)
    margin: Floats = float(np.quantile(scaled.max(axis=1), LEVEL)) * spread
    return margin


def _unidentified(
    betas: tuple[float, ...], kept: npt.NDArray[np.bool_], memory: Estimate, highest: float, steps: int
) -> str:
    """Why no factor is named; empty where one is."""
    if memory.value is None:
        return f"not identified: {memory.reason}"
    if steps < TOLERANCE * highest:  # the memory of a short series comes out short itself
        return (
            f"not identified: {steps} steps are fewer than {TOLERANCE:g} times {highest:.3g}, which the memory of the "
            f"scale may be (found: {memory.value:.3g}). Measure {math.ceil(TOLERANCE * highest)} steps or more"
        )
    if kept[-1]:
        return f"not identified: {betas[-1]:.4f}, the longest memory compared, is not told apart from the best"
    if kept[0]:
        return f"not identified: {betas[0]:.4f}, the shortest memory compared, is not told apart from the best"
    return ""


def _best(betas: tuple[float, ...], excess: Floats, margin: Floats) -> Estimate:
    """Minimum of the parabola through the lowest score and its neighbours, over log(beta / (1 - beta))."""
    logits = np.log(np.array(betas)) - np.log1p(-np.array(betas))
    i = int(excess.argmin())  # not an end: ends are told apart from it
    where, values = logits[i - 1 : i + 2], excess[i - 1 : i + 2]
    square, slope, _ = np.polyfit(where - where[1], values, 2)
    vertex = float(where[1] + np.clip(-slope / (2 * square), (where[0] - where[1]) / 2, (where[2] - where[1]) / 2))
    kept = np.flatnonzero(excess - margin <= 0)
    # What is told apart lies beyond the middle between two factors.
    low = float(logits[kept[0]] + logits[kept[0] - 1]) / 2
    high = float(logits[kept[-1]] + logits[kept[-1] + 1]) / 2
    return Estimate(
        value=_beta(vertex),
        low=_beta(low),
        high=_beta(high),
        level=LEVEL,
        unit="beta2",
        method="lowest one-step-ahead score of a bank of averages, block bootstrap over time",
        covers="sampling",
    )


def _beta(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _local_level(means: Floats, draws: Floats, bins: int) -> Estimate:
    level = _crossing(means, bins)
    gain = float(_gain(means[None], level)[0])
    if not 0 < gain < 1:
        return _refused("not identified: differences of log g^2 show no drift beyond the noise")
    logs = np.log(np.maximum(_gain(draws, level), np.finfo(float).tiny))
    error = float(logs.std())
    if error > 1:  # beyond a factor e the normal interval of a logarithm says nothing
        return _refused("not identified: the drift of log g^2 is known to no better than a factor e")
    factor = math.exp(NORMAL * error)
    return Estimate(
        value=1 - gain,
        low=max(0.0, 1 - gain * factor),
        high=1 - gain / factor,
        level=LEVEL,
        unit="beta2",
        method=f"local-level gain {gain:.3g}, relative standard error {error:.2g}, drift over {2**level} steps; the "
        "interval is of that gain, and the best factor may lie outside",
        covers="sampling",
    )


def _curve(moments: Floats) -> Floats:
    """L A(L) of every length of mean; NaN where there was no difference. Shape (..., levels)."""
    sums, counts = moments[..., 2 : 2 + LEVELS], moments[..., 2 + LEVELS :]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = sums / counts * 2.0 ** np.arange(LEVELS)
    return found


def _crossing(moments: Floats, bins: int) -> int:
    """The longest mean up to which drift adds at most as much as the noise of single steps; one doubling at least."""
    curve = _curve(moments)
    enough = bins * moments[2 + LEVELS :] >= MIN_DIFFERENCES
    beyond = np.flatnonzero(~(enough & (curve <= 2 * curve[0])))
    return max(1, int(beyond[0]) - 1 if len(beyond) else LEVELS - 1)


def _gain(moments: Floats, level: int) -> Floats:
    """K of each row: K^2 / (1 - K) = sigma_u^2 / (kappa - 1); NaN or zero where there is no drift."""
    curve, length = _curve(moments), 2.0**level
    drift = (curve[:, level] - curve[:, 0]) / ((2 * length**2 + 1) / 6 - 0.5)
    relative = moments[:, 0] / moments[:, 1] - 1
    ratio = np.maximum(drift, 0.0) / np.maximum(relative, np.finfo(float).eps)
    gain: Floats = (np.sqrt(ratio * ratio + 4 * ratio) - ratio) / 2
    return gain


def _refused(reason: str, unit: str = "beta2") -> Estimate:
    return Estimate.refused(reason, unit=unit, method="bank of running averages")
