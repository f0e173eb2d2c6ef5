"""What watches a training in ``benchmarks/monitor_peers.py``: each tool's loop as its documentation writes it.

Imports are inside the classes: a tool that does not import fails alone. Every class says in `kept` how much it has
recorded, so that one that has quietly given up does not pass for a cheap one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import nn

from .paired import Make, Training


class Watched(Training):
    """A training that is watched.

    Args:
        make: The model and its batch.
        folder: For what is written.
        every: Steps from one event to the next, of those that have events.
    """

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make)
        self.folder, self.every, self.count = folder, every, 0

    @property
    def ready(self) -> bool:
        """Whether whatever is done once has been done."""
        return True

    @property
    def kept(self) -> int:
        """How much was recorded, in the tool's own units."""
        raise NotImplementedError

    def close(self) -> None:
        """End watching."""


class Placebo(Watched):
    """The bare loop against itself."""

    @property
    def kept(self) -> int:
        return 1  # nothing, as it says


class ByHand(Watched):
    """A line of text for every step: the loss and the norm of the gradient."""

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        self.file = (folder / "log.txt").open("w")

    def step(self) -> Any:
        x, y = self.batch
        loss = self.criterion(self.model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        print(self.count, loss.item(), norm.item(), file=self.file)
        self.count += 1
        return loss

    @property
    def kept(self) -> int:
        self.file.flush()
        return len((self.folder / "log.txt").read_text().splitlines())

    def close(self) -> None:
        self.file.close()


class TensorBoard(Watched):
    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def step(self) -> Any:
        loss = super().step()
        self.writer.add_scalar("loss", loss.item(), self.count)
        self.count += 1
        return loss

    @property
    def kept(self) -> int:
        self.writer.flush()
        return sum(path.stat().st_size for path in self.folder.glob("events.*"))

    def close(self) -> None:
        self.writer.close()


class Wandb(Watched):
    """Offline; the loss at every step, and what `watch` was told to."""

    log: str | None = None

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self.run = wandb.init(project="benchmark", mode="offline", dir=str(folder))
        if self.log is not None:
            self.run.watch(self.model, log=self.log, log_freq=every)

    def step(self) -> Any:
        loss = super().step()
        self.run.log({"loss": loss.item()})
        return loss

    @property
    def kept(self) -> int:
        """Names in the summary; histograms only, where there should be some."""
        names = list(dict(self.run.summary))
        return len([name for name in names if self.log is None or name.startswith(("gradients", "parameters"))])

    def close(self) -> None:
        self.run.finish()


class WandbGradients(Wandb):
    log = "gradients"


class WandbAll(Wandb):
    log = "all"


class NeuralDbg(Watched):
    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        from neuraldbg import NeuralDbg as Debugger

        self.debugger = Debugger(self.model)
        self.debugger.__enter__()

    def step(self) -> Any:
        self.debugger.step = self.count
        x, y = self.batch
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.debugger.record_loss(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return loss

    @property
    def kept(self) -> int:
        return len(self.debugger.events)

    def close(self) -> None:
        self.debugger.__exit__(None, None, None)


class GradTracer(Watched):
    """Its constructor's default, every step."""

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        from gradtracer.tracker import FlowTracker

        self.tracker = FlowTracker(self.model, **self.options())

    def options(self) -> dict[str, Any]:
        return {}

    def step(self) -> Any:
        loss = super().step()
        self.tracker.step(loss=loss.item())
        return loss

    @property
    def kept(self) -> int:
        return sum(len(record.layers) for record in self.tracker.history.steps)

    def close(self) -> None:
        self.tracker.detach()


class GradTracerReadme(GradTracer):
    def options(self) -> dict[str, Any]:
        return {"track_interval": self.every}


class Cockpit(Watched):
    configuration = "economy"

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        from backpack import extend
        from cockpit import Cockpit as Dashboard
        from cockpit.utils.configuration import configuration

        self.model, self.criterion = extend(self.model), extend(self.criterion)
        self.each = nn.CrossEntropyLoss(reduction="none")
        self.cockpit = Dashboard(self.model.parameters(), quantities=configuration(self.configuration))

    def step(self) -> Any:
        x, y = self.batch
        outputs = self.model(x)
        loss = self.criterion(outputs, y)
        about = {
            "batch_size": x.shape[0],
            "individual_losses": self.each(outputs, y).detach(),
            "loss": loss,
            "optimizer": self.optimizer,
        }
        with self.cockpit(self.count, info=about):
            loss.backward(create_graph=self.cockpit.create_graph(self.count))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return loss.detach()

    @property
    def kept(self) -> int:
        return sum(len(values) for values in self.cockpit.get_output().values())


class CockpitFull(Cockpit):
    configuration = "full"


class Dyntune(Watched):
    """As the how-to writes it: `watch` around the batches, a loss for every step; `Monitor`'s defaults."""

    def __init__(self, make: Make, folder: Path, every: int) -> None:
        super().__init__(make, folder, every)
        import dyntune

        log = folder / "run.jsonl"
        self.monitor = dyntune.Monitor(self.model, self.optimizer, criterion=self.criterion, log=log, on_error="raise")
        self.stream = iter(self.monitor.watch(repeat(self.batch), progress=False))

    def step(self) -> Any:
        self.batch = next(self.stream)
        loss = super().step()
        self.monitor.observe(loss)
        return loss

    @property
    def ready(self) -> bool:
        from dyntune.monitor.monitor import SHARES

        return set(SHARES) <= set(self.monitor._session.budget.costs)

    @property
    def kept(self) -> int:
        return len(self.monitor.run.steps)

    def close(self) -> None:
        self.monitor.close()


@dataclass(frozen=True)
class Watcher:
    """A row.

    Args:
        make: A training that is watched.
        package: What has to be installed; its version is recorded.
        module: What is imported before the clock runs.
        records: What can be read afterwards.
        source: Where its documentation says to attach it like this.
        periods: Steps from one event to the next that are reported, if not every step is the same.
    """

    make: Callable[[Make, Path, int], Watched]
    package: str
    module: str
    records: str
    source: str
    periods: tuple[int, ...] = ()


_WANDB = "docstring of `Run.watch`: log_freq=1000"
_HISTOGRAMS = "loss at every step; a histogram of 64 bins per tensor"
_COCKPIT = "examples/01_basic_fmnist.py without its plots: every quantity at every step"
_ECONOMY = (
    "loss, gradient norm and histogram, position along the step, distance, update size, three tests of batch noise"
)

WATCHERS: dict[str, Watcher] = {
    "nothing (bare against bare)": Watcher(Placebo, "torch", "torch", "nothing", "what the measurement itself adds"),
    "by hand: loss, gradient norm": Watcher(
        ByHand,
        "torch",
        "torch",
        "loss and norm of the whole gradient",
        "`loss.item()`, `clip_grad_norm_(parameters, inf)`",
    ),
    "TensorBoard: loss": Watcher(
        TensorBoard, "tensorboard", "torch.utils.tensorboard", "loss", "docstring of `SummaryWriter.add_scalar`"
    ),
    "dyntune": Watcher(
        Dyntune,
        "dyntune",
        "dyntune",
        "loss and learning rate at recorded steps; within a budget: norm of the gradient, noise, statistics of every "
        "tensor, curvature, stability ratios; alerts",
        "`Monitor`, defaults",
    ),
    "wandb: loss": Watcher(Wandb, "wandb", "wandb", "loss", "docstring of `Run.log`, offline"),
    "wandb.watch, gradients": Watcher(
        WandbGradients, "wandb", "wandb", f"{_HISTOGRAMS} of gradients", _WANDB, (1000, 100)
    ),
    "wandb.watch, all": Watcher(
        WandbAll, "wandb", "wandb", f"{_HISTOGRAMS} of gradients and parameters", _WANDB, (1000, 100)
    ),
    "neuraldbg": Watcher(
        NeuralDbg,
        "neuraldbg",
        "neuraldbg",
        "changes of regime only: activations dead or saturated, gradients vanishing or exploding, NaN, loss",
        'README, "Optimizer Instability Detection"',
    ),
    "gradtracer, as in its README": Watcher(
        GradTracerReadme,
        "gradtracer",
        "gradtracer.tracker",
        "per weight tensor: norm, moments and extremes of weight and gradient, change, near-zero share; in memory",
        'README, "Basic Usage": track_interval=100',
        (100,),
    ),
    "gradtracer, every step": Watcher(
        GradTracer, "gradtracer", "gradtracer.tracker", "the same, every step", "its constructor's default"
    ),
    "cockpit, economy": Watcher(Cockpit, "cockpit-for-pytorch", "cockpit", _ECONOMY, _COCKPIT),
    "cockpit, full": Watcher(
        CockpitFull,
        "cockpit-for-pytorch",
        "cockpit",
        "that and Hessian trace, largest eigenvalue, TIC, two-dimensional histograms",
        _COCKPIT,
    ),
}


def children_seconds() -> float:
    """CPU seconds that processes of ours have spent: wandb writes in one of its own. Resolution 10 ms."""
    import psutil

    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total
