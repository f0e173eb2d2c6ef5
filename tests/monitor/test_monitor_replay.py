"""``Monitor(..., replay=K)``: alerts are explained by replaying the last steps, and training does not notice."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.alerts import Alert
from dyntune.monitor.breaker import MonitorWarning
from dyntune.monitor.budget import Budget
from dyntune.monitor.replayed import Explaining
from dyntune.monitor.rows import Rows
from dyntune.monitor.run import Event, Run
from dyntune.replay.answering import Answering
from dyntune.replay.ring import Ring
from tests.monitor.training import Training
from tests.neutrality.faults import ERRORS, SITES, Fuse, InjectedError, spread
from tests.neutrality.state import values
from tests.objective.snapshot import changes
from tests.replay.loops import CE, Batch, images, mlp, plain_mlp, seeded


class Prompt(Budget):
    """Steps are written out, and looked at by detectors, at every step; nothing is measured."""

    interval = 1

    def affords(self, kind: str, *, share: float) -> bool:
        return False


class At:
    """Raises an alert at some steps."""

    def __init__(
        self, *steps: int, severity: Literal["critical", "warning"] = "critical", since: int | None = None
    ) -> None:
        self.steps, self.severity, self.since = steps, severity, since

    def update(self, rows: Rows) -> Iterable[Alert]:
        for step in rows.steps.tolist():
            if step in self.steps:
                yield Alert(kind="mine", severity=self.severity, step=step, text="look.", advice="", since=self.since)


def train(
    batches: Sequence[Batch],
    *,
    jump: tuple[int, float] = (-1, 1.0),
    watch: bool = True,
    stop: type[BaseException] | None = None,
    make: Any = plain_mlp,
    accumulate: int = 1,
    **options: Any,
) -> Run:
    """Train as users do; `jump` is a step and the factor on the learning rate, `stop` is raised at a loss of NaN."""
    model = seeded(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    monitor = dyntune.Monitor(model, optimizer, criterion=CE, accumulate=accumulate, on_error="raise", **options)
    monitor._session.budget = Prompt(monitor.overhead)
    try:
        with monitor:
            for index, batch in enumerate(monitor.watch(batches, progress=False) if watch else batches):
                if index == jump[0]:
                    optimizer.param_groups[0]["lr"] *= jump[1]
                loss = CE(model(batch[0]), batch[1])
                if stop is not None and torch.isnan(loss):
                    monitor.observe(loss.detach())
                    raise stop
                (loss / accumulate).backward()
                monitor.observe(loss.detach(), batch=None if watch else batch)
                if (index + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    except (FloatingPointError, KeyboardInterrupt):
        pass
    return monitor.run


def named(run: Run, name: str) -> list[Event]:
    return [event for event in run.events if event.name == name]


def blind(run: Run) -> list[str]:
    return [event.detail["reason"] for event in named(run, "blind") if event.detail["signal"] == "replay"]


def poisoned(count: int, at: int) -> list[Batch]:
    """One entry of one batch is no number."""
    batches = images(count)
    batches[at][0][0, 0, 0, 0] = torch.nan
    return batches


# -- what it finds -----------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_jumps_is_named() -> None:
    """By the default detectors, some time later; the window reaches back to before it."""
    run = train(images(500), jump=(300, 30.0), replay=256)
    (found,) = named(run, "explained")
    first, last = found.detail["window"]
    assert first < 300 < found.detail["alert"]["step"] < last == found.step
    assert found.detail["alert"]["severity"] == "critical"
    assert found.detail["cause"] == "lr too high"
    first, *_ = [row for row in found.detail["evidence"] if row["averts"]]
    assert first["change"] == "learning rate held where it was"
    assert "began at step" not in found.detail["text"]


def test_a_window_that_begins_after_the_trouble_says_so() -> None:
    since = 100
    run = train(images(200), replay=16, detectors=[At(150, since=since)])
    (found,) = named(run, "explained")
    first, _ = found.detail["window"]
    assert first > since
    assert f"The trouble began at step {since}, and the window only at step {first}" in found.detail["text"]
    assert "larger replay=K" in found.detail["text"]


def test_a_batch_of_nan_is_named() -> None:
    """It is left out and all is well; the answer does not wait."""
    run = train(poisoned(200, 180), replay=32)
    (found,) = named(run, "explained")
    assert found.step == 182
    assert found.detail["verdict"] == "averted"
    assert found.detail["cause"] == "bad batches"
    assert "batch of step 180 left out" in found.detail["text"]


def test_a_run_that_ends_with_an_alert_gets_its_answer_at_the_end() -> None:
    """Eight steps are waited for; where fewer come, what there is has to do."""
    for steps, answered in ((200, 190), (184, 183)):
        run = train(poisoned(steps, 180), replay=32, detectors=[At(181)])
        (found,) = named(run, "explained")
        assert found.step == answered
        assert found.detail["cause"] == "bad batches"


def test_a_batch_that_nothing_came_after_is_no_number_by_itself() -> None:
    """No step follows by which a change could show, but the parameters never saw it."""
    run = train(poisoned(200, 180), replay=32, stop=FloatingPointError, detectors=[At(179)])
    assert named(run, "explained")[0].detail["verdict"] == "nothing_to_avert"
    run = train(poisoned(181, 180), replay=32)
    (found,) = named(run, "explained")
    assert found.detail["verdict"] == "batches"
    assert "That of step 180" in found.detail["text"]


def test_a_batch_that_is_changed_after_it_was_fetched_is_not_made_again() -> None:
    """The loop saw NaN and the replay does not: it says so, rather than that all was well."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    with dyntune.Monitor(model, optimizer, criterion=CE, replay=16, detectors=[At(31)]) as monitor:
        monitor._session.budget = Prompt(0.02)
        for index, (x, y) in enumerate(monitor.watch(images(40), progress=False)):
            if index == 30:
                x[0] = torch.nan
            loss = CE(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.observe(loss)
    (found,) = named(monitor.run, "explained")
    assert found.detail["verdict"] == "not_reproduced"


@pytest.mark.parametrize("loss_after", [True, False])
def test_the_ring_is_begun_once(loss_after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a loop of which the step is the first that is known."""
    made, inner = [], Answering.__init__

    def counted(self: Answering, *args: Any, **options: Any) -> None:
        made.append(options["number"])
        inner(self, *args, **options)

    monkeypatch.setattr(Answering, "__init__", counted)
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    with dyntune.Monitor(model, optimizer, criterion=CE, replay=8) as monitor:
        for x, y in images(20):
            loss = CE(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loss_after:
                monitor.observe(loss)
    assert made == [0]


def test_ctrl_c_is_not_kept_waiting() -> None:
    about: Any = {"replay": 32, "detectors": [At(178)], "stop": KeyboardInterrupt}
    assert len(named(train(poisoned(200, 180), **about), "explained")) == 0
    assert len(named(train(poisoned(200, 180), **about | {"stop": FloatingPointError}), "explained")) == 1


def test_batches_that_are_told_are_as_good_as_watched_ones() -> None:
    """Also where several make a step, each with a dropout mask of its own."""
    run = train(images(300), watch=False, make=mlp, accumulate=2, replay=32, detectors=[At(100)])
    (found,) = named(run, "explained")
    assert found.detail["verdict"] == "nothing_to_avert"
    assert found.detail["alert"] == {"kind": "mine", "step": 100, "severity": "critical"}


def test_warnings_are_answered_as_long_as_the_share_lasts() -> None:
    """The first in any case; critical alerts always."""
    for severity, count in (("warning", 1), ("critical", 2)):
        run = train(images(260), replay=32, overhead=0.0, detectors=[At(100, 200, severity=severity)])
        assert len(named(run, "explained")) == count
    run = train(images(260), replay=32, overhead=0.999, detectors=[At(100, 200, severity="warning")])
    assert len(named(run, "explained")) in (1, 2)  # by the clock


def test_a_healthy_run_has_nothing_to_explain() -> None:
    run = train(images(300), replay=32)
    assert named(run, "alert") == named(run, "explained") == []
    assert blind(run) == []


def test_what_it_takes_is_on_its_own_account() -> None:
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    with dyntune.Monitor(model, optimizer, criterion=CE, replay=16, detectors=[At(40)]) as monitor:
        monitor._session.budget = budget = Prompt(0.02)
        for x, y in monitor.watch(images(60), progress=False):
            CE(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert 0.0 < budget.kinds["replay"] < budget.spent
    assert monitor.run.provenance["replay"] == 16


# -- what it leaves alone ----------------------------------------------------------------------------------------------


def pair(detectors: Any = "default", **about: Any) -> tuple[Training, Training, dyntune.Monitor]:
    """A training without replays and one with them, both monitored all the time, from the same random state."""
    without, watched = Training(**about), Training(**about)
    state = torch.get_rng_state()
    without.loop()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with watched.monitored(replay=16, detectors=detectors) as monitor:
        watched.loop(monitor)
    assert torch.equal(after, torch.get_rng_state())
    return without, watched, monitor


@pytest.mark.parametrize("observe", ["before", "after"])
@pytest.mark.parametrize("alerts", [(), (40, 80)], ids=["healthy", "alerted"])
def test_training_is_the_same_bits(alerts: tuple[int, ...], observe: str) -> None:
    """BatchNorm, dropout, Adam; replays in between run the model."""
    without, watched, monitor = pair(detectors=[At(*alerts)], observe=observe)
    assert changes(values(without.model, without.opt), values(watched.model, watched.opt)) == []
    assert without.losses == watched.losses
    assert len(named(monitor.run, "explained")) == len(alerts)
    assert {e.detail["verdict"] for e in named(monitor.run, "explained")} <= {"nothing_to_avert"}


def test_off_by_default() -> None:
    training = Training(steps=3)
    with training.monitored() as monitor:
        training.loop(monitor)
    assert monitor._replay is None
    assert "replay" not in monitor.run.provenance
    assert "replay" not in monitor._session.budget.kinds


def test_hooks_of_the_user_can_tell() -> None:
    training = Training(steps=60)
    seen: list[bool] = []
    with training.monitored(replay=16, detectors=[At(40)]) as monitor:
        monitor._session.budget = Prompt(0.9)
        training.model.register_forward_hook(lambda *_: seen.append(monitor.is_probing))
        training.loop(monitor)
    assert seen.count(False) == 60
    assert seen.count(True) > 2 * 8  # unchanged and surveyed at the least


# -- what goes wrong in it ---------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Training:
    """Trained with one method that fails; `training.monitor` saw it."""

    def fails(*_: Any, **__: Any) -> None:
        raise InjectedError("injected")

    monkeypatch.setattr(owner, name, fails)
    bare, training = Training(), Training()
    state = torch.get_rng_state()
    bare.loop()
    torch.set_rng_state(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        monitor = training.monitored(replay=16, detectors=[At(40, 60, 80, 100)], on_error="warn")
        with monitor:
            training.loop(monitor)
    assert changes(values(bare.model, bare.opt), values(training.model, training.opt)) == []
    training.monitor = monitor  # type: ignore[attr-defined]
    return training


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Answering, "answer"),
        (Answering, "after_step"),
        (Answering, "alarm"),
        (Ring, "fetched"),
        (Ring, "observed"),
        (Ring, "before_step"),
        (Ring, "__init__"),
    ],
)
def test_its_errors_are_the_monitors(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Three, and it is off: training is the same, the record says why, and all else is still recorded."""
    run = failing(monkeypatch, owner, name).monitor.run  # type: ignore[attr-defined]
    assert [e.detail["where"] for e in named(run, "error")] == ["replay"] * 3
    assert [e.detail["part"] for e in named(run, "disabled")] == ["replay"]
    assert blind(run) == ["it failed with InjectedError: injected"]
    assert named(run, "explained") == []
    assert run.series("train/loss")[1].size == 120


def cut_short(site: str, count: int) -> int:
    """Cut a training with replays short at each of some calls within them; how many were reached."""

    def injected(fuse: Fuse) -> Training | BaseException:
        training = Training(steps=60)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MonitorWarning)
            monitor = training.monitored(replay=16, detectors=[At(30, 52)], on_error="warn")
            monitor._session.budget = Prompt(0.9)
            inner = Explaining._answer

            def fused(self: Explaining, kept: Answering) -> None:
                with SITES[site](fuse):
                    inner(self, kept)

            Explaining._answer = fused  # type: ignore[method-assign]
            try:
                with monitor:
                    training.loop(monitor)
            except KeyboardInterrupt as error:
                return error
            finally:
                Explaining._answer = inner  # type: ignore[method-assign]
            return training

    bare = Training(steps=60)
    torch.manual_seed(5)
    bare.loop()
    total, errors, blown = Fuse(), itertools.cycle(ERRORS), 0
    injected(total)
    for at in spread(total.calls, count):
        kind = next(errors)
        fuse = Fuse(at, ERRORS[kind])
        watched = injected(fuse)
        where = f"{kind} at {site} call {at} of {total.calls}: {fuse.place}"
        blown += fuse.blown
        if isinstance(watched, Training):
            assert changes(values(bare.model, bare.opt), values(watched.model, watched.opt)) == [], where
        else:
            assert kind == "interrupt", where
    return blown


@pytest.mark.parametrize("site", SITES)
def test_an_exception_at_some_calls_of_a_replay(site: str) -> None:
    assert cut_short(site, 3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_an_exception_at_many_calls_of_a_replay(site: str) -> None:
    assert cut_short(site, 60) == 60


# -- where it does without ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [-1, 1, 7, 64.0, True])
def test_too_few_steps_are_refused(replay: Any, tmp_path: Any) -> None:
    """Before anything is made."""
    model = nn.Linear(2, 1)
    log = tmp_path / "run.jsonl"
    with pytest.raises(InvalidArgumentError, match=r"replay=.* at least 8"):
        dyntune.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), replay=replay, log=log)
    assert not log.exists()


