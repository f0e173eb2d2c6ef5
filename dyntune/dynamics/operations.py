"""Watching the operations of forward passes, several readers in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dyntune.errors import UnreadableModelError

__all__ = ["OperationReader", "Operations"]


class OperationReader(ABC):
    """Something that is read off the operations of a forward pass, below autograd and autocast."""

    def begin(self, batch: Any) -> None:  # noqa: B027 - most have nothing to do
        """A pass over `batch` begins; modules may be wrapped until the passes end."""

    @abstractmethod
    def wants(self, name: str, func: Any) -> bool:
        """Whether to be shown the operations of this name; asked once for each."""

    def before(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: B027 - nor before an operation
        """One of them is about to run; what this returns is handed to :meth:`after`."""

    def after(self, name: str, args: Any, result: Any, noted: Any) -> None:  # noqa: B027 - nor after it
        """It has run."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows each operation to the readers that want it. What they compute themselves is seen by none of them.

    Args:
        readers: Who watches.
        batches: What the passes are over, one after the other.
        tolerant: Where a reader finds an operation that it cannot read, go on without it.

    Attributes:
        unreadable: Why a reader was left out, by reader; only if `tolerant`.
    """

    def __init__(
        self, readers: Sequence[OperationReader], batches: Sequence[Any] = (), *, tolerant: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unreadable: dict[OperationReader, str] = {}
        self._readers, self._tolerant = list(readers), tolerant
        self._batches = iter(batches)
        self._wanted: dict[Any, tuple[str, list[OperationReader]]] = {}

    def __enter__(self) -> Operations:
        batch = next(self._batches)
        for reader in self._readers:
            reader.begin(batch)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._wanted:
            name = getattr(getattr(func, "overloadpacket", None), "__name__", str(func))
            self._wanted[func] = name, [reader for reader in self._readers if reader.wants(name, func)]
        name, readers = self._wanted[func]
        if not readers:
            return func(*args, **kwargs)
        noted = []
        for reader in tuple(readers):
            try:
                noted.append((reader, reader.before(name, func, args, kwargs)))
            except UnreadableModelError as error:
                self._leave_out(reader, error)
        result = func(*args, **kwargs)
        for reader, note in noted:
            try:
                reader.after(name, args, result, note)
            except UnreadableModelError as error:
                self._leave_out(reader, error)
        return result

    def _leave_out(self, reader: OperationReader, error: UnreadableModelError) -> None:
        if not self._tolerant:
            raise error
        self.unreadable[reader] = str(error)
        self._readers.remove(reader)
        self._wanted.clear()
