"""Running out of memory: how it is recognised, and what is said where nothing lighter is left to try."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dyntune.errors import InsufficientMemoryError

__all__ = ["enough_memory", "is_out_of_memory", "let_go", "refuse"]

# torch's allocator on the CPU raises a plain RuntimeError with this in it (2.13).
_CPU_TEXT = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch's on any device, or Python's own."""
    if isinstance(error, InsufficientMemoryError):
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_TEXT in str(error)


def let_go(error: BaseException) -> None:
    """Free what a failed attempt still holds: graphs in the frames of its traceback, and in reference cycles."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def refuse(doing: str, error: BaseException) -> InsufficientMemoryError:
    """The error to raise: memory ran out while `doing`."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InsufficientMemoryError(
        f"memory ran out in {doing}, and nothing lighter is left to try: {text} Give batches of fewer rows, or fewer "
        "parameters (params=...)."
    )


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Turn any out-of-memory exception into the typed one.

    Args:
        doing: What is tried, for the message.

    Raises:
        InsufficientMemoryError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise refuse(doing, error) from error
