"""What the monitor attaches to, what it lands on, and that nothing of it stays."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.hooks import base_optimizer
from tests.monitor.training import Training


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def module_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return own + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_hooks_are_on_the_optimizer_alone_and_go_with_close():
    training = Training(steps=5)
    monitor = training.monitored()
    assert (hooks(training.opt), module_hooks(training.model)) == (2, 0)
    training.loop(monitor)
    monitor.close()
    monitor.close()
    assert hooks(training.opt) == 0
    before = len(monitor.run)
    training.loop(None)
    monitor.observe(1.0)
    assert len(monitor.run) == before


def test_hooks_go_after_an_exception_and_the_run_says_so():
    training = Training(steps=5)
    monitor = training.monitored()
    training.batches[4] = None
    with pytest.raises(TypeError), monitor:
        training.loop(monitor)
    assert hooks(training.opt) == 0
    assert [e.detail["error"] for e in monitor.run.events if e.name == "stopped"] == ["TypeError"]


def test_hooks_go_when_the_monitor_is_garbage():
    training = Training(steps=12)
    monitor = training.monitored()
    training.loop(monitor)
    reference = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert reference() is None
    assert hooks(training.opt) == 0


def test_several_monitors_watch_one_optimizer_and_one_goes_without_the_other():
    training = Training(steps=10)
    first, second = training.monitored(), training.monitored()
    training.loop()
    first.close()
    assert hooks(training.opt) == 2
    training.loop()
    second.close()
    assert (first.run.series("train/lr")[0].size, second.run.series("train/lr")[0].size) == (10, 20)


class Wrapped:
    """As Accelerate and Lightning wrap optimizers."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers_are_looked_through():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert base_optimizer(Wrapped(Wrapped(optimizer))) is optimizer
    with pytest.raises(InvalidArgumentError, match="step hooks"):
        base_optimizer(Wrapped(None))


def test_accelerate_is_looked_through():
    accelerate = pytest.importorskip("accelerate")
    training = Training(steps=6)
    try:
        model, wrapped = accelerate.Accelerator(cpu=True).prepare(training.model, training.opt)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with dyntune.Monitor(model, wrapped) as monitor:
        training.loop()
    assert monitor.run.series("train/lr")[0].size == 6


def test_schedulers_are_seen_and_see_the_steps():
    training = Training(steps=6)
    with training.monitored() as monitor:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(training.opt, gamma=0.5)
        for _ in range(6):
            training.loop(None, 1)
            scheduler.step()
    steps, rates = monitor.run.series("train/lr")  # rows of settings, which have none, are left out
    assert steps.tolist() == list(range(6))
    assert rates.tolist() == pytest.approx([3e-3 / 2**k for k in range(6)])


def test_a_copied_optimizer_is_not_watched():
    training = Training(steps=3)
    with training.monitored() as monitor:
        twin = copy.deepcopy(training.opt)
        for _ in range(2):
            twin.step()
    assert len(monitor.run) == 0


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("observe", ["before", "after"])
def test_a_loss_lands_on_its_step(observe, watch):
    training = Training(steps=20, observe=observe)
    with training.monitored(criterion=None) as monitor:
        if watch:
            training.loop(monitor)
        else:
            for i, batch in enumerate(training.batches[:20]):
                training._batch(i, batch, monitor)
    steps, losses = monitor.run.series("train/loss")
    assert steps.tolist() == list(range(20))
    assert losses.tolist() == training.losses


def test_a_loss_that_is_overwritten_afterwards_is_recorded_as_it_was():
    training = Training(steps=1)
    with training.monitored() as monitor:
        loss = torch.tensor(2.0)
        monitor.observe(loss)
        loss.zero_()
        training.loop()
    assert monitor.run["train/loss"].tolist() == [2.0]


def test_a_loss_with_several_elements_is_refused():
    monitor = Training().monitored()
    with pytest.raises(InvalidArgumentError, match="one real number"):
        monitor.observe(torch.zeros(3))
    monitor.close()


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_counted(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    training = Training(steps=40, scaler=scaler, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, fused=fused))
    for bad in (30, 35):
        training.batches[bad] = (torch.full_like(training.batches[bad][0], torch.nan), training.batches[bad][1])
    with training.monitored(criterion=None) as monitor:
        training.loop(monitor)
    assert scaler.get_scale() == 2.0**8  # halved by each
    assert monitor.run.series("train/skipped")[1][-1] == 2
    assert len(monitor.run.series("train/lr")[0]) == (40 if fused else 38)
    assert {alert.kind for alert in monitor.alerts} == {"non-finite"}


def test_user_hooks_can_tell_probes_from_training():
    training = Training(steps=60)
    calls = []
    training.model.register_forward_hook(lambda *_: calls.append(monitor.is_probing))
    with training.monitored() as monitor:
        training.loop(monitor)
    assert calls.count(False) == 60
    assert calls.count(True) > 10
    assert not monitor.is_probing


def test_a_resumed_run_goes_on(tmp_path):
    log = tmp_path / "run.jsonl"
    training = Training(steps=30)
    with training.monitored(log=log) as monitor:
        training.loop(monitor, 20)
        state = monitor.state_dict()
        training.loop(monitor, 10)
    with pytest.raises(RunFileError, match="exists"):
        training.monitored(log=log)
    with training.monitored(log=log, resume=True) as again:
        again.load_state_dict(state)
        training.loop(again, 10)
    run = dyntune.load_run(log)
    assert run.series("train/loss")[0].tolist() == list(range(30))
    assert run.attempts == 2
    assert run.id == monitor.run.id
    with pytest.raises(InvalidArgumentError, match="state_dict"):
        again.load_state_dict({"version": 1})


def test_a_resumed_run_without_a_checkpoint_counts_on(tmp_path):
    log = tmp_path / "run.jsonl"
    training = Training(steps=7)
    for _ in range(2):
        with training.monitored(log=log, resume=True) as monitor:
            training.loop(monitor)
    assert monitor.run.series("train/loss")[0].tolist() == list(range(14))


def test_the_file_holds_what_the_monitor_has(tmp_path):
    log = tmp_path / "run.jsonl"
    training = Training(steps=60)
    with training.monitored(log=log) as monitor:
        training.loop(monitor)
    read = dyntune.load_run(log)
    assert read.names == monitor.run.names
    assert read["train/loss"].tolist() == pytest.approx(monitor.run["train/loss"].tolist(), nan_ok=True)
    assert read.assumed["clipping"] == "unknown"
    assert read.provenance["optimizer"]["class"] == "AdamW"
    assert read.columns["grad/norm"].unit == "loss / parameter"


def test_watch_is_the_loader():
    training = Training()
    with training.monitored() as monitor:
        watched = monitor.watch(training.batches)
        assert len(watched) == len(training.batches)
        assert [x is y[0] for (x, _), y in zip(watched, training.batches, strict=True)] == [True] * len(watched)
        assert len(list(monitor.watch(iter(training.batches)))) == len(training.batches)


def test_watch_shows_the_ratio(capsys):
    training = Training(steps=60)
    with training.monitored() as monitor:
        loader = monitor.watch(training.batches[:60], progress=True)
        for i, batch in enumerate(loader):
            training._batch(i, batch, monitor)
    assert "stability ratio" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"overhead": -0.1}, {"overhead": 1.0}, {"accumulate": 0}, {"on_error": "ignore"}, {"loss_fn": print}]
)
def test_arguments_out_of_range_are_refused(options):
    training = Training()
    with pytest.raises(InvalidArgumentError):
        training.monitored(**options)
    assert hooks(training.opt) == 0
