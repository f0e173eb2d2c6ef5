"""A run's file while it grows: :class:`Tail` reads what was appended since it last looked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dyntune.errors import RunFileError
from dyntune.monitor.ranks import run_files
from dyntune.monitor.reader import Reader
from dyntune.monitor.run import Run

__all__ = ["Tail"]

PIECE = 1 << 20  # bytes read at a time


class Tail:
    r"""Follows the log of a run that may not have begun yet.

    Of several processes, that of the lowest rank there is. A file that was replaced or has become shorter is read from
    its beginning.

    Args:
        path: As for :func:`dyntune.load_run`.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "run.jsonl")
        ...     tail = Tail(file)
        ...     before = tail.poll()
        ...     _ = file.write_bytes(b'{"kind":"row","seq":0,"step":7,"values":{"loss":1.5}}\n{"kind":"r')
        ...     before, tail.poll(), tail.run().steps.tolist(), tail.poll()
        (False, True, [7], False)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._reader = Reader()
        self._known: tuple[int, int] | None = None  # device and inode
        self._offset = 0
        self._rest = b""  # of a line that is still being written

    @property
    def records(self) -> int:
        """How many have been read."""
        return self._reader.records

    def poll(self) -> bool:
        """Read what is new.

        Returns:
            Whether there were complete lines.

        Raises:
            RunFileError: The file cannot be read, is no ordinary one, holds records of two runs, or was written by a
                newer version of the format.
        """
        file = self._file()
        if file is None:
            return False
        try:
            with file.open("rb") as source:
                found = os.fstat(source.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise RunFileError(f"run {str(file)!r} is no ordinary file. Give the path of a .jsonl file.")
                if self._known != (found.st_dev, found.st_ino) or found.st_size < self._offset:
                    self._forget()
                    self._known = (found.st_dev, found.st_ino)
                source.seek(self._offset)
                taken = 0
                while piece := source.read(PIECE):
                    self._offset += len(piece)
                    *lines, self._rest = (self._rest + piece).split(b"\n")
                    taken += len(lines)
                    for line in lines:
                        self._reader.take(line + b"\n")
        except FileNotFoundError:  # gone since _file() saw it
            return False
        except OSError as error:
            raise RunFileError(f"run {str(file)!r} cannot be read: {error.strerror}. Check the path.") from error
        return taken > 0

    def run(self) -> Run:
        """The run so far."""
        return self._reader.run(path=os.fspath(self.path))

    def _file(self) -> Path | None:
        """The file to follow; None where there is none yet."""
        given = Path(self.path)
        if given.is_dir() and not any(given.glob("*.jsonl")):
            return None
        file = run_files(given)[0]
        return file if file.exists() else None
