"""Parameters stored in bfloat16 or float16: measured through float32 copies that stand in while a measurement runs.

A gradient in bfloat16 has 8 bits; differences of two of them, and sums of thousands of products, have none left. The
copies hold the same numbers exactly, so what is measured is the curvature at the stored point, in float32 arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dyntune.errors import DyntuneError, UnsupportedDtypeError
from dyntune.objective.batches import map_tensors
from dyntune.objective.state import parameter_slots, swapped

__all__ = ["LOW_PRECISION", "FullPrecision", "measured_dtype"]

LOW_PRECISION = (torch.bfloat16, torch.float16)


def measured_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter stored in `dtype` is measured."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


_lent: WeakKeyDictionary[nn.Module, dict[int, nn.Parameter]] = WeakKeyDictionary()


class FullPrecision:
    """Lends float32 copies of a model's low-precision parameters; false where the model has none.

    Args:
        model: The model; frozen parameters count, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stored = [p for p in model.parameters() if p.dtype in LOW_PRECISION]
        # Shared by all operators on the model: a sum of two has two sessions open, and must move the same copies.
        self._copies = _lent.setdefault(model, {})

    def __bool__(self) -> bool:
        return bool(self._stored)

    @property
    def note(self) -> str:
        """What is done, for the record; empty where there is nothing to do."""
        names = sorted({str(p.dtype).removeprefix("torch.") for p in self._stored})
        return f"float32 copy of {' and '.join(names)} parameters" if names else ""

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands in for a parameter at the moment: its copy within :meth:`lent`, else itself."""
        return self._copies.get(id(parameter), parameter)

    def copies_of(self, stored: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """What stands in for the parameters `stored`."""
        return [p.detach().float() for p in stored]

    def batch(self, batch: Any) -> Any:
        """A batch whose low-precision tensors are float32, if the model has low-precision parameters."""
        if not self:
            return batch
        return map_tensors(batch, lambda t: t.float() if t.dtype in LOW_PRECISION else t)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the copies stand in for the parameters."""
        stored = [p for p in self._stored if id(p) not in self._copies]  # none left within another scope
        tensors = self.copies_of(stored)
        copies = [nn.Parameter(t, requires_grad=p.requires_grad) for t, p in zip(tensors, stored, strict=True)]
        slots = parameter_slots(self._model, stored)
        pairs = [(slot, copy) for places, copy in zip(slots, copies, strict=True) for slot in places]
        self._copies.update((id(p), copy) for p, copy in zip(stored, copies, strict=True))
        try:
            with swapped([slot for slot, _ in pairs], [copy for _, copy in pairs]):
                yield
        finally:
            for p in stored:
                del self._copies[id(p)]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn torch's complaint about mixed dtypes into one that says where they come from.

        Raises:
            UnsupportedDtypeError: The model's code, or the loss, casts to a low-precision dtype by name.
        """
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            if not self or isinstance(error, DyntuneError) or not _is_about_dtypes(str(error)):
                raise
            raise UnsupportedDtypeError(
                f"parameters stored in low precision are measured through a {self.note}, and the model's code does "
                f"not run with it: {str(error).strip().splitlines()[0]} A cast to a fixed dtype in forward or in the "
                "loss, most likely: write x.to(self.weight.dtype) instead of x.bfloat16() or x.half()."
            ) from error


def _is_about_dtypes(text: str) -> bool:
    return re.search(r"dtype|scalar type|bfloat16|half\b|same type|should be the same", text, re.IGNORECASE) is not None
