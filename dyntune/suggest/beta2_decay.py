r"""Adafactor's factor, which grows along training: ``beta2_t = 1 - t^c`` at step t, with c below zero.

What is suggested is the c whose last step has the factor that the rule of :mod:`dyntune.suggest.beta2_rule` finds:

.. math:: 1 - \beta_2 = T^c \quad\Leftrightarrow\quad c = \ln(1 - \beta_2) / \ln T

Adafactor's learning rate is relative: a step moves a tensor by at most about the rate times the root mean square of its
weights, so the rate is what :func:`dyntune.suggest.beta2_rule.path_beta2` calls lr / RMS.

Source: Shazeer and Stern (2018), arXiv:1804.04235, for factor and relative rate; the inversion is derived here.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dyntune.errors import InvalidArgumentError
from dyntune.records import Recommendation

__all__ = ["DECAY", "as_exponent", "exponent_of", "last_factor"]

DECAY = "beta2_decay"


def last_factor(exponent: float, num_steps: float) -> float:
    """The factor of the last step.

    Raises:
        InvalidArgumentError: An exponent that is not below zero: the average would never begin, or grow.

    Example:
        >>> round(last_factor(-0.8, 10_000), 5)
        0.99937
    """
    if not -math.inf < exponent < 0:
        raise InvalidArgumentError(f"{DECAY}={exponent}: 1 - beta2 falls as steps to this power, which is below zero.")
    return float(1 - num_steps**exponent)


def exponent_of(beta2: float, num_steps: float) -> float:
    """The exponent at which the last step has a factor.

    Example:
        >>> round(exponent_of(last_factor(-0.8, 10_000), 10_000), 9)
        -0.8
    """
    return math.log(1 - beta2) / math.log(num_steps)


def check_length(num_steps: int | None) -> int:
    """The length of the training to come, without which a factor that grows is none.

    Raises:
        InvalidArgumentError: Unknown, or one step.
    """
    if num_steps is None or num_steps < 2:
        raise InvalidArgumentError(
            f"num_steps={num_steps}: Adafactor's beta2 grows along training, and {DECAY} is suggested for its last "
            "step. Give the number of steps of the training to come, two or more."
        )
    return num_steps


def as_exponent(found: Recommendation, num_steps: int) -> Recommendation:
    """A recommendation for the last step's factor as one for the exponent; refused ones as they are."""
    if found.value is None:
        return replace(found, knob=DECAY, low=-math.inf, high=0.0)
    low, high = exponent_of(min(found.high, 1 - 1e-12), num_steps), exponent_of(found.low, num_steps)
    return replace(
        found,
        knob=DECAY,
        value=exponent_of(found.value, num_steps),
        low=low,
        high=high,
        rule=f"{found.rule}; as the exponent at which the last step has that factor, ln(1 - beta2) / ln(steps)",
        sources=(*found.sources, "Shazeer and Stern (2018), arXiv:1804.04235 (1 - steps^c, and the relative rate)"),
        evidence={"beta2 at the last step": found.value, **found.evidence},
    )
