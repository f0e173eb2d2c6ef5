r"""How many rows of a batch can be kept so that as many clean ones exist: the rule behind :func:`suggest_keep_rate`.

Of n independent rows with noise rate eps, the clean ones are :math:`C \sim Bin(n, 1 - \epsilon)`. The usual keep rate,
:math:`1 - \epsilon`, asks for more clean rows than there are in almost half of all batches, however well losses rank
them. The largest k with :math:`P(C < k) \le \delta` is a quantile; Hoeffding's bound

.. math:: P(C/n \le 1 - \epsilon - t) \le e^{-2 n t^2}

gives the smaller :math:`k = \lfloor n (1 - \epsilon - \sqrt{\ln(1/\delta) / 2n}) \rfloor`, which holds for draws
without replacement, too (Hoeffding, 1963, theorem 4). A noise rate that was estimated from m audited labels is replaced
by its upper limit at half of delta; the batches share the other half between them.

Sources: Hoeffding (1963); Clopper, Pearson (1934); Han et al. (2018), arXiv:1804.06872 (co-teaching).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dyntune.errors import InvalidArgumentError
from dyntune.records import Recommendation, Status

__all__ = ["Bound", "KeepEvidence", "binomial_keep", "hoeffding_keep", "keep_rate_rule", "noise_limit"]

Bound: TypeAlias = Literal["binomial", "hoeffding"]
SOURCES = (
    "Hoeffding (1963), theorems 1 and 4",
    "Clopper, Pearson (1934) (limit of a share from a count)",
    "Han et al. (2018), arXiv:1804.06872 (co-teaching)",
)


@dataclass(frozen=True, kw_only=True)
class KeepEvidence:
    """What is known of the noise.

    Args:
        batch_size: Rows of a batch, n.
        noise_rate: Estimate of the share of wrong labels.
        limit: Its upper limit, with failure probability `spent`; the estimate itself where it is known.
        spent: Part of delta that the limit took.
        delta: Failure probability in all, over all batches.
        num_batches: Batches over which it is to hold.
        bound: Which.
        source: Where the noise rate comes from, in words.
        notes: What else is to be said.
        doubts: Why the status is not OK; empty otherwise.
    """

    batch_size: int
    noise_rate: float
    limit: float
    spent: float
    delta: float
    num_batches: int
    bound: Bound
    source: str
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def binomial_keep(batch_size: int, noise_rate: float, delta: float) -> int:
    """Largest k for which fewer than k clean rows have a probability of at most delta; 0 where there is none.

    Example:
        >>> binomial_keep(128, 0.2, 0.05)
        95
    """
    from scipy.stats import binom

    # P(C < k) = P(C <= k - 1): the quantile's neighbours are tried, since quantiles round their argument.
    k = int(binom.ppf(delta, batch_size, 1 - noise_rate))
    while k > 0 and binom.cdf(k - 1, batch_size, 1 - noise_rate) > delta:
        k -= 1
    while k < batch_size and binom.cdf(k, batch_size, 1 - noise_rate) <= delta:
        k += 1
    return k


def hoeffding_keep(batch_size: int, noise_rate: float, delta: float) -> int:
    """The same by Hoeffding's bound: fewer, and right without replacement.

    Example:
        >>> hoeffding_keep(128, 0.2, 0.05)
        88
    """
    slack = math.sqrt(math.log(1 / delta) / (2 * batch_size))
    return max(0, math.floor(batch_size * (1 - noise_rate - slack)))


def noise_limit(wrong: int, audited: int, delta: float, *, bound: Bound) -> float:
    """Upper limit of a noise rate of which so many of the audited labels were wrong, at failure probability delta.

    Example:
        >>> round(noise_limit(0, 100, 0.05, bound="binomial"), 4)
        0.0295
    """
    if bound == "hoeffding":
        return min(1.0, wrong / audited + math.sqrt(math.log(1 / delta) / (2 * audited)))
    from scipy.stats import beta

    return 1.0 if wrong == audited else float(beta.ppf(1 - delta, wrong + 1, audited - wrong))


def keep_rate_rule(evidence: KeepEvidence) -> Recommendation:
    """The keep rate, as k / n.

    Raises:
        InvalidArgumentError: A number outside its range.
    """
    e = evidence
    if e.batch_size < 1 or e.num_batches < 1:
        raise InvalidArgumentError(f"batch_size={e.batch_size}, num_batches={e.num_batches}: at least 1 of each.")
    if not 0 < e.delta < 1:
        raise InvalidArgumentError(f"delta={e.delta}: a failure probability lies between 0 and 1.")
    if not 0 <= e.noise_rate <= e.limit <= 1:
        raise InvalidArgumentError(f"noise_rate={e.noise_rate} with limit {e.limit}: shares in [0, 1], in order.")
    each = (e.delta - e.spent) / e.num_batches
    keep = {"binomial": binomial_keep, "hoeffding": hoeffding_keep}[e.bound]
    k, naive = keep(e.batch_size, e.limit, each), (1 - e.noise_rate) * e.batch_size
    failing = _failing(e.batch_size, e.limit, math.floor(naive))
    refused = k < 1
    reason = "; ".join(e.doubts)
    if refused:
        reason = (
            f"of {e.batch_size} rows with up to {e.limit:.1%} wrong labels not one is clean with probability "
            f"{1 - each:.6g}. Use larger batches, audit more labels, or allow a larger delta"
        )
    status = Status.REFUSED if refused else Status.UNCERTAIN if e.doubts else Status.OK
    return Recommendation(
        knob="keep rate",
        value=None if refused else k / e.batch_size,
        low=1 / e.batch_size if refused else min(k, hoeffding_keep(e.batch_size, e.limit, each)) / e.batch_size,
        high=max(k, math.floor(naive)) / e.batch_size,
        level=None,
        status=status,
        reason=reason,
        rule=f"the most rows of which {e.bound} concentration says that as many are clean, with probability 1 - delta",
        sources=SOURCES,
        evidence={
            "rows kept": float(k),
            "rows in a batch": float(e.batch_size),
            "noise rate": e.noise_rate,
            "its upper limit": e.limit,
            "noise from": e.source,
            "failure probability of one batch": each,
            "usual keep rate, 1 - noise rate": 1 - e.noise_rate,
            "batches in which the usual one asks for too many": failing,
        },
        checks=(
            "this is about how many clean rows exist: whether the smallest losses are theirs has to be measured",
            f"a step averages over {k} rows, not {e.batch_size}: choose the learning rate for that",
            *e.notes,
        ),
        cost=0.0,
    )


def _failing(n: int, noise: float, k: int) -> float:
    from scipy.stats import binom

    return float(binom.cdf(k - 1, n, 1 - noise))
