"""Many short trainings, each a point and a seed: :class:`Trials`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from dyntune.errors import InvalidArgumentError
from dyntune.trials.outcome import Key, Outcome, TrialFunction, tried
from dyntune.trials.store import Memory, OptunaStudy, Store
from dyntune.trials.workers import Workers

__all__ = ["Trials"]


class Trials:
    """A function run at many (point, seed), each once; a context manager.

    With a `storage` every outcome is recorded as it comes. A set of trials that was killed goes on where it stopped;
    several processes or machines that ask the same storage for the same trials share them: each first takes those that
    nobody has begun. Nobody waits for another, who may have been killed: in the end a trial may be run twice, and the
    outcome that a participant read first counts for it.

    A trial that raises, or whose process dies, is a failure with its reason, recorded like any other outcome and not
    tried again. A trial that never ends is waited for.

    Args:
        function: ``(point, seed) -> mapping`` of JSON types, a function of its arguments alone. With `workers` it has
            to be picklable.
        workers: Spawned processes of one thread each; 0 runs in this process. The results are the same bits where this
            process computes with one thread, too.
        storage: Path of an Optuna journal file (on a file system that the machines share), or an Optuna storage; None
            keeps outcomes in memory and needs no Optuna.
        name: Of the study in `storage`. It has to name what the function computes: trials of that name are believed.

    Raises:
        InvalidArgumentError: A negative number of workers, or a function that cannot be sent to them.
        MissingDependencyError: `storage` without Optuna.

    Example:
        >>> with Trials(lambda point, seed: {"loss": (point - 2) ** 2 + seed}) as trials:
        ...     found = trials.run([(1.0, 0), (2.0, 0)])
        >>> found[1.0, 0].result
        {'loss': 1.0}
    """

    def __init__(
        self, function: TrialFunction, *, workers: int = 0, storage: Any = None, name: str = "dyntune trials"
    ) -> None:
        if workers < 0:
            raise InvalidArgumentError(f"workers={workers}: give a number of processes, or 0 for none but this one.")
        self._function = function
        self._workers = Workers(function, workers) if workers else None
        self._store: Store = Memory() if storage is None else OptunaStudy(storage, name)
        self._open = ExitStack()

    def __enter__(self) -> Trials:
        if self._workers is not None:
            self._open.enter_context(self._workers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def run(self, asked: Sequence[Key]) -> dict[Key, Outcome]:
        """Outcomes of the trials, in the order asked; those that are known are not run again.

        Args:
            asked: Points and seeds.

        Raises:
            InvalidArgumentError: No process can be started with the function.
            KeyboardInterrupt: Ctrl-C; no process is left behind, and what was recorded stays.
        """
        wanted = list(dict.fromkeys(asked))
        begun: set[Key] = set()

        def take() -> Key | None:
            known, elsewhere = self._store.read()
            left = [key for key in wanted if key not in known and key not in begun]
            if not left:
                return None
            key = min(left, key=elsewhere.__contains__)  # the first that nobody else is at
            begun.add(key)
            self._store.begin(key)
            return key

        known, _ = self._store.read()
        if any(key not in known for key in wanted):  # processes are started only for something to do
            self._run(take, self._store.record)
            known, _ = self._store.read()
        return {key: known[key] for key in wanted}

    def _run(self, take: Callable[[], Key | None], done: Callable[[Key, Outcome], None]) -> None:
        if self._workers is not None:
            self._workers.run(take, done)
            return
        while (key := take()) is not None:
            done(key, tried(self._function, key))
