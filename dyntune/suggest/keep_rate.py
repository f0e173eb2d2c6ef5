"""How many rows of a batch to trust where labels are wrong: :func:`suggest_keep_rate`."""

from __future__ import annotations

import math

import numpy as np

from dyntune.calibration.outcomes import Array, as_array, class_numbers
from dyntune.errors import InvalidArgumentError, MissingDependencyError, NonFiniteError
from dyntune.records import Recommendation
from dyntune.suggest.keep_rate_rule import Bound, KeepEvidence, keep_rate_rule, noise_limit

__all__ = ["suggest_keep_rate"]


def suggest_keep_rate(
    batch_size: int,
    *,
    noise_rate: float | None = None,
    labels: Array | None = None,
    probabilities: Array | None = None,
    audited: Array | None = None,
    delta: float = 0.05,
    bound: Bound = "binomial",
    num_batches: int = 1,
    strict: bool = False,
) -> Recommendation:
    """The share of a batch to keep, by small loss, so that as many clean rows exist with probability 1 - delta.

    Args:
        batch_size: Rows of a batch; of one class where noise depends on the class: ask for each class, then.
        noise_rate: Share of wrong labels, if known; in [0, 1].
        labels: Given labels, (N,), to estimate it from with `probabilities` by confident learning.
        probabilities: Out-of-sample predicted probabilities, (N, K).
        audited: For a random sample of labels whether each was wrong; (m,), bool. Best of the three.
        delta: Failure probability in all. With `audited` half of it is the noise rate's.
        bound: ``"binomial"``: exact for independent rows. ``"hoeffding"``: keeps less; right without replacement.
        num_batches: Over how many batches it is to hold at once.
        strict: Raise when the status is not OK.

    Returns:
        ``value``: k / n. ``low`` is Hoeffding's rate, ``high`` the usual 1 - noise rate. UNCERTAIN where the noise rate
        is estimated by confident learning alone, which tells too little of it (by 0.026 on digits at 10, 20 and 40%),
        or is a half and more. REFUSED where not one row can be kept.

    Raises:
        InvalidArgumentError: A number outside its range, or no (or two) sources of the noise rate.
        NonFiniteError: A probability is NaN or infinite.
        MissingDependencyError: `labels` with `probabilities` without cleanlab.
        RefusedError, NotConvergedError: With ``strict=True``.

    Accuracy:
        Of the binomial bound the failure probability is at most delta, and more than half of it where the integers
        allow; by Monte Carlo in ``tests/suggest``.
    Cost:
        None on the model.
    Assumes:
        Rows drawn at random; noise that does not depend on the class (else ask by class). The bound is about how many
        clean rows exist, not about losses that find them.
    Source:
        Hoeffding (1963); Clopper, Pearson (1934); Northcutt, Jiang, Chuang (2021), arXiv:1911.00068 (confident
        learning); Han et al. (2018), arXiv:1804.06872 (co-teaching, whose keep rate is 1 - noise rate).

    Example:
        >>> found = suggest_keep_rate(128, noise_rate=0.2)
        >>> round(128 * float(found))
        95
    """
    estimated = labels is not None or probabilities is not None
    given = sum((noise_rate is not None, estimated, audited is not None))
    if given == 0 or (noise_rate is not None and given > 1):
        raise InvalidArgumentError(
            "the noise rate: give noise_rate=, or audited= (best), or labels= with probabilities=; one that is known "
            "is not estimated."
        )
    if not 0 < delta < 1:
        raise InvalidArgumentError(f"delta={delta}: a failure probability lies between 0 and 1.")
    if bound not in ("binomial", "hoeffding"):
        raise InvalidArgumentError(f'bound={bound!r}: "binomial" or "hoeffding".')
    notes, doubts, spent = [], [], 0.0
    confident = _confident(labels, probabilities) if estimated else None
    if audited is not None:
        wrong = _audit(audited)
        rate, source, spent = wrong.mean(), f"an audit of {len(wrong)} labels", delta / 2
        limit = noise_limit(int(wrong.sum()), len(wrong), spent, bound=bound)
        if confident is not None:
            notes.append(f"confident learning says {confident:.3g}, {confident - rate:+.3g} from the audit's")
    elif confident is not None:
        rate = limit = confident
        source = "confident learning"
        doubts.append("confident learning tells too little noise, by how much is not known: audit some labels")
    else:
        assert noise_rate is not None
        if not 0 <= noise_rate <= 1 or math.isnan(noise_rate):
            raise InvalidArgumentError(f"noise_rate={noise_rate}: a share of wrong labels lies in [0, 1].")
        rate = limit = float(noise_rate)
        source = "given"
    if limit >= 0.5:
        doubts.append(
            f"up to {limit:.1%} of labels are wrong: where they go to one other class (pairs), a half cannot be told "
            "from its complement, and small losses may be those of the wrong ones"
        )
    found = keep_rate_rule(
        KeepEvidence(
            batch_size=batch_size,
            noise_rate=float(rate),
            limit=max(float(limit), float(rate)),
            spent=spent,
            delta=delta,
            num_batches=num_batches,
            bound=bound,
            source=source,
            notes=tuple(notes),
            doubts=tuple(doubts),
        )
    )
    return found.require() if strict else found


def _audit(audited: Array) -> np.ndarray:
    wrong = as_array(audited, "audited")
    if wrong.ndim != 1 or len(wrong) == 0 or not np.isin(wrong, (0, 1)).all():
        raise InvalidArgumentError(
            f"audited of shape {wrong.shape}: for each label of a random sample whether it was wrong, (m,), 0 or 1."
        )
    return wrong.astype(bool)


def _confident(labels: Array | None, probabilities: Array | None) -> float:
    """Noise rate by confident learning."""
    if labels is None or probabilities is None:
        raise InvalidArgumentError("labels= and probabilities= go together: noise is where they disagree.")
    p = as_array(probabilities, "probabilities").astype(np.float64)
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] < 2:
        raise InvalidArgumentError(f"probabilities of shape {p.shape}: (N, K) with N > 0 rows and K > 1 classes.")
    if not np.isfinite(p).all():
        raise NonFiniteError(f"{int((~np.isfinite(p)).sum())} of {p.size} probabilities are NaN or infinite.")
    y = as_array(labels, "labels")
    if len(y) != len(p):
        raise InvalidArgumentError(f"{len(y)} labels with {len(p)} rows of probabilities.")
    y = class_numbers(y, p.shape[1])
    if len(np.unique(y)) < 2:
        raise InvalidArgumentError("all labels are of one class: nothing says which of them are wrong.")
    try:
        from cleanlab.count import num_label_issues
    except ImportError as error:
        raise MissingDependencyError(
            "estimating a noise rate needs cleanlab, which is not installed: pip install 'dyntune[noise]', or give "
            "noise_rate= or audited=."
        ) from error
    return float(num_label_issues(y, p)) / len(y)
