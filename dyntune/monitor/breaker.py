"""Errors of the monitor's own: seen, counted, and kept away from training: :class:`Breaker`."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from dyntune.errors import InvalidArgumentError

__all__ = ["STRICT", "Breaker", "MonitorWarning", "OnFailure"]

OnFailure: TypeAlias = Literal["warn", "raise", "disable"]

# A part that has failed this often in a row is switched off: a cause that passes (a batch of one row, memory that was
# short for a moment) is gone by then.
PATIENCE = 3
# Where this environment variable is 1, errors are raised whatever `on_error` says: for tests.
STRICT = "DYNTUNE_STRICT"


class MonitorWarning(RuntimeWarning):
    """A part of the monitor has failed, or was switched off; training is not affected."""


class Breaker:
    """Decides what becomes of an error: a record and a warning, the end of a part, or an exception.

    Args:
        on_error: ``"warn"`` of the first error of each kind and switch a part off after three in a row; ``"disable"``
            it at its first; ``"raise"``.
        event: Called with the name and the details of what goes into the record.

    Raises:
        InvalidArgumentError: An unknown `on_error`.

    Example:
        >>> breaker = Breaker("disable", lambda name, **detail: None)
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     breaker.failed("probe", ValueError("no loss"))
        >>> breaker.closed("probe"), breaker.closed("burst"), len(given)
        (False, True, 1)
    """

    def __init__(self, on_error: OnFailure, event: Callable[..., None]) -> None:
        if on_error not in get_args(OnFailure):
            raise InvalidArgumentError(f'on_error={on_error!r}: choose "warn", "raise" or "disable".')
        self.on_error = on_error
        self.errors = 0
        self.off: dict[str, str] = {}  # parts that are switched off, with the reason
        self._event = event
        self._in_a_row: Counter[str] = Counter()
        self._said: set[tuple[str, str]] = set()

    @property
    def strict(self) -> bool:
        """Whether errors are raised."""
        return self.on_error == "raise" or os.environ.get(STRICT) == "1"

    def closed(self, part: str) -> bool:
        """Whether a part is still on (a closed circuit)."""
        return part not in self.off

    def succeeded(self, part: str) -> None:
        """A part has done its work."""
        if self._in_a_row:
            self._in_a_row.pop(part, None)

    def failed(self, part: str, error: Exception) -> None:
        """A part has failed with `error`.

        Raises:
            Exception: That error, with ``on_error="raise"`` or ``DYNTUNE_STRICT=1``.
        """
        self.errors += 1
        self._in_a_row[part] += 1
        self._record("error", where=part, error=type(error).__name__, message=str(error)[:500])
        if self.strict:
            raise error
        kind = (part, type(error).__name__)
        count = self._in_a_row[part]
        if count >= PATIENCE or self.on_error == "disable":
            self.switch_off(part, f"{type(error).__name__}: {error}")
            self._warn(
                f"the monitor's {part} was switched off after {count} error{'s' if count > 1 else ''} in a row, the "
                f"last {type(error).__name__}: {error} Training goes on unchanged; the record says what is missing."
            )
        elif kind not in self._said:
            self._said.add(kind)
            self._warn(
                f"the monitor's {part} failed with {type(error).__name__}: {error} Training goes on unchanged; it is "
                "tried again, and this is not said again."
            )

    def switch_off(self, part: str, reason: str) -> None:
        """Do without a part from now on."""
        self.off[part] = reason
        self._record("disabled", part=part, reason=reason[:500])

    def _record(self, name: str, **detail: Any) -> None:
        try:
            self._event(name, **detail)
        except Exception as error:
            if self.strict:
                raise
            self._warn(f"the monitor's record failed with {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        with suppress(MonitorWarning):  # where warnings are errors, training would end by one: the record has it
            warnings.warn(text, MonitorWarning, stacklevel=3)
