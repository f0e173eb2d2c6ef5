"""An exception at the first line of every function of ours that a monitored training enters, one after the other.

With ``on_error="raise"`` that ends training, and its state is that of the place where it stood.
"""

from __future__ import annotations

import dis
import itertools
import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch

import dyntune
from dyntune.monitor.breaker import MonitorWarning
from dyntune.monitor.sink import SinkWarning
from tests.monitor.training import Training
from tests.neutrality.faults import PACKAGE, InjectedError, spread
from tests.neutrality.state import values
from tests.objective.snapshot import changes

RESUME = dis.opmap["RESUME"]
# One burst takes twelve steps from the third on; what it makes possible needs one more.
STEPS = 14
# What hands a call on to the monitor's guards: by the time that these run, nobody can catch anything for training yet.
DOORS = ("/monitor/hooks.py", "/monitor/watching.py")
# Called by the guards themselves when they are through; see the last tests.
UNGUARDED = "Budget.book"


class UnforeseenError(Exception):
    """Of no kind that anybody catches by name."""


# By what the monitor is told to do with errors: at which entry of a function, and what is raised.
MODES: dict[str, tuple[int, Callable[[], Exception]]] = {
    "warn": (1, lambda: InjectedError("injected")),
    "disable": (3, lambda: torch.OutOfMemoryError("injected: out of memory")),
    "raise": (1, lambda: UnforeseenError("injected")),
}


class Sink:
    """Takes everything."""

    def write(self, *_: Any) -> None:
        """Take it."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass
class Marked(Training):
    """Counts the places of the loop that it comes by, so that its state can be compared with another's at the same one.

    Args:
        keep: Whether the state at every place is kept.
        tell: Whether the batch and its parts are told with ``observe`` instead of ``watch``.
    """

    steps: int = STEPS
    keep: bool = False
    tell: bool = False
    states: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.place = -1
        # The monitor's hooks are registered later, and so run later; a scaler unscales before both.
        self.hooks = [
            self.opt.register_step_pre_hook(lambda *_: self.mark()),
            self.opt.register_step_post_hook(lambda *_: self.mark()),
        ]
        self.mark()

    def mark(self) -> None:
        self.place += 1
        if self.keep:
            self.states.append(values(self.model, self.opt))

    def loop(self, monitor: dyntune.Monitor | None = None, steps: int | None = None) -> None:
        if not self.tell or monitor is None:
            super().loop(monitor, steps)
            return
        for i, batch in enumerate(self.batches[: self.steps * self.accumulate]):
            parts = list(zip(*(tensor.split(8) for tensor in batch), strict=True))
            monitor.observe(batch=batch, microbatches=parts)
            self._batch(i, batch, monitor)

    def _step(self) -> None:
        self.mark()  # gradients are there
        super()._step()
        self.mark()  # and gone


CASES: dict[str, Callable[..., Marked]] = {
    "watched": Marked,
    "told, scaled, accumulated": lambda **more: Marked(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        scaler=torch.amp.GradScaler("cpu", init_scale=64.0),
        accumulate=2,
        observe="before",
        tell=True,
        **more,
    ),
    "lost": lambda **more: Marked(optimizer=lambda p: torch.optim.SGD(p, lr=1e20), **more),
}


class Watch:
    """Sees every entry of a Python function of dyntune's.

    Args:
        target: The function at whose `at`-th entry `error` is raised; None: none.
    """

    def __init__(self, target: CodeType | None = None, at: int = 0, error: Callable[[], Exception] = Exception) -> None:
        self.target, self.at, self.error = target, at, error
        self.entries: Counter[CodeType] = Counter()
        self.callers: defaultdict[CodeType, set[CodeType]] = defaultdict(set)

    @property
    def fired(self) -> bool:
        return self.target is not None and self.entries[self.target] >= self.at

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or (self.target is not None and code is not self.target):
            return
        # Generators that go on are no entry; the interpreter lets nothing be caught where one is thrown into.
        if not code.co_filename.startswith(PACKAGE) or code.co_code[frame.f_lasti] != RESUME:
            return
        self.entries[code] += 1
        if self.target is None:
            if frame.f_back is not None:
                self.callers[code].add(frame.f_back.f_code)
        elif self.entries[code] == self.at:
            raise self.error()

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def place(code: CodeType) -> str:
    return f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_firstlineno} {code.co_qualname}"


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        warnings.simplefilter("ignore", SinkWarning)
        yield


def seed_all(seed: int) -> None:
    """Every global generator: other tests leave them in other states."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def trained(case: str, watch: Watch, on_error: Any, folder: Path) -> tuple[Marked, BaseException | None]:
    """A monitored training with a log and a sink, and what came out of it."""
    log = folder / "run.jsonl"
    log.unlink(missing_ok=True)
    training, found = CASES[case](), None
    seed_all(5)
    monitor = training.monitored(on_error=on_error, log=log, sinks=[Sink()])
    try:
        with watch.watching(), monitor:
            training.loop(monitor)
    except Exception as error:
        found = error
    monitor.close()
    return training, found


@cache
def states(case: str) -> list[dict[str, Any]]:
    """Of the same training without a monitor, at every place."""
    seed_all(5)
    with quiet():
        training = CASES[case](keep=True)
        training.loop()
    return training.states


