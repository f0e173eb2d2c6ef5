"""The tree of errors: one except for all of them, and the builtin one that code without dyntune expects."""

from __future__ import annotations

import inspect

import pytest

import dyntune
from dyntune import errors

BUILTIN = {
    errors.AmbiguousLossError: ValueError,
    errors.BatchError: ValueError,
    errors.CheckpointError: ValueError,
    errors.DistributedError: RuntimeError,
    errors.EmptyBatchError: ValueError,
    errors.HVPUnsupportedError: RuntimeError,
    errors.InsufficientMemoryError: MemoryError,
    errors.InvalidArgumentError: ValueError,
    errors.MissingDependencyError: ImportError,
    errors.NoGradientError: ValueError,
    errors.NoParametersError: ValueError,
    errors.NonFiniteError: ArithmeticError,
    errors.NondeterministicLossError: RuntimeError,
    errors.NotConvergedError: RuntimeError,
    errors.OneShotIteratorError: ValueError,
    errors.OptimizerMismatchError: ValueError,
    errors.RefusedError: ValueError,
    errors.RunFileError: ValueError,
    errors.ShapeMismatchError: ValueError,
    errors.StaleOperatorError: RuntimeError,
    errors.UnreadableModelError: RuntimeError,
    errors.UnsupportedDtypeError: TypeError,
}


def test_every_error_is_listed_here_and_exported():
    defined = {e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.DyntuneError)}
    assert {e.__name__ for e in defined} == set(errors.__all__)
    assert defined - {errors.DyntuneError} == set(BUILTIN)
    assert dyntune.errors is errors


@pytest.mark.parametrize(("error", "builtin"), BUILTIN.items(), ids=lambda e: e.__name__)
def test_caught_as_ours_and_as_builtin(error, builtin):
    for kind in (errors.DyntuneError, builtin, error):
        with pytest.raises(kind, match="what, why and what to do"):
            raise error("what, why and what to do")


@pytest.mark.parametrize("error", BUILTIN)
def test_an_error_may_carry_what_was_established(error):
    assert error("text").partial is None
    assert error("text", partial=3.5).partial == 3.5
    assert str(error("text", partial=3.5)) == "text"


@pytest.mark.parametrize("error", [errors.EmptyBatchError, errors.OneShotIteratorError])
def test_errors_about_batches_have_a_family(error):
    assert issubclass(error, errors.BatchError)


@pytest.mark.parametrize("error", BUILTIN)
def test_every_error_says_when_it_is_raised(error):
    assert error.__doc__.strip().endswith(".")
