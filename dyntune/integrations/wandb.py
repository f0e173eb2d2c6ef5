"""Numbers of a run to Weights & Biases: :class:`WandbSink`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.integrations.text import detail, storable
from dyntune.monitor.run import Event

__all__ = ["WandbSink"]

STEP = "dyntune/step"


class WandbSink:
    """Logs to a run of yours, under ``dyntune/``, over an axis of its own, ``dyntune/step``.

    With an axis of its own the training may log at other steps, and a measurement that arrives late is kept: W&B drops
    what comes with a lower number than its own counter. That counter goes up by one with each call here; give your own
    numbers an axis, too, where it matters (``define_metric``).

    Args:
        run: What ``wandb.init(...)`` returned (``mode="offline"`` included); default the one that is active. It is left
            open.

    Raises:
        MissingDependencyError: The package wandb is not installed.
        InvalidArgumentError: No run was given and none is active.

    Example::

        run = wandb.init(project="mnist", mode="offline")
        with dyntune.Monitor(model, optimizer, sinks=[WandbSink(run)]) as monitor:
            ...
    """

    def __init__(self, run: Any = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError(
                "the Weights & Biases sink needs the package wandb, which is not installed: pip install "
                "'dyntune[wandb]'."
            ) from error
        self._run: Any = wandb.run if run is None else run
        if self._run is None:
            raise InvalidArgumentError(
                "no wandb run is active, so there is nowhere to log to. Call run = wandb.init(project=...) first and "
                "give WandbSink(run)."
            )
        self._known = False
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`."""
        if self._closed:
            raise InvalidArgumentError("the Weights & Biases sink is closed; make another.")
        if not self._known:  # a pattern may only end in a star
            self._run.define_metric(STEP)
            self._run.define_metric("dyntune/*", step_metric=STEP)
            self._known = True
        logged: dict[str, Any] = {_key(name): float(value) for name, value in values.items()}
        for event in events:
            logged[_key(f"events/{event.name}")] = detail(event, step=event.step)
        self._run.log(logged | {STEP: step})

    def close(self) -> None:
        """Nothing: the run is yours to finish."""
        self._closed = True


def _key(name: str) -> str:
    """Where it is logged; ``step`` is the axis."""
    key = storable(f"dyntune/{name}")
    return f"{key}_" if key == STEP else key