@cache
def sites(case: str, folder: Path) -> dict[CodeType, int]:
    """Functions of ours that a monitored training enters and no earlier case does, with how often."""
    watch = Watch()
    with quiet():
        trained(case, Watch(), "warn", folder)  # what is imported or cached at the first
        _, error = trained(case, watch, "warn", folder)
    assert error is None
    before = list(itertools.takewhile(lambda name: name != case, CASES))
    known = {code for name in before for code in sites(name, folder)}
    return {
        code: count
        for code, count in watch.entries.items()
        if code not in known and not code.co_qualname.startswith(UNGUARDED) and not is_door(code, watch.callers[code])
    }


def is_door(code: CodeType, callers: set[CodeType]) -> bool:
    """What training itself calls, or hands on such a call without doing anything."""
    handed = any(caller.co_filename.removeprefix(PACKAGE) in DOORS for caller in callers)
    public = code.co_qualname.startswith("Monitor.") and hasattr(dyntune.Monitor, code.co_name)
    outside = public and (code.co_name[0] != "_" or code.co_name in ("__enter__", "__exit__"))
    return handed or outside or code.co_filename.removeprefix(PACKAGE) in DOORS


def broken(case: str, on_error: str, code: CodeType, folder: Path) -> tuple[bool, list[str]]:
    """Whether the function was entered that often, and what is not as it should be."""
    at, error = MODES[on_error]
    watch = Watch(code, at, error)
    with quiet():
        training, found = trained(case, watch, on_error, folder)
        state = values(training.model, training.opt)
        expected = states(case)  # trains at its first call, so the random state was read before
        wrong = changes(expected[training.place], state)
    if on_error != "raise" and found is not None:
        wrong.append(f"training was ended by {found!r}")
    if on_error == "raise" and watch.fired and not isinstance(found, UnforeseenError):
        wrong.append(f"swallowed, and {found!r} came out")
    if found is None and training.place != len(expected) - 1:
        wrong.append("training went another way")
    for ours in training.hooks:
        ours.remove()
    if training.opt._optimizer_step_pre_hooks or training.opt._optimizer_step_post_hooks:
        wrong.append("hooks are left")
    return watch.fired, [f"{on_error}, entry {at} of {place(code)}: {what}" for what in wrong]


def swept(case: str, on_error: str, folder: Path, count: int | None = None) -> tuple[int, int, list[str]]:
    """How many were tried, how many of these were reached, and what went wrong."""
    at = MODES[on_error][0]
    codes = [code for code, entries in sites(case, folder).items() if entries >= at]
    if on_error != "warn":  # what the monitor calls is below its guards, whatever it was told: a third of it will do
        own = [code for code in codes if code.co_filename.startswith(f"{PACKAGE}/monitor/")]
        codes = own + [code for code in codes if code not in own][::3]
    chosen = [codes[k - 1] for k in spread(len(codes), count)]
    results = [broken(case, on_error, code, folder) for code in chosen]
    return len(chosen), sum(fired for fired, _ in results), [text for _, wrong in results for text in wrong]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("on_error", MODES)
def test_at_some_functions(on_error: str, folder: Path) -> None:
    tried, reached, wrong = swept("watched", on_error, folder, 12)
    assert wrong == []
    assert (tried, reached) == (12, 12)


@pytest.mark.slow
@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("case", CASES)
def test_at_every_function(case: str, on_error: str, folder: Path) -> None:
    tried, reached, wrong = swept(case, on_error, folder)
    assert wrong == []
    # The clock decides some calls; nearly all of what is entered once is entered again.
    assert tried - reached <= max(2, 0.05 * tried)
    if case == "watched":
        assert tried > (300 if on_error == "warn" else 100)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_when_the_guards_themselves_cannot_count(at: int, folder: Path) -> None:
    watch = Watch()
    with quiet():
        trained("watched", watch, "warn", folder)
        codes = [code for code in watch.entries if code.co_qualname.startswith(UNGUARDED)]
        ended = [trained("watched", Watch(code, at, InjectedError), "warn", folder)[1] for code in codes]
    assert codes != []
    assert ended == [None] * len(codes)


class Unsized:
    """A loader that training can iterate over and whose length nobody may ask."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        raise NotImplementedError("a stream")


class BrokenTerminal:
    """A terminal that was closed while training goes on."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def fetched(loader: Any) -> list[Any]:
    training, found = Training(steps=1), []
    with training.monitored(on_error="warn") as monitor, quiet():
        found.extend(batch for batch in monitor.watch(loader))  # list(...) would ask for a length of its own
    return found


def test_a_loader_whose_length_cannot_be_asked() -> None:
    assert fetched(Unsized([1, 2, 3])) == [1, 2, 3]


def test_a_stream_gives_no_other_warnings_than_without_a_monitor() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        """Longer than it says: torch warns of that, once somebody has asked."""

        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

        def __len__(self) -> int:
            return 3

    def seen(monitored: bool) -> tuple[list[Any], list[str]]:
        loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            found = fetched(loader) if monitored else [*iter(loader)]
        return found, [str(each.message) for each in given]

    assert seen(True) == seen(False)


def test_a_progress_bar_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", BrokenTerminal())
    assert fetched([1, 2, 3]) == [1, 2, 3]
