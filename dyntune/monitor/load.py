"""Reading a recorded run from its file or, of a job of several processes, from theirs: :func:`load_run`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dyntune.errors import RunFileError
from dyntune.monitor.ranks import open_run_file, rank_in_name, run_files
from dyntune.monitor.reader import Reader, read_lines
from dyntune.monitor.run import Run

__all__ = ["check_is_run", "load_run"]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a recorded run, also of a writer that was killed or is still at it.

    A record that was cut short is dropped, a bad line set aside and counted; every other record is kept. Where the
    training was resumed from a checkpoint, steps that were made twice count as the later attempt made them; the earlier
    rows are in ``superseded``.

    Args:
        path: The JSONL file; the path that was given to a job of several processes, ``run.jsonl`` for
            ``run.rank0.jsonl`` and so on; a folder that holds one run; or a pattern such as ``"logs/run.rank*.jsonl"``.

    Returns:
        The run; ``torn``, ``quarantined``, ``gaps`` and ``lost`` say what is missing. Of several processes, that of
        rank 0, or of the lowest rank there is; ``ranks`` holds the runs of all of them, ``missing``, ``short`` and
        ``unreadable`` what is wrong with their files.

    Raises:
        RunFileError: No such file, no record in it, one written by a newer version of the format, or files or records
            of different runs.

    Cost:
        About 30 bytes of memory for each number that was measured, at the most, and one pass over the file.
    """
    files = run_files(path)
    if len(files) == 1 and files[0] == Path(path):
        return _read(files[0])
    return _merged(files, str(path))


def check_is_run(reader: Reader, file: Path) -> None:
    """See that a reader has found a record in the file.

    Raises:
        RunFileError: It has not.
    """
    if not reader.records - reader.unknown:
        raise RunFileError(
            f"{str(file)!r} is not a recorded run: none of its {len(reader.bad) + reader.torn} lines is a record (the "
            f"first: {reader.bad[0].reason if reader.bad else 'empty or cut short'})."
        )


def _read(file: Path) -> Run:
    reader = read_lines(open_run_file(file))
    check_is_run(reader, file)
    return reader.run(path=str(file))


def _merged(files: list[Path], path: str) -> Run:
    ranks: dict[int, Run] = {}
    unreadable: dict[str, str] = {}
    for file in files:
        try:
            run = _read(file)
        except RunFileError as error:
            unreadable[file.name] = str(error)
            continue
        named = rank_in_name(file)
        rank = named if run.id is None and named is not None else run.rank
        if rank in ranks:
            raise RunFileError(
                f"{file.name!r} and {Path(ranks[rank].path or '').name!r} are both of rank {rank}: two runs, or a "
                "copy. Give the files of one run."
            )
        ranks[rank] = run
    if not ranks:
        raise RunFileError(f"{path!r}: none of {len(files)} files is a recorded run. {next(iter(unreadable.values()))}")
    ids = {run.id for run in ranks.values()} - {None}
    if len(ids) > 1:
        raise RunFileError(
            f"{path!r} matches files of {len(ids)} different runs ({', '.join(sorted(map(repr, ids)))}). Give the "
            "files of one of them."
        )
    ranks = dict(sorted(ranks.items()))
    world = max(max(run.world for run in ranks.values()), max(ranks) + 1)
    lead = next(iter(ranks.values()))
    return dataclasses.replace(
        lead,
        rank=next(iter(ranks)),
        world=world,
        ranks=ranks,
        missing=tuple(rank for rank in range(world) if rank not in ranks),
        unreadable=unreadable,
        path=path,
    )
