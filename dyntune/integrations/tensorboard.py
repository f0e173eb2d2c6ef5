"""Numbers of a run to TensorBoard: :class:`TensorBoardSink`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.integrations.text import storable
from dyntune.monitor.run import Event

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes scalars under their names, which TensorBoard groups by what is before the first slash, and events as text.

    Args:
        to: A folder, or the ``SummaryWriter`` of the training, which is then flushed and left open.
        resume: Of a folder that another attempt has written to: TensorBoard drops its steps from the first one that is
            now written on. Otherwise, where a step appears twice, both are drawn.
        prefix: In front of each name, such as ``"dyntune/"`` where the training has names of its own.

    Raises:
        MissingDependencyError: The package tensorboard is not installed.
        InvalidArgumentError: `resume` with a writer, which says so itself (``SummaryWriter(..., purge_step=...)``).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = TensorBoardSink(folder)
        ...     sink.write(10, {"curvature/lambda_max": 12.5}, ())
        ...     sink.close()
        ...     [path.name.split(".")[0] for path in Path(folder).iterdir()]
        ['events']
    """

    def __init__(self, to: str | os.PathLike[str] | SummaryWriter, *, resume: bool = False, prefix: str = "") -> None:
        try:
            import tensorboard  # noqa: F401 - what torch.utils.tensorboard writes with
        except ImportError as error:
            raise MissingDependencyError(
                "the TensorBoard sink needs the package tensorboard, which is not installed: pip install "
                "'dyntune[tensorboard]'."
            ) from error
        self._folder = os.fspath(to) if isinstance(to, (str, os.PathLike)) else None
        self._writer: Any = to if self._folder is None else None
        if resume and self._folder is None:
            raise InvalidArgumentError(
                "resume=True is for a folder; a SummaryWriter drops the steps of an earlier attempt by its own "
                "purge_step. Leave resume out, or give the folder."
            )
        self._resume, self._prefix = resume, prefix
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`."""
        if self._closed:
            raise InvalidArgumentError("the TensorBoard sink is closed; make another with resume=True.")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step if self._resume else None)
        for name, value in values.items():
            self._writer.add_scalar(storable(self._prefix + name), value, step)
        for event in events:
            at = step if event.step is None else event.step
            self._writer.add_text(storable(f"{self._prefix}events/{event.name}"), _as_code(event), at)

    def close(self) -> None:
        """Write what waits; close the writer unless it is the training's."""
        if self._closed or self._writer is None:
            self._closed = True
            return
        self._closed = True
        self._writer.flush()
        if self._folder is not None:
            self._writer.close()


def _as_code(event: Event) -> str:
    """The detail as a block of code: TensorBoard reads text as Markdown."""
    text = json.dumps(dict(event.detail), default=str, indent=1)
    return "".join(f"    {line}\n" for line in text.splitlines())
