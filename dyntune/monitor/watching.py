"""A loader seen through a monitor: the same batches, each remembered, with a progress bar: :class:`Watched`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from tqdm import tqdm

__all__ = ["Watched"]

Batch = TypeVar("Batch")


class Watched(Generic[Batch]):
    """What ``monitor.watch(loader)`` returns: iterated like the loader, as often as that can be.

    Args:
        loader: The loader, whose iterator is made and advanced exactly as without a monitor.
        fetched: Called with each batch before the loop gets it.
        ratio: The stability ratio for the bar; NaN while there is none.
        progress: Whether to show a bar; None: where the output is a terminal.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        fetched: Callable[[Any], None],
        ratio: Callable[[], float],
        progress: bool | None,
    ) -> None:
        self.loader = loader
        self._fetched, self._ratio, self._progress = fetched, ratio, progress

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        try:
            total = len(self)
        except TypeError:  # a loader of unknown length
            total = None
        disable = None if self._progress is None else not self._progress
        with tqdm(total=total, unit="step", leave=False, disable=disable) as bar:
            for batch in self.loader:
                self._fetched(batch)
                yield batch
                ratio = self._ratio()
                if not bar.disable and not math.isnan(ratio):
                    bar.set_postfix_str(f"stability ratio {ratio:.2f}", refresh=False)
                bar.update()
