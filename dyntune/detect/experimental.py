"""Detectors whose false-alarm rate on healthy runs is not established, to be opted in to.

All of them::

    Monitor(model, optimizer, detectors=(*default_detectors(), *experimental_detectors()))

They look at single tensors and layers, of which a run holds few measurements, and all of their alarms are warnings.
"""

from __future__ import annotations

from dyntune.detect.inside import AttentionLogits, OutputLogits, Staleness
from dyntune.detect.spikes import GradientSpike
from dyntune.detect.tensors import DeadUnits, EpsTooLarge, Explosion, Frozen, GroupRate, Vanishing
from dyntune.monitor.alerts import Detector

__all__ = [
    "AttentionLogits",
    "DeadUnits",
    "EpsTooLarge",
    "Explosion",
    "Frozen",
    "GradientSpike",
    "GroupRate",
    "OutputLogits",
    "Staleness",
    "Vanishing",
    "experimental_detectors",
]


def experimental_detectors() -> tuple[Detector, ...]:
    """All of them; new ones at each call.

    Example:
        >>> len(experimental_detectors())
        10
    """
    return (
        GradientSpike(),
        Frozen(),
        Vanishing(),
        Explosion(),
        DeadUnits(),
        EpsTooLarge(),
        GroupRate(),
        AttentionLogits(),
        OutputLogits(),
        Staleness(),
    )
