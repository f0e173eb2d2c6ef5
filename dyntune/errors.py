"""Typed errors: each says what is wrong (with name and value), why it matters, and what to do.

Every error of the library derives from :class:`DyntuneError`, so that one ``except`` catches them all; those that
report a bad argument are also ``ValueError``, so that code which does not know dyntune treats them as it should.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AmbiguousLossError",
    "BatchError",
    "CheckpointError",
    "DistributedError",
    "DyntuneError",
    "EmptyBatchError",
    "HVPUnsupportedError",
    "InsufficientMemoryError",
    "InvalidArgumentError",
    "MissingDependencyError",
    "NoGradientError",
    "NoParametersError",
    "NonFiniteError",
    "NondeterministicLossError",
    "NotConvergedError",
    "OneShotIteratorError",
    "OptimizerMismatchError",
    "RefusedError",
    "RunFileError",
    "ShapeMismatchError",
    "StaleOperatorError",
    "UnreadableModelError",
    "UnsupportedDtypeError",
]


class DyntuneError(Exception):
    """Base of every error raised by dyntune.

    Args:
        message: What is wrong, why it matters and what to do.
        partial: The result as far as it was established, where there is one.
    """

    def __init__(self, message: str, *, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class DistributedError(DyntuneError, RuntimeError):
    """Another process of the job failed or did not answer, so that nothing could be measured together."""


class InvalidArgumentError(DyntuneError, ValueError):
    """An argument lies outside its permitted range."""


class MissingDependencyError(DyntuneError, ImportError):
    """A package that only an extra brings is needed and not installed."""


class CheckpointError(DyntuneError, ValueError):
    """A checkpoint cannot be read without running code, is damaged, or does not fit the model."""


class RunFileError(DyntuneError, ValueError):
    """A file is not a recorded run, or one of a newer version, or stands in the way of a new one."""


class BatchError(DyntuneError, ValueError):
    """The batches do not follow the batch grammar."""


class EmptyBatchError(BatchError):
    """A batch, or the collection of batches, holds no rows that count."""


class OneShotIteratorError(BatchError):
    """A generator or iterator was given: measuring would use it up, and a second product would see other data."""


class AmbiguousLossError(DyntuneError, ValueError):
    """No loss was given and the outputs do not determine one."""


class NoGradientError(DyntuneError, ValueError):
    """The loss does not depend on the selected parameters through autograd."""


class NonFiniteError(DyntuneError, ArithmeticError):
    """A parameter, the loss, or a product is NaN or infinite."""


class NoParametersError(DyntuneError, ValueError):
    """No trainable parameter was selected."""


class UnsupportedDtypeError(DyntuneError, TypeError):
    """A selected parameter is stored in a type in which curvature cannot be measured."""


class UnreadableModelError(DyntuneError, RuntimeError):
    """A forward pass does not show what is to be measured: no attention, no activation, or in a form unknown here."""


class ShapeMismatchError(DyntuneError, ValueError):
    """A vector does not have the shapes of the operator."""


class OptimizerMismatchError(DyntuneError, ValueError):
    """The optimizer does not hold the model's trainable parameters."""


class StaleOperatorError(DyntuneError, RuntimeError):
    """The model's parameters changed while an operator's session was open."""


class HVPUnsupportedError(DyntuneError, RuntimeError):
    """The model cannot be differentiated twice, and no fallback was permitted."""


class InsufficientMemoryError(DyntuneError, MemoryError):
    """Memory ran out, even with the lightest way of measuring that was permitted."""


class NondeterministicLossError(DyntuneError, RuntimeError):
    """The loss of one batch at fixed parameters differs from one evaluation to the next."""


class RefusedError(DyntuneError, ValueError):
    """A refused result was used as a number."""


class NotConvergedError(DyntuneError, RuntimeError):
    """``strict=True`` was given and the result is not established."""
