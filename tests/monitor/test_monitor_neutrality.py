"""A monitored training is the same bits as one that is not, whatever goes wrong in the monitor."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.monitor.breaker import MonitorWarning
from tests.monitor.training import Training
from tests.neutrality.faults import ERRORS, SITES, Fuse, InjectedError, entries, spread
from tests.neutrality.state import values
from tests.objective.snapshot import changes

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "SGD with everything": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def pair(monitored: Any = None, **about: Any) -> tuple[Training, Training, dyntune.Monitor]:
    """A training without a monitor and the same with one, from the same random state."""
    bare, watched = Training(**about), Training(**about)
    state = torch.get_rng_state()
    bare.loop()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with watched.monitored(**(monitored or {})) as monitor:
        watched.loop(monitor)
    assert torch.equal(after, torch.get_rng_state())
    return bare, watched, monitor


def assert_same(bare: Training, watched: Training) -> None:
    assert changes(values(bare.model, bare.opt), values(watched.model, watched.opt)) == []
    assert bare.losses == watched.losses


def columns(monitor: dyntune.Monitor) -> set[str]:
    return set(monitor.run.names)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_without_it(name):
    bare, watched, monitor = pair(optimizer=OPTIMIZERS[name])
    assert_same(bare, watched)
    assert {"train/loss", "grad/norm", "grad/autocorr_lag1", "curvature/batch_sharpness"} <= columns(monitor)
    assert {"curvature/lambda_max", "curvature/lambda_max_preconditioned"} & columns(monitor)


@pytest.mark.slow
def test_the_same_bits_over_ten_thousand_steps():
    bare, watched, monitor = pair(steps=10_000, monitored={"overhead": 0.3})
    assert_same(bare, watched)
    assert len(monitor.run.series("curvature/batch_sharpness")[0]) > 10


def test_the_same_bits_in_mixed_precision():
    bare, watched, monitor = pair(autocast=torch.bfloat16)
    assert_same(bare, watched)
    assert "curvature/batch_sharpness" in columns(monitor)


@pytest.mark.parametrize("name", ["AdamW", "fused Adam"])
def test_the_same_bits_under_a_gradient_scaler(name):
    def trained(monitor_it: bool) -> tuple[Training, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=50)
        training = Training(optimizer=OPTIMIZERS[name], scaler=scaler)
        torch.manual_seed(3)
        if not monitor_it:
            training.loop()
            return training, None
        with training.monitored() as monitor:
            training.loop(monitor)
        return training, monitor

    (bare, _), (watched, monitor) = trained(False), trained(True)
    assert_same(bare, watched)
    assert bare.scaler.state_dict() == watched.scaler.state_dict()
    # Cross-entropy's gradient is of order one; with the scaler's factor it would be a thousand.
    assert 0 < monitor.run.series("grad/norm")[1].max() < 30


def test_the_same_bits_with_accumulation():
    bare, watched, monitor = pair(steps=60, accumulate=3)
    assert_same(bare, watched)
    means = [sum(bare.losses[i : i + 3]) / 3 for i in range(0, 180, 3)]
    steps, losses = monitor.run.series("train/loss")
    assert steps.tolist() == list(range(60))
    assert losses.tolist() == pytest.approx(means, rel=1e-6)  # means of three float32 numbers


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_the_same_bits_when_compiled(what):
    def training() -> Training:
        wrap = (lambda m: torch.compile(m, backend="aot_eager")) if what == "model" else (lambda m: m)
        found = Training(steps=40, wrap=wrap)
        if what == "optimizer":
            found.opt.step = torch.compile(found.opt.step, backend="aot_eager")
        return found

    bare, watched = training(), training()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of graph breaks
        bare.loop()
        torch._dynamo.reset()
        torch.manual_seed(3)
        with watched.monitored() as monitor:
            watched.loop(monitor)
    torch._dynamo.reset()
    assert [p.tolist() for p in bare.model.parameters()] == [p.tolist() for p in watched.model.parameters()]
    assert "grad/autocorr_lag1" in columns(monitor)


class Broken:
    """A sink and detector that fails."""

    def write(self, *_: Any) -> None:
        raise InjectedError

    def update(self, *_: Any) -> Any:
        raise InjectedError

    def close(self) -> None:
        raise InjectedError


def test_a_broken_sink_or_detector_does_not_reach_training():
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        bare, watched, monitor = pair(
            steps=30, monitored={"sinks": [Broken()], "detectors": [Broken()], "on_error": "warn"}
        )
    assert_same(bare, watched)
    assert [w.category.__name__ for w in given].count("SinkWarning") == 1
    assert "disabled" in {e.name for e in monitor.run.events}


@pytest.mark.parametrize("on_error", ["warn", "disable"])
def test_a_loss_that_fails_does_not_reach_training(on_error):
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        raise InjectedError("no such loss")

    with pytest.warns(MonitorWarning, match="no such loss"):
        bare, watched, monitor = pair(monitored={"criterion": None, "loss_fn": loss_fn, "on_error": on_error})
    assert_same(bare, watched)
    errors = [e for e in monitor.run.events if e.name == "error"]
    assert Counter(e.detail["where"] for e in errors) == dict.fromkeys(
        ("curvature", "inside"), 3 if on_error == "warn" else 1
    )
    assert [e.detail["part"] for e in monitor.run.events if e.name == "disabled"] == ["curvature", "inside"]
    assert "grad/autocorr_raw_lag1" in columns(monitor)  # what needs no loss goes on


def test_warnings_that_are_errors_do_not_end_training():
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        raise InjectedError

    bare, watched, _ = pair(monitored={"criterion": None, "loss_fn": loss_fn, "on_error": "warn"})
    assert_same(bare, watched)


@pytest.mark.parametrize("strict", ["argument", "environment"])
def test_strict_ones_are_raised(strict, monkeypatch):
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        raise InjectedError

    if strict == "environment":
        monkeypatch.setenv("DYNTUNE_STRICT", "1")
    training = Training()
    on_error = "raise" if strict == "argument" else "warn"
    with (
        pytest.raises(InjectedError),
        training.monitored(criterion=None, loss_fn=loss_fn, on_error=on_error) as monitor,
    ):
        training.loop(monitor)
    assert not training.opt._optimizer_step_pre_hooks


def cut_short(site: str, count: int) -> int:
    """Cut a monitored training short at each of some calls of the monitor's; all others go on."""
    errors = itertools.cycle(ERRORS)
    blown = 0
    Training(steps=16).loop()
    total = Fuse()
    _injected(total, site)
    for at in spread(total.calls, count):
        kind = next(errors)
        fuse = Fuse(at, ERRORS[kind])
        bare = Training(steps=20)
        torch.manual_seed(5)
        bare.loop()
        watched = _injected(fuse, site)
        where = f"{kind} at {site} call {at} of {total.calls}: {fuse.place}"
        blown += fuse.blown
        if isinstance(watched, Training):
            assert changes(values(bare.model, bare.opt), values(watched.model, watched.opt)) == [], where
        else:
            assert kind == "interrupt", where  # the one that is meant to end training
    return blown


# Before their first line there is nobody yet who could catch anything.
HOOKS = ("Monitor.before_step", "Monitor.after_step")


def _injected(fuse: Fuse, site: str) -> Training | BaseException:
    """A monitored training, with the fuse in the monitor's hooks only."""
    training = Training(steps=20)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        monitor = training.monitored(on_error="warn")
        for name in ("before_step", "after_step"):
            inner = getattr(monitor, name)

            def fused(optimizer: Any, inner: Any = inner) -> None:
                with entries(fuse, HOOKS) if site == "function of ours" else SITES[site](fuse):
                    inner(optimizer)

            setattr(monitor, name, fused)
        try:
            with monitor:
                training.loop(monitor)
        except KeyboardInterrupt as error:
            return error
        assert not training.opt._optimizer_step_pre_hooks
        return training


@pytest.mark.parametrize("site", SITES)
def test_an_exception_at_some_calls(site):
    assert cut_short(site, 6) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_an_exception_at_many_calls(site):
    assert cut_short(site, 100) >= 80
