"""Detectors whose false-alarm rate on healthy runs is not established, to be opted in to.

All of them::

    Monitor(model, optimizer, detectors=(*default_detectors(), *experimental_detectors()))

Most look at single tensors, of which a run holds few measurements; :class:`Plateau` says of healthy runs, too, that a
lower learning rate would help. All of their alarms are warnings.
"""

from __future__ import annotations

from dyntune.detect.course import Course
from dyntune.detect.inside import Staleness
from dyntune.detect.memorised import Memorised
from dyntune.detect.plateau import Plateau
from dyntune.detect.spikes import GradientSpike
from dyntune.detect.tensors import Explosion, Frozen, GroupRate
from dyntune.monitor.alerts import Detector

__all__ = [
    "Explosion",
    "Frozen",
    "GradientSpike",
    "GroupRate",
    "Memorised",
    "Plateau",
    "Staleness",
    "experimental_detectors",
]


def experimental_detectors() -> tuple[Detector, ...]:
    """All of them; new ones at each call.

    Example:
        >>> len(experimental_detectors())
        7
    """
    course = Course()
    return (
        GradientSpike(course),
        Frozen(course),
        Explosion(course),
        GroupRate(course),
        Staleness(course),
        Plateau(course),
        Memorised(course),
    )
