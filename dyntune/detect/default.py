"""The detectors that a monitor has by default: :func:`default_detectors`."""

from __future__ import annotations

from dyntune.detect.configured import Configured
from dyntune.detect.course import Course
from dyntune.detect.diverging import Diverging
from dyntune.detect.growth import GradientGrowth
from dyntune.detect.inside import AttentionLogits, OutputLogits
from dyntune.detect.interrupted import Interrupted
from dyntune.detect.level import LossLevel
from dyntune.detect.nonfinite import NonFinite
from dyntune.detect.order import DataOrder
from dyntune.detect.pace import Pace
from dyntune.detect.scale import LossScale
from dyntune.detect.spikes import LossSpike
from dyntune.detect.tensors import DeadUnits, EpsTooLarge, Vanishing
from dyntune.detect.unwired import Unwired
from dyntune.monitor.alerts import Detector

__all__ = ["default_detectors"]


def default_detectors() -> tuple[Detector, ...]:
    """Those whose false alarms on synthetic series are tested; new ones at each call, since they remember a run.

    Returns:
        Sixteen of them; all but :class:`NonFinite` and :class:`Diverging` share what they read. Of one step, the first
        to tell is the one that knows the mechanism.

    Cost:
        Some 6 microseconds a step, in records of 36 steps with what was measured in between (a run of 8,000 steps of
        the benchmark of faults, one thread of an AMD EPYC): half of it for reading the record, which all share.

    Example:
        >>> [type(detector).__name__ for detector in default_detectors()]  # doctest: +NORMALIZE_WHITESPACE
        ['Configured', 'NonFinite', 'Unwired', 'LossScale', 'EpsTooLarge', 'AttentionLogits', 'OutputLogits',
         'DeadUnits', 'Vanishing', 'Interrupted', 'Pace', 'Diverging', 'LossLevel', 'GradientGrowth', 'DataOrder',
         'LossSpike']
    """
    course = Course()
    return (
        Configured(course),
        NonFinite(),
        Unwired(course),
        LossScale(course),
        EpsTooLarge(course),
        AttentionLogits(course),
        OutputLogits(course),
        DeadUnits(course),
        Vanishing(course),
        Interrupted(course),
        Pace(course),
        Diverging(),
        LossLevel(course),
        GradientGrowth(course),
        DataOrder(course),
        LossSpike(course),
    )
