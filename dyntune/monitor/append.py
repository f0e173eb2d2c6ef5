"""Appending lines to a file that may be full, forbidden or gone: :class:`AppendFile`."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable
from typing import Literal

from dyntune.errors import RunFileError

__all__ = ["AppendFile", "OnError", "RunFileWarning"]

OnError = Literal["raise", "warn"]

# While nothing can be written, about 190 records of ten numbers (340 bytes each) wait in memory: a disk that is full
# for a moment costs none. The next attempt is made when as long has passed as one might need to free some space.
HELD_BYTES = 64 * 1024
RETRY_SECONDS = 10.0

_ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space, or raise the quota",
    errno.EFBIG: "Raise the limit on the size of files",
    errno.EACCES: "Give the process the right to write there",
    errno.EPERM: "Give the process the right to write there",
    errno.EROFS: "Make the file system writable",
    errno.ENOENT: "Create the folder",
    errno.ENOTDIR: "Create the folder",
    errno.EEXIST: "Move the other file away",
}


class RunFileWarning(RuntimeWarning):
    """A log cannot be written. Given once; what is lost is counted, and in the log as soon as that can be written."""


class _DeletedError(OSError):
    """The file is open and has no name any more: what is written to it is gone when it is closed."""


class AppendFile:
    """Lines, appended in order and never changed: one system call for each, or for those of a time.

    A call that writes only the beginning is continued where it stopped, at once or when there is space again, so that
    no piece of a line is left in the middle of the file. What cannot be written waits, up to 64 KiB; then lines are
    dropped and counted.

    Args:
        path: The file.
        new: Whether it must not exist yet; else it must.
        on_error: ``"raise"`` a RunFileError, or ``"warn"`` once and go on, trying again every ten seconds.
        flush_seconds: How long lines may wait for others to be written with. 0: not at all.
        again: Lines to begin the file with if it was deleted and is made anew: called with the number of the first line
            that will follow.
        note: The line that says that some were dropped: called with their count, the number of the last one, and why.

    Raises:
        RunFileError: With ``on_error="raise"``: the file cannot be opened.
    """

    def __init__(
        self,
        path: str,
        *,
        new: bool,
        on_error: OnError = "raise",
        flush_seconds: float = 0.0,
        again: Callable[[int], list[bytes]],
        note: Callable[[int, int, str], bytes],
    ) -> None:
        self.path = path
        self.lost = 0  # in all
        self.trouble: str | None = None  # the latest reason why something could not be written; None: all is well
        self._new, self._on_error, self._every, self._again, self._note = new, on_error, flush_seconds, again, note
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None
        self._waiting: list[bytes] = []
        self._held = self._number = 0  # bytes that wait, number of the first line of them
        self._inside = False  # whether the first waiting one is the rest of a line
        self._dropped, self._last_dropped, self._why = 0, 0, ""
        self._since = self._retry = float("-inf")
        self._warned = False
        self._process = os.getpid()
        self._attempt(time.monotonic())

    def append(self, line: bytes, number: int) -> None:
        """Write a line, or keep it until it can be written, or count it as lost.

        Args:
            line: With its newline, and perhaps one in front that finishes what another writer left behind.
            number: One more than that of the line before.

        Raises:
            RunFileError: With ``on_error="raise"``.
        """
        if os.getpid() != self._process:  # a forked worker: the file belongs to the process that opened it
            return
        now = time.monotonic()
        if self._crowded(line):
            self._attempt(now)
        if self._crowded(line):
            self._dropped += 1
            self.lost += 1
            self._last_dropped = number
            return
        if not self._waiting:
            self._since = now
            self._number = number
        self._waiting.append(line)
        self._held += len(line)
        if now - self._since >= self._every:
            self._attempt(now)

    def flush(self) -> None:
        """Write now what waits."""
        if os.getpid() == self._process and (self._waiting or self._dropped):
            self._retry = float("-inf")
            self._attempt(time.monotonic())

    def sync(self) -> None:
        """Ask the system to bring the file to the disk."""
        if self._descriptor is not None and os.getpid() == self._process:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has nothing to synchronise
                    self._failed(error)

    def close(self) -> None:
        """Write what waits, if that is possible, and close the file."""
        try:
            self.flush()
            self.sync()
        finally:
            self.lost += len(self._waiting)
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None and self._still_ours(descriptor):
                os.close(descriptor)

    def _crowded(self, line: bytes) -> bool:
        return bool(self._dropped or (self._waiting and self._held + len(line) > HELD_BYTES))

    def _attempt(self, now: float) -> None:
        if now < self._retry:
            return
        try:
            self._ready()
            self._drain()
            if self._dropped:
                line = self._note(self._dropped, self._last_dropped, self._why)
                self._waiting, self._held, self._number = [line], len(line), self._last_dropped
                self._dropped = 0
                self._drain()
            self.trouble = None
        except OSError as error:
            self._retry = now + RETRY_SECONDS if self._on_error == "warn" else now
            self._failed(error)

    def _drain(self) -> None:
        while self._waiting:
            data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            assert self._descriptor is not None  # _ready has seen to it
            written = os.write(self._descriptor, data)
            if written == len(data):
                self._waiting, self._held, self._inside = [], 0, False
                return
            self._held -= written
            while written >= len(self._waiting[0]):
                written -= len(self._waiting.pop(0))
                self._number += 1
                self._inside = False
            if written:
                self._waiting[0] = self._waiting[0][written:]
                self._inside = True

    def _ready(self) -> None:
        """See to it that the descriptor leads to our file, under a name."""
        if self._descriptor is not None:
            try:
                found = os.fstat(self._descriptor)
            except OSError:  # somebody closed it
                self._descriptor = None
            else:
                if (found.st_dev, found.st_ino) != self._identity:  # closed, and the number given to another file
                    self._descriptor = None
                elif found.st_nlink:
                    return
                else:
                    self._renew()
                    return
        if self._identity is None:
            self._open(new=self._new)
            return
        try:
            self._open(new=False)
        except FileNotFoundError:
            self._renew()

    def _open(self, *, new: bool) -> None:
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0)
        descriptor = os.open(self.path, flags, 0o644)
        found = os.fstat(descriptor)
        identity = (found.st_dev, found.st_ino)
        if not new and self._identity not in (None, identity):
            os.close(descriptor)
            raise FileExistsError(errno.EEXIST, "another file has taken its place")
        self._descriptor, self._identity = descriptor, identity

    def _renew(self) -> None:
        """Begin anew after the file was deleted; what was in it is gone."""
        if self._on_error == "raise":
            raise _DeletedError(errno.ENOENT, "it was deleted while it was written")
        self._warn(
            f"log {self.path!r} was deleted while it was written: what it held is lost. It is begun anew, as often as "
            "that happens; this is not said again. To stop the log, close its monitor."
        )
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
        self._open(new=True)
        if self._inside:  # the beginning of that line went with the file
            self._held -= len(self._waiting.pop(0))
            self._number += 1
            self._inside = False
        following = self._number if self._waiting else self._last_dropped + 1 - self._dropped
        lines = self._again(following)
        self._waiting = lines + [line.lstrip(b"\n") for line in self._waiting]
        self._held = sum(map(len, self._waiting))
        self._number = following - len(lines)

    def _still_ours(self, descriptor: int) -> bool:
        try:
            found = os.fstat(descriptor)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def _failed(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        self.trouble = self._why = reason
        advice = _ADVICE.get(error.errno or 0, "Check the disk")
        if self._on_error == "raise":
            what = "created" if self._identity is None and self._new else "written"
            raise RunFileError(f"log {self.path!r} cannot be {what}: {reason}. {advice}.") from error
        self._warn(
            f"log {self.path!r} cannot be written: {reason}. Training goes on; {HELD_BYTES // 1024} KiB of records "
            f"wait in memory, others are lost and counted. {advice}: every {RETRY_SECONDS:.0f} s it is tried again, "
            "and then the log says how many are missing. This is not said again."
        )

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, RunFileWarning, stacklevel=2)
