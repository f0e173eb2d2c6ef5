"""One file per process: names of the files, and finding those of a run."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from dyntune.errors import InvalidArgumentError, RunFileError

__all__ = ["file_of_rank", "open_run_file", "rank_in_name", "run_files"]

_RANK = re.compile(r"(?P<stem>.*)\.rank(?P<rank>\d{1,6})")


def file_of_rank(path: str | os.PathLike[str], rank: int, world: int) -> Path:
    """The file that a process writes: the path itself where it is the only one.

    Raises:
        InvalidArgumentError: A rank that is none of 0 .. world - 1.

    Example:
        >>> file_of_rank("run.jsonl", 3, 8).name, file_of_rank("run.jsonl", 0, 1).name
        ('run.rank3.jsonl', 'run.jsonl')
    """
    if not 0 <= rank < world:
        raise InvalidArgumentError(f"rank={rank} of world={world}: ranks are 0 .. world - 1.")
    path = Path(path)
    return path if world == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def rank_in_name(path: Path) -> int | None:
    """The rank that a file name speaks of."""
    found = _RANK.fullmatch(path.stem)
    return None if found is None else int(found["rank"])


def open_run_file(path: Path) -> Iterator[bytes]:
    """Lines of a file with their newlines, one at a time.

    Raises:
        RunFileError: It cannot be read, or is no ordinary file: a device may never end, a pipe never begin.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunFileError(f"run {str(path)!r} is no ordinary file. Give the path of a .jsonl file or a folder.")
        with path.open("rb") as file:
            yield from file
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, RunFileError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunFileError(f"run {str(path)!r} cannot be read: {reason}. Check the path.") from error


def run_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a run: one, or one for each process.

    Args:
        path: A file; the path that the processes were given, of which each made its own; a folder; or a pattern.

    Raises:
        RunFileError: There are none, or those of several runs in the folder.
    """
    given = Path(path)
    try:
        folder, there = given.is_dir(), given.exists()
    except (OSError, ValueError):  # too long, or a NUL: open_run_file says so
        return [given]
    if folder:
        return _of_one_run(given)
    if there:
        return [given]
    beside = given.parent.glob(f"{glob.escape(given.stem)}.rank*{glob.escape(given.suffix)}")
    found = [file for file in beside if rank_in_name(file) is not None]
    if not found:
        found = [Path(name) for name in glob.glob(str(given)) if Path(name).is_file()]
    return sorted(found) or [given]


def _of_one_run(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.jsonl") if file.is_file())
    if not files:
        raise RunFileError(f"folder {str(folder)!r} holds no .jsonl file: no run was recorded there. Check the path.")
    stems = {_stem(file): file for file in files}
    if len(stems) > 1:
        names = ", ".join(sorted(f"{stem}.jsonl" for stem in stems))
        raise RunFileError(f"folder {str(folder)!r} holds several runs ({names}). Give the path of one of them.")
    return files


def _stem(file: Path) -> str:
    found = _RANK.fullmatch(file.stem)
    return file.stem if found is None else found["stem"]
