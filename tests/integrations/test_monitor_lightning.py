"""The Lightning callback on real fits: the same training to the bit, the right numbers, and no hook left behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.integrations.csv_file import CSVSink
from dyntune.integrations.lightning import MonitorCallback
from dyntune.monitor.load import load_run
from dyntune.monitor.monitor import Monitor
from tests.integrations import test_lightning as lightning
from tests.suggest.problems import same

CE = nn.CrossEntropyLoss()
STEPS = 50

pytestmark = [
    *lightning.pytestmark,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*"),
]


class Plain(LightningModule):
    """Dropout and BatchNorm, so that a random number or a buffer that moved would show."""

    def __init__(
        self, *, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, fail_at: int | None = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.optimizer, self.fail_at = optimizer, fail_at
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fail_at is not None and self.trainer.global_step == self.fail_at:
            raise KeyError("mine")
        loss = CE(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", CE(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.01)


class Seen(Callback):
    """Gradient norms as the optimizer takes them, by hand: its own hook cannot say, as it runs before the closure."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:  # of the step before
            self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))


def loader() -> DataLoader[Any]:
    x, y = classification(160)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def classification(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=g), torch.randint(3, (rows,), generator=g)


def made(*callbacks: Callback, max_steps: int = STEPS, folder: Path | None = None, **more: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        enable_checkpointing=folder is not None,
        default_root_dir=folder,
        devices=1,
        **quiet,
        **more,
    )


