"""Detectors whose false-alarm rate on healthy runs is not established, to be opted in to.

All of them::

    Monitor(model, optimizer, detectors=(*default_detectors(), *experimental_detectors()))

They look at single tensors, of which a run holds few measurements, and all of their alarms are warnings.
"""

from __future__ import annotations

from dyntune.detect.course import Course
from dyntune.detect.inside import Staleness
from dyntune.detect.spikes import GradientSpike
from dyntune.detect.tensors import Explosion, Frozen, GroupRate
from dyntune.monitor.alerts import Detector

__all__ = ["Explosion", "Frozen", "GradientSpike", "GroupRate", "Staleness", "experimental_detectors"]


def experimental_detectors() -> tuple[Detector, ...]:
    """All of them; new ones at each call.

    Example:
        >>> len(experimental_detectors())
        5
    """
    course = Course()
    return GradientSpike(course), Frozen(course), Explosion(course), GroupRate(course), Staleness(course)
