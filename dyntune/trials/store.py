"""Where outcomes are kept: in memory, or in an Optuna storage that survives a kill and that machines can share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from dyntune.errors import MissingDependencyError
from dyntune.trials.outcome import Key, Outcome

__all__ = ["Memory", "OptunaStudy", "Store"]


class Store(Protocol):
    """What :class:`dyntune.trials.trials.Trials` asks of a store."""

    def read(self) -> tuple[dict[Key, Outcome], set[Key]]:
        """Outcomes by trial, and the trials that were begun elsewhere and have none yet."""

    def begin(self, key: Key) -> None:
        """Note that a trial begins here."""

    def record(self, key: Key, outcome: Outcome) -> None:
        """Keep the outcome of a trial that began here."""


class Memory:
    """Outcomes of this process alone."""

    def __init__(self) -> None:
        self._outcomes: dict[Key, Outcome] = {}

    def read(self) -> tuple[dict[Key, Outcome], set[Key]]:
        """See :class:`Store`."""
        return dict(self._outcomes), set()

    def begin(self, key: Key) -> None:
        """See :class:`Store`."""

    def record(self, key: Key, outcome: Outcome) -> None:
        """See :class:`Store`."""
        self._outcomes.setdefault(key, outcome)


class OptunaStudy:
    """Outcomes in a study of an Optuna storage: one Optuna trial each, with the point and the seed as its parameters.

    Args:
        storage: Path of a journal file, made where there is none, or an ``optuna.storages.BaseStorage``.
        name: Of the study; the same for all who share it, and another for every other set of trials.

    Raises:
        MissingDependencyError: Optuna is not installed.
    """

    def __init__(self, storage: Any, name: str) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise MissingDependencyError(
                f"storage={storage!r} needs Optuna, which is not installed: pip install 'dyntune[search]', or leave "
                "storage out and keep the trials in memory."
            ) from error
        self._optuna = optuna
        if isinstance(storage, (str, os.PathLike)):
            storage = optuna.storages.JournalStorage(JournalFileBackend(os.fspath(storage)))
        with self._quiet():
            # The sampler is never asked: every parameter has one possible value. This one leaves NumPy's state alone.
            self._study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, sampler=optuna.samplers.RandomSampler(seed=0)
            )
        self._own: dict[Key, Any] = {}
        self._outcomes: dict[Key, Outcome] = {}

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Optuna announces on stderr every study that is made or found."""
        before = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(max(before, self._optuna.logging.WARNING))
        try:
            yield
        finally:
            self._optuna.logging.set_verbosity(before)

    def read(self) -> tuple[dict[Key, Outcome], set[Key]]:
        """See :class:`Store`; of two outcomes of one trial the one that was seen first stays."""
        running = set()
        own = {trial.number for trial in self._own.values()}
        for trial in self._study.get_trials(deepcopy=False):
            if not {"point", "seed"} <= trial.params.keys():
                continue  # begun a moment ago, or of somebody else's making
            key = (float(trial.params["point"]), int(trial.params["seed"]))
            if trial.state.is_finished() and "outcome" in trial.user_attrs:
                self._outcomes.setdefault(key, Outcome(**trial.user_attrs["outcome"]))
            elif not trial.state.is_finished() and trial.number not in own:
                running.add(key)
        return dict(self._outcomes), running - self._outcomes.keys()

    def begin(self, key: Key) -> None:
        """See :class:`Store`."""
        trial = self._study.ask()
        point, seed = key
        trial.suggest_float("point", point, point)
        trial.suggest_int("seed", seed, seed)
        self._own[key] = trial

    def record(self, key: Key, outcome: Outcome) -> None:
        """See :class:`Store`."""
        trial = self._own.pop(key)
        trial.set_user_attr("outcome", asdict(outcome))
        if outcome.result is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        loss = float(outcome.result.get("loss", 0.0))
        self._study.tell(trial, math.inf if math.isnan(loss) else loss)  # Optuna takes NaN for a failure