def trained(
    *callbacks: Callback, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, **more: Any
) -> dict[str, Any]:
    """Everything that a training leaves behind, random states included."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module, trainer = Plain(optimizer=optimizer), made(*callbacks, **more)
        trainer.fit(module, loader())
        state = trainer.optimizers[0].state_dict()
        return {
            "model": {n: t.clone() for n, t in module.state_dict().items()},
            "optimizer": state["state"],
            "rng": torch.get_rng_state(),
            "losses": module.losses,
            "hooks": len(trainer.optimizers[0]._optimizer_step_pre_hooks),
            "training": module.training,
        }


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "clipped": {"gradient_clip_val": 0.5},
    "sgd": {"optimizer": torch.optim.SGD},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_same_to_the_bit(setting: str, tmp_path: Path) -> None:
    more = SETTINGS[setting]
    # overhead=0.99: bursts and probes run as often as they can, so that what they might disturb is disturbed
    callback = MonitorCallback(criterion=CE, overhead=0.99, log=tmp_path / "run.jsonl", on_error="raise")
    bare, watched = trained(**more), trained(callback, **more)
    assert same(bare, watched)
    run = load_run(tmp_path / "run.jsonl")
    assert callback.monitor is not None
    assert run.series("train/loss")[0].tolist() == list(range(STEPS))
    assert {event.name for event in run.events} >= {"closed"}
    closed = next(event for event in run.events if event.name == "closed")
    assert closed.detail["bursts"] > 0  # something was there that could have disturbed the training
    assert closed.detail["probes"] > 0
    assert closed.detail["errors"] == 0


def test_losses_are_those_of_the_module(tmp_path: Path) -> None:
    for parts in (1, 3):
        callback = MonitorCallback(on_error="raise")
        module = Plain()
        made(callback, max_steps=10, accumulate_grad_batches=parts).fit(module, loader())
        # ten batches an epoch: the last step of one is made of a single batch
        groups: list[list[float]] = []
        for i, loss in enumerate(module.losses):
            if i % 10 % parts == 0:
                groups.append([])
            groups[-1].append(loss)
        assert callback.monitor is not None
        found = callback.monitor.run.series("train/loss")[1]
        means = [sum(group) / len(group) for group in groups]
        assert found.tolist() == pytest.approx(means, rel=1e-6)  # float32 products by 1/3 and 3


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradients_are_those_of_the_step(clip: float | None) -> None:
    """Lightning steps with a closure: before it ran, the gradients are still those of the step before."""
    seen, callback = Seen(), MonitorCallback(criterion=CE, overhead=0.99, on_error="raise")
    made(callback, seen, gradient_clip_val=clip).fit(Plain(), loader())
    assert callback.monitor is not None
    steps, norms = callback.monitor.run.series("grad/norm")
    kept = steps < len(seen.norms)  # the last step's are never cleared
    assert kept.sum() > 5
    assert norms[kept].tolist() == pytest.approx([seen.norms[step] for step in steps[kept]], rel=1e-5)
    if clip is not None:
        assert max(norms) <= clip * (1 + 1e-5)


def test_an_exception_closes_the_monitor_and_passes(tmp_path: Path) -> None:
    callback = MonitorCallback(log=tmp_path / "run.jsonl", sinks=[CSVSink(tmp_path / "run.csv")])
    module = Plain(fail_at=7)
    trainer = made(callback)
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(module, loader())
    run = load_run(tmp_path / "run.jsonl")
    assert run.steps.max() == 6
    assert run.events[-1].name == "closed"
    assert len(trainer.optimizers[0]._optimizer_step_pre_hooks) == 0
    assert "6,metric,train/loss," in (tmp_path / "run.csv").read_text()


def test_a_test_without_a_fit_is_not_watched(tmp_path: Path) -> None:
    callback = MonitorCallback(log=tmp_path / "run.jsonl")
    made(callback).test(Plain(), DataLoader(TensorDataset(*classification(32)), batch_size=16), verbose=False)
    assert callback.monitor is None
    assert not (tmp_path / "run.jsonl").exists()


def test_a_resumed_fit_goes_on_with_the_record(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    first = made(MonitorCallback(criterion=CE, log=log), max_steps=20, folder=tmp_path)
    first.fit(Plain(), loader())
    first.save_checkpoint(tmp_path / "at20.ckpt")
    second = made(MonitorCallback(criterion=CE, log=log), max_steps=30, folder=tmp_path)
    second.fit(Plain(), loader(), ckpt_path=str(tmp_path / "at20.ckpt"))
    run = load_run(log)
    assert run.attempts == 2
    assert run.series("train/loss")[0].tolist() == list(range(30))
    third = made(MonitorCallback(criterion=CE, log=log), max_steps=25, folder=tmp_path)
    third.fit(Plain(), loader(), ckpt_path=str(tmp_path / "at20.ckpt"))  # as if it had died at step 30
    run = load_run(log)
    assert (run.attempts, int(run.steps.max())) == (3, 24)
    assert run.series("train/loss")[0].tolist() == list(range(25))
    assert {row.step for row in run.superseded} == set(range(20, 30))


def test_a_checkpoint_within_the_fit_holds_the_step(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = MonitorCallback(log=tmp_path / "run.jsonl")
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    made(callback, saver, folder=tmp_path, max_steps=30).fit(Plain(), loader())
    saved = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    state = saved["callbacks"]["MonitorCallback"]["monitor"]
    assert (state["steps"], state["run"]["step"]) == (20, 19)


def test_a_second_fit_goes_on_and_another_log_is_refused(tmp_path: Path) -> None:
    callback = MonitorCallback(log=tmp_path / "run.jsonl")
    module = Plain()
    made(callback, max_steps=10).fit(module, loader())
    made(callback, max_steps=10).fit(module, loader())
    assert load_run(tmp_path / "run.jsonl").series("train/loss")[0].tolist() == list(range(20))
    with pytest.raises(RunFileError, match="exists"):
        made(MonitorCallback(log=tmp_path / "run.jsonl"), max_steps=10).fit(Plain(), loader())


@pytest.mark.parametrize("by_name", [True, False])
def test_a_step_with_a_closure_is_seen_when_its_gradients_are_there(by_name: bool) -> None:
    """What Lightning's steps come down to, and L-BFGS, whose first evaluation counts."""
    x, y = classification(32)
    for kind, evaluations in ((torch.optim.SGD, 1), (torch.optim.LBFGS, 4)):
        model = nn.Linear(8, 3)
        optimizer = kind(model.parameters(), lr=0.1, **({"max_iter": 4} if evaluations > 1 else {}))
        norms: list[float] = []

        def closure(model: nn.Module = model, optimizer: Any = optimizer, norms: list[float] = norms) -> torch.Tensor:
            optimizer.zero_grad()
            loss = CE(model(x), y)
            loss.backward()
            norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
            return loss

        with Monitor(model, optimizer, overhead=0.99, on_error="raise") as monitor:
            for _ in range(30):
                result = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert isinstance(result, torch.Tensor)
        assert monitor.run.series("train/lr")[0].tolist() == list(range(30))
        steps, found = monitor.run.series("grad/norm")
        assert steps.size > 5
        if evaluations == 1:
            assert found.tolist() == pytest.approx([norms[step] for step in steps], rel=1e-5)
        else:
            assert all(min(abs(value / n - 1) for n in norms) < 1e-5 for value in found)


class Two(Plain):
    """Optimizes by hand, with an optimizer for each half."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(CE(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[4].parameters(), lr=0.2)]


def test_one_of_several_optimizers_is_watched() -> None:
    with pytest.raises(InvalidArgumentError, match="with 2 optimizers"):
        made(MonitorCallback(), max_steps=10).fit(Two(), loader())
    callback = MonitorCallback(optimizer_index=1, on_error="raise")
    made(callback, max_steps=10).fit(Two(), loader())  # Lightning counts the steps of both
    assert callback.monitor is not None
    assert callback.monitor.run.series("train/lr")[1].tolist() == [0.2] * 5
    assert "train/loss" not in callback.monitor.run
