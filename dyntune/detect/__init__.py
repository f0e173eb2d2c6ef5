"""Detectors: what is wrong with a training, told from what a monitor records.

Each looks at :class:`~dyntune.monitor.rows.Rows` as they come in, or at those of a recorded run, with the same alarms
however the rows are cut. Thresholds are relative to the run's own healthy steps, so that they do not depend on units.
A monitor has those of :func:`default_detectors`; the others are in :mod:`dyntune.detect.experimental`.
"""

from dyntune.detect.default import default_detectors
from dyntune.detect.diverging import Diverging
from dyntune.detect.level import LossLevel
from dyntune.detect.nonfinite import NonFinite
from dyntune.detect.spikes import LossSpike
from dyntune.detect.watch import Watch

__all__ = ["Diverging", "LossLevel", "LossSpike", "NonFinite", "Watch", "default_detectors"]
