"""Exceptions raised at the k-th call, for every k: the loop with which SQLite is tested for running out of memory.

Not among the sites: calls within contextlib and torch themselves. An interrupt on the very way into the ``__exit__`` of
a ``with`` statement (https://bugs.python.org/issue29988) keeps that one scope open until the exception is let go, when
Python closes the generator behind it; torch's own ``autocast.__exit__`` is a class, and what it missed stays missed.
So does what ``no_grad`` missed: a function mode sees its two calls of ``_set_grad_enabled``, and cut short there,
gradients stay off.
"""

from __future__ import annotations

import dis
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dyntune

__all__ = ["ERRORS", "SITES", "Fuse", "InjectedError", "spread"]

PACKAGE = str(Path(dyntune.__file__).parent)


class InjectedError(RuntimeError):
    """An error that no library knows."""


# What users' programs are cut short by: a bug, Ctrl-C, and an accelerator that is full.
ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: InjectedError("injected"),
    "interrupt": KeyboardInterrupt,
    "out of memory": lambda: torch.OutOfMemoryError("injected: out of memory"),
}


class Fuse:
    """Counts calls and raises at the k-th.

    Args:
        at: k, from 1; 0: never.
        error: What to raise.
    """

    def __init__(self, at: int = 0, error: Callable[[], BaseException] = KeyboardInterrupt) -> None:
        self.at = at
        self.error = error
        self.calls = 0
        self.place = ""

    @property
    def blown(self) -> bool:
        return 0 < self.at <= self.calls

    def count(self, place: str) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.place = place
            raise self.error()


def spread(total: int, count: int | None) -> list[int]:
    """At most `count` of 1 .. total, one from the middle of each of as many equal strata; all of them for None."""
    if count is None or count >= total:
        return list(range(1, total + 1))
    return [1 + (2 * i + 1) * total // (2 * count) for i in range(count)]


class _Functions(TorchFunctionMode):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._C._set_grad_enabled:
            self.fuse.count(getattr(func, "__qualname__", repr(func)))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fuse.count(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def entries(fuse: Fuse, outermost: tuple[str, ...] = ()) -> Iterator[None]:
    """Every entry of a Python function of dyntune's but `outermost`, and every time that one of its generators goes on.

    An exception that is thrown into a generator is none: the interpreter runs no signal handler there, and the frame's
    own handlers would not see what a trace function raises. Nor is what a finalizer calls, of some other test's monitor
    whenever garbage happens to be collected: nobody is there who could catch it.
    """
    resume = dis.opmap["RESUME"]

    def trace(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        entered = event == "call" and code.co_filename.startswith(PACKAGE) and code.co_code[frame.f_lasti] == resume
        called_by = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if entered and code.co_qualname not in outermost and called_by != weakref.__file__:
            fuse.count(f"{code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} {code.co_qualname}")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


SITES: dict[str, Callable[[Fuse], AbstractContextManager[Any]]] = {
    "torch function": _Functions,
    "torch operation": _Operations,
    "function of ours": entries,
}
