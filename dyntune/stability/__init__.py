"""Where optimizers lose stability."""

from dyntune.stability.thresholds import batch_threshold as batch_threshold
from dyntune.stability.thresholds import threshold as threshold
