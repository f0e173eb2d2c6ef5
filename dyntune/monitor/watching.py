"""A loader seen through a monitor: the same batches, each remembered, with a progress bar: :class:`Watched`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

from torch.utils.data import IterableDataset
from tqdm import tqdm

__all__ = ["Watched"]

Batch = TypeVar("Batch")


class Watched(Generic[Batch]):
    """What ``monitor.watch(loader)`` returns: iterated like the loader, as often as that can be.

    Args:
        loader: The loader, whose iterator is made and advanced exactly as without a monitor.
        begun: Called when the loader is iterated over from its start.
        fetched: Called with each batch before the loop gets it.
        ratio: The stability ratio for the bar; NaN while there is none.
        progress: Whether to show a bar; None: where the output is a terminal.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        begun: Callable[[], None],
        fetched: Callable[[Any], None],
        ratio: Callable[[], float],
        progress: bool | None,
    ) -> None:
        self.loader = loader
        self._begun, self._fetched, self._ratio, self._progress = begun, fetched, ratio, progress

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        bar = self._bar()
        self._begun()
        try:
            for batch in self.loader:
                self._fetched(batch)
                yield batch
                if bar is not None:
                    bar = self._moved(bar)
        finally:
            if bar is not None:
                with suppress(Exception):  # as in `_moved`
                    bar.close()

    def _bar(self) -> tqdm[Any] | None:
        """None where none is shown, or it cannot be: a bar is nothing that training depends on."""
        if self._progress is False:
            return None
        try:
            bar = tqdm(
                total=self._length(), unit="step", leave=False, disable=None if self._progress is None else False
            )
        except Exception:  # the stream is the user's sys.stderr, a terminal or any object, and may raise anything
            return None
        return None if bar.disable else bar

    def _moved(self, bar: tqdm[Any]) -> tqdm[Any] | None:
        try:
            ratio = self._ratio()
            if not math.isnan(ratio):
                bar.set_postfix_str(f"stability ratio {ratio:.2f}", refresh=False)
            bar.update()
        except Exception:  # a terminal that is gone (OSError), a file that is closed (ValueError), any other stream
            return None
        return bar

    def _length(self) -> int | None:
        """Number of batches; None where nobody says. A stream is not asked: torch's loader would warn of it later."""
        if isinstance(getattr(self.loader, "dataset", None), IterableDataset):
            return None
        try:
            return len(self)
        except Exception:  # `__len__` is the user's code, and may raise anything
            return None
