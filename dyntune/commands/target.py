"""The user's own code from the command line: ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dyntune.errors import DyntuneError, InvalidArgumentError

__all__ = ["UserCodeError", "call_target", "importable_here", "users_code"]


class UserCodeError(Exception):
    """An exception out of the user's code.

    Args:
        what: Which part of it.
        error: What was raised.
    """

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(what, error)
        self.what = what
        self.error = error

    def report(self) -> str:
        """The traceback, from the user's first line on, and one line that says where it comes from."""
        trace = self.error.__traceback__
        while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        shown = "".join(traceback.format_exception(type(self.error), self.error, trace))
        return f"{shown}dyntune: {self.what} raised {type(self.error).__name__}; the traceback is above.\n"


def _is_ours(filename: str) -> bool:
    """Whether a frame is this module's or that of the import system, which only lead to the user's code."""
    return filename == __file__ or filename.startswith("<frozen importlib") or filename == importlib.__file__


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn what the user's code raises into a :class:`UserCodeError`; typed errors and interrupts pass."""
    try:
        yield
    except (DyntuneError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserCodeError(what, error) from error


@contextmanager
def importable_here() -> Iterator[None]:
    """The current directory first on the import path, as ``python -m`` has it."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def call_target(target: str) -> Any:
    """Import ``package.module``, and call ``function`` in it without arguments.

    Raises:
        InvalidArgumentError: Not of that form, no such module, or no such function in it.
        UserCodeError: What importing or calling it raised.
    """
    module_name, _, name = target.partition(":")
    parts = [*module_name.split("."), name]
    if not all(part.isidentifier() for part in parts):
        hint = module_name.removesuffix(".py").replace("/", ".").strip(".") or "package.module"
        raise InvalidArgumentError(f"{target!r} is not package.module:function. Write, say, {hint}:{name or 'setup'}")
    importlib.invalidate_caches()
    with users_code(f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # one that theirs imports
            raise InvalidArgumentError(
                f"there is no module {error.name!r}, neither here ({os.getcwd()}) nor installed. Run the command from "
                "the folder that holds it."
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidArgumentError(
            f"{module_name} has no function {name!r} ({getattr(module, '__file__', 'built in')}). Define "
            f"def {name}(): ... there, or name another."
        )
    with users_code(f"{target}()"):
        return function()