def test_short_memory_is_said_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MiB free of which a quarter may be taken; four times the parameters of a 256 x 256 layer are 1 MiB."""
    monkeypatch.setattr("dyntune.replay.ring._free_bytes", lambda _: 2.0 * 2**20)
    run = train(images(30), replay=8, make=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), nn.Linear(1024, 4)))
    (reason,) = blind(run)
    assert "would take 1.08 MiB, and a ring may take 0.5 of what is free" in reason
    assert [e.detail["part"] for e in named(run, "disabled")] == ["replay"]


def test_memory_that_runs_short_later_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters fit, their batches do not: 16 rows of 64 floats are 4 KiB a step."""
    monkeypatch.setattr("dyntune.replay.ring._free_bytes", lambda _: 200.0 * 2**10)
    run = train(images(100), replay=64)
    (reason,) = blind(run)
    assert "MiB" in reason
    assert named(run, "blind")[-1].step != 0


def test_other_optimizers_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters())
    with dyntune.Monitor(model, optimizer, criterion=nn.MSELoss(), replay=8) as monitor:
        for x in monitor.watch([torch.ones(3, 2)] * 3, progress=False):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    (reason,) = blind(monitor.run)
    assert "L-BFGS" in reason


def test_without_batches_there_is_no_answer_and_the_reason() -> None:
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    with dyntune.Monitor(model, optimizer, criterion=CE, replay=8, detectors=[At(30)]) as monitor:
        monitor._session.budget = Prompt(0.02)
        for x, y in images(60):
            loss = CE(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.observe(loss)
    (reason,) = blind(monitor.run)
    assert "is not known" in reason
    assert "monitor.watch(loader)" in reason
    assert named(monitor.run, "explained") == named(monitor.run, "error") == []


def test_without_a_loss_there_is_no_answer_and_the_reason() -> None:
    """Said once, and nothing is kept any more."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    with dyntune.Monitor(model, optimizer, replay=8, detectors=[At(30, 50)]) as monitor:
        monitor._session.budget = Prompt(0.02)
        for x in monitor.watch([x for x, _ in images(60)], progress=False):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.observe(loss)
    (reason,) = blind(monitor.run)
    assert "criterion=" in reason
    assert named(monitor.run, "explained") == named(monitor.run, "error") == []
    assert [e.detail["part"] for e in named(monitor.run, "disabled")] == ["replay"]


def test_steps_are_counted_on_after_a_checkpoint() -> None:
    """The ring is begun again, with the numbers of the run that goes on."""
    training = Training(steps=40)
    with training.monitored(replay=16) as monitor:
        training.loop(monitor)
        state = monitor.state_dict()
    later = Training(steps=60, model=training.model)
    with later.monitored(replay=16, detectors=[At(80)]) as monitor:
        monitor.load_state_dict(state)
        later.loop(monitor)
    (found,) = named(monitor.run, "explained")
    assert found.detail["alert"]["step"] == 80
    assert found.detail["window"] == [72, 84]
